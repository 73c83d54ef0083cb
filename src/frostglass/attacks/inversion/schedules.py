"""Numbers that change over a run: learning rates and term weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from frostglass.core.errors import BadInput

Schedule: TypeAlias = Callable[[int, int], float]
"""(step from 0, steps in all) -> value."""


def _from_0(what: str, *values: float) -> None:
    if not all(0 <= value < math.inf for value in values):
        given = ", ".join(f"{value:g}" for value in values)
        raise BadInput(f"attack: {what} of {given} is not possible; give numbers from 0.")


def constant(value: float) -> Schedule:
    """The same at every step."""
    _from_0("a rate or weight", value)
    return lambda t, steps: value


def falling(start: float, end: float) -> Schedule:
    """From `start` to `end`, both above 0, on a logarithmic scale along half a cosine: slow, fast, slow."""
    _from_0("a weight that falls", start, end)
    if not start or not end:
        raise BadInput("attack: a weight cannot fall from or to 0 on a logarithmic scale; give numbers above 0.")

    def value(t: int, steps: int) -> float:
        return end * (start / end) ** (0.5 * (1 + math.cos(math.pi * t / max(1, steps))))

    return value


def cosine(peak: float, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Linear rise over `warmup` steps, at most half of all, then half a cosine from `peak` down to `floor`."""
    _from_0("a learning rate", peak, floor)
    _from_0("a warmup", warmup)

    def value(t: int, steps: int) -> float:
        rise = min(warmup, steps // 2)
        if t < rise:
            return peak * (t + 1) / (rise + 1)
        share = (t - rise) / max(1, steps - rise)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))

    return value


def step_decay(start: float, *, at: Sequence[float], factor: float) -> Schedule:
    """`start`, multiplied by `factor` at each share of the run in `at`."""
    _from_0("a learning rate", start)
    return lambda t, steps: start * factor ** sum(t >= share * steps for share in at)


def as_schedule(value: float | Schedule) -> Schedule:
    """A number becomes a constant schedule."""
    return value if callable(value) else constant(float(value))
