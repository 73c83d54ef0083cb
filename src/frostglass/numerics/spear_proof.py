"""A set of candidate directions turned into images, and the proof that they are the private batch (see `spear`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frostglass.numerics.spear_problem import TOLERANCE, SpearProblem, mean_coordinates

NEAR = 0.9995  # |cosine| above which a direction is most likely a flawed copy of another


@dataclass(frozen=True)
class SpearState:
    """Candidates so far, best first, as plain tensors: k candidates, k <= 4 r."""

    directions: Float[Tensor, "k r"]  # unit vectors q
    coordinates: Float[Tensor, "k r"]  # estimated u of the same image
    agreement: Float[Tensor, " k"]  # pattern agreement of the lone candidate, in [0, 1]
    calls: Tensor  # int64 scalar: search calls so far
    samples: Tensor  # int64 scalar: starts so far


@dataclass(frozen=True)
class SpearResult:
    """The best candidate set. Rows follow candidate quality, not the order of the private batch.

    inputs: [r, d] in the layer's own input space, r = min(batch, rank); rows without a candidate hold the gradient-
    weighted
    mean input. coordinates: u, with inputs = u R. proved: the row's ReLU pattern agrees AND the rebuilt gradient of
    the whole set
    equals the observed one (see `assemble`). agreement: share of live units, in [0, 1], whose pattern of W x + b
    equals the support
    of the row's dL/dz; 0 without a candidate. deviation: error per input entry (standard deviation) expected from the
    gradient's
    noise, infinite for an incomplete set. found: number of proved rows. residual: ||dL/dW - S X|| / ||dL/dW|| with S
    set to 0 where
    X is inactive. pre_gradient: that S, the recovered dL/dz. missing: batch - r, images repeated or below the noise.
    """

    inputs: Float[Tensor, "r d"]
    coordinates: Float[Tensor, "r r"]
    proved: Bool[Tensor, " r"]
    agreement: Float[Tensor, " r"]
    deviation: Float[Tensor, " r"]
    found: int
    residual: float
    pre_gradient: Float[Tensor, "h r"]
    missing: int


def assemble(problem: SpearProblem, state: SpearState | None) -> SpearResult:
    """The best set of r candidates, its scales from Q s = A^T dL/db, its inputs X = inv(Q diag(s)) R, and its proof.

    A row is proved when (1) at most 0.5 % of its units carry gradient (|S| above `problem.tolerance` standard
    deviations of the noise) although
    W x + b < 0 by more than 1e-3 of its median size and the noise, (2) its agreement is >= 0.9 and its zeros alone
    fix its
    direction (the second
    singular value of the inactive rows exceeds 3 times the noise's), (3) every row of the set passes (1), and the
    residual is at
    most 1.5 times the measured noise plus 1e-5, (4) that noise is below 0.3. Otherwise it is a candidate and nothing
    more.
    """
    state = state or empty_state(problem)
    chosen = independent(problem, state)
    if len(chosen) < problem.size or not problem.separable:
        return _partial(problem, state, chosen)
    best = solve(problem, state.directions[chosen].T)
    for _ in range(8):  # with the pattern known, every inactive unit counts: the statistically best direction
        directions = polish(problem, best)
        if float(torch.linalg.svdvals(directions)[-1]) < 1e-6:
            break
        better = solve(problem, directions)
        if better.residual >= best.residual and float(better.agreement.sum()) <= float(best.agreement.sum()):
            break
        best = better
    return best


def empty_state(problem: SpearProblem) -> SpearState:
    """No candidate yet."""
    none = torch.zeros(0, problem.size, dtype=torch.float64)
    return SpearState(none, none.clone(), none.sum(1), torch.tensor(0), torch.tensor(0))


def independent(problem: SpearProblem, state: SpearState) -> list[int]:
    """Greedy: best candidate first, each clearly outside the span of those before (distance above 1e-3).

    Copies (|cosine| > NEAR to a chosen one) wait for a second round: they may be a near-duplicate image, or a flawed
    direction.
    """
    basis, chosen = torch.zeros(0, problem.size, dtype=torch.float64), list[int]()
    for limit in (NEAR, 1.0):
        for i, q in enumerate(state.directions):
            if len(chosen) == problem.size or i in chosen:
                continue
            if chosen and float((state.directions[chosen] @ q).abs().max()) > limit:
                continue
            rest = q - basis.T @ (basis @ q)
            rest = rest - basis.T @ (basis @ rest)
            if float(rest.norm()) > 1e-3:
                basis, chosen = torch.cat([basis, (rest / rest.norm())[None]]), [*chosen, i]
    return chosen


def solve(problem: SpearProblem, directions: Float[Tensor, "r r"]) -> SpearResult:
    """Scales, images, patterns and proof of a complete set of directions (columns)."""
    scale = torch.linalg.solve(directions, problem.offset)
    scale = torch.where(scale.abs() < 1e-12 * scale.abs().max(), 1e-12 * scale.abs().max(), scale)
    mixing = directions * scale  # Q
    coordinates = torch.linalg.inv(mixing)
    z = problem.forward @ coordinates.T + problem.bias[:, None]
    gradient = problem.left @ mixing
    level = problem.tolerance * problem.sigma[:, None] * (mixing / problem.values[:, None]).norm(dim=0)
    support, active = gradient.abs() > level, z > 0
    agreement = (support == active)[problem.live].double().mean(0)
    deviation = coordinates.norm(dim=1) * problem.sigma.square().mean().sqrt()
    # a pre-activation this close to 0 has an unknown sign: the input carries the noise of the gradient
    margin = 1e-3 * z.abs().median(dim=0).values + 2 * TOLERANCE * problem.gain[:, None] * deviation
    contradiction = (support & (z < -margin)).double().mean(0)
    masked = gradient * (z > -margin)
    misfit = ((problem.left - masked @ coordinates) * problem.values).square().sum() / problem.values.square().sum()
    residual = math.sqrt(float(misfit) + problem.noise**2)
    consistent = bool((contradiction <= 5e-3).all()) and residual <= 1.5 * problem.noise + 1e-5 and problem.noise < 0.3
    proved = (agreement >= 0.9) & _determined(problem, active) & consistent
    return SpearResult(
        inputs=coordinates @ problem.right,
        coordinates=coordinates,
        proved=proved,
        agreement=agreement,
        deviation=deviation,
        found=int(proved.sum()),
        residual=residual,
        pre_gradient=masked,
        missing=problem.batch - problem.size,
    )


def _whitened(problem: SpearProblem) -> Float[Tensor, "l r"]:
    """Live rows of dL/dW R^T / values, in units of their noise: independent errors of variance 1 in every entry."""
    return (problem.left * problem.values / problem.sigma[:, None])[problem.live]


def _determined(problem: SpearProblem, active: Bool[Tensor, "h r"]) -> Bool[Tensor, " r"]:
    """Whether the inactive rows of each image leave one direction only: not so for near-duplicates."""
    rows, inactive, size = _whitened(problem), ~active[problem.live], problem.size
    if size == 1:
        return torch.ones(1, dtype=torch.bool)
    out = [
        int(k.sum()) >= size and float(torch.linalg.svdvals(rows[k])[-2]) > 3 * math.sqrt(int(k.sum()))
        for k in inactive.T
    ]
    return torch.tensor(out)


def polish(problem: SpearProblem, result: SpearResult) -> Float[Tensor, "r r"]:
    """Directions again, each the null direction of the rows that its recovered image leaves inactive, weighted by the
    noise.
    """
    rows, out = _whitened(problem), []
    z = problem.forward @ result.coordinates.T + problem.bias[:, None]
    for inactive, q in zip((z <= 0)[problem.live].T, torch.linalg.inv(result.coordinates).T, strict=True):
        if problem.size > 1 and int(inactive.sum()) >= problem.size:
            q = torch.linalg.eigh(rows[inactive].T @ rows[inactive])[1][:, 0] * problem.values
        out.append(q / q.norm())
    return torch.stack(out, dim=1)


def _partial(problem: SpearProblem, state: SpearState, chosen: list[int]) -> SpearResult:
    """No complete set: images estimated from their activation cells, the mean input elsewhere; nothing proved."""
    coordinates = mean_coordinates(problem, problem.size).clone()
    agreement = torch.zeros(problem.size, dtype=torch.float64)
    coordinates[: len(chosen)], agreement[: len(chosen)] = state.coordinates[chosen], state.agreement[chosen]
    active = problem.forward @ coordinates.T + problem.bias[:, None] > 0
    gradient = problem.left @ torch.linalg.pinv(coordinates, rtol=1e-10) * active
    misfit = ((problem.left - gradient @ coordinates) * problem.values).square().sum() / problem.values.square().sum()
    return SpearResult(
        inputs=coordinates @ problem.right,
        coordinates=coordinates,
        proved=torch.zeros(problem.size, dtype=torch.bool),
        agreement=agreement,
        deviation=torch.full_like(agreement, math.inf),
        found=0,
        residual=math.sqrt(float(misfit) + problem.noise**2),
        pre_gradient=gradient,
        missing=problem.batch - problem.size,
    )
