"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.auditing.metrics.registry import METRICS, Metric

CEILING = 150.0
"""dB given to a mean squared error below 1e-15: beyond what float32 images can carry."""


def psnr_values(found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """-10 log10(mean squared error) in dB, per image, pixels in [0, 1], at most `CEILING`."""
    error = (found.double().clamp(0, 1) - truth.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(10 ** (-CEILING / 10)))


@METRICS.register()
def psnr() -> Metric:
    """Peak signal-to-noise ratio in dB, pixels in [0, 1]; higher is closer."""
    return Metric("psnr", psnr_values)
