"""Image identifiability precision in pixels."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from frostglass.auditing.metrics.identification import copies, identified, pool_words
from frostglass.auditing.metrics.registry import METRICS, Metric, MetricContext


def iip_pixels_values(
    found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"], context: MetricContext
) -> Float[Tensor, " b"]:
    """1 if the own original is the nearest of `context.pool` by cosine of pixels in [0, 1], else 0, per image.

    Easy: a picture of 14 dB may well be identified. A success says that images can be told apart, not that one can
    be recognised.
    """
    del truth  # it is in the pool
    return identified(found.flatten(1), context.pool.flatten(1), context.index, copies(context))


@METRICS.register(paper="Yin et al. 2021, CVPR (GradInversion)")
def iip_pixels() -> Metric:
    """1 if the nearest of a pool of originals in pixels (cosine) is the own one, else 0; higher is closer."""
    return Metric("iip_pixels", iip_pixels_values, needs_context=True, about=pool_words)
