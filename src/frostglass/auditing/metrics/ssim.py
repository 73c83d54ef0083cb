"""Structural similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from frostglass.auditing.metrics.registry import METRICS, Metric

K1, K2 = 0.01, 0.03
"""Constants of Wang et al. 2004, for a data range of 1."""


def ssim_values(found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean structural similarity per image (Wang et al. 2004), equal to scikit-image's: 7x7 window, data range 1.

    The window is uniform, with sample covariances; only whole windows count. Images under 7 pixels take the largest
    odd window that fits; under 3 there is none, and the similarity is NaN.
    """
    side = min(found.shape[-2:])
    if side < 3:
        return torch.full((len(found),), torch.nan, dtype=torch.float64)
    window = min(7, side if side % 2 else side - 1)
    x, y = found.double().clamp(0, 1), truth.double().clamp(0, 1)
    mean_x, mean_y, xx, yy, xy = (avg_pool2d(t, window, stride=1) for t in (x, y, x * x, y * y, x * y))
    sample = window**2 / (window**2 - 1)
    var_x, var_y, cov = (
        sample * (t - m) for t, m in ((xx, mean_x * mean_x), (yy, mean_y * mean_y), (xy, mean_x * mean_y))
    )
    c1, c2 = K1**2, K2**2
    above = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    below = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (above / below).flatten(1).mean(1)


@METRICS.register(paper="Wang et al. 2004, IEEE TIP")
def ssim() -> Metric:
    """Structural similarity in [-1, 1], 7x7 window, data range 1; higher is closer."""
    return Metric("ssim", ssim_values)
