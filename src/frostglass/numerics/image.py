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
