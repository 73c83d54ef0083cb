"""DP-InstaHide: what additive noise on a mixture of images proves. A true theorem with weak constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from frostglass.core.errors import BadInput
from frostglass.guarantees.conversions import compose_gdp, gdp_epsilon
from frostglass.guarantees.domain import check

PIXELS_ONLY = "pixels only; labels not private"


@dataclass(frozen=True)
class EncodingPrivacy:
    """Of noisy encodings under replace-one adjacency, coefficients drawn independently of the data.

    Args:
        sensitivity: L2, (high - low) c_max sqrt(d).
        noise_multiplier: noise / sensitivity.
        mu: of one release.
        mu_total: of all releases of an image.
        epsilon: at `delta`, of all releases.
        delta: of (epsilon, delta).
        covers: what the guarantee is about.
    """

    sensitivity: float
    noise_multiplier: float
    mu: float
    mu_total: float
    epsilon: float
    delta: float
    covers: str


def l2_sensitivity(largest: float, dimensions: int, low: float = 0.0, high: float = 1.0) -> float:
    """(high - low) c_max sqrt(d): one image exchanged for any other.

    Args:
        largest: c_max, the largest coefficient that one image can get; 1 / k only if equal weights are enforced.
        dimensions: channels x height x width.
        low, high: bounds of a pixel; encodings in [-1, 1] count twice those in [0, 1].

    Raises:
        BadInput: a coefficient outside (0, 1], or bounds that are none.
    """
    _refuse(largest, low, high)
    return (high - low) * largest * math.sqrt(dimensions)


def l1_sensitivity(largest: float, dimensions: int, low: float = 0.0, high: float = 1.0) -> float:
    """(high - low) c_max d, for Laplace noise."""
    _refuse(largest, low, high)
    return (high - low) * largest * dimensions


def _refuse(largest: float, low: float, high: float) -> None:
    if not 0 < largest <= 1:
        raise BadInput(f"largest coefficient: {largest:g} must be above 0 and at most 1; 1 / k for equal weights.")
    if not high > low:
        raise BadInput(f"pixel bounds: [{low:g}, {high:g}] must have high above low.")


def encoding_privacy(
    noise: float,
    largest: float,
    dimensions: int,
    *,
    releases: int = 1,
    delta: float = 1e-5,
    low: float = 0.0,
    high: float = 1.0,
    labels_noised: bool = False,
) -> EncodingPrivacy:
    """What Gaussian noise on the encodings of an image proves.

    Args:
        noise: standard deviation s on each pixel, in the units of `low` and `high`.
        largest: as in `l2_sensitivity`.
        dimensions: channels x height x width.
        releases: encodings that hold an image, the cap that the exposure ledger enforces; mu grows with its root.
        delta: of (epsilon, delta).
        low, high: bounds of a pixel.
        labels_noised: True if labels are noised and accounted for too.

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(noise_multiplier=noise, steps=releases, delta=delta)
    sensitivity = l2_sensitivity(largest, dimensions, low, high)
    mu = sensitivity / noise
    total = compose_gdp([mu] * releases)
    covers = "pixels and labels" if labels_noised else PIXELS_ONLY
    return EncodingPrivacy(sensitivity, noise / sensitivity, mu, total, gdp_epsilon(total, delta), delta, covers)
