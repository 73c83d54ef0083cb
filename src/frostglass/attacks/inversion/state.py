"""What an inversion knows between two steps, of all seeds of this rank together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Averaged:
    """What became of the mean of seeds.

    Args:
        seeds: how many agreed.
        images: images of which their mean is returned; of the others, that of the best seed.
        best: objective of the best seed under the weights of the last step.
    """

    seeds: int
    images: int
    best: float


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
        lost: seeds dropped so far because a value was not finite.
        anchor: [b, c, h, w] what the seeds agree on, in normalised space; None before the first refresh.
        restarts: restarts of diverged seeds so far.
        unregistered: images that could not be registered at the last refresh.
        eliminated: seeds of all ranks left behind so far because others had lower objectives.
        averaged: set at the end where seeds may be averaged and some agreed.
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
    eliminated: int = 0
    averaged: Averaged | None = None


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


def take_seeds(index: Tensor, held: Any) -> Any:
    """The seeds at `index` [n] of a state: tensors have seeds first, tuples are walked, anything else stays."""
    if isinstance(held, Tensor):
        return held.index_select(0, index)
    if isinstance(held, tuple):
        return tuple(take_seeds(index, part) for part in held)
    return held


def join_seeds(parts: Sequence[Any]) -> Any:
    """The inverse of `take_seeds`: parts of one state, one after another, on the device of the first."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part.to(first.device) for part in parts])
    if isinstance(first, tuple):
        return tuple(join_seeds(column) for column in zip(*parts, strict=True))
    return first


def on_host(held: Any) -> Any:
    """The same with tensors in the memory of the CPU, to be sent to another process."""
    if isinstance(held, Tensor):
        return held.detach().cpu()
    return tuple(on_host(part) for part in held) if isinstance(held, tuple) else held
