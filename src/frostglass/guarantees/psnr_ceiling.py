"""The PSNR that an analytic attacker without a prior can reach (Riess, Ziller et al. 2024, 2402.12861)."""

from __future__ import annotations

import math

from frostglass.guarantees.domain import check

MEAN_SQUARE = 0.25
"""Of a pixel in [0, 1], where the image is not known: that of a flat grey of one half."""

SAY_BOTH = (
    "It holds for an attacker without any prior on images; one with a prior can beat it, and one who only has to "
    "identify an image among candidates is covered by gamma alone."
)


def psnr_ceiling(
    noise_multiplier: float, dimensions: int, *, observations: int = 1, mean_square: float = MEAN_SQUARE
) -> float:
    """-10 log10(sigma^2 ||X||^2 / T) in dB, with ||X||^2 = dimensions x mean_square and pixels in [0, 1].

    Only for per-image clipping of an update of one image: in a client-level clipped update an image is a part.

    Args:
        noise_multiplier: sigma; the noise is relative to the norm of the image's own contribution.
        dimensions: channels x height x width.
        observations: T noisy observations of the same image that are averaged.
        mean_square: mean of x^2 over the pixels.

    Raises:
        BadInput: no noise, no observation.
    """
    check(noise_multiplier=noise_multiplier, steps=observations)
    return -20 * math.log10(noise_multiplier) - 10 * math.log10(dimensions * mean_square / observations)


def noise_for_psnr(psnr: float, dimensions: int, *, observations: int = 1, mean_square: float = MEAN_SQUARE) -> float:
    """The noise multiplier whose ceiling is `psnr` dB."""
    return math.sqrt(10 ** (-psnr / 10) * observations / (dimensions * mean_square))
