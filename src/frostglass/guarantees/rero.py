"""Reconstruction robustness: the highest probability with which any attack can reconstruct a target.

A mechanism is (eta, gamma)-robust if no attack comes within error eta of the target with a probability above gamma;
kappa is what the best guess without access reaches (1/N for N equally likely candidates). Sources: Balle, Cherubin,
Hayes 2022 (pure DP, RDP); Hayes, Mahloujifar, Balle 2023 (tight, by the dominating pair); Kaissis et al. 2023,
2307.03928 (gamma = 1 - f(kappa) of the trade-off function f).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from frostglass.core.randomness import Rng
from frostglass.guarantees.conversions import ORDERS, gdp_mu, zcdp_rho
from frostglass.guarantees.domain import SENSITIVITY, Adjacency, check

CHUNK = 50_000
"""Samples that are simulated at once, so that they stay in the cache."""

SMALL_KAPPA = 1e-3
"""At and below it, a million samples are the least."""

FEW = 100
"""Samples above the threshold below which an estimate's own spread is not known, and counting bounds its error."""


def gaussian(kappa: float, noise_multiplier: float, steps: int = 1, adjacency: Adjacency = "add_remove") -> float:
    """gamma = Phi(Phi^-1(kappa) + sqrt(T) / sigma) of `steps` full-batch Gaussian releases: exact.

    Args:
        kappa: success of the best guess without access, in (0, 1).
        noise_multiplier: sigma, the standard deviation of the noise in clipping norms.
        steps: releases T that all hold the target.
        adjacency: "replace_one" doubles the sensitivity (sigma / 2).

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(kappa=kappa)
    return gdp(kappa, gdp_mu(noise_multiplier, steps, adjacency))


def gdp(kappa: float, mu: float) -> float:
    """gamma = Phi(Phi^-1(kappa) + mu) of any mu-GDP mechanism.

    Raises:
        BadInput: kappa outside (0, 1), or mu is not above 0.
    """
    check(kappa=kappa, noise_multiplier=mu)
    return float(norm.cdf(norm.ppf(kappa) + mu))


def pure_dp(kappa: float, epsilon: float) -> float:
    """gamma <= min(1, kappa e^eps).

    Raises:
        BadInput: kappa outside (0, 1), or a negative epsilon.
    """
    check(kappa=kappa, epsilon=epsilon)
    return math.exp(min(0.0, math.log(kappa) + epsilon))


def approximate_dp(kappa: float, epsilon: float, delta: float) -> float:
    """gamma <= min(1, e^eps kappa + delta, 1 - e^-eps (1 - delta - kappa)): the trade-off function of (eps, delta)-DP.

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(kappa=kappa, epsilon=epsilon, delta=delta)
    other = 1 - math.exp(-epsilon) * max(0.0, 1 - delta - kappa)
    return min(1.0, pure_dp(kappa, epsilon) + delta, other)


