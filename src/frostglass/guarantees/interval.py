"""Exact intervals for a success rate (Clopper, Pearson 1934)."""

from __future__ import annotations

from scipy.stats import beta

from frostglass.core.errors import BadInput


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """(lower, upper) two-sided limits for the rate behind `successes` of `trials` independent trials.

    Raises:
        BadInput: no trial, more successes than trials, or a confidence outside (0, 1).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise BadInput(f"successes: {successes} of {trials} trials is not possible; give 0 <= successes <= trials.")
    if not 0 < confidence < 1:
        raise BadInput(f"confidence: {confidence:g} must be strictly between 0 and 1, as in 0.95.")
    tail = (1 - confidence) / 2
    x, n = successes, trials
    lower = 0.0 if x == 0 else float(beta.ppf(tail, x, n - x + 1))
    upper = 1.0 if x == n else float(beta.ppf(1 - tail, x + 1, n - x))
    return lower, upper


def zero_successes(trials: int, confidence: float = 0.95) -> float:
    """The *one-sided* upper limit after no success, 1 - (1 - confidence)^(1/n), about 3/n; two-sided is about 3.7/n.

    Raises:
        BadInput: no trial.
    """
    if trials < 1:
        raise BadInput(f"trials: {trials} must be at least 1.")
    return float(1 - (1 - confidence) ** (1 / trials))
