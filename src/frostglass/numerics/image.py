"""Image priors as plain functions of a batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def total_variation(x: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Anisotropic: mean |difference to the right neighbour| + mean |difference to the lower neighbour|."""
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def mean_norm(x: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean over the batch of ||x_i||_2."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).mean()


def variation_norm(x: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean over the batch of ||differences to the right||_2 + ||differences downwards||_2, norms not squared."""
    right, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    norms = [torch.linalg.vector_norm(d.flatten(1), dim=1) for d in (right, down)]
    return (norms[0] + norms[1]).mean()


def anchor_distance(x: Float[Tensor, "b c h w"], anchor: Float[Tensor, "b c h w"]) -> Float[Tensor, ""]:
    """Mean over the batch of ||x_i - anchor_i||_2 (Yin et al. 2021, Eq. 11), image by image; 0, with gradient 0, where
    they agree."""
    return torch.linalg.vector_norm((x - anchor).flatten(1), dim=1).mean()


def blocks(x: Float[Tensor, "... h w"], size: int) -> Float[Tensor, "... h w"]:
    """Every block of size x size pixels by its mean (blocks at the lower and right edge may be smaller)."""
    flat = x.reshape(-1, 1, *x.shape[-2:])
    small = torch.nn.functional.avg_pool2d(flat, size, ceil_mode=True, count_include_pad=False)
    wide = small.repeat_interleave(size, -2).repeat_interleave(size, -1)
    return wide[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


def shifted(x: Float[Tensor, "b c h w"], down: int, right: int, *, flip: bool = False) -> Float[Tensor, "b c h w"]:
    """Rolled around by (down, right) pixels, then mirrored left to right if `flip`."""
    rolled = torch.roll(x, (down, right), (-2, -1))
    return rolled.flip(-1) if flip else rolled
