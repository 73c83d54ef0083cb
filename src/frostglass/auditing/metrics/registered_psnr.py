"""Peak signal-to-noise ratio after registration."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.auditing.metrics.psnr import psnr_values
from frostglass.auditing.metrics.registry import METRICS, Metric
from frostglass.numerics.registration import ecc_euclidean


def registered_psnr_values(found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """PSNR in dB of the better of two candidates per image: as it is, and shifted and rotated onto its original.

    Registration is by enhanced correlation (Evangelidis & Psarakis 2008), onto the image's own original, with pixels
    from outside repeated from the border. Leaving the image alone is a candidate, so it is never below `psnr_values`.
    """
    plain = found.double().clamp(0, 1)
    moved = ecc_euclidean(plain, truth.double())
    return torch.maximum(psnr_values(plain, truth), psnr_values(moved, truth))


@METRICS.register()
def registered_psnr() -> Metric:
    """PSNR in dB after shifting and rotating onto the original, at least the plain PSNR; higher is closer."""
    return Metric("registered_psnr", registered_psnr_values)
