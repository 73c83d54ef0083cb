"""Distances between gradients, given as tensors in one common order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def flatten(gradients: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """All tensors one after another as one vector."""
    return torch.cat([g.reshape(-1) for g in gradients])


def cosine_distance(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """1 - <a, b> / (||a|| ||b||) (Geiping et al. 2020, Eq. 4), over all layers together. In [0, 2]; 0 for a = 0 too."""
    tiny = torch.finfo(a.dtype).tiny
    norms = (a.dot(a) * b.dot(b)).clamp_min(tiny).sqrt()
    return 1 - a.dot(b) / norms


def layer_norms(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_l ||a_l - b_l||_2, norms not squared (Yin et al. 2021, Eq. 3)."""
    return torch.stack([torch.linalg.vector_norm(x - y) for x, y in zip(a, b, strict=True)]).sum()


def squared_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_l ||a_l - b_l||_2^2 (Zhu et al. 2019, Eq. 4)."""
    return torch.stack([(x - y).square().sum() for x, y in zip(a, b, strict=True)]).sum()


def relative_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """||a - b|| / ||b|| over all layers together, in float64; 0 if both are zero."""
    top = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    bottom = sum(float(y.double().square().sum()) for y in b)
    return 0.0 if top == 0 else float("inf") if bottom == 0 else (top / bottom) ** 0.5
