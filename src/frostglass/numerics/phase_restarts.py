"""Pixels that phase retrieval left in a wrong local maximum, started again from their neighbours.

Pixels are independent given the coefficients, so that one may fail where the next succeeded; and neighbouring pixels of
natural images are alike. Doubtful pixels start again from each neighbour and from the median of them, and the result of
greatest posterior is kept: the objective is that of `phase_retrieval`, only the starting points are new.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

VARIANCE = 0.27
"""Of pixels of natural images in [-1, 1]."""


def neighbours(x: Float[Tensor, "p c h w"]) -> Float[Tensor, "n p c h w"]:
    """Of every pixel: the four around it (itself at the edge), and the other channels at the same place."""
    h, w = x.shape[-2:]
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    around = [wide[..., i : i + h, j : j + w] for i, j in ((0, 1), (2, 1), (1, 0), (1, 2))]
    return torch.stack(around + [x.roll(i, 1) for i in range(1, x.shape[1])])


def fold_pixels(
    y: Float[Tensor, "e n"],
    weights: Float[Tensor, "e p"],
    noise: Float[Tensor, " e"],
    x: Float[Tensor, "p n"],
    steps: int,
) -> tuple[Float[Tensor, "p n"], Float[Tensor, " n"]]:
    """EM of independent pixels from x, under a prior of natural variance: (x, log-posterior up to a constant)."""
    scaled = (weights / noise[:, None]).T
    normal = scaled @ weights + torch.eye(weights.shape[1], dtype=x.dtype, device=x.device) / VARIANCE
    factor = torch.linalg.cholesky(normal)
    gain = y / noise[:, None]
    for _ in range(steps):
        v = y * torch.tanh(gain * (weights @ x))
        x = torch.cholesky_solve(scaled @ v, factor)
    a = gain * (weights @ x).abs()
    # log N(y; m, s^2) + log N(y; -m, s^2), without what does not depend on x
    fit = a + torch.log1p(torch.exp(-2 * a)) - (weights @ x).square() / (2 * noise[:, None])
    return x, fit.sum(0) - x.square().sum(0) / (2 * VARIANCE)


def restart_pixels(
    y: Float[Tensor, "e c h w"],
    weights: Float[Tensor, "e p"],
    noise: Float[Tensor, " e"],
    x: Float[Tensor, "p c h w"],
    share: float = 0.25,
    steps: int = 6,
) -> Float[Tensor, "p c h w"]:
    """x with the `share` of pixels that agree least with their neighbours started again, where that is likelier."""
    near = neighbours(x)
    starts = torch.cat([x[None], near, near.median(0, keepdim=True).values]).flatten(2)
    agreement = torch.nn.functional.cosine_similarity(x, near.mean(0), dim=0).flatten()
    doubtful = agreement.argsort()[: max(1, int(share * len(agreement)))]
    seen = y.flatten(1)[:, doubtful]
    kept, value = fold_pixels(seen, weights, noise, starts[0][:, doubtful], steps)
    for start in starts[1:]:
        other, likelier = fold_pixels(seen, weights, noise, start[:, doubtful], steps)
        better = likelier > value + 1e-3
        kept, value = torch.where(better, other, kept), torch.where(better, likelier, value)
    made = x.flatten(1).clone()
    made[:, doubtful] = kept
    return made.view_as(x)
