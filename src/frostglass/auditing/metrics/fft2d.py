"""Distance between amplitude spectra: our own definition, as GradInversion's normalisation was not published."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.auditing.metrics.registry import METRICS, Metric

GREY_LEVELS = 255.0
"""Amplitudes below one grey level of 8 bits hardly count."""


def fft2d_values(found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """sum |A - B| / sum (A + B) per image, in [0, 1]: 0 for equal spectra, 1 if no frequency is in both.

    A and B are log(1 + 255 |F|) of the two images, F the orthonormal 2-D Fourier transform of each channel in float64
    and the sums over channels and frequencies. Phases do not count, so a circular shift and a half turn cost nothing:
    read it beside PSNR. Not comparable with the values of Yin et al. 2021.
    """
    a, b = _amplitudes(found), _amplitudes(truth)
    apart, together = (a - b).abs().flatten(1).sum(1), (a + b).flatten(1).sum(1)
    return apart / together.clamp_min(torch.finfo(torch.float64).tiny)


def _amplitudes(images: Tensor) -> Tensor:
    spectrum = torch.fft.fft2(images.double().clamp(0, 1), norm="ortho")
    return torch.log1p(GREY_LEVELS * spectrum.abs())


@METRICS.register()
def fft2d() -> Metric:
    """Relative distance of log amplitude spectra in [0, 1], our definition, blind to position; lower is closer."""
    return Metric("fft2d", fft2d_values, higher_is_closer=False)
