"""Notions of privacy agree with the published numbers, with each other, and with Opacus."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from frostglass.core.errors import BadInput
from frostglass.guarantees import conversions as to
from frostglass.guarantees.accounting import accounted_epsilon, noise_for_epsilon


@pytest.mark.parametrize(("mu", "epsilon", "delta"), [(1, 1, 0.126937), (0.5, 1, 0.0068296), (2, 3, 0.183813)])
def test_delta_of_a_gaussian_mechanism(mu: float, epsilon: float, delta: float) -> None:
    assert to.gdp_delta(mu, epsilon) == pytest.approx(delta, abs=6e-7)

    def excess(x: float) -> float:  # the definition: the integral of (P - e^eps Q)+
        return max(0.0, float(norm.pdf(x, mu) - math.exp(epsilon) * norm.pdf(x)))

    edge = epsilon / mu + mu / 2
    assert to.gdp_delta(mu, epsilon) == pytest.approx(quad(excess, edge, edge + 30)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("mu", "exact", "zcdp"), [(0.5, 1.993, 2.524), (1, 4.377, 5.299), (2, 9.997, 11.597), (5, 33.10, 36.49)]
)
def test_epsilon_at_delta(mu: float, exact: float, zcdp: float) -> None:
    """mu = 5: 33.1037 to 60 digits; 33.82, found in notes, leaves out the second term of delta(epsilon)."""
    digits = 5e-4 if mu < 5 else 5e-3
    assert to.gdp_epsilon(mu, 1e-5) == pytest.approx(exact, abs=digits)
    assert to.zcdp_epsilon(to.zcdp_rho(mu), 1e-5) == pytest.approx(zcdp, abs=digits)
    assert to.gdp_epsilon(mu, 1e-5) <= to.rdp_epsilon(to.zcdp_rho(mu), 1e-5) <= to.zcdp_epsilon(to.zcdp_rho(mu), 1e-5)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 3.0, 40.0, 1e3, 2e4])
def test_epsilon_and_delta_are_inverse_over_many_orders(mu: float) -> None:
    for delta in (1e-9, 1e-5, 1e-2):
        epsilon = to.gdp_epsilon(mu, delta)
        assert math.isfinite(epsilon)
        if epsilon > 0:
            assert to.gdp_delta(mu, epsilon) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 10), (4.0, 100), (0.7, 3)])
def test_full_batch_steps_agree_with_opacus_to_one_percent(sigma: float, steps: int) -> None:
    mu = to.gdp_mu(sigma, steps)
    exact = to.gdp_epsilon(mu, 1e-5)
    assert accounted_epsilon(sigma, steps=steps, accountant="prv") == pytest.approx(exact, rel=0.01)
    renyi = to.rdp_epsilon(to.zcdp_rho(mu), 1e-5)
    assert accounted_epsilon(sigma, steps=steps, accountant="rdp") == pytest.approx(renyi, rel=0.01)


def test_noise_for_a_target_spends_that_target() -> None:
    sigma = noise_for_epsilon(3.0, steps=100, rate=0.05, delta=1e-5)
    assert accounted_epsilon(sigma, steps=100, rate=0.05, delta=1e-5) == pytest.approx(3.0, rel=0.01)


def test_composition_and_adjacency() -> None:
    assert to.gdp_mu(2.0, 16) == pytest.approx(to.compose_gdp([0.5] * 16))
    assert to.gdp_mu(2.0, 16, "replace_one") == 2 * to.gdp_mu(2.0, 16)


def test_the_classical_formula() -> None:
    assert to.classical_noise(1e-4, 10, 1e-5) == pytest.approx(4.845e-05, abs=5e-9)
    below = to.classical_noise(1.0, 0.5, 1e-5)
    assert to.gdp_epsilon(1 / below, 1e-5) < 0.5, "below 1 the classical noise is enough"
    above = to.classical_noise(1.0, 30, 1e-5)
    assert to.gdp_epsilon(1 / above, 1e-5) > 30, "far above 1 it is not"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: to.gdp_mu(0.0), "noise multiplier: 0 must be above 0"),
        (lambda: to.gdp_mu(math.nan), "noise multiplier"),
        (lambda: to.gdp_mu(1.0, 0), "steps: 0 must be at least 1"),
        (lambda: to.gdp_mu(1.0, 1, "swap"), "adjacency: 'swap' is not known"),  # type: ignore[arg-type]
        (lambda: to.gdp_epsilon(1.0, 0.0), "delta: 0 must be strictly between"),
        (lambda: to.gdp_delta(1.0, -1.0), "epsilon: -1 must be at least 0"),
        (lambda: accounted_epsilon(1.0, steps=1, rate=1.5), "sampling rate: 1.5 must be above 0 and at most 1"),
        (lambda: to.classical_noise(1.0, 0.0, 1e-5), "epsilon: 0 must be above 0"),
        (lambda: to.classical_noise(-1.0, 1.0, 1e-5), "sensitivity: -1 must be above 0"),
    ],
)
def test_what_no_theorem_is_about_is_refused(call: object, sentence: str) -> None:
    with pytest.raises(BadInput) as wrong:
        call()  # type: ignore[operator]
    assert len(wrong.value.problems) == 1
    assert sentence in wrong.value.problems[0]


def test_orders_are_renyi_orders() -> None:
    assert min(to.ORDERS) > 1
    assert np.all(np.diff(to.ORDERS) > 0)
