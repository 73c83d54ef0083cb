"""Many cheap seeds: the worse part by objective is dropped on the way, so that the others get the time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from frostglass.attacks.inversion import ranks
from frostglass.attacks.inversion.state import InversionState, join_seeds, on_host, take_seeds
from frostglass.core.errors import BadInput
from frostglass.core.runtime import World

_WHAT = "the elimination of seeds"


@dataclass(frozen=True)
class Elimination:
    """When seeds are dropped, and how many (successive halving, Jamieson & Talwalkar 2016, on seeds).

    Args:
        at: shares of the run, rising, each above 0 and below 1.
        keep: share of the seeds that goes on each time, rounded up: one is always left.

    Raises:
        BadInput: a share outside its range, or not rising.
    """

    at: tuple[float, ...] = (0.1, 0.3)
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not self.at or not all(0 < share < 1 for share in self.at) or list(self.at) != sorted(set(self.at)):
            raise BadInput(
                f"attack.eliminate: {self.at!r} must be rising shares of the run between 0 and 1, as (0.1, 0.3)."
            )
        if not 0 < self.keep < 1:
            raise BadInput(f"attack.keep: {self.keep!r} must be a share of the seeds between 0 and 1, as 0.5.")

    def due(self, t: int, steps: int) -> bool:
        """Whether seeds are dropped before step t."""
        return t > 0 and t in {round(share * steps) for share in self.at}

    def survivors(self, seeds: int) -> int:
        """How many of `seeds` go on after one elimination."""
        return max(1, math.ceil(self.keep * seeds))


PER_SEED = ("z", "rule", "best", "best_loss", "alive", "first_loss", "last_loss")
"""Fields of a state whose tensors have seeds first."""


def eliminated(state: InversionState, how: Elimination, world: World) -> InversionState:
    """The seeds with the lowest own objective at the last step, over all ranks; broken ones go first.

    All seeds are at the same step, so that falling weights are the same for all. The truth is no argument. What is left
    is dealt anew, so that no rank idles while another has seeds to spare.
    """
    wall = torch.full_like(state.last_loss, float("inf"))
    losses = torch.where(state.alive, state.last_loss, wall).tolist()
    held = list(zip(losses, state.seeds, strict=True))
    everyone = sorted(seed for rank in ranks.gathered(held, world, _WHAT) for seed in rank)
    going_on = sorted(number for _, number in everyone[: how.survivors(len(everyone))])
    kept = [i for i, number in enumerate(state.seeds) if number in going_on]
    gone = len(everyone) - len(going_on)
    fields = {
        name: take_seeds(torch.tensor(kept, device=state.z.device).long(), getattr(state, name)) for name in PER_SEED
    }
    numbers = tuple(state.seeds[i] for i in kept)
    if world.size > 1:
        numbers, fields = _dealt(numbers, fields, going_on, world)
    return replace(state, **fields, seeds=numbers, eliminated=state.eliminated + gone)


def _dealt(
    numbers: tuple[int, ...], fields: dict[str, Any], going_on: list[int], world: World
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """This rank's share of all surviving seeds: each `world.size`-th, in order of number."""
    empty = {
        name: take_seeds(torch.zeros(0, dtype=torch.long, device=fields["z"].device), fields[name]) for name in fields
    }
    held = [
        {
            name: on_host(take_seeds(torch.tensor([i], device=fields["z"].device), value))
            for name, value in fields.items()
        }
        for i in range(len(numbers))
    ]
    sent = ranks.gathered(dict(zip(numbers, held, strict=True)), world, _WHAT)
    by_number = {number: seed for rank in sent for number, seed in rank.items()}
    mine = tuple(going_on[world.rank :: world.size])
    joined = {name: join_seeds([empty[name], *(by_number[n][name] for n in mine)]) for name in fields}
    return mine, joined
