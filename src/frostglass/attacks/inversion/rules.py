"""Update rules: small pure transformations of a gradient, put together by `chain` (the shape of optax)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from frostglass.attacks.inversion.schedules import Schedule, as_schedule
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.image import blocks

Gradient: TypeAlias = Callable[[Tensor], Tensor]
"""Variables of all seeds [s, ...] -> the gradient of each one's objective."""


@dataclass(frozen=True)
class StepInfo:
    """Where in the run a rule is applied.

    Args:
        t, steps: this step, from 0, of so many.
        rng: of this step.
        seeds: numbers of the seeds in the whole run, by which draws are addressed; 0, 1, ... if None.
        z: the variables now, for rules that evaluate more than one gradient a step.
        gradient: what such a rule calls.
    """

    t: int
    steps: int
    rng: Rng
    seeds: Sequence[int] | None = None
    z: Tensor | None = None
    gradient: Gradient | None = None

    def normal(self, what: str, like: Tensor) -> Tensor:
        """Standard normal draws as `like`, each seed's (first dimension) by its own path."""
        numbers = range(len(like)) if self.seeds is None else self.seeds
        if not numbers:
            return torch.zeros_like(like)
        return torch.stack([_normal(self.rng.at(what, number), like[0]) for number in numbers])


@dataclass(frozen=True)
class Rule:
    """Turns a gradient into a change of the variable.

    Args:
        init: variables -> state: tensors that have seeds first, and tuples of them.
        apply: (gradient or what the rule before made of it, state, step) -> (change, state).
    """

    init: Callable[[Tensor], Any]
    apply: Callable[[Tensor, Any, StepInfo], tuple[Tensor, Any]]


def chain(*rules: Rule) -> Rule:
    """One rule that passes the gradient through all, in order."""

    def init(z: Tensor) -> tuple[Any, ...]:
        return tuple(r.init(z) for r in rules)

    def apply(g: Tensor, states: tuple[Any, ...], info: StepInfo) -> tuple[Tensor, tuple[Any, ...]]:
        kept = []
        for rule, state in zip(rules, states, strict=True):
            g, state = rule.apply(g, state, info)
            kept.append(state)
        return g, tuple(kept)

    return Rule(init, apply)


def _stateless(change: Callable[[Tensor, StepInfo], Tensor]) -> Rule:
    return Rule(lambda z: (), lambda g, state, info: (change(g, info), state))


def sign() -> Rule:
    """The sign of the gradient (Geiping et al. 2020)."""
    return _stateless(lambda g, info: g.sign())


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Rule:
    """Adam's direction (Kingma & Ba 2015, Alg. 1) without the learning rate."""

    def init(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(z), torch.zeros_like(z)

    def apply(g: Tensor, state: tuple[Tensor, Tensor], info: StepInfo) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        m = b1 * state[0] + (1 - b1) * g
        v = b2 * state[1] + (1 - b2) * g * g
        k = info.t + 1
        return (m / (1 - b1**k)) / ((v / (1 - b2**k)).sqrt() + eps), (m, v)

    return Rule(init, apply)


def pixel_noise(amount: float) -> Rule:
    """Adds amount * N(0, 1) to the change. Put it after `adam` and before `scale`, so that the noise lands on the
    pixels, scaled by the current learning rate (Yin et al. 2021, sec. 3.4), and is not normalised away."""
    if not amount >= 0:
        raise BadInput(f"attack.noise: {amount!r} must be a number from 0.")
    if amount == 0:
        return _stateless(lambda g, info: g)
    return _stateless(lambda g, info: g + amount * info.normal("pixel noise", g))


def scale(lr: float | Schedule) -> Rule:
    """-lr(t) times what came before: the change of the variable."""
    schedule = as_schedule(lr)
    return _stateless(lambda g, info: -schedule(info.t, info.steps) * g)


def clip_norm(limit: float) -> Rule:
    """Scales the gradient of each image down to a norm of at most `limit`."""

    def change(g: Tensor, _: StepInfo) -> Tensor:
        norm = torch.linalg.vector_norm(g.flatten(-3), dim=-1).clamp_min(1e-12)[..., None, None, None]
        return g * (limit / norm).clamp_max(1.0)

    return _stateless(change)


def coarse_to_fine(size: int, until: float) -> Rule:
    """Moves blocks of size x size pixels as one for the share `until` of the run, single pixels afterwards.

    With a start in the same blocks (`spaces.pixels(coarse=size)`) this is an optimisation at a lower resolution that
    goes on at the full one, for networks that take one size only (DeepInversion's multi-resolution start).
    """
    if size < 1 or not 0 <= until <= 1:
        raise BadInput(f"attack.coarse: blocks of {size} pixels for {until:g} of the run; give from 1, and 0 to 1.")
    return _stateless(lambda g, info: blocks(g, size) if size > 1 and info.t < until * info.steps else g)


def _normal(rng: Rng, like: Tensor) -> Tensor:
    """On CUDA drawn there: 4 million numbers a step through the host would cost more than the step."""
    if like.device.type != "cuda":
        return rng.normal(like.shape, like=like)
    made = rng.generator(like.device)
    return torch.randn(like.shape, generator=made, device=like.device, dtype=like.dtype)
