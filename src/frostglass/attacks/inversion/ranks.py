"""Everything that crosses ranks: sums for the consensus, numbers for reports, the final choice, checkpoints in step.

Seed g of a run begins on rank g mod size, and its draws are addressed by g: a run on two ranks makes those of a run on
one. Ranks meet at consensus refreshes, eliminations, reports, checkpoints and at the end, and nowhere else.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
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


def started() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: torch.device) -> torch.device:
    """Of this rank: "cuda" without a number is dealt out by torchrun's LOCAL_RANK."""
    if device.type != "cuda" or device.index is not None or not started():
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def joined_world(*, device: torch.device | None = None, timeout_s: float = 6 * 3600.0) -> Iterator[World]:
    """The ranks that `torchrun` started, joined for the block; World(0, 1) where it did not start this process.

    Args:
        device: of this rank's computation; NCCL where every rank has a CUDA device of its own, else gloo.
        timeout_s: how long a rank waits for one that is alive. A rank that is killed is noticed at once; the others do
            wait while one of them scores, or runs an attack that has no seeds to share.

    Raises:
        BadInput: torchrun's variables are there but the ranks cannot find each other.
        RankLost: in the block, if torchrun ends this process because another is gone.
    """
    if not started() or dist.is_initialized():
        size = dist.get_world_size() if dist.is_initialized() else 1
        yield World(dist.get_rank(), size) if size > 1 else World()
        return
    try:
        dist.init_process_group(_backend(device), timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as wrong:
        raise BadInput(f"ranks: cannot be joined ({_first_line(wrong)}); start with torchrun.") from None
    try:
        with _ended_in_words():
            yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _backend(device: torch.device | None) -> str:
    if device is None or device.type != "cuda":
        return "gloo"
    torch.cuda.set_device(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return "nccl" if here <= torch.cuda.device_count() else "gloo"


@contextmanager
def _ended_in_words() -> Iterator[None]:
    """SIGTERM, by which torchrun ends the ranks that are left when one is gone, as a RankLost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise RankLost("ranks: told to stop, another rank is gone or the job was cancelled" + _GO_ON)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_GO_ON = "; start all ranks again with --resume to go on from the last checkpoint."


@contextmanager
def _together(what: str) -> Iterator[None]:
    """Turns the loss of another rank into a sentence."""
    try:
        yield
    except RuntimeError as wrong:  # torch.distributed's errors are RuntimeErrors
        raise RankLost(
            f"ranks: {what} failed, another rank was killed or is late ({_first_line(wrong)})" + _GO_ON
        ) from wrong


def _first_line(wrong: BaseException) -> str:
    return next((line.strip() for line in str(wrong).splitlines() if line.strip()), type(wrong).__name__)[:200]


def lost_by(world: World, wrong: BaseException) -> str:
    """Why this rank ends, and with it the run."""
    return f"ranks: rank {world.rank} failed ({type(wrong).__name__}: {_first_line(wrong)})" + _GO_ON


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


def from_first(call: Callable[[], S], world: World, what: str) -> S:
    """call() on rank 0 alone; every rank gets its value.

    Raises:
        BadInput: on every rank, where rank 0 refuses.
    """
    if world.size == 1:
        return call()
    found, refused = _tried(call) if world.rank == 0 else (None, None)
    found, refused = gathered((found, refused), world, what)[0]
    if refused is not None:
        raise BadInput(refused)
    return found


def same_on_all(value: S, world: World, what: str) -> S:
    """`value`, if all ranks hold the same.

    Raises:
        BadInput: on every rank, where they differ.
    """
    if len(set(gathered(value, world, what))) > 1:
        raise BadInput(f"ranks: they hold different {what}; give all of them the same files and plan.")
    return value


def on_all(call: Callable[[], S], world: World, what: str) -> S:
    """call() on every rank; each keeps its own value.

    Raises:
        BadInput: on every rank, where one refuses.
    """
    if world.size == 1:
        return call()
    found, refused = _tried(call)
    wrong = [problems for problems in gathered(refused, world, what) if problems is not None]
    if wrong:
        raise BadInput(wrong[0])
    return found


def _tried(call: Callable[[], Any]) -> tuple[Any, tuple[str, ...] | None]:
    try:
        return call(), None
    except BadInput as refused:
        return None, refused.problems


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
