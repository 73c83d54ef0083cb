"""Update rules: small pure transformations of a gradient, put together by `chain` (the shape of optax)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frostglass.attacks.inversion.schedules import Schedule, as_schedule
from frostglass.core.randomness import Rng


@dataclass(frozen=True)
class StepInfo:
    """Where in the run a rule is applied; `rng` belongs to this step."""

    t: int
    steps: int
    rng: Rng


@dataclass(frozen=True)
class Rule:
    """Turns a gradient into a change of the variable.

    Args:
        init: variable -> state (tensors, numbers and tuples of them).
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
    return _stateless(lambda g, info: g + amount * info.rng.at("pixel noise").normal(g.shape, like=g))


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
