"""One-time keys as an encoder uses them: drawn ahead, used once, dropped at a fork, never stored."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from frostglass.numerics.compiled import fastest
from frostglass.numerics.key_loops import next_keys
from frostglass.numerics.key_rows import (
    MixLaw,
    draw_coefficients,
    draw_distinct,
    draw_mask,
    draw_partner_permutations,
)
from frostglass.numerics.keystream import Secret

Partners: TypeAlias = Literal["iid", "permutation"]


class KeyRing:
    """One-time key rows of one encoder, process and epoch, read forwards from streams of one secret.

    Partners and coefficients do not depend on the row they encode, so they are drawn `ahead` in blocks.

    Args:
        secret: is wiped once its streams exist.
        law: of the coefficients.
        partners: "iid" draws k - 1 distinct partners anew for each row; "permutation" draws, once, one permutation of
            the set per slot, so that each image is a partner exactly k - 1 times an epoch, which hands exact counts
            to an attacker; a row that comes again (no new epoch was named) gets partners as under "iid".
        images: size of the private set.
        public: size of the public pool, 0 without one.
        ahead: rows drawn at a time.
    """

    def __init__(
        self, secret: Secret, law: MixLaw, partners: Partners, images: int, public: int, ahead: int = 4096
    ) -> None:
        self.law, self.partners, self.images, self.public, self.ahead = law, partners, images, public, ahead
        names = ("indices", "public", "coefficients", "mask", "order", "crops")
        self.streams = {name: secret.stream(name) for name in names}
        secret.wipe()
        self._blocks: dict[str, Any] = {}
        self._permutations: NDArray[np.int64] | None = None
        self._came = np.zeros(images if partners == "permutation" else 0, np.bool_)

    def draw(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(indices [b, k], coefficients [b, k]) of fresh keys whose slot 0 is `rows`; k distinct sources in each.

        Raises:
            BadInput: the set or the pool is too small for k distinct sources.
        """
        law, streams, count = self.law, self.streams, len(rows)
        k, p, others, pool = law.k, law.private, self.images - 1, self.public
        partners = public = np.empty((count, 0), np.int64)
        if p > 1 and self.partners == "permutation":
            partners = self._permuted(rows, p - 1)
        elif p > 1:
            partners = self._next("partners", count, lambda m: draw_distinct(streams["indices"], others, p - 1, m))
        if p < k:
            public = self._next("public", count, lambda m: draw_distinct(streams["public"], pool, k - p, m))
        weights = self._next("weights", count, lambda m: draw_coefficients(streams["coefficients"], law, m))
        indices, coefficients = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
        fastest(next_keys)(rows, partners, public, weights, indices, coefficients)
        return indices, coefficients

    def _permuted(self, rows: NDArray[np.int64], slots: int) -> NDArray[np.int64]:
        """[b, slots] partners of `rows` under the permutations, as ranks among the others."""
        if self._permutations is None:
            self._permutations = draw_partner_permutations(self.streams["indices"], self.images, slots)
        partners = np.ascontiguousarray(self._permutations.T[rows])
        partners -= partners > rows[:, None]
        again = np.ones(len(rows), np.bool_)  # the same partners once more would be half of the same key
        again[np.unique(rows, return_index=True)[1]] = False
        again |= self._came[rows]
        if again.any():
            partners[again] = draw_distinct(self.streams["indices"], self.images - 1, slots, int(again.sum()))
        self._came[rows] = True
        return partners

    def mask(self, count: int, d: int) -> NDArray[np.uint8]:
        """[count, ceil(d / 8)] fresh bits of the sign mask."""
        return draw_mask(self.streams["mask"], count, d)

    def _next(self, name: str, count: int, draw: Callable[[int], Any]) -> Any:
        """The next rows of the block `name`, where they are: whoever uses them overwrites them."""
        block = self._blocks.get(name)
        if block is None:
            block = draw(max(count, self.ahead))
        elif len(block) < count:
            left = block
            block = np.concatenate([left, draw(max(count - len(left), self.ahead))])
            left[:] = 0  # these rows stand in the new block
        self._blocks[name] = block[count:]
        return block[:count]

    def wipe(self) -> None:
        """Overwrites keys drawn ahead and forgets the streams."""
        for block in [*self._blocks.values(), self._permutations]:
            if block is not None:
                (block if block.base is None else block.base).fill(0)
        self._blocks.clear()
        self._permutations = None
        for stream in self.streams.values():
            stream.wipe()

    def __repr__(self) -> str:
        return "KeyRing(...)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a KeyRing holds key material and is never pickled, copied or saved")


@runtime_checkable
class HoldsKeys(Protocol):
    """Something that must not carry keys into a forked process."""

    def forget_keys(self) -> None:
        """Drops all key material."""


_HOLDERS: weakref.WeakSet[Any] = weakref.WeakSet()


def forget_on_fork(holder: HoldsKeys) -> None:
    """Calls `holder.forget_keys()` in every process forked from here: parent and worker must not share a keystream."""
    _HOLDERS.add(holder)


def _forget_all() -> None:
    for holder in list(_HOLDERS):
        holder.forget_keys()


os.register_at_fork(after_in_child=_forget_all)


def world_size() -> int:
    """Processes that train together under torch.distributed, 1 without it."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


def process_path() -> tuple[str | int, ...]:
    """(rank, world size, worker, worker seed): what tells this process from others that share an insecure seed.

    A DataLoader worker's seed is new in every epoch, even where the caller forgets to name the epoch.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    worker = get_worker_info()
    return (rank, world, -1, 0) if worker is None else (rank, world, int(worker.id), int(worker.seed))
