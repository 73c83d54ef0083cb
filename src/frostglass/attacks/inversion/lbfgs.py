"""L-BFGS as an update rule: many seeds at once, its history in the state, no host synchronisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from frostglass.attacks.inversion.rules import Rule, StepInfo
from frostglass.core.errors import BadInput

LEAST_CURVATURE = 1e-10
LEAST_GRADIENT = 1e-7


class _History(NamedTuple):
    """Of every seed: [s, n] and [s, m, n] over the flattened variable, newest pair last.

    Args:
        before: gradient at the last iteration.
        moved: the last step taken.
        steps, changes: pairs (step, change of the gradient); rows of zeros are empty.
        rho: [s, m] 1 / <step, change>, 0 where empty.
        scale: [s] of the initial inverse Hessian.
        fresh: [s] no iteration has been made yet.
        filled: at most so many of the last pairs hold anything.
    """

    before: Tensor
    moved: Tensor
    steps: Tensor
    changes: Tensor
    rho: Tensor
    scale: Tensor
    fresh: Tensor
    filled: int


def lbfgs(*, lr: float = 1.0, iterations: int = 20, history: int = 100) -> Rule:
    """L-BFGS without line search (Nocedal & Wright 2006, Alg. 7.4 and 7.5), with the safeguards of torch's.

    The first iteration of a seed takes a step of length min(1, 1 / ||g||_1) lr along -g, the others lr along the
    quasi-Newton direction; pairs of too small a curvature are left out. Put it first in a chain: it calls
    `info.gradient`, `iterations` - 1 times a step.

    Args:
        lr: length of a step.
        iterations: in one step of the attack (torch's max_iter).
        history: pairs kept: memory of 2 x history variables a seed.
    """

    if not (lr > 0 and iterations >= 1 and history >= 1):
        raise BadInput(
            f"attack: L-BFGS with lr = {lr:g}, {iterations} inner evaluations and a history of {history} does nothing; "
            "give lr above 0 and the others from 1."
        )

    def init(z: Tensor) -> _History:
        flat, s = z.flatten(1), len(z)
        kept = flat.new_zeros(s, history, flat.shape[1])
        rho, one = flat.new_zeros(s, history), flat.new_ones(s)
        none, first = torch.zeros_like(flat), torch.ones(s, dtype=torch.bool, device=z.device)
        return _History(none, none.clone(), kept, kept.clone(), rho, one, first, 0)

    def apply(g: Tensor, state: tuple[Any, ...], info: StepInfo) -> tuple[Tensor, _History]:
        if info.gradient is None or info.z is None:
            raise ValueError("lbfgs needs the gradient function; use it in an Inversion, first in its chain")
        held, total, now = _History(*state), torch.zeros_like(g), g.flatten(1)
        for i in range(iterations):
            if i:
                now = info.gradient(info.z + total).flatten(1)
            change, held = _iterate(now, held, lr)
            total = total + change.view_as(total)
        return total, held

    return Rule(init, apply)


def _iterate(g: Tensor, held: _History, lr: float) -> tuple[Tensor, _History]:
    """One iteration of all seeds: (step [s, n], history)."""
    held = _remember(g, held)
    direction = _direction(g, held)
    first = (1 / g.abs().sum(1).clamp_min(1e-30)).clamp_max(1.0)
    length = lr * torch.where(held.fresh, first, torch.ones_like(first))
    still = (g.abs().amax(1) <= LEAST_GRADIENT) | ((g * direction).sum(1) > 0)  # at a minimum, or uphill
    step = torch.where(still, torch.zeros_like(length), length)[:, None] * direction
    return step, held._replace(before=g, moved=step, fresh=torch.zeros_like(held.fresh))


def _remember(g: Tensor, held: _History) -> _History:
    change = g - held.before
    curvature = (change * held.moved).sum(1)
    good = (curvature > LEAST_CURVATURE) & ~held.fresh
    rho = torch.where(good, 1 / curvature, torch.zeros_like(curvature))
    scale = torch.where(good, curvature / change.square().sum(1).clamp_min(1e-30), held.scale)

    def push(kept: Tensor, new: Tensor) -> Tensor:
        keep = good.view(-1, *[1] * (kept.ndim - 1))
        return torch.where(keep, torch.cat([kept[:, 1:], new[:, None]], 1), kept)

    return held._replace(
        steps=push(held.steps, held.moved),
        changes=push(held.changes, change),
        rho=push(held.rho, rho),
        scale=scale,
        filled=min(held.filled + 1, held.rho.shape[1]),
    )


def _direction(g: Tensor, held: _History) -> Tensor:
    """The two-loop recursion; empty pairs have rho = 0 and change nothing."""
    steps, changes, rhos = (t[:, t.shape[1] - held.filled :].unbind(1) for t in (held.steps, held.changes, held.rho))
    q, weights = -g, []
    for step, change, rho in zip(reversed(steps), reversed(changes), reversed(rhos), strict=True):
        a = torch.linalg.vecdot(step, q) * rho
        q = torch.addcmul(q, a[:, None], change, value=-1)
        weights.append(a)
    q = q * held.scale[:, None]
    for step, change, rho, a in zip(steps, changes, rhos, reversed(weights), strict=True):
        b = torch.linalg.vecdot(change, q) * rho
        q = torch.addcmul(q, (a - b)[:, None], step)
    return q
