"""All metrics by name; a module below `frostglass.auditing.metrics` that registers one is found by existing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from frostglass.core.registry import Registry


@dataclass(frozen=True)
class Metric:
    """A score of one reconstruction against one private image.

    Args:
        name: in plans and scorecards.
        score: ([b, c, h, w], [b, c, h, w]) in [0, 1] -> [b], matched pairs in order.
        higher_is_closer: direction.
    """

    name: str
    score: Callable[[Tensor, Tensor], Tensor]
    higher_is_closer: bool = True


METRICS: Registry[Metric] = Registry("metric", "frostglass.auditing.metrics")
