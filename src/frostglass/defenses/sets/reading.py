"""Reading an encoded set as a torch data set, without the private images."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from frostglass.core.batch import Domain
from frostglass.core.errors import BadInput
from frostglass.defenses.encoder import encoded_domain
from frostglass.defenses.sets.manifest import problems_of, read_manifest


class EncodedFolder(Dataset[tuple[Tensor, Tensor]]):
    """The encodings that `frostglass encode` wrote: (image [c, h, w], target [classes]) by row number.

    Safe in DataLoader workers; give `soft_collate`, or nothing, as `collate_fn`. InstaHide is broken: `manifest` holds
    the warning, the exposure histogram and the claimed cost of an attack.

    Args:
        folder: an encoded set.
        verify: check the SHA-256 of every shard first (about a second per GiB).
        dtype: of the images that come out; None leaves them as stored.

    Attributes:
        manifest: what the set says about itself.
        classes: columns of the targets; they are empty where the set has none.
        shape: (c, h, w).

    Raises:
        BadInput: no encoded set, a shard is missing or changed (named), or files that are no part of it.
    """

    def __init__(self, folder: str | Path, verify: bool = True, dtype: torch.dtype | None = torch.float32) -> None:
        self.folder, self.dtype = Path(folder), dtype
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        if verify:
            wrong = problems_of(self.folder, self.manifest)
            if wrong:
                raise BadInput(wrong)
        self.classes: int = self.manifest["classes"]
        self.shape: tuple[int, ...] = tuple(self.manifest["shape"])
        self._starts = [0, *accumulate(s["rows"] for s in self.manifest["shards"])]
        self._open: dict[int, Any] = {}

    @property
    def domain(self) -> Domain:
        """What a pixel may be: [-1, 1], and no normalisation by the model."""
        return encoded_domain(self.shape[0])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """(image [c, h, w], target [classes]).

        Raises:
            IndexError: no such row.
            BadInput: its shard cannot be read.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} encodings")
        row %= len(self)
        number = bisect.bisect_right(self._starts, row) - 1
        at = row - self._starts[number]
        images, targets = self._shard(number)
        image = images[at]
        return image if self.dtype is None else image.to(self.dtype), torch.empty(0) if targets is None else targets[at]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Several rows, in the order asked; the loader of torch uses it."""
        return [self[int(row)] for row in rows]

    def _shard(self, number: int) -> tuple[Any, Any]:
        """(images, targets or None) as slices that read from the file on demand."""
        from safetensors import SafetensorError, safe_open

        if number not in self._open:
            about = self.manifest["shards"][number]
            try:
                held = safe_open(self.folder / about["file"], framework="pt").__enter__()
                images = held.get_slice("images")
                targets = None if self.manifest["labels"] == "none" else held.get_slice("targets")
            except (SafetensorError, OSError) as wrong:
                raise BadInput(f"encoded set: shard {about['file']} cannot be read ({wrong}); copy it anew.") from None
            shapes = [tuple(part.get_shape()) for part in (images, targets) if part is not None]
            if shapes != [(about["rows"], *self.shape), (about["rows"], self.classes)][: len(shapes)]:
                raise BadInput(f"encoded set: shard {about['file']} is not of the shape in the manifest.")
            self._open[number] = images, targets, held
        images, targets, _ = self._open[number]
        return images, targets

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker opens the files for itself

    def __repr__(self) -> str:
        return f"EncodedFolder({len(self)} encodings, k={self.manifest.get('k')}, {self.manifest.get('guarantee')})"
