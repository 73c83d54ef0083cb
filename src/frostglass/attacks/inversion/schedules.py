"""Numbers that change over a run: learning rates and term weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int, int], float]
"""(step from 0, steps in all) -> value."""


def constant(value: float) -> Schedule:
    """The same at every step."""
    return lambda t, steps: value


def falling(start: float, end: float) -> Schedule:
    """From `start` to `end` on a logarithmic scale along half a cosine: slow, fast, slow."""

    def value(t: int, steps: int) -> float:
        return end * (start / end) ** (0.5 * (1 + math.cos(math.pi * t / max(1, steps))))

    return value


def cosine(peak: float, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Linear rise over `warmup` steps, then half a cosine from `peak` down to `floor`."""

    def value(t: int, steps: int) -> float:
        if t < warmup:
            return peak * (t + 1) / (warmup + 1)
        share = (t - warmup) / max(1, steps - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))

    return value


def step_decay(start: float, *, at: Sequence[float], factor: float) -> Schedule:
    """`start`, multiplied by `factor` at each share of the run in `at`."""
    return lambda t, steps: start * factor ** sum(t >= share * steps for share in at)


def geometric(start: float, end: float) -> Schedule:
    """From `start` to `end`, by the same factor at every step."""
    return lambda t, steps: start * (end / start) ** (t / max(1, steps - 1))


def as_schedule(value: float | Schedule) -> Schedule:
    """A number becomes a constant schedule."""
    return value if callable(value) else constant(float(value))
