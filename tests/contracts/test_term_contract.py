"""What every term of an inversion objective must hold to: scalar, right gradient in float64, 0 at the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from frostglass.attacks.inversion import terms
from frostglass.attacks.inversion.target import Target, lay_out
from frostglass.core.batch import Batch
from frostglass.core.errors import BadInput
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows
from frostglass.core.update import BNStatistics
from frostglass.numerics.bn import bn_distance
from frostglass.numerics.local_update import local_update
from victims import observe

TERMS: dict[str, Callable[[], terms.Term]] = {
    "cosine": terms.match_cosine,
    "layer_norms": terms.match_layer_norms,
    "squared": terms.match_squared,
    "l2": lambda: terms.l2_norm(1.0),
    "variation_norm": lambda: terms.variation_norm(1.0),
    "cross_entropy": lambda: terms.cross_entropy(1.0),
    "tv": lambda: terms.total_variation(1.0),
    "bn": lambda: terms.bn_statistics(1.0, Knows.BN_BATCH),
    "bn_relative": lambda: terms.bn_statistics(1.0, Knows.BN_BATCH, relative=True),
}
ZERO_AT_TRUTH = {"cosine", "layer_norms", "squared", "bn", "bn_relative"}


@pytest.fixture(scope="module")
def setting() -> tuple[Target, Batch]:
    seen, private = observe("small_bn_cnn", size=8, batch=2, width=2, dtype=torch.float64)
    return lay_out(seen, Runtime(dtype=torch.float64)), private


def evaluate(name: str, z: Tensor, target: Target, private: Batch) -> Tensor:
    images = target.seen.domain.denormalise(z)
    trace = local_update(target.model, images, private.targets, target.plan, differentiable=True)
    return TERMS[name]().value(terms.Candidate(z, images, private.targets, trace, target))


@pytest.mark.parametrize("name", TERMS)
def test_it_is_a_scalar_whose_gradient_reaches_the_image(name: str, setting: tuple[Target, Batch]) -> None:
    target, private = setting
    z = torch.randn(private.images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z.requires_grad_(True)
    value = evaluate(name, z, target, private)
    assert value.shape == ()
    gradient = torch.autograd.grad(value, z)[0]
    assert float(gradient.abs().max()) > 0
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-7
    with torch.no_grad():
        ends = [float(evaluate(name, z + s * step * direction, target, private)) for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=2e-4, abs=1e-9)


@pytest.mark.parametrize("name", sorted(ZERO_AT_TRUTH))
def test_it_is_zero_at_the_truth(name: str, setting: tuple[Target, Batch]) -> None:
    target, private = setting
    z = target.seen.domain.normalise(private.images)
    assert float(evaluate(name, z, target, private).detach()) == pytest.approx(0, abs=1e-7)


def test_every_term_is_in_the_table() -> None:
    from typing import get_type_hints

    makers = {n for n, f in vars(terms).items() if callable(f) and f.__module__ == terms.__name__ and n[0] != "_"}
    terms_made = {n for n in makers if n != "Term" and get_type_hints(getattr(terms, n)).get("return") is terms.Term}
    named = {"match_cosine", "match_layer_norms", "match_squared", "total_variation", "bn_statistics"}
    named.add("epoch_agreement")  # 0 unless a client shuffles its epochs: tested with local updates
    assert terms_made == named | {"l2_norm", "variation_norm", "cross_entropy"}, "add it to TERMS above"


def test_only_matching_terms_read_the_observed_update() -> None:
    assert {n for n, make in TERMS.items() if make().gradient} == {"cosine", "layer_norms", "squared"}


def test_a_weight_of_zero_takes_the_term_out_and_all_out_is_refused() -> None:
    kept = terms.live((terms.match_cosine(), terms.l2_norm(0.0), terms.total_variation(lambda t, n: 0.0)))
    assert [t.name for t in kept] == ["cosine", "tv"]  # a schedule may reach 0 and leave it again
    with pytest.raises(BadInput, match="weight 0"):
        terms.live((terms.l2_norm(0.0),))


def test_no_batchnorm_layer_is_favoured(setting: tuple[Target, Batch]) -> None:
    """Eq. 10 weighs all layers alike; some code weighs the first one ten times."""
    goal = setting[0].bn_batch
    assert goal is not None
    assert len(goal) >= 3
    for chosen in goal:
        moved = {n: replace(s, mean=s.mean + 1.0) if n == chosen else s for n, s in goal.items()}
        width = len(goal[chosen].mean)
        assert float(bn_distance(moved, goal)) == pytest.approx(width**0.5)


def test_batchnorm_distance_on_a_hand_computed_case() -> None:
    def of(mean: list[float], var: list[float]) -> BNStatistics:
        return BNStatistics(torch.tensor(mean), torch.tensor(var), 4)

    found = {"a": of([3.0, 4.0], [1.0, 1.0]), "b": of([0.0], [2.0])}
    goal = {"a": of([0.0, 0.0], [1.0, 1.0]), "b": of([0.0], [5.0])}
    assert float(bn_distance(found, goal)) == pytest.approx(5 + 3)  # norms, neither squared nor averaged


def test_the_layer_norm_loss_answers_linearly_to_one_layer(setting: tuple[Target, Batch]) -> None:
    """Eq. 3 sums unsquared norms: scaling one layer's difference by 3 triples that layer's part."""
    from frostglass.numerics.distance import layer_norms

    a = [torch.ones(3), torch.ones(5)]
    b = [torch.zeros(3), torch.zeros(5)]
    base = float(layer_norms(a, b))
    grown = float(layer_norms([3 * a[0], a[1]], b))
    assert grown - base == pytest.approx(2 * 3**0.5)
