"""Counts on a network whose posteriors vary: fit the features of the batch to the last layer's gradient.

The bias identity needs the sum of the posteriors. On an untrained network with large logits these differ from image
to image, and the posterior at the mean feature is not their mean. So the features h_i = mean + L u_i (L: leading
directions of the features of any images on this network, u_i standard normal) are fitted to the whole gradient
sum_i r_i [h_i; 1]^T together with a correction of the counts, by Gauss-Newton with a falling noise level; the corrected
counts are made whole by an integer search in the metric that the fit leaves behind. Ours; labels are taken as
independent of the features, which holds while the network is untrained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics.label_counts import Counts, Head, mean_feature
from frostglass.numerics.labels import largest_remainder

_LEVELS = tuple(max(0.8**k, 0.01) for k in range(22))
_PRIOR = 1.0  # standard deviation of the correction of a count
_TALL = 4  # corrections in a row before a fit is given up


@dataclass(frozen=True)
class _Frame:
    """The problem in `q` leading directions: features are mean + u L^T, compared after projection."""

    gradient: Float[Tensor, "k q1"]
    mean_logits: Float[Tensor, " k"]
    logit_map: Float[Tensor, "k r"]
    mean: Float[Tensor, " q"]
    map: Float[Tensor, "q r"]
    one: float  # the constant feature beside the others, scaled to their size
    scale: float


def fit_counts(
    head: Head, pool: Float[Tensor, "n d"], start: Float[Tensor, " k"], *, rank: int = 24, starts: int = 2
) -> Counts:
    """Counts by fitting the batch's features; see the module.

    Args:
        head: layer and gradient.
        pool: features of other images on the same network in the same mode; their covariance is used.
        start: whole counts to correct, of sum K.
        rank: directions of the covariance that are kept.
        starts: independent starts; the best posterior is returned.

    Returns:
        counts with the relative misfit and the spread of the correction.
    """
    frame = _frame(head, pool, rank)
    best: tuple[float, Counts] | None = None
    for seed in range(starts):
        counts = start.double()
        for _ in range(_TALL):
            delta, metric, loss, misfit = _gauss_newton(frame, counts, head.examples, seed)
            whole = _integers(counts + delta, metric, head.examples)
            settled = torch.equal(whole, counts)
            estimate, counts = counts + delta, whole
            if settled:
                break
        spread = float(torch.linalg.pinv(metric).diagonal().clamp_min(0).max().sqrt())
        found = Counts(counts, estimate, misfit, spread)
        if best is None or loss < best[0]:
            best = (loss, found)
    assert best is not None
    return best[1]


def _frame(head: Head, pool: Tensor, rank: int) -> _Frame:
    mean = mean_feature(head)
    centred = (pool.double() - pool.double().mean(0)) / max(1, len(pool) - 1) ** 0.5
    # from the images' side: a layer may be wide, and there are a few hundred images
    squares, weights = torch.linalg.eigh(centred @ centred.T)
    keep = squares[-rank:] > 1e-9 * squares[-1].clamp_min(1e-300)
    squares, weights = squares[-rank:][keep], weights[:, -rank:][:, keep]
    vectors = centred.T @ weights / squares.sqrt()
    values = 1.5 * squares  # other images vary otherwise: rather too wide than too narrow
    level = vectors * values.sqrt()
    across = mean - vectors @ (vectors.T @ mean)
    basis = torch.cat([vectors, (across / across.norm().clamp_min(1e-12))[:, None]], 1)
    one = float(mean.norm().clamp_min(1e-12))
    summed = head.summed
    gradient = torch.cat([summed[:, :-1] @ basis, summed[:, -1:] * one], 1)
    return _Frame(
        gradient,
        head.weight @ mean + head.bias,
        head.weight @ level,
        basis.T @ mean,
        basis.T @ level,
        one,
        float(values[-1].sqrt()),
    )


def _errors(frame: _Frame, hot: Tensor, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, r, [features; constant]) at the current variables; the correction is spread over all images."""
    p = torch.softmax(frame.mean_logits + u @ frame.logit_map.T, 1)
    r = p - hot - (delta - delta.mean()) / len(u)
    features = frame.mean + u @ frame.map.T
    return p, r, torch.cat([features, features.new_full((len(u), 1), frame.one)], 1)


