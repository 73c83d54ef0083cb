"""The one way to match images: one-to-one, by least total squared error."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pairwise_mse(a: Float[Tensor, "r c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, "r n"]:
    """Mean squared difference of every image of `a` to every image of `b`, in float64."""
    x, y = a.double().flatten(1), b.double().flatten(1)
    return torch.stack([(row - y).square().mean(1) for row in x]) if len(x) else x.new_zeros(0, len(y))


def assign(found: Float[Tensor, "r c h w"], truth: Float[Tensor, "n c h w"]) -> Int[Tensor, " n"]:
    """For each image of `truth` the row of `found` that is matched to it, -1 if none is left (Hungarian method).

    Rows that hold a non-finite value are matched to nothing.
    """
    from scipy.optimize import linear_sum_assignment

    order = torch.full((len(truth),), -1, dtype=torch.long)
    usable = found.flatten(1).isfinite().all(1).nonzero().flatten() if len(found) else torch.zeros(0, dtype=torch.long)
    if len(usable) and len(truth):
        rows, columns = linear_sum_assignment(pairwise_mse(found[usable], truth).numpy())
        order[torch.as_tensor(columns)] = usable[torch.as_tensor(rows)]
    return order
