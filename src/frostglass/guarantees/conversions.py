"""Between the notions of differential privacy of a Gaussian mechanism: GDP, zCDP, RDP and (epsilon, delta).

Sources: Dong, Roth, Su 2022 (Gaussian differential privacy, corollary 2.13); Bun, Steinke 2016 (zCDP, propositions 1.3
and 1.6); Mironov 2017 (RDP, proposition 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from frostglass.core.errors import BadInput
from frostglass.guarantees.domain import SENSITIVITY, Adjacency, check

ORDERS: tuple[float, ...] = tuple(1 + x / 20 for x in range(1, 200)) + tuple(range(11, 65)) + (128, 256, 512, 1024)
"""Renyi orders that are tried; the best one counts."""

LARGEST_EPSILON = 1e12


def gdp_mu(noise_multiplier: float, steps: int = 1, adjacency: Adjacency = "add_remove") -> float:
    """mu of `steps` full-batch Gaussian mechanisms: sqrt(T) Delta / s, with s = noise_multiplier x clipping norm.

    Raises:
        BadInput: no noise, no step, or an unknown adjacency.
    """
    check(noise_multiplier=noise_multiplier, steps=steps, adjacency=adjacency)
    return math.sqrt(steps) * SENSITIVITY[adjacency] / noise_multiplier


def compose_gdp(mus: Iterable[float]) -> float:
    """mu of several Gaussian mechanisms together: sqrt(sum mu_i^2)."""
    return math.sqrt(math.fsum(mu * mu for mu in mus))


def gdp_delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2), in logarithms where e^eps overflows.

    Raises:
        BadInput: epsilon is negative, or mu is not above 0.
    """
    check(epsilon=epsilon, noise_multiplier=mu)
    first = float(norm.logcdf(-epsilon / mu + mu / 2))
    second = epsilon + float(norm.logcdf(-epsilon / mu - mu / 2))
    return max(0.0, -math.exp(first) * math.expm1(min(0.0, second - first)))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon >= 0 with delta(epsilon) <= delta.

    Raises:
        BadInput: delta outside (0, 1), or mu is not above 0.
    """
    check(delta=delta, noise_multiplier=mu)
    if gdp_delta(mu, 0.0) <= delta:
        return 0.0
    high = mu * mu / 2 + mu * (math.sqrt(2 * math.log(1 / delta)) + 1) + 1  # zCDP's epsilon is above it
    return float(brentq(lambda e: gdp_delta(mu, e) - delta, 0.0, high, xtol=1e-12 * high, rtol=1e-12))


def zcdp_rho(mu: float) -> float:
    """rho = mu^2 / 2 of a mu-GDP Gaussian mechanism."""
    return mu * mu / 2


def zcdp_epsilon(rho: float, delta: float) -> float:
    """epsilon = rho + 2 sqrt(rho ln(1/delta)): simple, and above the exact one.

    Raises:
        BadInput: delta outside (0, 1).
    """
    check(delta=delta, epsilon=rho)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def rdp_epsilon(rho: float, delta: float, orders: Sequence[float] = ORDERS) -> float:
    """The best (epsilon, delta) from eps_alpha = alpha rho (Balle et al. 2020, theorem 21, as Opacus converts).

    Raises:
        BadInput: delta outside (0, 1).
    """
    check(delta=delta, epsilon=rho)
    a = np.asarray(orders, dtype=float)
    found = a * rho + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    return float(max(0.0, found.min()))


def classical_noise(sensitivity: float, epsilon: float, delta: float) -> float:
    """s = Delta sqrt(2 ln(1.25/delta)) / eps, which its proof allows for epsilon < 1 only.

    Raises:
        BadInput: epsilon or sensitivity not above 0, or delta outside (0, 1).
    """
    for name, value in (("epsilon", epsilon), ("sensitivity", sensitivity)):
        if not (value > 0 and math.isfinite(value)):
            raise BadInput(f"{name}: {value:g} must be above 0 and finite.")
    check(delta=delta)
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
