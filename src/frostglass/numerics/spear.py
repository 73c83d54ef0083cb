"""Exact recovery of a private batch from the gradient of one fully connected layer followed by ReLU.

With z = W x + b the observed gradient is dL/dW = S X and dL/db = S 1, where S = dL/dz [h, batch] holds one column per
image and X [batch, d] the inputs. S X has rank `batch`, so dL/dW = A R (A [h, r] orthonormal), S = A Q and X = inv(Q) R
for an unknown invertible Q [r, r]. ReLU makes S sparse, so the columns of Q are the directions q with many zeros in A q
(Dimitrov et al. 2024, SPEAR, arXiv 2403.03945, sec. 3; the view as sparse dictionary learning: SPEAR++, arXiv 2510.24200).

Instead of null vectors of random row subsets (exponential in the batch) this file minimises log-sum sparsity of A q by
reweighted least squares from many starts. Two facts that the plain sparse problem ignores make it strong: an image's
coordinates u (a row of inv(Q)) satisfy u . (A^T dL/db) = 1, and sign(W R^T u + b) must equal the support of its A q. Hence one
candidate can be checked alone, its estimated image tells which units to expect at zero, and the estimated images of the
candidates already found keep later starts away from them (q_j . u_i = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frostglass.numerics.spear_cells import fit_cells, outer_rows, smallest_directions, sparse_directions, unit_rows

TOLERANCE = 8.0  # |A q| counts as zero below this many standard deviations of the measured noise
ROUNDING = 60.0  # the same for a gradient that shows nothing but float32 rounding: equal pixels round alike, so errors add up
TRUSTED = 0.97  # pattern agreement of a lone candidate above which later starts are kept away from it
SAME = 1 - 1e-6  # |cosine| above which two directions are one
NEAR = 0.9995  # and above which the second is most likely a flawed copy of the first
COLUMNS = 16384  # columns of the gradient converted to float64 at a time: bounds the memory for large images


@dataclass(frozen=True)
class SpearProblem:
    """The factored gradient, in float64. h units, r images looked for, d inputs.

    rank: numerical rank of dL/dW; `batch`: the batch size given (or the rank). r = min(batch, rank). rank < batch means
    repeated images (their columns of S add up) or images whose loss gradient lies below the noise.
    noise: share of ||dL/dW|| outside the r leading directions (relative, Frobenius): the measured noise floor.
    """

    left: Float[Tensor, "h r"]
    right: Float[Tensor, "r d"]
    values: Float[Tensor, " r"]  # singular values of dL/dW
    offset: Float[Tensor, " r"]  # A^T dL/db = Q 1
    forward: Float[Tensor, "h r"]  # W R^T: pre-activations are forward @ u + bias
    bias: Float[Tensor, " h"]
    gain: Float[Tensor, " h"]  # length of each row of W
    sigma: Float[Tensor, " h"]  # standard deviation of the noise per entry of a row of dL/dW
    live: Bool[Tensor, " h"]  # units with a gradient above the noise
    batch: int
    rank: int
    noise: float

    @property
    def size(self) -> int:
        """r: number of distinct images that can be looked for."""
        return self.left.shape[1]

    @property
    def tolerance(self) -> float:
        """Number of standard deviations of the noise below which a value counts as zero."""
        return ROUNDING if self.noise < 1e-6 else TOLERANCE

    @property
    def separable(self) -> bool:
        """Whether there are enough live units (more than r + 4) for zeros to single out one image."""
        return int(self.live.sum()) > self.size + 4 or self.size == 1

    @property
    def samples(self) -> int:
        """Suggested `samples` of one `search` call: roughly 0.05 to 0.3 s on one core."""
        cost = 40.0 * (self.left.shape[0] * self.size**2 + 40.0 * self.size**3)
        return max(8, min(128, int(1.2e9 / cost)))


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

    inputs: [r, d] in the layer's own input space, r = min(batch, rank); rows without a candidate hold the gradient-weighted
    mean input. coordinates: u, with inputs = u R. proved: the row's ReLU pattern agrees AND the rebuilt gradient of the whole set
    equals the observed one (see `assemble`). agreement: share of live units, in [0, 1], whose pattern of W x + b equals the support
    of the row's dL/dz; 0 without a candidate. deviation: error per input entry (standard deviation) expected from the gradient's
    noise, infinite for an incomplete set. found: number of proved rows. residual: ||dL/dW - S X|| / ||dL/dW|| with S set to 0 where
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


def prepare(
    weight: Float[Tensor, "h d"],
    bias: Float[Tensor, " h"],
    grad_weight: Float[Tensor, "h d"],
    grad_bias: Float[Tensor, " h"] | None,
    batch: int | None = None,
) -> SpearProblem:
    """Factor dL/dW into r = min(batch, rank) directions and measure the noise floor; any float dtype, computed in float64.

    batch: number of images; None estimates it by the numerical rank.
    Raises ValueError: NaN or infinity, a zero gradient, no bias gradient, shapes that do not fit, or batch < 1.
    """
    _check(weight, bias, grad_weight, grad_bias, batch)
    assert grad_bias is not None
    grams = [block.double() @ block.double().T for block in grad_weight.split(COLUMNS, dim=1)]
    energy, vectors = torch.linalg.eigh(torch.stack(grams).sum(0))
    spectrum = energy.flip(0).clamp_min(0).sqrt()
    rank = _numerical_rank(spectrum[: int((grad_weight != 0).any(1).sum())])
    size = min(rank, batch or rank)
    left, values = vectors.flip(1)[:, :size].contiguous(), spectrum[:size]
    right = torch.cat([left.T @ block.double() for block in grad_weight.split(COLUMNS, dim=1)], dim=1)
    forward = torch.stack([w.double() @ r.T for w, r in zip(weight.split(COLUMNS, 1), right.split(COLUMNS, 1))]).sum(0)
    rest, blocks = torch.zeros_like(left[:, 0]), zip(grad_weight.split(COLUMNS, 1), right.split(COLUMNS, 1))
    for block, part in blocks:
        rest += (block.double() - left @ part).square().sum(1)
    total = float(grad_weight.double().square().sum()) if grad_weight.numel() < 1 << 24 else float(energy.sum())
    # a row of small entries may show less rounding noise than the sums behind it carried, hence the common floor
    spread = (rest / max(grad_weight.shape[1] - size, 1)).sqrt()
    sigma = torch.maximum(spread, 0.1 * spread.square().mean().sqrt()).clamp_min(1e-15 * math.sqrt(total / grad_weight.numel()))
    live = (left * values).norm(dim=1) > 3 * TOLERANCE * math.sqrt(size) * sigma
    return SpearProblem(
        left=left,
        right=right,
        values=values,
        offset=left.T @ grad_bias.double(),
        forward=forward,
        bias=bias.double(),
        gain=weight.double().norm(dim=1) if weight.numel() < 1 << 24 else weight.norm(dim=1).double(),
        sigma=sigma,
        live=live,
        batch=batch or rank,
        rank=rank,
        noise=math.sqrt(float(rest.sum()) / total),
    )


def search(problem: SpearProblem, state: SpearState | None, generator: torch.Generator, samples: int) -> SpearState:
    """One bounded chunk: `samples` starts of the sparse search; returns the enlarged, re-ranked candidate list.

    Deterministic given the generator's state; see `problem.samples` for a suggested size. A caller repeats it until `assemble`
    proves every row or its budget ends.
    """
    state = state or _empty(problem)
    state = replace(state, calls=state.calls + 1, samples=state.samples + samples)
    if not problem.separable:
        return state
    if problem.size == 1:
        return _merge(problem, state, torch.ones(1, 1, dtype=torch.float64))
    rows = unit_rows(problem.left[problem.live])
    starts = unit_rows(torch.randn(samples, problem.size, generator=generator, dtype=torch.float64))
    power = 0.5 * (torch.rand(samples, generator=generator) < 0.5).double()
    avoid = _avoid(state, samples, generator)
    rough = sparse_directions(rows, starts, power, avoid, first=0.3, last=0.02, steps=18)
    rough = _distinct(rough, state.directions[state.agreement > TRUSTED], 0.98)[: 4 * problem.size]
    fine = torch.cat([rough, _follow_cells(problem, rows, rough)])
    floor = float(problem.tolerance * _zero_level(problem, fine)[:, problem.live].median()) if len(fine) else 0.0
    fine = sparse_directions(rows, fine, fine.new_zeros(len(fine)), None, first=0.02, last=min(max(floor, 1e-4), 0.02), steps=10)
    return _merge(problem, state, fine)


def assemble(problem: SpearProblem, state: SpearState | None) -> SpearResult:
    """The best set of r candidates, its scales from Q s = A^T dL/db, its inputs X = inv(Q diag(s)) R, and its proof.

    A row is proved when (1) at most 0.5 % of its units carry gradient (|S| above `problem.tolerance` standard deviations of the noise) although
    W x + b < 0 by more than 1e-3 of its median size, (2) its agreement is >= 0.9 and its zeros alone fix its direction (the second
    singular value of the inactive rows exceeds 3 times the noise's), (3) every row of the set passes (1), and the residual is at
    most 1.5 times the measured noise plus 1e-5, (4) that noise is below 0.3. Otherwise it is a candidate and nothing more.
    """
    state = state or _empty(problem)
    chosen = _independent(problem, state)
    if len(chosen) < problem.size or not problem.separable:
        return _partial(problem, state, chosen)
    best = _solve(problem, state.directions[chosen].T)
    for _ in range(2):  # with the pattern known, every inactive unit counts: the statistically best direction
        directions = _polish(problem, best)
        if float(torch.linalg.svdvals(directions)[-1]) < 1e-6:
            break
        better = _solve(problem, directions)
        best = better if better.residual <= best.residual or better.agreement.min() > best.agreement.min() else best
    return best


def _check(
    weight: Tensor, bias: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, batch: int | None
) -> None:
    if grad_bias is None:
        raise ValueError("spear needs the gradient of the layer's bias: without it the scale of each input is undetermined")
    if weight.ndim != 2 or grad_weight.shape != weight.shape or bias.shape != weight.shape[:1] or grad_bias.shape != bias.shape:
        raise ValueError("spear needs weight and its gradient as [units, inputs] and bias and its gradient as [units]")
    if not all(bool(torch.isfinite(t).all()) for t in (weight, bias, grad_weight, grad_bias)):
        raise ValueError("spear needs finite numbers: the layer or its gradient contains NaN or infinity")
    if not bool(grad_weight.any()) or not bool(grad_bias.any()):
        raise ValueError("the gradient of the layer is zero: it carries no image")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


def _numerical_rank(spectrum: Float[Tensor, " k"]) -> int:
    """Last clear drop of the spectrum: noise falls smoothly (ratio near 1), images end in a step.

    Values below 3e-8 of the first are round-off of the squared spectrum. In the lower half of the spectrum, where pure noise
    may also fall fast, only a step of 100 counts. No drop at all: full rank.
    """
    clipped = spectrum.clamp_min(3e-8 * float(spectrum[0]))
    ratio = clipped[:-1] / clipped[1:]
    need = torch.where(torch.arange(len(ratio)) < len(ratio) // 2, 1.7, 100.0)
    drops = (ratio > need).nonzero().flatten()
    return int(drops[-1]) + 1 if len(drops) else len(spectrum)


def _empty(problem: SpearProblem) -> SpearState:
    none = torch.zeros(0, problem.size, dtype=torch.float64)
    return SpearState(none, none.clone(), none.sum(1), torch.tensor(0), torch.tensor(0))


def _zero_level(problem: SpearProblem, q: Float[Tensor, "n r"]) -> Float[Tensor, "n h"]:
    """Standard deviation that the gradient's noise alone gives to the unit row a_k . q; A's column j carries sigma / value j."""
    scale = problem.sigma / problem.left.norm(dim=1).clamp_min(1e-300)
    return (q / problem.values).norm(dim=1)[:, None] * scale


def _avoid(state: SpearState, samples: int, generator: torch.Generator) -> Float[Tensor, "n r r"] | None:
    """Per start, a penalty on trusted candidates: a random subset of their directions, or their images' coordinates, or none.

    A missing q_j satisfies q_j . u_i = 0 exactly, so images are the sharper fence, but only as good as their estimate.
    """
    kept = state.agreement > TRUSTED
    if not bool(kept.any()):
        return None
    kind = torch.rand(samples, 1, generator=generator, dtype=torch.float64)
    subset = (torch.rand(samples, int(kept.sum()), generator=generator, dtype=torch.float64) < 0.8).double()
    size = state.directions.shape[1]
    by_direction = (subset * (kind < 0.4)) @ outer_rows(state.directions[kept])
    by_image = (kind > 0.5).double() * subset.clamp_min(0.3) @ outer_rows(unit_rows(state.coordinates[kept]))
    return (by_direction + by_image).view(-1, size, size)


def _distinct(q: Float[Tensor, "n r"], known: Float[Tensor, "k r"], same: float) -> Float[Tensor, "m r"]:
    """Rows of q that differ from `known` and from each other (|cosine| <= same), the earlier one kept."""
    if len(known):
        q = q[(q @ known.T).abs().amax(1) <= same]
    return q[_first_of_kind(q, same)]


def _first_of_kind(q: Float[Tensor, "n r"], same: float) -> Bool[Tensor, " n"]:
    """Mask of the rows without an earlier kept row at |cosine| > same."""
    close = torch.triu((q @ q.T).abs() > same, diagonal=1)
    keep = torch.ones(len(q), dtype=torch.bool)
    for i in range(len(q)):
        if keep[i]:
            keep &= ~close[i]
    return keep


def _signs(problem: SpearProblem, active: Bool[Tensor, "n l"]) -> Float[Tensor, "n h"]:
    """+1 and -1 per unit from the pattern of the live units; a unit without gradient is inactive for every image."""
    sign = torch.full((len(active), len(problem.live)), -1.0, dtype=torch.float64)
    sign[:, problem.live] = torch.where(active, 1.0, -1.0).double()
    return sign


def _mean_coordinates(problem: SpearProblem, count: int) -> Float[Tensor, "n r"]:
    """The point of u . offset = 1 nearest to 0: a mixture of all images, the start of every cell fit."""
    return (problem.offset / problem.offset.square().sum())[None].expand(count, -1)


def _follow_cells(problem: SpearProblem, rows: Float[Tensor, "l r"], q: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Alternate: support of A q -> image in that activation cell -> units it leaves inactive -> direction with zeros there."""
    u, outer = _mean_coordinates(problem, len(q)), outer_rows(rows)
    for step in range(7):
        size = (q @ rows.T).abs()
        level = 0.05 * 0.6**step + 1e-3
        u = fit_cells(problem.forward, problem.bias, problem.offset, _signs(problem, size > level), u, 6 if step else 10)
        z = u @ problem.forward.T + problem.bias
        inactive = torch.sigmoid(-10 * z / z.abs().median(dim=1, keepdim=True).values)[:, problem.live]
        q = smallest_directions(inactive / (size.square() + level * level), outer, problem.size)
    return q


def _merge(problem: SpearProblem, state: SpearState, q: Float[Tensor, "n r"]) -> SpearState:
    """Settle each direction on its own zeros, score it alone by its activation cell, and keep the best 4 r of all.

    The direction with zeros at the units that its cell leaves inactive joins as a second candidate: it repairs a direction that
    carries a little of another image, too little to show in the pattern.
    """
    rows, size = unit_rows(problem.left[problem.live]), problem.size
    for _ in range(2 if size > 1 else 0):
        zero = (q @ rows.T).abs() <= problem.tolerance * _zero_level(problem, q)[:, problem.live] + 1e-5
        zero = zero[zero.sum(1) >= size + 2]
        q = smallest_directions(zero.double(), outer_rows(rows), size)
    first = _score(problem, rows, _distinct(q, state.directions, SAME))
    inactive = (first[1] @ problem.forward.T + problem.bias)[:, problem.live] <= 0
    again = smallest_directions(inactive.double(), outer_rows(rows), size) if size > 1 else q[:0]
    second = _score(problem, rows, again[(inactive.sum(1) >= size + 2)[: len(again)]])
    directions = torch.cat([state.directions, first[0], second[0]])
    coordinates = torch.cat([state.coordinates, first[1], second[1]])
    agreement = torch.cat([state.agreement, first[2], second[2]])
    level = problem.tolerance * _zero_level(problem, directions)[:, problem.live]
    zeros = ((directions @ rows.T).abs() <= level).double().mean(1)
    order = (agreement + 0.1 * zeros).argsort(descending=True, stable=True)
    order = order[_first_of_kind(directions[order], SAME)][: 4 * size]
    return replace(state, directions=directions[order], coordinates=coordinates[order], agreement=agreement[order])


def _score(problem: SpearProblem, rows: Float[Tensor, "l r"], q: Float[Tensor, "n r"]) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, coordinates of the image in the cell of their support, and how far its pattern agrees with that support."""
    support = (q @ rows.T).abs() > problem.tolerance * _zero_level(problem, q)[:, problem.live]
    u = fit_cells(problem.forward, problem.bias, problem.offset, _signs(problem, support), _mean_coordinates(problem, len(q)), 16)
    active = (u @ problem.forward.T + problem.bias)[:, problem.live] > 0
    return q, u, (active == support).double().mean(1)


def _independent(problem: SpearProblem, state: SpearState) -> list[int]:
    """Greedy: best candidate first, each clearly outside the span of those before (distance above 1e-3).

    Copies (|cosine| > NEAR to a chosen one) wait for a second round: they may be a near-duplicate image, or a flawed direction.
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


def _solve(problem: SpearProblem, directions: Float[Tensor, "r r"]) -> SpearResult:
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
    """Whether the inactive rows of each image leave one direction only: near-duplicates and too few zeros leave more."""
    rows, inactive, size = _whitened(problem), ~active[problem.live], problem.size
    if size == 1:
        return torch.ones(1, dtype=torch.bool)
    out = [int(k.sum()) >= size and float(torch.linalg.svdvals(rows[k])[-2]) > 3 * math.sqrt(int(k.sum())) for k in inactive.T]
    return torch.tensor(out)


def _polish(problem: SpearProblem, result: SpearResult) -> Float[Tensor, "r r"]:
    """Directions again, each the null direction of the rows that its recovered image leaves inactive, weighted by the noise."""
    rows, out = _whitened(problem), []
    z = problem.forward @ result.coordinates.T + problem.bias[:, None]
    for inactive, q in zip((z <= 0)[problem.live].T, torch.linalg.inv(result.coordinates).T, strict=True):
        if problem.size > 1 and int(inactive.sum()) >= problem.size:
            q = torch.linalg.eigh(rows[inactive].T @ rows[inactive])[1][:, 0] * problem.values
        out.append(q / q.norm())
    return torch.stack(out, dim=1)


def _partial(problem: SpearProblem, state: SpearState, chosen: list[int]) -> SpearResult:
    """No complete set: images estimated from their activation cells, the mean input elsewhere; nothing proved."""
    coordinates = _mean_coordinates(problem, problem.size).clone()
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
