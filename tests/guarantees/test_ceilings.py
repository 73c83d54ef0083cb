"""Floors under the error of a reconstruction, the sensitivity of DP-InstaHide, and exact intervals."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.guarantees import summary
from frostglass.guarantees.dfil import dfil, van_trees_floor
from frostglass.guarantees.dp_instahide import PIXELS_ONLY, encoding_privacy, l1_sensitivity, l2_sensitivity
from frostglass.guarantees.interval import clopper_pearson, zero_successes
from frostglass.guarantees.psnr_ceiling import noise_for_psnr, psnr_ceiling


@pytest.mark.parametrize(
    ("dimensions", "ceilings", "sigma"),
    [
        (3072, (51.2, 31.2, 11.2), 0.0114),
        (150_528, (34.2, 14.2, -5.8), 0.00163),
        (262_144, (31.8, 11.8, -8.2), 0.00124),
    ],
)
def test_psnr_ceiling(dimensions: int, ceilings: tuple[float, ...], sigma: float) -> None:
    for noise, ceiling in zip((1e-4, 1e-3, 1e-2), ceilings, strict=True):
        assert psnr_ceiling(noise, dimensions) == pytest.approx(
            ceiling, abs=0.055
        )  # 51.146 is printed as 51.2 in the table, 31.146 as 31.2
    digits = 5e-5 if dimensions == 3072 else 5e-6
    assert noise_for_psnr(10.0, dimensions) == pytest.approx(sigma, abs=digits)


def test_the_ceiling_is_what_averaging_reaches() -> None:
    """The attacker of the formula, played: T noisy looks at one image, averaged."""
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, looks = 0.02, 50
    noise = Rng.from_seed(1).normal((looks, *image.shape)).double()
    mean = (image + sigma * image.norm() * noise).mean(0)
    reached = -10 * math.log10(float((mean - image).square().mean()))
    said = psnr_ceiling(sigma, image.numel(), observations=looks, mean_square=float(image.square().mean()))
    assert reached == pytest.approx(said, abs=0.7)


def test_ceiling_needs_noise_and_an_observation() -> None:
    with pytest.raises(BadInput, match="noise multiplier: 0"):
        psnr_ceiling(0.0, 10)
    with pytest.raises(BadInput, match="steps: 0"):
        psnr_ceiling(1.0, 10, observations=0)


def test_linear_release_attains_the_floor() -> None:
    x = torch.zeros(40, dtype=torch.float64)
    found = dfil(lambda z: z, x, 0.3, probes=None)
    assert found.unbiased_floor == pytest.approx(0.09)
    seen = x + 0.3 * Rng.from_seed(2).normal((20_000, 40)).double()
    assert float(seen.square().mean()) == pytest.approx(found.unbiased_floor, rel=0.01)


def test_hutchinson_agrees_with_the_whole_jacobian() -> None:
    weight = Rng.from_seed(3).normal((30, 12)).double()

    def encode(z: Tensor) -> Tensor:
        return torch.tanh(weight @ z)

    x = Rng.from_seed(4).normal((12,)).double()
    jacobian = torch.autograd.functional.jacobian(encode, x)
    exact = float(jacobian.square().sum()) / (0.5**2 * 12)
    assert dfil(encode, x, 0.5, probes=None).value == pytest.approx(exact, rel=1e-9)
    close = dfil(encode, x, 0.5, probes=400, rng=Rng.from_seed(5))
    assert abs(close.value - exact) < 3.5 * close.standard_error
    assert close.standard_error < 0.1 * exact
    assert dfil(encode, x, 0.5, probes=9, rng=Rng.from_seed(5)) == dfil(encode, x, 0.5, probes=9, rng=Rng.from_seed(5))


def test_gradients_are_encoders_too() -> None:
    """dFIL of a client's gradient with respect to its image."""
    model = torch.nn.Linear(6, 3).double()
    label = torch.tensor([1])

    def gradient(image: Tensor) -> Tensor:
        params = dict(model.named_parameters())

        def loss(p: dict[str, Tensor]) -> Tensor:
            out = torch.func.functional_call(model, p, (image[None],))
            return torch.nn.functional.cross_entropy(out, label)

        grads = torch.func.grad(loss)(params)
        return torch.cat([g.flatten() for g in grads.values()])

    x = torch.linspace(0, 1, 6, dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(gradient, x).square().sum() / (0.1**2 * 6)
    assert dfil(gradient, x, 0.1, probes=None).value == pytest.approx(float(exact), rel=1e-9)


def test_van_trees_is_attained_by_the_gaussian_posterior_mean() -> None:
    prior, noise = 0.5, 0.3  # x ~ N(0, 0.25), seen through N(0, 0.09): the posterior variance is the floor
    floor = van_trees_floor(1 / noise**2, 1 / prior**2)
    assert floor == pytest.approx(1 / (1 / 0.09 + 1 / 0.25))
    x = prior * Rng.from_seed(6).normal((200_000,)).double()
    seen = x + noise * Rng.from_seed(7).normal((200_000,)).double()
    guess = seen * prior**2 / (prior**2 + noise**2)
    assert float((guess - x).square().mean()) == pytest.approx(floor, rel=0.02)


@pytest.mark.parametrize(
    "call",
    [
        lambda: dfil(lambda z: z, torch.zeros(3), 0.0),
        lambda: dfil(lambda z: z, torch.zeros(3), 1.0, probes=64),
        lambda: dfil(lambda z: z, torch.zeros(3), 1.0, probes=1, rng=Rng.from_seed(0)),
        lambda: van_trees_floor(0.0, 0.0),
        lambda: van_trees_floor(-1.0, 2.0),
    ],
)
def test_floors_without_a_meaning_are_refused(call: object) -> None:
    with pytest.raises(BadInput):
        call()  # type: ignore[operator]


def test_dp_instahide_check_value() -> None:
    found = encoding_privacy(0.1, 1 / 4, 3072)
    assert l2_sensitivity(1.0, 3072) == pytest.approx(55.43, abs=0.005)
    assert found.noise_multiplier == pytest.approx(0.0072, abs=5e-5)
    assert found.mu == pytest.approx(138.6, abs=0.05)
    assert found.covers == PIXELS_ONLY
    assert encoding_privacy(0.1, 1 / 4, 3072, releases=9).mu_total == pytest.approx(3 * found.mu)
    assert encoding_privacy(0.1, 1 / 4, 3072, low=-1.0).mu == pytest.approx(2 * found.mu)
    assert l1_sensitivity(0.5, 100, -1.0, 1.0) == 100.0


@pytest.mark.parametrize("largest", [0.0, 1.5, -0.1])
def test_coefficients_that_none_are(largest: float) -> None:
    with pytest.raises(BadInput, match="largest coefficient"):
        l2_sensitivity(largest, 10)


def test_releases_and_bounds_of_encodings_are_checked() -> None:
    with pytest.raises(BadInput, match="steps: 0"):
        encoding_privacy(0.1, 0.25, 10, releases=0)
    with pytest.raises(BadInput, match="pixel bounds"):
        l2_sensitivity(0.5, 10, 1.0, 1.0)


@pytest.mark.parametrize(
    ("x", "n", "low", "high"),
    [
        (0, 30, 0, 0.1157), (0, 100, 0, 0.0362), (1, 100, 0.0003, 0.0545), (5, 100, 0.0164, 0.1128),
        (10, 30, 0.1729, 0.5281), (30, 100, 0.2124, 0.3998), (100, 100, 0.9638, 1),
    ],
)  # fmt: skip
def test_clopper_pearson(x: int, n: int, low: float, high: float) -> None:
    found = clopper_pearson(x, n)
    assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_one_sided_after_no_success() -> None:
    assert zero_successes(30) == pytest.approx(0.0950, abs=5e-5)
    assert zero_successes(100) == pytest.approx(0.0295, abs=5e-5)


def test_intervals_hold_what_they_promise() -> None:
    """Exact coverage, over the binomial itself and not a simulation."""
    for n in (5, 30):
        for p in (0.02, 0.3, 0.5, 0.93):
            limits = [clopper_pearson(x, n) for x in range(n + 1)]
            held = sum(float(binom.pmf(x, n, p)) for x, (low, high) in enumerate(limits) if low <= p <= high)
            assert held >= 0.95


@pytest.mark.parametrize(("x", "n", "confidence"), [(1, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_intervals_of_nothing_are_refused(x: int, n: int, confidence: float) -> None:
    with pytest.raises(BadInput):
        clopper_pearson(x, n, confidence)


def test_the_ceiling_of_a_sampled_image_is_not_rounded_down() -> None:
    """100 releases at rate .014 hold an image 1.4 times: two observations, not one."""
    sampled = summary.ceiling(summary.Setting(1e-3, steps=100, rate=0.014), 3072)
    assert sampled == pytest.approx(psnr_ceiling(1e-3, 3072, observations=2))
    whole = summary.ceiling(summary.Setting(1e-3, steps=100, rate=0.07), 3072)
    assert whole == psnr_ceiling(1e-3, 3072, observations=7)
    assert summary.ceiling(summary.Setting(1e-3, steps=3), 3072) == psnr_ceiling(1e-3, 3072, observations=3)
