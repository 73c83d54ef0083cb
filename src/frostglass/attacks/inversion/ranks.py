"""Everything that crosses ranks: sums for the consensus, numbers for reports, the final choice, checkpoints in step.

Seed g of a run lives on rank g mod size, whatever the number of ranks: a run on two ranks makes the draws of a run on
one. Ranks meet at consensus refreshes, at reports, at checkpoints and at the end, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from frostglass.core.drive import Store
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.runtime import World

S = TypeVar("S")


class RankLost(AttackFailed):
    """Another rank is gone: no further cell of a run can be computed by those that are left."""


def seeds_of(world: World, seeds: int) -> tuple[int, ...]:
    """The numbers of the seeds that this rank holds; may be empty."""
    return tuple(range(world.rank, seeds, world.size))


@contextmanager
def joined_world(*, device: torch.device | None = None, timeout_s: float = 300.0) -> Iterator[World]:
    """The ranks that `torchrun` started, joined for the block; World(0, 1) where it did not start this process.

    Args:
        device: of the computation; NCCL on CUDA, else gloo.
        timeout_s: how long a rank waits for another before it gives up.

    Raises:
        BadInput: torchrun's variables are there but the ranks cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        size = dist.get_world_size() if dist.is_initialized() else 1
        yield World(dist.get_rank(), size) if size > 1 else World()
        return
    backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as wrong:
        raise BadInput(f"ranks: cannot be joined ({_first_line(wrong)}); start with torchrun.") from None
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Turns the loss of another rank into a sentence."""
    try:
        yield
    except RuntimeError as wrong:  # torch.distributed's errors are RuntimeErrors
        raise RankLost(
            f"ranks: {what} failed, another rank was killed or is late ({_first_line(wrong)}); start all ranks again "
            "with --resume to go on from the last checkpoint"
        ) from wrong


def _first_line(wrong: BaseException) -> str:
    return next((line.strip() for line in str(wrong).splitlines() if line.strip()), type(wrong).__name__)[:200]


def total(x: Tensor, world: World, what: str) -> Tensor:
    """Sum over ranks; the same on all of them."""
    if world.size == 1:
        return x
    with _together(what):
        summed = x.clone()
        dist.all_reduce(summed, dist.ReduceOp.SUM)
    return summed


def lowest(x: Tensor, world: World, what: str) -> Tensor:
    """Minimum over ranks, element by element."""
    if world.size == 1:
        return x
    with _together(what):
        least = x.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return least


def from_rank(x: Tensor, owner: int, world: World, what: str) -> Tensor:
    """What `owner` holds, on every rank; `x` gives shape and dtype elsewhere."""
    if world.size == 1:
        return x
    with _together(what):
        held = x.clone()
        dist.broadcast(held, owner)
    return held


def gathered(value: Any, world: World, what: str) -> list[Any]:
    """`value` of every rank, in rank order."""
    if world.size == 1:
        return [value]
    with _together(what):
        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, value)
    return found


@dataclass
class RankStore:
    """Checkpoints of one rank among several, as a `Store`.

    Ranks can be killed between each other's saves, so that two checkpoints are kept in turn and a run resumes from the
    latest step that every rank holds (from the start if there is none).

    Args:
        slots: two stores of this rank's own.
        world: the ranks.
    """

    slots: tuple[Store, Store]
    world: World
    turn: int = 0

    def save(self, step: int, state: object) -> None:
        """Waits for all ranks, then replaces the older checkpoint."""
        if len(set(gathered(step, self.world, "a checkpoint"))) != 1:
            raise AttackFailed("ranks: they are at different steps; start all of them with the same plan and options")
        self.slots[self.turn % 2].save(step, state)
        self.turn += 1

    def load(self, template: S) -> tuple[int, S] | None:
        """The latest checkpoint that all ranks hold."""
        held = [slot.load(template) for slot in self.slots]
        steps = gathered([kept[0] for kept in held if kept is not None], self.world, "resuming")
        common = set.intersection(*map(set, steps))
        if not common:
            return None
        latest = max(common)
        pick = next(i for i, kept in enumerate(held) if kept is not None and kept[0] == latest)
        self.turn = 1 - pick  # the next save replaces the other one
        return held[pick]
