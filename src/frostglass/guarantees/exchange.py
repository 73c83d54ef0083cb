"""Epsilon of sampled Gaussian steps where one unit is exchanged for another, which Opacus has no account of.

A step holds the unit with probability q. With x along the direction in which the two units differ most, its output is

    P = (1 - q) N(0, sigma^2) + q N(1, sigma^2)  against  Q = (1 - q) N(0, sigma^2) + q N(-1, sigma^2)

(Schuchardt et al. 2024), a pair that is its own mirror image. Half the noise, which is exact without sampling, gives an
epsilon far above this one, and in the one direction that `rero` takes it is no bound.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr

from frostglass.guarantees.accounting import Accountant, quiet
from frostglass.guarantees.domain import check

_ORDERS = np.concatenate([np.linspace(1.05, 11, 100), np.arange(12, 64), np.geomspace(64, 512, 20)])
_FINE, _MOST = 16, 1 << 18
"""Points of the quadrature to a standard deviation, and at the most: with so little noise no order is of use."""


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
    pair = _Exchange(noise_multiplier, rate)
    if accountant == "rdp":
        spent = np.array([pair.rdp(a) for a in _ORDERS]) * steps
        found = spent + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
        return max(0.0, float(found.min()))
    with quiet():
        return _numerical(pair, steps, delta)


def _numerical(pair: _Exchange, steps: int, delta: float) -> float:
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import TruncatedPrivacyRandomVariable, compose_heterogeneous, discretize

    class Exchanged(PRVAccountant):  # type: ignore[misc, unused-ignore]
        def _get_dprv(self, eps_error: float, delta_error: float) -> Any:
            domain = self._get_domain([pair], [steps], eps_error, delta_error)
            cut = TruncatedPrivacyRandomVariable(pair, domain.t_min, domain.t_max)
            return compose_heterogeneous([discretize(cut, domain)], [steps])

    return float(Exchanged().get_epsilon(delta))


class _Exchange:
    """The privacy loss log P / Q of one step under P, as Opacus wants it; it grows with x and is odd in it."""

    def __init__(self, sigma: float, rate: float) -> None:
        self.sigma, self.rate = sigma, rate
        # By these Opacus finds how far its grid has to reach: that of half the noise reaches farther.
        self.noise_multiplier, self.sample_rate = sigma / 2, rate

    def cdf(self, loss: Any) -> NDArray[np.float64]:
        """P(log P / Q <= loss)."""
        b, log_a = 1 - self.rate, math.log(self.rate) - 1 / (2 * self.sigma**2)
        s = -np.abs(np.asarray(loss, np.float64))
        # With u = exp(x / sigma^2) and a = q exp(-1 / (2 sigma^2)): a u^2 + b (1 - e^s) u - a e^s = 0.
        rest = -b * np.expm1(s)
        log_u = math.log(2) + log_a + s - np.log(rest + np.hypot(rest, 2 * np.exp(log_a + s / 2)))
        x = self.sigma**2 * np.where(np.asarray(loss) > 0, -log_u, log_u)
        found: NDArray[np.float64] = b * ndtr(x / self.sigma) + self.rate * ndtr((x - 1) / self.sigma)
        return found

    def rdp(self, order: float) -> float:
        """Renyi divergence of `order` above 1, by quadrature as far as 40 standard deviations of noise."""
        sigma, share = self.sigma, math.log(self.rate)
        ends = -1 - 40 * sigma, 2 * order + 40 * sigma  # P^order Q^(1 - order) has its last bump at 2 order - 1
        points = int((ends[1] - ends[0]) / sigma * _FINE) + 1
        if points > _MOST:
            return math.inf
        x, step = np.linspace(*ends, points, retstep=True)
        none = math.log1p(-self.rate) - x**2 / (2 * sigma**2)
        p, q = (np.logaddexp(none, share - (x - at) ** 2 / (2 * sigma**2)) for at in (1.0, -1.0))
        total = logsumexp(order * p + (1 - order) * q) + math.log(step / (sigma * math.sqrt(2 * math.pi)))
        return max(0.0, float(total)) / (order - 1)
