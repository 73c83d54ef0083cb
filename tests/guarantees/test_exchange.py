"""Epsilon where a sampled unit is exchanged for another: against one step in closed form, limits, and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import ndtr

from frostglass.core.errors import BadInput
from frostglass.guarantees.accounting import accounted_epsilon
from frostglass.guarantees.composed import ExchangedLoss
from frostglass.guarantees.exchange import exchanged_epsilon
from frostglass.guarantees.summary import Setting, epsilons

PAIRS = [(1.0, 0.01), (1.0, 0.1), (0.5, 0.3), (2.0, 0.5), (1.0, 0.9)]


def loss(x: float, sigma: float, q: float) -> float:
    above = [np.logaddexp(math.log1p(-q), math.log(q) + (2 * s * x - 1) / (2 * sigma**2)) for s in (1, -1)]
    return float(above[0] - above[1])


def exact(sigma: float, q: float, delta: float) -> float:
    """Of one step, by the threshold on x."""

    def beyond(x: float, at: int) -> float:
        return float((1 - q) * ndtr(-x / sigma) + q * ndtr((at - x) / sigma))

    def excess(epsilon: float) -> float:
        x = brentq(lambda x: loss(x, sigma, q) - epsilon, -1e4, 1e4)
        return beyond(x, 1) - math.exp(epsilon) * beyond(x, -1) - delta

    return float(brentq(excess, 0, 60))


@pytest.mark.parametrize(("sigma", "q"), PAIRS)
def test_one_step_is_that_of_the_closed_form(sigma: float, q: float) -> None:
    wanted = exact(sigma, q, 1e-5)
    numerical = exchanged_epsilon(sigma, steps=1, rate=q, accountant="prv")
    assert wanted <= numerical <= wanted + 0.02
    assert wanted <= exchanged_epsilon(sigma, steps=1, rate=q) <= wanted + 1


@pytest.mark.parametrize(("sigma", "q"), PAIRS)
def test_the_privacy_loss_has_the_distribution_of_drawn_ones(sigma: float, q: float) -> None:
    made = np.random.default_rng(0)
    x = sigma * made.normal(size=20_000) + (made.random(20_000) < q)
    losses = np.array([loss(v, sigma, q) for v in x])
    levels = np.quantile(losses, [0.01, 0.2, 0.5, 0.8, 0.99])
    assert ExchangedLoss(sigma, q).cdf(levels) == pytest.approx([0.01, 0.2, 0.5, 0.8, 0.99], abs=0.012)
    # E_P[(P/Q)^2] is the divergence of order 3, E_P of e^(2 loss)
    if sigma >= 1:
        assert np.exp(2 * losses).mean() == pytest.approx(math.exp(2 * ExchangedLoss(sigma, q).rdp(3.0)), rel=0.2)


def test_many_steps_are_below_their_renyi_account_and_above_one_step() -> None:
    numerical = exchanged_epsilon(1.0, steps=100, rate=0.01, accountant="prv")
    assert numerical == pytest.approx(0.905, abs=0.01)  # .895 by composing discrete losses; half the noise gives 6.47
    assert exact(1.0, 0.01, 1e-5) < numerical < exchanged_epsilon(1.0, steps=100, rate=0.01)


def test_where_all_take_part_it_is_half_the_noise() -> None:
    for accountant in ("rdp", "prv"):
        near = exchanged_epsilon(2.0, steps=10, rate=1 - 1e-9, accountant=accountant)  # type: ignore[arg-type]
        assert near == pytest.approx(accounted_epsilon(1.0, steps=10, accountant=accountant), rel=1e-3)  # type: ignore[arg-type]


def test_exchanging_costs_more_than_removing_and_at_most_both() -> None:
    """Exchange is removal and addition: (2 epsilon, (1 + e^epsilon) delta)."""
    single = accounted_epsilon(1.5, steps=50, rate=0.05, delta=1e-6, accountant="prv")
    both = exchanged_epsilon(1.5, steps=50, rate=0.05, delta=(1 + math.exp(single)) * 1e-6, accountant="prv")
    assert both <= 2 * single + 0.03
    assert exchanged_epsilon(1.5, steps=50, rate=0.05, delta=1e-6, accountant="prv") >= single - 0.02


@pytest.mark.parametrize("sigma", [1e-3, 0.05, 50.0, 1e4])
def test_far_from_a_useful_noise_it_is_a_number_or_left_out(sigma: float) -> None:
    found = epsilons(Setting(sigma, 100, 0.01, 1e-5, "replace_one"))
    assert set(found) <= {"RDP", "PRV, Opacus"}
    assert all(math.isfinite(v) and v >= 0 for v in found.values())


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(BadInput, match="rate"):
        exchanged_epsilon(1.0, steps=1, rate=1.5)
