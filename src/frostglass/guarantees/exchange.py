"""Epsilon of sampled Gaussian steps where one unit is exchanged for another, which Opacus has no account of.

A step holds the unit with probability q. With x along the direction in which the two units differ most, its output is

    P = (1 - q) N(0, sigma^2) + q N(1, sigma^2)  against  Q = (1 - q) N(0, sigma^2) + q N(-1, sigma^2)

(Schuchardt et al. 2024), a pair that is its own mirror image. Half the noise, which is exact without sampling, gives an
epsilon far above this one, and in the one direction that `rero` takes it is no bound.
"""

from __future__ import annotations

import math

import numpy as np

from frostglass.guarantees.accounting import Accountant
from frostglass.guarantees.composed import EPSILON_ERROR, ExchangedLoss, composed
from frostglass.guarantees.domain import check

_ORDERS = np.concatenate([np.linspace(1.05, 11, 100), np.arange(12, 64), np.geomspace(64, 512, 20)])


def exchanged_epsilon(
    noise_multiplier: float, *, steps: int, rate: float, delta: float = 1e-5, accountant: Accountant = "rdp"
) -> float:
    """epsilon at `delta` of `steps` Poisson-sampled Gaussian steps, for exchanging one unit for another.

    Args:
        noise_multiplier: standard deviation of the noise on the sum, in clipping norms.
        steps: releases that are composed.
        rate: probability with which a unit takes part in a step; below 1 (at 1 half the noise is exact).
        delta: of (epsilon, delta).
        accountant: "rdp" is an upper bound, by quadrature (Mironov 2017; conversion of Canonne et al. 2020); "prv" is
            numerical, about .01 above the optimum (Gopi et al. 2021, composed by Opacus).

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(noise_multiplier=noise_multiplier, steps=steps, rate=rate, delta=delta)
    pair = ExchangedLoss(noise_multiplier, rate)
    if accountant == "rdp":
        spent = np.array([pair.rdp(a) for a in _ORDERS]) * steps
        found = spent + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
        return max(0.0, float(found.min()))
    found = composed(pair, steps, EPSILON_ERROR, delta / 1000)
    return float(found.compute_epsilon(delta, delta / 1000, EPSILON_ERROR)[2])
