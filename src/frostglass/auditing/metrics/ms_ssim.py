"""Multi-scale structural similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from frostglass.auditing.metrics.registry import METRICS, Metric
from frostglass.auditing.metrics.ssim import K1, K2

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, the finest first (Wang et al. 2003, section 3.2)."""
WINDOW, SIGMA = 11, 1.5
LEAST = WINDOW * 2 ** (len(WEIGHTS) - 1)
"""176: below, the window does not fit into the coarsest scale."""
CHUNK = 16


def ms_ssim_values(found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Product over five scales of contrast and structure, times luminance at the last (Wang et al. 2003), per image.

    Gaussian 11x11 window, sigma 1.5, only whole windows; scales halve by 2x2 means; a negative mean counts as 0, as
    its power is not real. In float64; in [0, 1].
    """
    pairs = zip(found.split(CHUNK), truth.split(CHUNK), strict=True)
    parts = [_values(a.double().clamp(0, 1), b.double().clamp(0, 1)) for a, b in pairs]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _values(x: Tensor, y: Tensor) -> Tensor:
    product = torch.ones(len(x), dtype=x.dtype)
    for scale, weight in enumerate(WEIGHTS):
        last = scale == len(WEIGHTS) - 1
        similarity, contrast = _similarity(x, y)
        product = product * (similarity if last else contrast).clamp_min(0) ** weight
        if not last:
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
    return product


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(structural similarity, its contrast-structure part) of one scale, [b] each: means over channels and windows."""
    mean_x, mean_y, xx, yy, xy = (_blurred(t) for t in (x, y, x * x, y * y, x * y))
    c1, c2 = K1**2, K2**2
    contrast = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x.square() + yy - mean_y.square() + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * contrast).flatten(1).mean(1), contrast.flatten(1).mean(1)


def _blurred(image: Tensor) -> Tensor:
    """Whole windows alone: [b, c, h, w] -> [b, c, h - 10, w - 10]."""
    place = torch.arange(WINDOW, dtype=image.dtype) - WINDOW // 2
    line = torch.exp(-(place**2) / (2 * SIGMA**2))
    line = line / line.sum()
    c = image.shape[1]
    rows = conv2d(image, line.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)
    return conv2d(rows, line.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)


@METRICS.register(paper="Wang, Simoncelli and Bovik 2003, Asilomar")
def ms_ssim() -> Metric:
    """Multi-scale structural similarity in [0, 1], five scales, from 176 pixels a side; higher is closer."""
    return Metric("ms_ssim", ms_ssim_values, least_side=LEAST)
