"""What an inversion knows between two steps, of all seeds of this rank together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class InversionState:
    """Of all seeds together; every tensor that belongs to seeds has them first.

    Args:
        z: [s, ...] the variables: [s, b, c, h, w] in pixel spaces.
        rule: state of the update rule.
        targets: [b, k]; unused where labels are part of the variable.
        counts: restored counts per class, None if labels were granted or are part of the variable.
        best: the variables at their lowest own objective since the last consensus refresh, as `z`.
        best_loss: [s] that objective: matching and priors, without the coupling to other seeds; inf for dropped seeds.
        seeds: their numbers in the whole run.
        alive: [s] False once a value was not finite: such a seed is dropped, and the others go on.
        first_loss, last_loss: [s] own objective at the (re)start and at the last step, to detect divergence.
        lost: seeds dropped so far.
        anchor: [b, c, h, w] what the seeds agree on, in normalised space; None before the first refresh.
        restarts: restarts of diverged seeds so far.
        unregistered: images that could not be registered at the last refresh.
    """

    z: Tensor
    rule: Any
    targets: Float[Tensor, "b k"]
    counts: Float[Tensor, " k"] | None
    best: Tensor
    best_loss: Float[Tensor, " s"]
    seeds: tuple[int, ...]
    alive: Bool[Tensor, " s"]
    first_loss: Float[Tensor, " s"]
    last_loss: Float[Tensor, " s"]
    lost: Tensor
    anchor: Tensor | None
    restarts: Tensor
    unregistered: Tensor


def per_seed(mask: Bool[Tensor, " s"], like: Tensor) -> Bool[Tensor, ...]:
    """The mask, shaped so that it broadcasts over a tensor that has seeds first."""
    return mask.view(-1, *[1] * (like.ndim - 1))


def where_seeds(mask: Bool[Tensor, " s"], new: Any, old: Any) -> Any:
    """Of two states of one shape: `new` for the seeds in `mask`, `old` for the others.

    Tensors have seeds first; tuples are walked; anything else is taken from `old`.
    """
    if isinstance(old, Tensor):
        return old.where(~per_seed(mask, old), new)
    if isinstance(old, tuple):
        return tuple(where_seeds(mask, n, o) for n, o in zip(new, old, strict=True))
    return old
