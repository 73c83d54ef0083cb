"""Exact recovery of a private batch from the gradient of one fully connected layer followed by ReLU.

With z = W x + b the observed gradient is dL/dW = S X and dL/db = S 1, where S = dL/dz [h, batch] holds one column per
image and X [batch, d] the inputs. S X has rank `batch`, so dL/dW = A R (A [h, r] orthonormal), S = A Q and X = inv(Q) R
for an unknown invertible Q [r, r]. ReLU makes S sparse, so the columns of Q are the directions q with many zeros in A q
(Dimitrov et al. 2024, SPEAR, arXiv 2403.03945, sec. 3; the view as sparse dictionary learning: SPEAR++, arXiv
2510.24200).

Instead of null vectors of random row subsets (exponential in the batch) this file minimises log-sum sparsity of A q by
reweighted least squares from many starts. Two facts that the plain sparse problem ignores make it strong: an image's
coordinates u (a row of inv(Q)) satisfy u . (A^T dL/db) = 1, and sign(W R^T u + b) must equal the support of its A q.
Hence one candidate can be checked alone, its estimated image tells which units to expect at zero, and the estimated
images of the candidates already found keep later starts away from them (q_j . u_i = 0).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frostglass.numerics.spear_cells import (
    distinct,
    first_of_kind,
    fit_cells,
    isotropic_frame,
    outer_rows,
    smallest_directions,
    sparse_directions,
    unit_rows,
)
from frostglass.numerics.spear_problem import SpearProblem, mean_coordinates, prepare, zero_level
from frostglass.numerics.spear_proof import SpearResult, SpearState, assemble, empty_state, independent, polish, solve

__all__ = ["SpearProblem", "SpearResult", "SpearState", "assemble", "prepare", "search"]

TRUSTED = 0.97  # pattern agreement of a lone candidate above which later starts are kept away from it
SAME = 1 - 1e-6  # |cosine| above which two directions are one


def search(problem: SpearProblem, state: SpearState | None, generator: torch.Generator, samples: int) -> SpearState:
    """One bounded chunk: `samples` starts of the sparse search; returns the enlarged, re-ranked candidate list.

    Deterministic given the generator's state; see `problem.samples` for a suggested size. A caller repeats it until
    `assemble`
    proves every row or its budget ends.
    """
    state = state or empty_state(problem)
    state = replace(state, calls=state.calls + 1, samples=state.samples + samples)
    if not problem.separable:
        return state
    if problem.size == 1:
        return _merge(problem, state, torch.ones(1, 1, dtype=torch.float64))
    frame = isotropic_frame(problem.left[problem.live])
    rows = unit_rows(problem.left[problem.live] @ frame)
    starts = unit_rows(torch.randn(samples, problem.size, generator=generator, dtype=torch.float64))
    power = 0.5 * (torch.rand(samples, generator=generator) < 0.5).double()
    avoid = _avoid(state, frame, samples, generator)
    rough = sparse_directions(rows, starts, power, avoid, first=0.3, last=0.02, steps=18)
    known = torch.linalg.solve(frame, state.directions[state.agreement > TRUSTED].T).T
    rough = distinct(rough, unit_rows(known), 0.98)[: 4 * problem.size]
    fine = torch.cat([rough, _follow_cells(problem, rows, rough)])
    floor = (
        float(problem.tolerance * zero_level(problem, unit_rows(fine @ frame.T))[:, problem.live].median())
        if len(fine)
        else 0.0
    )
    fine = sparse_directions(
        rows, fine, fine.new_zeros(len(fine)), None, first=0.02, last=min(max(floor, 1e-4), 0.02), steps=10
    )
    state = _merge(problem, state, unit_rows(fine @ frame.T))
    chosen = independent(problem, state)
    if len(chosen) < problem.size:
        return state
    # all images of a complete set at once are sharper than cells: where units are few, the set heals over the calls
    return _merge(problem, state, polish(problem, solve(problem, state.directions[chosen].T)).T)


def _avoid(
    state: SpearState, frame: Float[Tensor, "r r"], samples: int, generator: torch.Generator
) -> Float[Tensor, "n r r"] | None:
    """Per start, a penalty on trusted candidates: a random subset of their directions, or their images' coordinates,
    or none.

    A missing q_j satisfies q_j . u_i = 0 exactly, so images are the sharper fence, but only as good as their estimate.
    """
    kept = state.agreement > TRUSTED
    if not bool(kept.any()):
        return None
    kind = torch.rand(samples, 1, generator=generator, dtype=torch.float64)
    subset = (torch.rand(samples, int(kept.sum()), generator=generator, dtype=torch.float64) < 0.8).double()
    size = state.directions.shape[1]
    by_direction = (subset * (kind < 0.4)) @ outer_rows(
        unit_rows(torch.linalg.solve(frame, state.directions[kept].T).T)
    )
    by_image = (kind > 0.5).double() * subset.clamp_min(0.3) @ outer_rows(unit_rows(state.coordinates[kept] @ frame))
    return (by_direction + by_image).view(-1, size, size)


def _signs(problem: SpearProblem, active: Bool[Tensor, "n l"]) -> Float[Tensor, "n h"]:
    """+1 and -1 per unit from the pattern of the live units; a unit without gradient is inactive for every image."""
    sign = torch.full((len(active), len(problem.live)), -1.0, dtype=torch.float64)
    sign[:, problem.live] = torch.where(active, 1.0, -1.0).double()
    return sign


def _follow_cells(problem: SpearProblem, rows: Float[Tensor, "l r"], q: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Alternate: support of A q -> image in that activation cell -> units it leaves inactive -> direction with zeros
    there.
    """
    u, outer = mean_coordinates(problem, len(q)), outer_rows(rows)
    for step in range(7):
        size = (q @ rows.T).abs()
        level = 0.05 * 0.6**step + 1e-3
        u = fit_cells(
            problem.forward, problem.bias, problem.offset, _signs(problem, size > level), u, 6 if step else 10
        )
        z = u @ problem.forward.T + problem.bias
        inactive = torch.sigmoid(-10 * z / z.abs().median(dim=1, keepdim=True).values)[:, problem.live]
        q = smallest_directions(inactive / (size.square() + level * level), outer, problem.size)
    return q


