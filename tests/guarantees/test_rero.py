"""Reconstruction robustness: published values, order of the bounds, and simulation against the closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.guarantees import rero

RNG = Rng.from_seed(0, "rero")


@pytest.mark.parametrize(
    ("sigma", "steps", "gammas"),
    [(1, 1, (0.389, 0.092, 0.018)), (2, 10, (0.618, 0.228, 0.066)), (4, 100, (0.8885, 0.569, 0.278))],
)
def test_closed_form(sigma: float, steps: int, gammas: tuple[float, ...]) -> None:
    for kappa, gamma in zip((0.1, 0.01, 0.001), gammas, strict=True):
        assert rero.gaussian(kappa, sigma, steps) == pytest.approx(gamma, abs=5e-4)


@pytest.mark.parametrize(("sigma", "steps", "bounds"), [(1, 1, (0.519, 0.126, 0.025)), (2, 10, (0.853, 0.348, 0.102))])
def test_renyi_bound_is_loose_by_up_to_1_6(sigma: float, steps: int, bounds: tuple[float, ...]) -> None:
    for kappa, bound in zip((0.1, 0.01, 0.001), bounds, strict=True):
        assert rero.rdp(kappa, sigma, steps) == pytest.approx(bound, abs=5e-4)
        assert 1 <= rero.rdp(kappa, sigma, steps) / rero.gaussian(kappa, sigma, steps) < 1.65


@pytest.mark.parametrize(("kappa", "sigma", "steps"), [(0.1, 2, 1), (0.01, 1, 1), (0.1, 4, 10)])
def test_simulation_agrees_with_the_closed_form(kappa: float, sigma: float, steps: int) -> None:
    """Within three of its own standard errors, for eight seeds; and these errors are of the right size."""
    exact = rero.gaussian(kappa, sigma, steps)
    found = [rero.subsampled([kappa], sigma, steps, 1.0, RNG.at("agree", i), samples=40_000)[0] for i in range(8)]
    scores = [(e.gamma - exact) / e.standard_error for e in found]
    assert max(map(abs, scores)) < 3.5
    assert 0.3 < float(np.std(scores)) < 2.0


@pytest.mark.parametrize(
    ("rate", "steps", "tenth", "hundredth"),
    [
        (0.01, 100, (0.127, 0.129), (0.0145, 0.0155)),
        (0.1, 100, (0.469, 0.470), (0.146, 0.147)),
        pytest.param(0.01, 1000, (0.194, 0.195), (0.028, 0.0292), marks=pytest.mark.slow),  # exact: .1942, .0291
    ],
)
def test_subsampled_values(rate: float, steps: int, tenth: tuple[float, float], hundredth: tuple[float, float]) -> None:
    found = rero.subsampled([0.1, 0.01], 1.0, steps, rate, RNG, samples=100_000)
    for estimate, (low, high) in zip(found, (tenth, hundredth), strict=True):
        slack = 5e-4 + 3 * estimate.standard_error
        assert low - slack <= estimate.gamma <= high + slack
        assert estimate.standard_error < 0.01 * estimate.gamma + 1e-3


def test_subsampled_is_the_dual_of_opacus_accounting() -> None:
    """gamma = inf over epsilon of e^eps kappa + delta(eps), with delta by Opacus's PRV: another road altogether."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(1.0, 0.1, 20)]
    curve = accountant._get_dprv(eps_error=0.01, delta_error=1e-9)
    for kappa in (0.1, 0.01):
        dual = minimize_scalar(
            lambda e, k=kappa: k * math.exp(e) + curve.compute_delta_estimate(e), bounds=(0, 8), method="bounded"
        ).fun
        found = rero.subsampled([kappa], 1.0, 20, 0.1, RNG.at("dual"), samples=200_000)[0]
        assert found.gamma == pytest.approx(dual, abs=3.5 * found.standard_error + 0.002 * dual)


