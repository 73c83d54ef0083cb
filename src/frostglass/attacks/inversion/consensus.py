"""Group consistency (Yin et al. 2021, sec. 3.3): seeds are drawn towards what they agree on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frostglass.attacks.inversion import ranks
from frostglass.attacks.inversion.choice import interchangeable, order_like
from frostglass.attacks.inversion.schedules import Schedule
from frostglass.attacks.inversion.state import InversionState, per_seed
from frostglass.attacks.inversion.target import Target
from frostglass.core.errors import BadInput
from frostglass.core.runtime import World
from frostglass.numerics.registration import Register, none, unmoved


@dataclass(frozen=True)
class Consensus:
    """When and how the anchor E is made, and how strongly it draws.

    Args:
        weight: a_group of Eq. 11.
        start: first refresh, in steps.
        every: steps between two refreshes; the anchor is held fixed in between.
        register: warps each seed onto the pixel mean before the average (Eq. 12); `registration.none` for the lazy
            mean.
    """

    weight: float | Schedule
    start: int
    every: int
    register: Register

    def __post_init__(self) -> None:
        if not callable(self.weight) and not self.weight >= 0:
            raise BadInput(f"attack.group: {self.weight!r} must be a number from 0.")

    def due(self, t: int) -> bool:
        """Whether the anchor is made anew before step t."""
        return t >= self.start and (t - self.start) % self.every == 0


@dataclass(frozen=True)
class Anchor:
    """What the seeds agree on.

    Args:
        z: in normalised space.
        unregistered: images, over all seeds, whose registration failed.
    """

    z: Float[Tensor, "b c h w"]
    unregistered: Float[Tensor, ""]


def in_one_order(
    state: InversionState, images: Float[Tensor, "s b c h w"], blocks: int, world: World
) -> tuple[InversionState, Float[Tensor, "s b c h w"]]:
    """Seeds exchange their rows of equal targets so that all hold them in the order of the first living one.

    The gradient is the same in any order, so that seeds that found the same two images of one class would otherwise
    be drawn to the mean of the two.

    Args:
        state: its variables have a row for each image.
        images: what the variables show.
        blocks: parts of a variable with rows of their own order (epochs of a shuffling client).
        world: the ranks.
    """
    groups = interchangeable(state.targets, images.shape[1], blocks)
    if len(groups.unique()) == len(groups):
        return state, images
    reference = ranks.from_rank(_first_living(images, state.alive), 0, world, "the consensus")
    own = torch.arange(images.shape[1], device=images.device)
    orders = [
        order_like(image, reference, groups) if alive and bool(image.isfinite().all()) else own
        for image, alive in zip(images, state.alive.tolist(), strict=True)
    ]

    def turned(held: Any) -> Any:
        if isinstance(held, tuple):
            return tuple(turned(part) for part in held)
        if not isinstance(held, Tensor) or held.shape != state.z.shape or not orders:
            return held
        return torch.stack([rows[order] for rows, order in zip(held, orders, strict=True)])

    moved = replace(state, z=turned(state.z), best=turned(state.best), rule=turned(state.rule))
    return moved, torch.stack([image[order] for image, order in zip(images, orders, strict=True)]) if orders else images


def find_anchor(
    z: Float[Tensor, "s b c h w"], alive: Bool[Tensor, " s"], how: Consensus, target: Target, world: World
) -> Anchor:
    """E of Eq. 12: the average over all ranks' living seeds, each warped onto their pixel mean.

    Seeds that agree give exactly themselves: sums are of differences to one of them. Registration works in the bounds
    of the domain, and its effect is carried over as a displacement, so that no rounding of a conversion enters.
    """
    z = torch.where(per_seed(alive, z), z, torch.zeros_like(z))
    mean = seed_mean(z, alive, world)
    if how.register is none:
        return Anchor(mean, mean.new_zeros(()))
    fixed = _as_images(mean, target)
    moves, failed = torch.zeros_like(z), mean.new_zeros(())
    for s in range(len(z)):
        moving = _as_images(z[s], target)
        warped = how.register(moving, fixed)
        failed = failed + torch.where(alive[s], unmoved(moving, warped, fixed), torch.zeros_like(failed))
        moves[s] = (warped - fixed) / target.std
    change = _masked_mean(moves, alive, world)
    return Anchor(mean + change, ranks.total(failed, world, "the consensus"))


def seed_mean(z: Float[Tensor, "s ..."], alive: Bool[Tensor, " s"], world: World) -> Float[Tensor, ...]:
    """Average over the living seeds of all ranks; exact where they are equal. Zeros if none lives."""
    reference = ranks.from_rank(_first_living(z, alive), 0, world, "the consensus")
    return reference + _masked_mean(z - reference, alive, world)


def _first_living(z: Tensor, alive: Tensor) -> Tensor:
    """Of the first living seed; zeros if there is none."""
    held = torch.cat([z, z.new_zeros(1, *z.shape[1:])])
    first = torch.cat([alive, alive.new_ones(1)]).to(torch.uint8).argmax().view(1)
    return held.index_select(0, first)[0]


def _masked_mean(x: Tensor, alive: Tensor, world: World) -> Tensor:
    summed = ranks.total(torch.where(per_seed(alive, x), x, torch.zeros_like(x)).sum(0), world, "the consensus")
    count = ranks.total(alive.to(x.dtype).sum(), world, "the consensus")
    return summed / count.clamp_min(1)


def _as_images(z: Tensor, target: Target) -> Tensor:
    return target.seen.domain.clamp(target.denormalise(z))
