"""gamma of many sampled steps, composed numerically: from above, and near what is known otherwise."""

from __future__ import annotations

import math

import pytest
from scipy.stats import norm

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.guarantees import composed, rero, summary
from frostglass.guarantees.composed import composed_gammas
from frostglass.guarantees.summary import MANY, Setting, bounds

KAPPAS = [0.1, 0.01, 0.001]
RNG = Rng.from_seed(0)


@pytest.mark.parametrize(
    ("sigma", "steps", "rate", "adjacency"),
    [
        (1.0, 20, 0.1, "add_remove"),
        (0.8, 3, 0.5, "add_remove"),
        (1.0, 20, 0.1, "replace_one"),
        (4.0, 100, 0.2, "add_remove"),
        (4.0, 100, 0.2, "replace_one"),
    ],
)
def test_it_is_what_a_simulation_comes_to(sigma: float, steps: int, rate: float, adjacency: str) -> None:
    found = composed_gammas(KAPPAS, sigma, steps, rate, adjacency)  # type: ignore[arg-type]
    simulated = rero.subsampled(KAPPAS, sigma, steps, rate, RNG, adjacency=adjacency, samples=100_000)  # type: ignore[arg-type]
    assert found is not None
    for gamma, estimate in zip(found, simulated, strict=True):
        error = 3.5 * estimate.standard_error
        assert estimate.gamma - error <= gamma <= 1.02 * estimate.gamma + error


def test_almost_sure_sampling_is_the_exact_bound_without_it() -> None:
    found = composed_gammas(KAPPAS, 20.0, 400, 1 - 1e-9)
    assert found is not None
    for kappa, gamma in zip(KAPPAS, found, strict=True):
        exact = rero.gaussian(kappa, 20.0, 400)
        assert exact <= gamma <= 1.015 * exact


def test_many_rare_draws_are_as_gaussian_as_the_central_limit_says() -> None:
    """q sqrt(T (e^(1 / sigma^2) - 1)) as mu (Bu et al. 2020), at ten thousand steps."""
    mu = 0.001 * math.sqrt(10_000 * (math.e - 1))
    found = composed_gammas([0.1, 0.01], 1.0, 10_000, 0.001)
    assert found is not None
    for kappa, gamma in zip([0.1, 0.01], found, strict=True):
        assert gamma == pytest.approx(float(norm.cdf(norm.ppf(kappa) + mu)), rel=0.03)


def test_gamma_is_between_guessing_and_certainty() -> None:
    assert composed_gammas([0.5], 100.0, 1, 1e-6)[0] == pytest.approx(0.5, rel=0.012)  # type: ignore[index]
    assert 0.98 < composed_gammas([0.1], 0.5, 2000, 0.02)[0] <= 1  # type: ignore[index]


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"steps": 0}, {"rate": 0.0}, {"kappa": 1.0}])
def test_impossible_numbers_are_refused(wrong: dict[str, float]) -> None:
    given = {"kappa": 0.1, "sigma": 1.0, "steps": 10, "rate": 0.1} | wrong
    with pytest.raises(BadInput):
        composed_gammas([given["kappa"]], given["sigma"], int(given["steps"]), given["rate"])


def test_many_releases_are_composed_and_others_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    few = bounds(Setting(1.0, MANY - 1, 0.01), [0.1], RNG, 2_000, told.append)[0]
    assert few.standard_error > 0
    assert sum(told) == 2_000
    told.clear()
    many = bounds(Setting(1.0, MANY, 0.01), [0.1], RNG, 2_000, told.append)[0]
    assert many.standard_error == 0
    assert not told
    assert many.gamma == pytest.approx(few.gamma, abs=4 * few.standard_error + 0.01 * few.gamma)
    monkeypatch.setattr(composed, "MOST_POINTS", 1000)  # no grid is small enough
    assert bounds(Setting(1.0, MANY, 0.01), [0.1], RNG, 2_000)[0].standard_error > 0
    monkeypatch.setattr(summary, "MOST_SAMPLED", MANY - 1)  # and no simulation short enough
    assert bounds(Setting(1.0, MANY, 0.01), [0.1], RNG, 2_000)[0].gamma == rero.gaussian(0.1, 1.0, MANY)


def test_a_chance_too_small_for_the_grid_is_simulated() -> None:
    assert composed_gammas([1e-9], 1.0, 1000, 0.01) is None
    assert composed_gammas([0.1], 0.2, 1000, 0.01) is None
