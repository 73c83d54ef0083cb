"""How many encodings each private image has gone into: what decides how well InstaHide can be undone."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from frostglass.core.errors import BadInput
from frostglass.numerics.compiled import fastest
from frostglass.numerics.key_loops import count_rows


def rounds_used_up(rounds: int) -> str:
    """The sentence that refuses a further round of fresh encodings."""
    return (
        f"rounds: the {rounds} rounds of fresh encodings are used up; train on them again with reuse=True from the "
        "start (in epoch() or EncodedDataset, which keep them), or allow more rounds knowing that this is what breaks "
        "them."
    )


class ExposureLedger:
    """Counts, for each image of one private set, the encodings it appeared in as first image and as partner.

    For the owner alone: per-image counts help whoever unmixes the encodings. What may leave is `histogram`.

    It counts what this process and its DataLoader workers encode, and nothing else: each rank of a distributed run has
    a ledger of its own, so ranks that share images each go up to the limits. Give each rank its own shard.

    Args:
        images: size of the set.
        max_exposure: encodings that no image may exceed, both roles together; None for no limit.
        rounds: encodings that no image may exceed as first image; None for no limit.
    """

    def __init__(self, images: int, max_exposure: int | None = None, rounds: int | None = None) -> None:
        self.max_exposure, self.rounds = max_exposure, rounds
        self._process = os.getpid()
        self._earlier: Tensor = torch.zeros(images, dtype=torch.int64)
        # One slab for this process and one for each DataLoader worker: nobody writes where another does.
        self._hold(torch.zeros(1, 2, images, dtype=torch.int64))

    def _hold(self, counts: Tensor) -> None:
        self._counts = counts
        self._array: NDArray[np.int64] = counts.numpy()  # the same memory

    def __len__(self) -> int:
        return self._counts.shape[2]

    def share(self, workers: int) -> None:
        """Puts the counts into memory shared with `workers` DataLoader workers; call it before they start."""
        grown = torch.zeros(1 + workers, 2, len(self), dtype=torch.int64)
        grown[: len(self._counts)] = self._counts[: len(grown)]
        grown[0] += self._counts[len(grown) :].sum(0)
        self._hold(grown.share_memory_())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold(self._counts)
        self._process = os.getpid()

    def count_earlier(self, first: Tensor, partner: Tensor) -> None:
        """Counts encodings of an earlier run or set ([N] each), which go into `max_exposure` and not into `rounds`.

        Raises:
            BadInput: an image is in more than `max_exposure` of them already (then nothing is counted).
        """
        held = self._counts[self._slab()]
        over = self.total + first + partner
        if self.max_exposure is not None and int(over.max()) > self.max_exposure:
            raise BadInput(self._too_many(int((over > self.max_exposure).sum())))
        held[0] += first
        held[1] += partner
        self._earlier = self._earlier + first

    def _too_many(self, images: int) -> str:
        return (
            f"max_exposure: {images} images would appear in more than {self.max_exposure} encodings; "
            "train on the encodings that exist (reuse), or raise the limit knowing that this is what breaks them."
        )

    def add(self, first: NDArray[np.int64], partners: NDArray[np.int64]) -> None:
        """Counts encodings of the images `first` with the private `partners` [b, any], before they are released.

        Raises:
            BadInput: an image would exceed `max_exposure` or `rounds`, or is not in the set (then nothing is counted),
                or a DataLoader worker or another forked process counts in a ledger that is not shared with it.
        """
        own, count = self._array[self._slab()], fastest(count_rows)
        if not count(own, first, partners, 1):
            raise BadInput(f"exposure: rows that are not in the set of {len(self)} images; give row numbers from 0.")
        # Counted first, checked second: workers that add at the same time can then only refuse too early.
        refused = self._refusal(first, partners)
        if refused:
            count(own, first, partners, -1)
            raise BadInput(refused)

    def _refusal(self, first: NDArray[np.int64], partners: NDArray[np.int64]) -> str | None:
        if self.rounds is not None and len(first):
            fresh = self._array[:, 0, first].sum(0) - self._earlier.numpy()[first]
            if fresh.max() > self.rounds:
                return rounds_used_up(self.rounds)
        if self.max_exposure is not None:
            touched = np.unique(np.concatenate([first, partners.reshape(-1)]))
            over = self._array[:, :, touched].sum((0, 1)) > self.max_exposure
            if over.any():
                return self._too_many(int(over.sum()))
        return None

    def _slab(self) -> int:
        worker = get_worker_info()
        if worker is None and os.getpid() == self._process:
            return 0
        if worker is None:  # what a child of a plain fork counts, its parent would never see
            raise BadInput(
                "exposure: this process was forked from the one that owns the ledger, which would not see what is "
                "encoded here; encode in the parent or in DataLoader workers, or make an encoder here with a shard of "
                "its own."
            )
        if worker.id + 1 >= len(self._counts):
            raise BadInput(
                f"exposure: DataLoader worker {worker.id} cannot reach the ledger of its encoder; call "
                f"encoder.share({worker.num_workers}) before the loader starts."
            )
        return int(worker.id) + 1

    @property
    def first(self) -> Tensor:
        """[N] encodings with the image in slot 0."""
        return self._counts[:, 0].sum(0)

    @property
    def partner(self) -> Tensor:
        """[N] encodings with the image in another slot."""
        return self._counts[:, 1].sum(0)

    @property
    def total(self) -> Tensor:
        """[N] encodings with the image in any slot."""
        return self._counts.sum((0, 1))

    def histogram(self) -> dict[int, int]:
        """{appearances: number of images}: the only part that goes into an encoded set or a report."""
        values, images = self.total.unique(return_counts=True)
        return {int(v): int(n) for v, n in zip(values, images, strict=True)}

    def __repr__(self) -> str:
        return f"ExposureLedger({len(self)} images, max_exposure={self.max_exposure})"
