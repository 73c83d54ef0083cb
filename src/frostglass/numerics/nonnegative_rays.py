"""Separating mixed activations: the sparse, non-negative vectors that span a subspace.

Where an equation has the activations of b images as solutions, every mixture of them solves it too. What a ReLU wrote
is non-negative and zero at many places, and a mixture of two images is zero only where both are. So the images are the
vectors of the subspace with the most zeros: local minima of sum_i log |v_i| on it, found by reweighted least squares
from random starts (as the images of a fully connected layer are by `spear`). Frostglass's own method; related is
non-negative matrix factorisation (Donoho & Stodden 2003).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics.spear_cells import distinct, isotropic_frame, sparse_directions, unit_rows

ROWS = 1500
"""Entries that are looked at in the search, drawn at random."""

ROUNDS, STARTS = 40, 8
"""Rounds of the search; starts of each, for every vector that is looked for."""

ZERO, NEGATIVE, LEAST = 1e-4, 1e-3, 0.1
"""An entry below the first counts as zero (rows of the subspace scaled to length 1); a vector may fall below zero by
the second, of its largest entry; and has at least the third as its share of zeros."""


def rays(basis: Float[Tensor, "n r"], generator: torch.Generator) -> Float[Tensor, "n r"] | None:
    """The r sparse non-negative vectors that span the same space as the columns of `basis`.

    Args:
        basis: of full column rank, float64.
        generator: of the starts, on the CPU.

    Returns:
        Columns in no particular order, each of length 1 and with a positive sum; None if fewer than r were found.
    """
    size = basis.norm(dim=1)
    live = basis[size > 1e-6 * size.max()]
    count = basis.shape[1]
    if count == 1:
        return _positive(basis)
    rows = live[torch.randperm(len(live), generator=generator)[:ROWS]]
    frame = isotropic_frame(rows)
    rows = unit_rows(rows @ frame)
    found = rows.new_zeros(0, count)
    for _ in range(ROUNDS):
        starts = unit_rows(torch.randn(STARTS * count, count, generator=generator, dtype=rows.dtype))
        power = 0.5 * (torch.rand(len(starts), generator=generator) < 0.5).to(rows)
        q = sparse_directions(rows, starts, power, None, first=0.3, last=0.02, steps=18)
        q = distinct(q, found, 0.98)
        q = sparse_directions(rows, q, q.new_zeros(len(q)), None, first=0.02, last=1e-6, steps=14)
        q = distinct(q, found, 1 - 1e-6)
        values = live @ frame @ q.T
        values = values * values.sum(0).sign()
        fits = ((q @ rows.T).abs() < ZERO).double().mean(1) > LEAST
        fits &= values.amin(0) > -NEGATIVE * values.amax(0)
        found = torch.cat([found, q[fits]])
        if len(found) >= count:
            break
    made = basis @ frame @ found[:count].T
    whole = len(found) >= count and int(torch.linalg.matrix_rank(unit_rows(made.T), rtol=1e-4)) == count
    return _positive(made) if whole else None


def _positive(columns: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Of length 1 and with a positive sum."""
    columns = columns / columns.norm(dim=0)
    return columns * torch.where(columns.sum(0) < 0, -1.0, 1.0).to(columns)
