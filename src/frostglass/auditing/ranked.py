"""A run on several ranks: rank 0 plays the plan, the others take their share of attacks whose seeds can be shared."""

from __future__ import annotations

from typing import Any

from frostglass.attacks.inversion import ranks
from frostglass.auditing.scorecard import Cell
from frostglass.auditing.store import CheckpointStore, RunFolder, Stopwatch
from frostglass.core.drive import Attack, drive
from frostglass.core.errors import AttackFailed
from frostglass.core.events import Emit, silent
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime, World
from frostglass.core.threat import Observation

_WHAT = "the next part of the plan"


def shares(attack: Attack[Any], world: World) -> bool:
    """Whether all ranks take part in this attack; others are rank 0's alone."""
    return world.size > 1 and bool(getattr(attack, "shares_seeds", False))


def call_others(unit: int, world: World) -> None:
    """Rank 0, before it attacks this repetition: the others are to attack it too."""
    ranks.gathered(unit, world, _WHAT)


def end_cell(row: Cell, world: World) -> None:
    """Rank 0, after a cell: what has become of it, for the others."""
    ranks.gathered(row, world, _WHAT)


def next_call(world: World) -> int | Cell:
    """Any other rank: the repetition to attack next, or the row of a cell that is over."""
    found: int | Cell = ranks.gathered(None, world, _WHAT)[0]
    return found


def drive_share(
    attack: Attack[Any],
    seen: Observation,
    run: Runtime,
    slots: tuple[CheckpointStore, CheckpointStore],
    *,
    save_every: int,
    emit: Emit = silent,
    film: frozenset[int] = frozenset(),
) -> Reconstruction:
    """`drive` on every rank, with checkpoints that all of them hold.

    Raises:
        AttackFailed: the attack has no result; the same on all ranks, which go on with the plan.
        RankLost: another rank is gone, or this one met an error that the others cannot know of.
    """
    store = ranks.RankStore(slots, run.world)
    try:
        found = drive(attack, seen, run, emit=emit, store=store, save_every=save_every, film=film)
    except AttackFailed:
        raise
    except Exception as wrong:
        raise ranks.RankLost(ranks.lost_by(run.world, wrong)) from wrong
    return found


def slots_of(
    folder: RunFolder, cell: str, unit: int, run: Runtime, watch: Stopwatch | None = None
) -> tuple[CheckpointStore, CheckpointStore]:
    """Two checkpoints of this rank; those of another number of ranks hold other seeds, and are not looked at."""
    whole = folder.checkpoint(cell, unit, run.device).path
    mark = f"rank{run.world.rank}of{run.world.size}"
    first, second = (
        CheckpointStore(whole.with_name(f"{whole.stem}.{mark}{slot}.safetensors"), run.device, watch) for slot in "ab"
    )
    return first, second


def drop(slots: tuple[CheckpointStore, CheckpointStore]) -> None:
    """After the repetition is finished."""
    for slot in slots:
        slot.path.unlink(missing_ok=True)
