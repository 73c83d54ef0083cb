"""Separating mixed activations: the sparse, non-negative vectors that span a subspace.

Where an equation has the activations of b images as solutions, every mixture of them solves it too. What a ReLU wrote
is non-negative and zero at many places. The non-negative vectors of the subspace are a cone, and an image, being zero
at more places than the cone has dimensions, is one of its edges. A linear program over the cone ends on an edge; with
an objective that is zero on all images found so far it ends on another one. Frostglass's own method; related is
non-negative matrix factorisation (Donoho & Stodden 2003).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics.spear_cells import distinct, isotropic_frame, sparse_directions, unit_rows

LIVE = 1e-4
"""Entries that are smaller than this share of the largest in all vectors say nothing but rounding."""

ROWS = 1500
"""Entries that the scale of the subspace is taken from, drawn at random."""

PROGRAMS = 12
"""Linear programs at the most, for every vector that is looked for; every third is not kept from what was found."""

SLACK, ZERO, NEGATIVE, LEAST = 1e-6, 1e-4, 1e-3, 0.1
"""How far below zero a program lets an entry fall, and what counts as zero (rows of the subspace scaled to length 1);
how far below zero a vector may fall, as a share of its largest entry; the least share of zeros it may have."""


def rays(basis: Float[Tensor, "n r"], generator: torch.Generator) -> Float[Tensor, "n r"] | None:
    """The r sparse non-negative vectors that span the same space as the columns of `basis`.

    Args:
        basis: of full column rank, float64.
        generator: of the objectives, on the CPU.

    Returns:
        Columns in no particular order, each of length 1 and with a positive sum; None if fewer than r were found.
    """
    count = basis.shape[1]
    if count == 1:
        return _positive(basis)
    size = basis.norm(dim=1)
    live = basis[size > LIVE * size.max()]
    frame = isotropic_frame(live[torch.randperm(len(live), generator=generator)[:ROWS]])
    rows = unit_rows(live @ frame)
    found = rows.new_zeros(0, count)
    for attempt in range(PROGRAMS * count):
        objective = torch.randn(count, generator=generator, dtype=rows.dtype)
        if len(found) and attempt % 3 < 2:
            known = torch.linalg.qr(found.T).Q
            objective = objective - known @ (known.T @ objective)
        q = _edge(rows, objective)
        if q is None or not len(distinct(q[None], found, 1 - 1e-6)):
            continue
        values = live @ frame @ q
        sparse = float(((rows @ q).abs() < ZERO).double().mean()) > LEAST
        if sparse and float(values.min()) > -NEGATIVE * float(values.max()):
            found = torch.cat([found, q[None]])
        if len(found) == count:
            return _positive(basis @ frame @ found.T)
    return None


def _edge(rows: Float[Tensor, "m r"], objective: Float[Tensor, " r"]) -> Float[Tensor, " r"] | None:
    """The edge of {q: rows q >= 0} with the least objective for its mean; refined by reweighted least squares."""
    from scipy.optimize import linprog

    mean = rows.mean(0)
    # One row of the subspace is one inequality; the mean is fixed, as a cone has no least element.
    solved = linprog(
        objective.numpy(),
        A_ub=-rows.numpy(),
        b_ub=torch.full((len(rows),), SLACK, dtype=rows.dtype).numpy(),
        A_eq=mean[None].numpy(),
        b_eq=[1.0],
        bounds=(None, None),
        method="highs",
    )
    if solved.x is None:
        return None
    q = unit_rows(torch.from_numpy(solved.x)[None])
    q = sparse_directions(rows, q, q.new_zeros(1), None, first=1e-3, last=SLACK, steps=8)[0]
    return q * (1 if float(mean @ q) >= 0 else -1)


def _positive(columns: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Of length 1 and with a positive sum."""
    columns = columns / columns.norm(dim=0)
    return columns * torch.where(columns.sum(0) < 0, -1.0, 1.0).to(columns)