def rdp(
    kappa: float,
    noise_multiplier: float,
    steps: int = 1,
    adjacency: Adjacency = "add_remove",
    orders: Sequence[float] = ORDERS,
) -> float:
    """min over alpha of (kappa e^{eps_alpha})^{(alpha-1)/alpha}: valid, and up to 1.6 times the exact value.

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(kappa=kappa)
    rho = zcdp_rho(gdp_mu(noise_multiplier, steps, adjacency))
    a = np.asarray(orders, dtype=float)
    exponent = (a - 1) / a * (math.log(kappa) + a * rho)
    return float(math.exp(min(0.0, exponent.min())))


@dataclass(frozen=True)
class Estimate:
    """A bound that was simulated.

    Args:
        gamma: the estimate.
        standard_error: of it.
        samples: simulated.
    """

    gamma: float
    standard_error: float
    samples: int

    @property
    def upper(self) -> float:
        """Three standard errors above, at most 1: what a verdict compares with."""
        return min(1.0, self.gamma + 3 * self.standard_error)


def subsampled(
    kappas: Sequence[float],
    noise_multiplier: float,
    steps: int,
    rate: float,
    rng: Rng,
    *,
    adjacency: Adjacency = "add_remove",
    samples: int | None = None,
    tick: Callable[[int], object] = lambda runs: None,
) -> list[Estimate]:
    """gamma under Poisson sampling by Monte Carlo on the one-dimensional dominating pair, one estimate a kappa.

    P = [(1-q) N(0, sigma^2) + q N(1, sigma^2)]^T. Q = N(0, sigma^2)^T where the target is added or removed, and
    [(1-q) N(0, sigma^2) + q N(-1, sigma^2)]^T where it is exchanged for another (Schuchardt et al. 2024): sigma / 2 is
    no bound then, as what moves the other way is sampled too. The best test at level kappa accepts where the
    log-likelihood ratio L of P to Q exceeds a threshold. Only P is sampled: kappa(t) = E_P[e^-L; L > t] has a much
    smaller variance than counting under Q, where the event is rare.

    Args:
        kappas: levels in (0, 1); all are read off one simulation.
        noise_multiplier: sigma in clipping norms.
        steps: T.
        rate: q, the probability with which the target takes part in a step.
        rng: draws follow from it alone.
        adjacency: as in `gaussian`.
        samples: simulated runs; None: `samples_for`.
        tick: told of the runs that have been simulated, some thousands at a time.

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(noise_multiplier=noise_multiplier, steps=steps, rate=rate, adjacency=adjacency)
    for kappa in kappas:
        check(kappa=kappa)
    parts = _log_ratios(noise_multiplier, steps, rate, adjacency, rng, samples or samples_for(kappas))
    found = []
    for part in parts:
        found.append(part)
        tick(len(part))
    ratios = np.sort(np.concatenate(found))[::-1]
    return [_read_off(ratios, kappa) for kappa in kappas]


def samples_for(kappas: Sequence[float]) -> int:
    """Runs that `subsampled` simulates: 200,000, or 1,000,000 if a kappa is at or below 1e-3."""
    return 1_000_000 if min(kappas) <= SMALL_KAPPA else 200_000


def _log_ratios(
    sigma: float, steps: int, rate: float, adjacency: Adjacency, rng: Rng, samples: int
) -> Iterator[np.ndarray]:
    """[samples] log-likelihood ratios of whole runs drawn from P, in parts."""
    if rate == 1:
        sigma /= SENSITIVITY[adjacency]
    for start in range(0, samples, CHUNK):
        size = min(CHUNK, samples - start)
        draw = rng.at("rero", start).numpy()
        total = np.zeros(size)
        for _ in range(steps):
            x = sigma * draw.standard_normal(size)
            x += 1.0 if rate == 1 else draw.random(size) < rate
            total += _above_empty(x, sigma, rate)
            if rate < 1 and adjacency == "replace_one":
                total -= _above_empty(-x, sigma, rate)
        yield total


def _above_empty(x: np.ndarray, sigma: float, rate: float) -> np.ndarray:
    """Logarithm of the density of (1-q) N(0, sigma^2) + q N(1, sigma^2) at `x` over that of N(0, sigma^2)."""
    exponent = (2 * x - 1) / (2 * sigma * sigma)
    return exponent if rate == 1 else np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)


def _read_off(ratios: np.ndarray, kappa: float) -> Estimate:
    """From ratios in falling order; the slope of gamma in kappa is the likelihood ratio at the threshold.

    A test may leave its input alone, so gamma is at least kappa, also where no sample lies beyond the threshold.
    """
    n = len(ratios)
    weights = np.exp(np.minimum(-ratios, 700.0))  # the tail that overflows lies beyond every kappa
    level = np.cumsum(weights) / n
    count = int(np.searchsorted(level, kappa, side="right"))
    gamma = count / n
    threshold = float(ratios[min(count, n - 1)])
    inside = np.arange(n) < count
    # the estimate's linearisation: 1{L > t} - e^t (e^-L 1{L > t} - kappa)
    influence = np.where(inside, 1 - np.exp(np.minimum(threshold - ratios, 0.0)), 0.0)
    error = float(influence.std(ddof=1) / math.sqrt(n))
    return Estimate(max(kappa, gamma), max(error, math.sqrt(count + 1) / n) if count < FEW else error, n)
