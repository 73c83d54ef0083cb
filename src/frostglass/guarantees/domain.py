"""The range that each parameter of a bound must lie in, and the sentence when it does not."""

from __future__ import annotations

import math
from typing import Literal

from frostglass.core.errors import BadInput

Adjacency = Literal["add_remove", "replace_one"]
"""What may differ between two neighbouring data sets: one more unit of data, or one unit exchanged for another."""

SENSITIVITY: dict[str, float] = {"add_remove": 1.0, "replace_one": 2.0}
"""L2 sensitivity of a clipped sum, in clipping norms."""

LEAST_NOISE = 1e-15
"""Noise multiplier below which epsilon leaves the range of floating point; gamma has long been 1."""


def check(
    *,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    rate: float | None = None,
    kappa: float | None = None,
    delta: float | None = None,
    epsilon: float | None = None,
    adjacency: str | None = None,
) -> None:
    """Refuses what no theorem is about; what is None is not looked at.

    Raises:
        BadInput: every parameter that is out of range, a sentence each.
    """
    found = []
    if noise_multiplier is not None and not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
        found.append(f"noise multiplier: {noise_multiplier:g} must be above 0 and finite; without noise nothing holds.")
    if steps is not None and steps < 1:
        found.append(f"steps: {steps} must be at least 1; count every release.")
    if rate is not None and not 0 < rate <= 1:
        found.append(f"sampling rate: {rate:g} must be above 0 and at most 1; give batch size / data set size.")
    if kappa is not None and not 0 < kappa < 1:
        found.append(f"kappa: {kappa:g} must be strictly between 0 and 1; for N candidates it is 1 / N.")
    if delta is not None and not 0 < delta < 1:
        found.append(f"delta: {delta:g} must be strictly between 0 and 1; well below 1 / (number of records).")
    if epsilon is not None and not (epsilon >= 0 and not math.isnan(epsilon)):
        found.append(f"epsilon: {epsilon:g} must be at least 0.")
    if adjacency is not None and adjacency not in SENSITIVITY:
        found.append(f"adjacency: {adjacency!r} is not known; give one of {', '.join(SENSITIVITY)}.")
    if found:
        raise BadInput(found)
