"""What a run returns in the end: the seed with the lowest objective, or the mean of seeds that agree with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.inversion import ranks
from frostglass.attacks.inversion.state import Averaged, InversionState
from frostglass.core.errors import BadInput
from frostglass.core.runtime import World
from frostglass.numerics.assign import assign

_WHAT = "the choice among seeds"


@dataclass(frozen=True)
class AgreeingMean:
    """Returns, image by image, the pixel mean of the seeds that agree.

    Seeds that the objective cannot tell apart are draws with errors of one size, and the mean of such draws has a
    smaller squared error than each, by their spread. Two rules decide, and neither knows the truth: who takes part is
    judged by the objective (`within`), and whether they show one picture by their spread (`shared`). That the mean has
    the lower objective is not asked: averaging smooths, which matching and BatchNorm terms punish. Measured (4 seeds of
    thaw, CIFAR-10 at 32 px): small BatchNorm CNN, batches of 1, 4 and 8, 8 batches: 0.7 to 1.4 dB and .005 to .05 SSIM
    above the best seed, with an objective 1.1 to 3.4 times as high; random ResNet-20, 1 image: 1.4 dB with 20 times the
    objective.

    Args:
        within: a seed takes part if its own objective is at most so many times the lowest.
        shared: an image is averaged if at least this share of the variance of the mean image is common to the seeds:
            1 - s^2 / (n v), with s^2 the variance over n seeds and v that over the pixels of the mean (Spearman-Brown).
            Seeds of noise share nothing.

    Raises:
        BadInput: `within` below 1, or `shared` outside [0, 1].
    """

    within: float = 1.5
    shared: float = 0.5

    def __post_init__(self) -> None:
        if not self.within >= 1:
            raise BadInput(f"attack.within: {self.within!r} must be from 1: it multiplies the lowest objective.")
        if not 0 <= self.shared <= 1:
            raise BadInput(f"attack.shared: {self.shared!r} must be from 0 to 1.")


def choose(state: InversionState, world: World) -> InversionState:
    """After the last step: every rank holds the one seed with the lowest own objective of all ranks, and no other.

    The truth has no part in the choice: it is no argument of this function, nor of anything that calls it.
    """
    if world.size == 1:
        return state
    held = [(float(state.best_loss[i]), number, i) for i, number in enumerate(state.seeds)]
    bid = min(held, default=(float("inf"), -1, 0))
    bids = ranks.gathered(bid[:2], world, _WHAT)
    owner = min(range(world.size), key=lambda rank: bids[rank])
    mine = state.best[bid[2]] if held else state.best.new_zeros(state.best.shape[1:])
    best = ranks.from_rank(mine.contiguous(), owner, world, _WHAT)
    chosen = _alone(state, best, bids[owner][1], bids[owner][0])
    return replace(
        chosen, lost=ranks.total(state.lost, world, _WHAT), restarts=ranks.total(state.restarts, world, _WHAT)
    )


def combined(
    state: InversionState, how: AgreeingMean, objective: Callable[[Tensor], Tensor], blocks: int, world: World
) -> InversionState:
    """After the last step, in place of `choose`: the best seed, with the mean of agreeing seeds where they share it.

    Args:
        state: of this rank's seeds, in a pixel space.
        how: who agrees, and when a mean is taken.
        objective: own objective of one variable under the weights of the last step.
        blocks: parts of a variable with rows of their own order (epochs of a shuffling client).
        world: the ranks.

    Returns:
        the state of one seed; `averaged` says what became of the mean, None if fewer than two seeds agreed.
    """
    chosen = choose(state, world)
    pick = int(chosen.best_loss.argmin())
    reference, number, least = chosen.best[pick], chosen.seeds[pick], float(chosen.best_loss[pick])
    chosen = _alone(chosen, reference, number, least)
    agreeing = [i for i, loss in enumerate(state.best_loss.tolist()) if loss <= how.within * least]
    count = int(ranks.total(torch.tensor(len(agreeing), device=reference.device), world, _WHAT))
    if count < 2 or not math.isfinite(least):
        return chosen
    groups = interchangeable(state.targets, len(reference), blocks)
    # differences to the best seed: seeds that are equal give exactly that one
    moves = [state.best[i][order_like(state.best[i], reference, groups)] - reference for i in agreeing]
    change = ranks.total(sum(moves, torch.zeros_like(reference)), world, _WHAT) / count
    off = sum(((move - change).square() for move in moves), torch.zeros_like(reference))
    spread = ranks.total(off, world, _WHAT).flatten(1).mean(1) / (count - 1)
    mean = reference + change
    taken = shared_part(mean, spread, count) >= how.shared
    mean = torch.where(taken.view(-1, 1, 1, 1), mean, reference)
    # both under the weights of the last step: a seed may have been best under earlier ones
    best, found = float(objective(reference)), float(objective(mean))
    images = int(taken.sum())
    chosen = replace(chosen, averaged=Averaged(count, images, best))
    return _alone(chosen, mean, number, found) if images else chosen


def shared_part(mean: Float[Tensor, "b c h w"], spread: Float[Tensor, " b"], count: int) -> Float[Tensor, " b"]:
    """1 - s^2 / (n v): the share of each mean's variance that is not left over from the seeds' own errors."""
    variance = (count * mean.flatten(1).var(1)).clamp_min(torch.finfo(mean.dtype).tiny)
    return (1 - spread / variance).clamp_min(0)


def ends_told(state: InversionState) -> dict[str, float | int | str | bool]:
    """What a result says about how it was chosen."""
    info: dict[str, float | int | str | bool] = {}
    if state.eliminated:
        info["seeds_eliminated"] = state.eliminated
    if state.averaged is not None:
        info["seeds_averaged"] = state.averaged.seeds if state.averaged.images else 0
        info["images_averaged"] = state.averaged.images
        info["objective_of_best_seed"] = state.averaged.best
    return info


def interchangeable(targets: Float[Tensor, "b k"], rows: int, blocks: int) -> Tensor:
    """[rows] numbers of groups whose rows have one target, so that a network cannot tell them apart."""
    group = torch.unique(targets, dim=0, return_inverse=True)[1]
    repeats = rows // len(group)
    group = group.repeat(repeats)
    block = torch.arange(rows, device=group.device) // (rows // blocks)
    return group + block * (int(group.max()) + 1)


def order_like(z: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"], groups: Tensor) -> Tensor:
    """[b] rows of z, exchanged within each group so that they lie nearest to those of the reference."""
    order = torch.arange(len(z), device=z.device)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().flatten()
        if len(rows) > 1:
            order[rows] = rows[assign(z[rows].cpu(), reference[rows].cpu()).to(rows.device)]
    return order


def _alone(state: InversionState, best: Tensor, number: int, loss: float) -> InversionState:
    """The state of one seed in place of all."""
    objective = state.best_loss.new_full((1,), loss)
    return replace(
        state,
        best=best[None],
        best_loss=objective,
        seeds=(number,),
        alive=state.alive.new_ones(1),
        first_loss=objective.clone(),
        last_loss=objective.clone(),
    )