def _merge(problem: SpearProblem, state: SpearState, q: Float[Tensor, "n r"]) -> SpearState:
    """Settle each direction on its own zeros, score it alone by its activation cell, and keep the best 4 r of all.

    The direction with zeros at the units that its cell leaves inactive joins as a second candidate: it repairs a
    direction that
    carries a little of another image, too little to show in the pattern.
    """
    rows, size = unit_rows(problem.left[problem.live]), problem.size
    for _ in range(2 if size > 1 else 0):
        zero = (q @ rows.T).abs() <= problem.tolerance * zero_level(problem, q)[:, problem.live] + 1e-5
        zero = zero[zero.sum(1) >= size + 2]
        q = smallest_directions(zero.double(), outer_rows(rows), size)
    first = _score(problem, rows, distinct(q, state.directions, SAME))
    inactive = (first[1] @ problem.forward.T + problem.bias)[:, problem.live] <= 0
    again = smallest_directions(inactive.double(), outer_rows(rows), size) if size > 1 else q[:0]
    second = _score(problem, rows, again[(inactive.sum(1) >= size + 2)[: len(again)]])
    directions = torch.cat([state.directions, first[0], second[0]])
    coordinates = torch.cat([state.coordinates, first[1], second[1]])
    agreement = torch.cat([state.agreement, first[2], second[2]])
    level = problem.tolerance * zero_level(problem, directions)[:, problem.live]
    zeros = ((directions @ rows.T).abs() <= level).double().mean(1)
    order = (agreement + 0.1 * zeros).argsort(descending=True, stable=True)
    order = order[first_of_kind(directions[order], SAME)][: 4 * size]
    return replace(state, directions=directions[order], coordinates=coordinates[order], agreement=agreement[order])


def _score(problem: SpearProblem, rows: Float[Tensor, "l r"], q: Float[Tensor, "n r"]) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, coordinates of the image in the cell of their support, and how far its pattern agrees with that
    support.
    """
    support = (q @ rows.T).abs() > problem.tolerance * zero_level(problem, q)[:, problem.live]
    u = fit_cells(
        problem.forward, problem.bias, problem.offset, _signs(problem, support), mean_coordinates(problem, len(q)), 16
    )
    active = (u @ problem.forward.T + problem.bias)[:, problem.live] > 0
    return q, u, (active == support).double().mean(1)
