"""The client's optimiser, out of place so that a step can be differentiated; equal to torch.optim's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frostglass.core.update import LocalPlan

BETAS = (0.9, 0.999)
EPS = 1e-8


@dataclass(frozen=True)
class OptimizerState:
    """What an optimiser carries from step to step.

    Args:
        first: by parameter name: SGD's velocity, or Adam's mean of gradients; empty before the first step.
        second: Adam's mean of squared gradients; empty for SGD.
        steps: taken so far.
    """

    first: Mapping[str, Tensor] = field(default_factory=dict)
    second: Mapping[str, Tensor] = field(default_factory=dict)
    steps: int = 0


def optimizer_step(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: OptimizerState,
    plan: LocalPlan,
    *,
    smooth: float = 0.0,
) -> tuple[dict[str, Tensor], OptimizerState]:
    """One step of `plan.optimizer`: new weights and state; the old ones are left as they were.

    Args:
        weights, gradients: by parameter name.
        state: `OptimizerState()` before the first step.
        plan: optimiser, lr, momentum, weight decay.
        smooth: for attackers (see `_adam`); the values are the same, only derivatives change.
    """
    decayed = {n: gradients[n] + plan.weight_decay * w if plan.weight_decay else gradients[n]
               for n, w in weights.items()}  # fmt: skip
    if plan.optimizer == "adam":
        return _adam(weights, decayed, state, plan.lr, smooth)
    if plan.momentum:
        first = {n: plan.momentum * state.first[n] + g if n in state.first else g for n, g in decayed.items()}
        decayed = first
    else:
        first = {}
    moved = {n: w - plan.lr * decayed[n] for n, w in weights.items()}
    return moved, OptimizerState(first, {}, state.steps + 1)


def _adam(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: OptimizerState, lr: float, smooth: float
) -> tuple[dict[str, Tensor], OptimizerState]:
    """Kingma & Ba 2015, Alg. 1, rounded as torch.optim.Adam rounds.

    Adam's first step is the sign of the gradient: almost everywhere without slope, so that nothing can be learned
    from its derivative. With `smooth` = s the derivative is that of m / sqrt(v + s^2 mean(v)), the mean being over
    the tensor, while the value stays Adam's own.
    """
    (b1, b2), t = BETAS, state.steps + 1
    moved: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, w in weights.items():
        g = gradients[name]
        m = b1 * state.first[name] + (1 - b1) * g if name in state.first else (1 - b1) * g
        v = b2 * state.second[name] + (1 - b2) * g * g if name in state.second else (1 - b2) * g * g
        change = (m / (1 - b1**t)) / (_root(v / (1 - b2**t)) + EPS)
        if smooth:
            held = v.detach() / (1 - b2**t)
            soft = (m / (1 - b1**t)) / (_root(v / (1 - b2**t) + smooth**2 * held.mean()) + EPS)
            change = soft + (change - soft).detach()
        moved[name], first[name], second[name] = w - lr * change, m, v
    return moved, OptimizerState(first, second, t)


def _root(v: Tensor) -> Tensor:
    """sqrt(v), with derivative 0 where v is 0 (units that no image reached): autograd's would be infinite there."""
    zero = v == 0
    return torch.where(zero, torch.zeros_like(v), torch.where(zero, torch.ones_like(v), v).sqrt())
