"""What becomes of seeds: dropped when they break, restarted when they diverge."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frostglass.attacks.inversion.rules import Rule
from frostglass.attacks.inversion.spaces import Space
from frostglass.attacks.inversion.state import InversionState, per_seed, where_seeds
from frostglass.attacks.inversion.target import Target
from frostglass.core.errors import BadInput
from frostglass.core.runtime import Runtime


@dataclass(frozen=True)
class Restart:
    """When a seed counts as diverged and starts anew.

    Args:
        every: steps between two checks, and the least age of a seed at one.
        factor: diverged if its objective is not below so many times the one it started with, or not finite.
        until: no restarts after this share of the run: what begins then has no time to arrive.
    """

    every: int
    factor: float
    until: float = 0.8

    def __post_init__(self) -> None:
        if self.every < 1 or not self.factor >= 0:
            raise BadInput(
                f"attack.restart_every: {self.every} must be from 1, and its factor ({self.factor:g}) from 0."
            )

    def due(self, t: int, steps: int) -> bool:
        """Whether seeds are checked before step t."""
        return t > 0 and t % self.every == 0 and t < self.until * steps


def start_of(
    space: Space, target: Target, rows: int, numbers: tuple[int, ...], run: Runtime, *path: str | int
) -> Tensor:
    """Fresh variables of seeds by their numbers, [s, rows, ...]; rows for every shuffled epoch where the space can."""
    rows = rows * target.epochs if space.per_row else rows
    like = torch.zeros((), dtype=run.dtype, device=run.device)
    made = [space.start(target, rows, run.rng.at("start", number, *path), like) for number in numbers]
    if not made:  # a rank without seeds still needs the shape
        made = [space.start(target, rows, run.rng.at("start", 0), like)]
    return space.box(torch.stack(made)[: len(numbers)], target)


def living(alive: Tensor, own: Tensor, gradient: Tensor) -> Tensor:
    """[s] seeds that still live: objective and gradient are finite."""
    return alive & own.isfinite() & gradient.flatten(1).isfinite().all(1)


def restarted(
    state: InversionState, how: Restart, rule: Rule, space: Space, target: Target, run: Runtime, t: int
) -> InversionState:
    """Diverged and dropped seeds from a fresh start, with a fresh state of the rule."""
    fresh = start_of(space, target, len(state.targets), state.seeds, run, "restart", t)
    lost = ~(state.last_loss < how.factor * state.first_loss) | ~state.alive
    inf = torch.full_like(state.first_loss, float("inf"))
    return replace(
        state,
        z=where_seeds(lost, fresh, state.z),
        rule=where_seeds(lost, rule.init(fresh), state.rule),
        alive=state.alive | lost,
        first_loss=torch.where(lost, inf, state.first_loss),
        lost=state.lost - (lost & ~state.alive).sum(),
        restarts=state.restarts + lost.sum(),
    )


def forget_best(state: InversionState) -> InversionState:
    """Before a refresh changes what is minimised: the best so far was the best at something else."""
    return replace(state, best_loss=torch.full_like(state.best_loss, float("inf")))


def keep_best(state: InversionState, own: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """(best variables, their objectives): the objective of a step goes with the variables before that step."""
    inf = torch.full_like(own, float("inf"))
    now = torch.where(alive, own, inf)
    better = now < state.best_loss
    best = torch.where(per_seed(better, state.z), state.z, state.best)
    return best, torch.where(alive, torch.where(better, now, state.best_loss), inf)
