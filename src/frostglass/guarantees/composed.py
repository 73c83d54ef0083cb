"""Many sampled Gaussian steps as one privacy loss, composed numerically (Gopi et al. 2021) by Opacus.

A privacy loss is log P / Q under P; the losses of steps add up, so that their distributions are convolved on a grid.
From the curve delta(epsilon) of the sum follows what `rero.subsampled` simulates: gamma = inf over epsilon of e^epsilon
kappa + delta(epsilon). It takes as long for a million steps as a simulation for a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, ndtr

from frostglass.core.opacus_import import import_opacus
from frostglass.guarantees.accounting import quiet
from frostglass.guarantees.domain import SENSITIVITY, Adjacency, check

EPSILON_ERROR = 0.01
"""Error in epsilon that the grid is made for; bounds are taken at its far end."""
MOST_POINTS = 1 << 23
"""Of a grid: half a minute and a gigabyte."""
NOISE = 0.3, 100.0
"""Noise, in sensitivities, for which Opacus's grids are made."""
LEAST_KAPPA = 1e-8
"""Below it the rounding of the convolution is felt."""
_FINE, _MOST = 16, 1 << 18
"""Points of the quadrature to a standard deviation, and at the most: with so little noise no order is of use."""


def composed_gammas(
    kappas: Sequence[float], noise_multiplier: float, steps: int, rate: float, adjacency: Adjacency = "add_remove"
) -> list[float] | None:
    """gamma at each kappa, from above by about 1 %; None where no grid is large or fine enough.

    Args:
        kappas: levels in (0, 1).
        noise_multiplier: sigma in clipping norms.
        steps: T.
        rate: q, the probability with which the target takes part in a step, below 1.
        adjacency: as in `rero.subsampled`.

    Raises:
        BadInput: a parameter that is out of range.
    """
    check(noise_multiplier=noise_multiplier, steps=steps, rate=rate, adjacency=adjacency)
    for kappa in kappas:
        check(kappa=kappa)
    if not NOISE[0] <= noise_multiplier / SENSITIVITY[adjacency] <= NOISE[1] or min(kappas) < LEAST_KAPPA:
        return None
    import_opacus()
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    if adjacency == "replace_one":
        pair: Any = ExchangedLoss(noise_multiplier, rate)
    else:
        pair = PoissonSubsampledGaussianPRV(rate, noise_multiplier)
    error = min(kappas) / 1000
    try:
        found = composed(pair, steps, EPSILON_ERROR, error, MOST_POINTS)
    except (OverflowError, ValueError, RuntimeError):
        return None
    if found is None:
        return None
    loss, share = found.domain.ts, np.maximum(found.pmf, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        above, weighed = (np.cumsum(x[::-1])[::-1] for x in (share, share * np.exp(-loss)))
        delta = above - np.exp(loss) * weighed + error
        curves = [np.exp(loss + EPSILON_ERROR) * kappa + delta for kappa in kappas]
    return [min(1.0, max(k, float(np.nanmin(c)))) for k, c in zip(kappas, curves, strict=True)]


def composed(pair: Any, steps: int, epsilon_error: float, delta_error: float, most: int | None = None) -> Any:
    """The privacy loss of `steps` steps, as Opacus's `DiscretePRV`; None if its grid had more than `most` points.

    Args:
        pair: of one step, as Opacus wants it (`ExchangedLoss`, `PoissonSubsampledGaussianPRV`).
        steps: that are composed.
        epsilon_error, delta_error: what the grid may be off by.
        most: None for no limit.
    """
    import_opacus()
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import TruncatedPrivacyRandomVariable, compose_heterogeneous, discretize

    with quiet(), np.errstate(all="ignore"):
        domain = PRVAccountant()._get_domain([pair], [steps], epsilon_error, delta_error)
        if most is not None and domain.size > most:
            return None
        cut = TruncatedPrivacyRandomVariable(pair, domain.t_min, domain.t_max)
        return compose_heterogeneous([discretize(cut, domain)], [steps])


class ExchangedLoss:
    """The privacy loss log P / Q of one step under P (see `exchange`), as Opacus wants it; odd in x, and grows."""

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
