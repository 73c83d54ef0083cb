"""Kernels of `spear`: batched sparse directions of a subspace, and the activation cell that contains an image.

All functions work on n candidates at once; h rows (units), r dimensions (images), float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PENALTY = 10.0  # weight of the avoided directions against a Gram matrix of trace 1


def unit_rows(x: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Rows scaled to length 1; zero rows stay zero."""
    lengths: Tensor = x.norm(dim=1, keepdim=True)
    return x / lengths.clamp_min(1e-300)


def outer_rows(x: Float[Tensor, "n r"]) -> Float[Tensor, "n rr"]:
    """The outer product of each row with itself, flattened: a weighted Gram matrix becomes one matrix product."""
    return (x[:, :, None] * x[:, None, :]).flatten(1)


def isotropic_frame(rows: Float[Tensor, "l r"]) -> Float[Tensor, "r r"]:
    """T such that the rows of A T, scaled to length 1, have no preferred direction (Tyler's scatter estimate).

    Images share much of their gradient: without this most rows point one way, and every q across it looks sparse.
    """
    scatter, size = torch.eye(rows.shape[1], dtype=rows.dtype), rows.shape[1]
    for _ in range(30):
        weight = (rows @ torch.linalg.inv(scatter) * rows).sum(1).clamp_min(1e-300)
        scatter = rows.T @ (rows / weight[:, None])
        scatter = scatter * (size / scatter.trace()) + 1e-9 * torch.eye(size, dtype=rows.dtype)
    values, vectors = torch.linalg.eigh(scatter)
    return (vectors / values.sqrt()) @ vectors.T


def distinct(q: Float[Tensor, "n r"], known: Float[Tensor, "k r"], same: float) -> Float[Tensor, "m r"]:
    """Rows of q that differ from `known` and from each other (|cosine| <= same), the earlier one kept."""
    if len(known):
        q = q[(q @ known.T).abs().amax(1) <= same]
    return q[first_of_kind(q, same)]


def first_of_kind(q: Float[Tensor, "n r"], same: float) -> Bool[Tensor, " n"]:
    """Mask of the rows without an earlier kept row at |cosine| > same."""
    close = torch.triu((q @ q.T).abs() > same, diagonal=1)
    keep = torch.ones(len(q), dtype=torch.bool)
    for i in range(len(q)):
        if keep[i]:
            keep &= ~close[i]
    return keep


def smallest_directions(weights: Float[Tensor, "n h"], outer: Float[Tensor, "h rr"], size: int) -> Float[Tensor, "n r"]:
    """Unit q that minimises sum_k weights[k] (a_k . q)^2, one per row of weights."""
    gram = (weights @ outer).view(-1, size, size)
    vectors: Tensor = torch.linalg.eigh(_scaled(gram))[1]
    return vectors[:, :, 0]


def sparse_directions(
    rows: Float[Tensor, "h r"],
    start: Float[Tensor, "n r"],
    power: Float[Tensor, " n"],
    avoid: Float[Tensor, "n r r"] | None,
    *,
    first: float,
    last: float,
    steps: int,
) -> Float[Tensor, "n r"]:
    """Local minima of sum_k |rows_k . q|^p on the sphere (p = 0: sum of logarithms) by reweighted least squares.

    The smoothing falls geometrically from `first` to `last` (in units of |rows_k . q|, rows of length 1): a wide
    start passes
    over shallow minima, the end counts zeros. `avoid` is a positive matrix per start, in force during the first half
    only, so
    that it moves the basin, not the minimum.
    """
    size, outer, q = rows.shape[1], outer_rows(rows), start
    for step in range(steps):
        eps = first * (last / first) ** (step / max(steps - 1, 1))
        weights = ((q @ rows.T).square() + eps * eps) ** (power[:, None] / 2 - 1)
        gram = _scaled((weights @ outer).view(-1, size, size))
        if avoid is not None and 2 * step < steps:
            gram = gram + PENALTY * avoid
        q = torch.linalg.eigh(gram)[1][:, :, 0]
    return q


def fit_cells(
    forward: Float[Tensor, "h r"],
    bias: Float[Tensor, " h"],
    offset: Float[Tensor, " r"],
    sign: Float[Tensor, "n h"],
    start: Float[Tensor, "n r"],
    steps: int = 12,
) -> Float[Tensor, "n r"]:
    """Coordinates u with u . offset = 1 whose pre-activations forward @ u + bias have the given signs (+1 active, -1
    not).

    Damped Newton steps on a logistic loss whose temperature falls from the median |pre-activation| to 3 % of it: ends
    near the
    middle of the cell if it exists and at a compromise otherwise. The equality fixes the scale, which the signs alone
    leave open
    wherever the bias is small. `start` must satisfy it.
    """
    basis = torch.linalg.qr(offset[:, None], mode="complete")[0][:, 1:]
    inner, u = forward @ basis, start
    outer, free = outer_rows(inner), inner.shape[1]
    for step in range(steps if free else 0):
        z = u @ forward.T + bias
        heat = z.abs().median(dim=1, keepdim=True).values.clamp_min(1e-12) * 0.03 ** min(1.0, step / max(steps - 3, 1))
        wrong = torch.sigmoid(-sign * z / heat)
        slope = -(sign * wrong / heat) @ inner
        curve = ((wrong * (1 - wrong) / heat.square()) @ outer).view(-1, free, free)
        ridge = 1e-6 * curve.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
        move = torch.linalg.solve(curve + ridge * torch.eye(free, dtype=u.dtype, device=u.device), slope)
        far = (move @ inner.T).abs().amax(1) / (3 * heat[:, 0] + 0.3 * z.abs().amax(1))
        u = u - (move / far.clamp_min(1)[:, None]) @ basis.T
    return u


def _scaled(gram: Float[Tensor, "n r r"]) -> Float[Tensor, "n r r"]:
    """Each matrix divided by its trace."""
    return gram / gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)[:, None, None]
