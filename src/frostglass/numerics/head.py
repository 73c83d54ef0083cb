"""What a classifier read, image by image, solved exactly from the gradient of its weight and bias.

For cross-entropy the gradient of the last linear layer is G = (1/b) D^T H with D = m p - y, where row i of H is the
layer's input for image i, p_i = softmax(W h_i + c) and m_i is the mass of target i. G has rank b, so H = M S V^T with
G = U S V^T and an unknown b x b matrix M, and M must satisfy M^T D(M) = b U^T: b c equations for b^2 unknowns. A
Levenberg-Marquardt solve from random starts finds it; inputs that follow a ReLU are not negative, which guides the
search. Frostglass's own method. Related: Zhu & Blaschko 2021 (R-GAP) solve layers one image at a time, Kariyappa et al.
2023 (Cocktail Party Attack) separate the inputs of linear layers by independence, which is not exact.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.core.randomness import Rng

ACCEPTED = 1e-4
"""Largest residual of a solution; wrong ones end above 1e-2, right ones below 1e-5 in float32 gradients."""

_NEGATIVE = 1e-3
"""Largest negative share of inputs that follow a ReLU."""

_HOPELESS = 0.3
"""A start whose residual is above this after 25 iterations is given up."""


@dataclass(frozen=True)
class HeadProblem:
    """The equations, in float64 on the CPU.

    Args:
        left: [b, c] U^T, the left singular vectors.
        rows: [b, f] S V^T: all inputs are M times these.
        logits: [b, c] what the rows give through the weight.
        bias: [c] of the layer.
        grad_bias: [c] its gradient.
        targets: [b, c] y.
        columns: [b, n] some columns of `rows`, scaled, on which inputs must not be negative.
    """

    left: Float[Tensor, "b c"]
    rows: Float[Tensor, "b f"]
    logits: Float[Tensor, "b c"]
    bias: Float[Tensor, " c"]
    grad_bias: Float[Tensor, " c"]
    targets: Float[Tensor, "b c"]
    columns: Float[Tensor, "b n"]

    @property
    def mass(self) -> Float[Tensor, "b 1"]:
        """Of each target: 1 unless a defence takes some away."""
        return self.targets.sum(1, keepdim=True)

    def error(self, mixing: Tensor) -> Float[Tensor, "b c"]:
        """D = m p - y, the gradient at the logits, for M = `mixing` [b, b]."""
        return self.mass * torch.softmax(self.bias + mixing @ self.logits, 1) - self.targets


def prepare(
    weight: Float[Tensor, "c f"],
    bias: Float[Tensor, " c"],
    grad_weight: Float[Tensor, "c f"],
    grad_bias: Float[Tensor, " c"],
    targets: Float[Tensor, "b c"],
    rng: Rng,
) -> HeadProblem:
    """Factors the gradient of a mean cross-entropy over b images.

    Args:
        weight, bias: of the classifier.
        grad_weight, grad_bias: what was sent.
        targets: non-negative rows of mass at most 1; their order becomes the order of the images.
        rng: draws the columns on which signs are watched.

    Raises:
        ValueError: b is above c - 1 (the rows of D sum to 0, so G cannot have rank b), or values are not finite.
    """
    b, c = targets.shape
    if b > c - 1:
        raise ValueError(f"{b} inputs of {c} classes are not determined: at most classes - 1 are.")
    double = [t.detach().double().cpu() for t in (weight, bias, grad_weight, grad_bias, targets)]
    if not all(bool(t.isfinite().all()) for t in double):
        raise ValueError("weights, gradients and targets must be finite.")
    w, offset, g, gb, y = double
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    rows = s[:b, None] * vh[:b]
    columns = rows[:, rng.permutation(rows.shape[1])[: 64 * b]]
    size = columns.norm(dim=0).mean().clamp_min(1e-300) * math.sqrt(columns.shape[1])
    return HeadProblem(u[:, :b].T, rows, rows @ w.T, offset, gb, y, 0.1 * columns / size)


def solve(
    problem: HeadProblem, rng: Rng, *, starts: int = 8, first: int = 0, iterations: int = 300
) -> tuple[Float[Tensor, "b b"], float]:
    """The best of a few random starts, polished if it is accepted; ends at the first start that is.

    Args:
        problem: from `prepare`.
        rng: one address a start, so that chunks of starts can be resumed.
        starts: tried in this call.
        first: number of the first one; their kinds take turns.
        iterations: of Levenberg-Marquardt, at the most, a start.

    Returns:
        (M, residual). A residual below `ACCEPTED` says that the inputs are exact; it uses no ground truth.
    """
    best, least = torch.eye(len(problem.rows), dtype=torch.float64), math.inf
    for k in range(first, first + starts):
        mixing, residual = _descend(problem, _start(problem, k, rng.at(k)), 1.0, iterations)
        if residual < 10 * _HOPELESS:  # the sign term may hold a solution up, and pulls at inputs rounded below zero
            free, lower = _descend(problem, mixing, 0.0, iterations)
            found = inputs_of(problem, free)
            if float(found.clamp_max(0).norm() / found.norm().clamp_min(1e-300)) < _NEGATIVE:
                mixing, residual = free, lower
        if residual < least:
            best, least = mixing, residual
        if least < ACCEPTED:
            break
    return best, least


def inputs_of(problem: HeadProblem, mixing: Float[Tensor, "b b"]) -> Float[Tensor, "b f"]:
    """Inputs of the classifier, in the order of the targets."""
    return mixing @ problem.rows


def label_candidates(grad_bias: Float[Tensor, " c"], examples: int, limit: int = 24) -> list[Float[Tensor, " c"]]:
    """Label counts that a bias gradient allows, the likeliest first.

    g_k = mean_i p_ik - n_k / b and p >= 0, so n_k >= -b g_k: most labels are certain, and what is left over is
    enumerated by its distance to the estimate with a uniform posterior. A wrong count leaves the equations of
    `prepare` without a solution, so the solve itself tells which one is right.

    Returns:
        [c] counts each, at most `limit`; empty if the gradient allows none (noise, or another number of images).
    """
    g = grad_bias.detach().double().cpu()
    least = (-examples * g - 1e-4).ceil().clamp_min(0)
    free, classes = examples - int(least.sum()), len(g)
    if free < 0:
        return []
    estimate = examples * (1 / classes - g)
    if math.comb(classes + free - 1, free) > 5000:
        return []
    found = []
    for picks in itertools.combinations_with_replacement(range(classes), free):
        counts = least.clone()
        for k in picks:
            counts[k] += 1
        found.append(counts)
    found.sort(key=lambda n: float((n - estimate).square().sum()))
    return found[:limit]


def _start(problem: HeadProblem, kind: int, rng: Rng) -> Float[Tensor, "b b"]:
    """M for guessed probabilities: M = b (D^+ ...)^T of the linear part of the equations."""
    b, c = problem.targets.shape
    like = problem.rows
    spread = (0.1, 0.5, 1.0, 2.0)[kind % 4]
    p = torch.softmax(problem.bias + spread * rng.at("logits").normal((b, c), like=like), 1)
    if kind % 2:  # confident networks: the probability of the own class is anywhere between 0 and 1
        own = torch.sigmoid(2 * rng.at("own").normal((b, 1), like=like))
        others = p * (1 - problem.targets)
        p = others / others.sum(1, keepdim=True).clamp_min(1e-300) * (1 - own) + problem.targets * own
    error = problem.mass * p - problem.targets
    inverse: Tensor = torch.linalg.pinv((error @ problem.left.T).T, rtol=1e-3)
    return b * inverse


def _value(problem: HeadProblem, mixing: Tensor, sign: float) -> float:
    """Sum of squares of all residuals."""
    b = len(mixing)
    d = problem.error(mixing)
    fit = (mixing.T @ d - b * problem.left).square().sum() / b + (d.mean(0) - problem.grad_bias).square().sum()
    return float(fit + (sign * (mixing @ problem.columns).clamp_max(0)).square().sum())


def _normal_equations(problem: HeadProblem, mixing: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """(J^T J, J^T r) over the entries of M, [b^2, b^2] and [b^2]."""
    b, c = problem.targets.shape
    d, k = problem.error(mixing), problem.logits
    p = d + problem.targets  # m p
    shares = p / problem.mass.clamp_min(1e-300)
    inner = p[:, :, None] * (k.T[None] - (shares @ k.T)[:, None, :])  # dD_i / dM_i, [b, c, b]
    first = torch.einsum("aj,ic->acij", torch.eye(b, dtype=d.dtype), d) + torch.einsum("ia,icj->acij", mixing, inner)
    second = (inner / b).permute(1, 0, 2).reshape(c, b * b)
    jacobian = torch.cat([(first / math.sqrt(b)).reshape(b * c, b * b), second])
    fit = (mixing.T @ d - b * problem.left) / math.sqrt(b)
    residual = torch.cat([fit.flatten(), d.mean(0) - problem.grad_bias])
    square, slope = jacobian.T @ jacobian, jacobian.T @ residual
    negative = sign * (mixing @ problem.columns).clamp_max(0)
    for i in range(b if sign else 0):
        active = sign * problem.columns[:, negative[i] < 0]
        block = slice(i * b, i * b + b)
        square[block, block] += active @ active.T
        slope[block] += active @ negative[i][negative[i] < 0]
    return square, slope


def _descend(problem: HeadProblem, mixing: Tensor, sign: float, iterations: int) -> tuple[Tensor, float]:
    """Levenberg-Marquardt with the damping of Marquardt 1963: (M, root of the sum of squares)."""
    damping, value = 1e-2, _value(problem, mixing, sign)
    for t in range(iterations):
        square, slope = _normal_equations(problem, mixing, sign)
        moved, lower = mixing, value
        while damping < 1e10:
            damped = square + damping * torch.diag(square.diagonal() + 1e-12)
            step, failed = torch.linalg.solve_ex(damped, -slope)
            moved = mixing + step.view_as(mixing)
            lower = math.inf if int(failed) else _value(problem, moved, sign)
            if lower < value:
                break
            damping *= 4
        if not lower < value:
            break
        stalled = value - lower < 1e-9 * value
        mixing, value, damping = moved, lower, max(damping / 5, 1e-12)
        if stalled or value < 1e-24 or (t == 25 and value > _HOPELESS):
            break
    return mixing, math.sqrt(value)
