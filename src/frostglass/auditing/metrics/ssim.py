"""Structural similarity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.auditing.metrics.registry import METRICS, Metric


def ssim_values(found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean structural similarity per image (Wang et al. 2004, scikit-image, 7x7 window, data range 1).

    Images under 7 pixels take the largest odd window that fits; under 3 there is none, and the similarity is NaN.
    """
    from skimage.metrics import structural_similarity

    side = min(found.shape[-2:])
    if side < 3:
        return torch.full((len(found),), torch.nan, dtype=torch.float64)
    window = min(7, side if side % 2 else side - 1)
    a, b = (t.double().clamp(0, 1).permute(0, 2, 3, 1).numpy() for t in (found, truth))
    scores = [
        structural_similarity(x, y, channel_axis=2, data_range=1.0, win_size=window) for x, y in zip(a, b, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)


@METRICS.register()
def ssim() -> Metric:
    """Structural similarity in [-1, 1], 7x7 window, data range 1; higher is closer."""
    return Metric("ssim", ssim_values)
