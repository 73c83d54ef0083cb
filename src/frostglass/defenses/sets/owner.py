"""What only the owner of the images may read: exposure of each image, and how far an encoding has come.

Neither holds a key. The resume state says which images still are to be first image of how many encodings; from there a
new key draws a new order, which has the same distribution as the rest of the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.defenses.sources import Images

_ABOUT = "For the owner of the images alone: how many encodings each image has appeared in helps whoever unmixes them."


@contextmanager
def owner_only(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, readable by this user alone from its first byte, that replaces it at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")  # mode 0600
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        beside.chmod(0o600)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def digest_of(images: Images, labels: NDArray[np.int64]) -> str:
    """SHA-256 of pixels and labels: recognises a private set, for its owner."""
    h = hashlib.sha256(repr((tuple(images.shape), str(images.dtype).removeprefix("torch."))).encode())
    for start in range(0, len(images), 1024):
        part = images[start : start + 1024]
        h.update(np.ascontiguousarray(part.cpu().numpy() if isinstance(part, Tensor) else part).tobytes())
    h.update(labels.tobytes())
    return h.hexdigest()


@dataclass
class Progress:
    """How far an encoding has come.

    Args:
        settings: digest of everything that must not change before it goes on.
        first, partner: [N] appearances in the shards that are finished, in this set alone.
        shards: file, rows and sha256 of each finished shard.
        name: random, of this encoding; tells whether a ledger counts it already. In no file that is shared.
    """

    settings: str
    first: Int64[Tensor, " n"]
    partner: Int64[Tensor, " n"]
    shards: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""

    def save(self, path: Path) -> None:
        """Whole or not at all, for the owner alone."""
        from safetensors.torch import save_file

        note = {"progress": json.dumps({"settings": self.settings, "shards": self.shards, "name": self.name})}
        with owner_only(path) as beside:
            save_file({"first": self.first.contiguous(), "partner": self.partner.contiguous()}, beside, metadata=note)


def load_progress(path: Path) -> Progress:
    """What `Progress.save` wrote.

    Raises:
        BadInput: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as held:
            note = json.loads((held.metadata() or {})["progress"])
            counts = held.get_tensor("first"), held.get_tensor("partner")
            return Progress(note["settings"], *counts, note["shards"], str(note.get("name", "")))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as wrong:
        raise BadInput(f"--resume: {path} cannot be read ({wrong}); delete it and encode anew.") from None


@dataclass(frozen=True)
class Counts:
    """Appearances of each image of one private set over all its encoded sets.

    Args:
        digest: of the private set.
        first, partner: [N] as first image and in another slot.
        sets: names of the encodings (see `Progress`) that are counted.
    """

    digest: str
    first: Int64[Tensor, " n"]
    partner: Int64[Tensor, " n"]
    sets: tuple[str, ...] = ()

    def without(self, progress: Progress) -> Counts:
        """What other sets hold: a kill may have come after the ledger was written and before the set appeared."""
        if progress.name not in self.sets:
            return self
        others = tuple(name for name in self.sets if name != progress.name)
        return Counts(self.digest, self.first - progress.first, self.partner - progress.partner, others)

    def beside(self, progress: Progress) -> Counts:
        """With the encodings of `progress`."""
        return Counts(
            self.digest, self.first + progress.first, self.partner + progress.partner, (*self.sets, progress.name)
        )

    def save(self, path: Path, names: Sequence[str], classes: Sequence[str] | None = None) -> None:
        """The ledger as JSON, image by image, for the owner alone; with the words that class indices stand for."""
        rows = zip(names, self.first.tolist(), self.partner.tolist(), strict=True)
        value = {
            "about": _ABOUT,
            "digest": self.digest,
            "sets": list(self.sets),
            **({} if classes is None else {"classes": list(classes)}),
            "images": [{"name": n, "first": f, "partner": p} for n, f, p in rows],
        }
        with owner_only(path) as beside:
            beside.write_text(json.dumps(value, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def load_counts(path: Path, digest: str, images: int) -> Counts:
    """The ledger that an earlier encoding of the same images left, zeros if there is none.

    Raises:
        BadInput: the file is no ledger, or one of other images.
    """
    if not path.exists():
        return Counts(digest, torch.zeros(images, dtype=torch.int64), torch.zeros(images, dtype=torch.int64))
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        known, rows, sets = str(held["digest"]), held["images"], tuple(map(str, held.get("sets", ())))
        first, partner = (torch.tensor([int(r[key]) for r in rows], dtype=torch.int64) for key in ("first", "partner"))
        if bool(((first < 0) | (partner < 0)).any()):
            raise ValueError("a count below 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as wrong:
        raise BadInput(f"--ledger: {path} is no exposure ledger ({wrong}); name another file.") from None
    if known != digest or len(first) != images:
        raise BadInput(f"--ledger: {path} counts other images than these; name another file.")
    return Counts(digest, first, partner, sets)