def _loss(frame: _Frame, hot: Tensor, u: Tensor, delta: Tensor, sigma: float) -> float:
    _, r, h = _errors(frame, hot, u, delta)
    misfit = ((frame.gradient - r.T @ h) / sigma).square().sum()
    return float(0.5 * (misfit + u.square().sum() + (delta / _PRIOR).square().sum()))


def _jacobian(frame: _Frame, hot: Tensor, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Of the simulated gradient with respect to u and to delta / _PRIOR: [k q1, K r] and [k q1, k]."""
    p, r, h = _errors(frame, hot, u, delta)
    classes = p.shape[1]
    slope = p[:, :, None] * (frame.logit_map[None] - (p @ frame.logit_map)[:, None, :])
    moves = torch.cat([frame.map, frame.map.new_zeros(1, u.shape[1])])
    by_u = torch.einsum("icr,im->cmir", slope, h) + torch.einsum("ic,mr->cmir", r, moves)
    centre = torch.eye(classes, dtype=u.dtype) - 1 / classes
    by_delta = -_PRIOR * torch.einsum("ck,m->cmk", centre, h.mean(0))
    size = classes * h.shape[1]
    return by_u.reshape(size, -1), by_delta.reshape(size, classes)


def _gauss_newton(frame: _Frame, counts: Tensor, examples: int, seed: int) -> tuple[Tensor, Tensor, float, float]:
    """(correction, its precision matrix, final loss, relative misfit) from one start."""
    classes = len(counts)
    made = torch.Generator().manual_seed(seed)
    hot = torch.nn.functional.one_hot(torch.repeat_interleave(torch.arange(classes), counts.long()), classes).double()
    rank = frame.map.shape[1]
    # equal starts would stay equal within a class: the images must differ from the first step on
    u = 0.7 * torch.randn(examples, rank, generator=made, dtype=torch.float64)
    delta = torch.zeros(classes, dtype=torch.float64)
    for level in _LEVELS:
        sigma = level * frame.scale
        u, delta = _step(frame, hot, u, delta, sigma)
    by_u, by_delta = _jacobian(frame, hot, u, delta)
    seen = by_u @ by_u.T
    seen.diagonal().add_(sigma**2)
    unit = by_delta / _PRIOR
    metric = unit.T @ torch.linalg.solve(seen, unit) + torch.eye(classes, dtype=torch.float64) / _PRIOR**2
    _, r, h = _errors(frame, hot, u, delta)
    misfit = float((frame.gradient - r.T @ h).norm() / frame.gradient.norm().clamp_min(1e-300))
    return delta - delta.mean(), metric, _loss(frame, hot, u, delta, sigma), misfit


def _step(frame: _Frame, hot: Tensor, u: Tensor, delta: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """One damped Gauss-Newton step of the posterior, solved in the space of the equations (fewer than variables)."""
    by_u, by_delta = _jacobian(frame, hot, u, delta)
    jacobian = torch.cat([by_u, by_delta], 1)
    _, r, h = _errors(frame, hot, u, delta)
    left = (frame.gradient - r.T @ h).flatten()
    now = torch.cat([u.flatten(), delta / _PRIOR])
    system = jacobian @ jacobian.T
    system.diagonal().add_(sigma**2)
    aim = jacobian.T @ torch.linalg.solve(system, left + jacobian @ now)
    before = _loss(frame, hot, u, delta, sigma)
    length = 1.0
    for _ in range(6):
        at = now + length * (aim - now)
        new_u, new_delta = at[: u.numel()].view_as(u), _PRIOR * at[u.numel() :]
        if _loss(frame, hot, new_u, new_delta, sigma) <= before:
            return new_u, new_delta
        length /= 2
    return u, delta


def _integers(estimate: Tensor, metric: Tensor, total: int) -> Tensor:
    """Whole non-negative counts of sum `total` near `estimate` in `metric`: best exchanges of one label, to the end."""
    found = largest_remainder(estimate, total).double()
    curve = metric.diagonal()[:, None] + metric.diagonal()[None] - 2 * metric
    for _ in range(4 * total):
        slope = metric @ (found - estimate)
        change = slope[:, None] - slope[None] + 0.5 * curve  # one label from column's class to row's class
        change = change.masked_fill((found < 1)[None], float("inf"))
        change.fill_diagonal_(float("inf"))
        best = int(change.argmin())
        if float(change.flatten()[best]) >= -1e-9:
            return found
        found[best // len(found)] += 1
        found[best % len(found)] -= 1
    return found