def test_simulation_follows_from_its_rng_alone() -> None:
    def run(key: int) -> list[rero.Estimate]:
        return rero.subsampled([0.1, 0.001], 1.0, 5, 0.5, RNG.at(key), samples=60_000)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_less_sampling_and_more_noise_leak_less_and_replace_one_counts_twice() -> None:
    def gamma(sigma: float = 1.0, rate: float = 0.5, **more: str) -> float:
        return rero.subsampled([0.05], sigma, 4, rate, RNG, samples=50_000, **more)[0].gamma  # type: ignore[arg-type]

    assert gamma(rate=0.1) < gamma(rate=0.5) < gamma(rate=1.0)
    assert gamma(sigma=2.0) < gamma(sigma=1.0) < gamma(adjacency="replace_one")
    assert gamma(rate=1.0, adjacency="replace_one") == gamma(rate=1.0, sigma=0.5)
    assert rero.gaussian(0.05, 2.0, adjacency="replace_one") == rero.gaussian(0.05, 1.0)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "gammas"),
    [
        (1.0, 0.1, 1, (0.0198, 0.3635, 0.5681, 0.9322)),  # by integration
        (0.5, 0.1, 4, (0.1063, 0.5589, 0.7536, 0.9914)),  # by convolution of the ratios' distributions
    ],
)
def test_an_image_exchanged_under_sampling(sigma: float, rate: float, steps: int, gammas: tuple[float, ...]) -> None:
    """Half the noise is no bound there: it gives .547 and .672 where an attack reaches .568 and .754 (kappa .5)."""
    found = rero.subsampled([0.01, 0.3, 0.5, 0.9], sigma, steps, rate, RNG, adjacency="replace_one", samples=100_000)
    for estimate, exact in zip(found, gammas, strict=True):
        assert estimate.gamma == pytest.approx(exact, abs=4 * estimate.standard_error + 5e-4)


def test_no_attack_is_bounded_below_guessing() -> None:
    """Where no sample reaches the threshold, nothing is known but kappa and the number of samples."""
    for kappa in (1e-9, 1e-7, 1 - 1e-9):
        found = rero.subsampled([kappa], 20.0, 1, 0.5, RNG, samples=1000)[0]
        assert found.gamma >= kappa
        assert found.upper >= rero.gaussian(kappa, 20.0) or kappa > 0.5
    rare = rero.subsampled([1e-3], 1.0, 1, 0.5, RNG, samples=1000)[0]
    assert rare.standard_error >= math.sqrt(1000 * rare.gamma) / 1000, "a handful of samples says no more than counting"


def test_bounds_by_epsilon() -> None:
    assert rero.pure_dp(0.01, math.log(5)) == pytest.approx(0.05)
    assert rero.pure_dp(0.5, 2e8) == 1.0
    assert rero.approximate_dp(0.01, math.log(5), 1e-5) == pytest.approx(0.05001)
    assert rero.approximate_dp(0.5, 1.0, 1e-5) == pytest.approx(1 - math.exp(-1) * (0.5 - 1e-5))
    from frostglass.guarantees.conversions import gdp_delta

    for epsilon in (0.1, 1.0, 3.0):  # every (eps, delta) of a mechanism bounds it, none below the exact value
        assert rero.approximate_dp(0.1, epsilon, gdp_delta(1.0, epsilon)) >= rero.gaussian(0.1, 1.0) - 1e-12


def test_extremes_neither_overflow_nor_leave_the_unit_interval() -> None:
    assert rero.gaussian(1e-9, 1e-6) == 1.0
    assert rero.rdp(1e-9, 1e-6) == 1.0
    wide = rero.subsampled([0.5, 1e-4], 0.01, 2, 0.5, RNG, samples=2000)
    assert all(0 <= e.gamma <= e.upper <= 1 for e in wide)


@pytest.mark.parametrize("kappa", [0.0, 1.0, -0.1, math.nan])
def test_kappa_outside_is_refused(kappa: float) -> None:
    for call in (
        lambda: rero.gaussian(kappa, 1.0),
        lambda: rero.pure_dp(kappa, 1.0),
        lambda: rero.rdp(kappa, 1.0),
        lambda: rero.subsampled([0.1, kappa], 1.0, 1, 0.1, RNG),
    ):
        with pytest.raises(BadInput, match=r"kappa: .* must be strictly between 0 and 1"):
            call()


def test_all_that_is_wrong_is_said_together() -> None:
    with pytest.raises(BadInput) as wrong:
        rero.subsampled([0.1], 0.0, 0, 1.5, RNG)
    assert [p.split(":")[0] for p in wrong.value.problems] == ["noise multiplier", "steps", "sampling rate"]
