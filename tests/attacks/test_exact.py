"""Exact attacks: known answers, and what they must not claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from frostglass.attacks.analytic.first_layer import find_first_linear
from frostglass.attacks.analytic.proof import prove, solve_targets
from frostglass.attacks.inversion.restore import by_counts, targets_of
from frostglass.attacks.registry import ATTACKS
from frostglass.core.batch import Batch
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Knows, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.assign import assign
from frostglass.numerics.local_update import local_update
from victims import observe

RUN = Runtime(Rng.from_seed(0, "exact"))
ONLY_COUNT = frozenset({Knows.EXAMPLES})


def worst_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    order = assign(found, truth)
    assert bool((order >= 0).all())
    return float((found[order] - truth).abs().max())


def test_bias_ratio_recovers_a_single_image_exactly() -> None:
    seen, private = observe("mlp", size=32, batch=1, knows=ONLY_COUNT)
    found = drive(ATTACKS["linear_exact"].make(), seen, RUN)
    assert found.proved.tolist() == [True]
    assert worst_error(found.images, private.images) < 1e-5
    assert found.targets is not None
    assert torch.equal(found.targets, private.targets)


def test_bias_ratio_shows_only_rows_that_several_units_name() -> None:
    seen, private = observe("mlp", size=16, batch=4, knows=ONLY_COUNT, hidden=(2048, 32))
    found = drive(ATTACKS["linear_exact"].make(min_units=3), seen, RUN)
    order = assign(found.images, private.images)
    hits = [float((found.images[j] - private.images[i]).abs().max()) for i, j in enumerate(order.tolist()) if j >= 0]
    assert len(found.images) <= 4
    assert all(error < 1e-3 for error in hits)


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_spear_recovers_the_whole_batch_and_its_labels(batch: int) -> None:
    seen, private = observe("mlp", size=32, batch=batch, knows=ONLY_COUNT, hidden=(256, 64))
    found = drive(ATTACKS["spear"].make(), seen, RUN)
    assert int(found.proved.sum()) == batch
    assert worst_error(found.images, private.images) < 1e-3
    assert found.targets is not None
    order = assign(found.images, private.images)
    assert torch.equal(found.targets[order], private.targets)
    assert found.info["recomputed_gradient_error"] < 1e-4


def test_spear_does_not_need_to_be_told_the_batch_size() -> None:
    seen, private = observe("mlp", size=32, batch=5, knows=frozenset(), hidden=(256, 64))
    found = drive(ATTACKS["spear"].make(), seen, RUN)
    assert int(found.proved.sum()) == 5
    assert worst_error(found.images, private.images) < 1e-3


def test_spear_proves_nothing_from_a_noised_gradient_and_shows_nothing_unproved() -> None:
    seen, _ = observe("mlp", size=32, batch=4, knows=ONLY_COUNT, hidden=(256, 64))
    noise = Rng.from_seed(1)
    noised = {n: g + g.square().mean().sqrt() * noise.at(n).normal(g.shape, like=g) for n, g in seen.gradients.items()}
    found = drive(ATTACKS["spear"].make(steps=4), replace(seen, messages=(GradientMessage(noised, "gradient"),)), RUN)
    assert int(found.proved.sum()) == 0
    assert len(found.images) == 0


def test_half_precision_is_no_defence() -> None:
    seen, private = observe("mlp", size=32, batch=4, knows=ONLY_COUNT, hidden=(512, 64))
    rounded = {n: g.bfloat16().float() for n, g in seen.gradients.items()}
    found = drive(ATTACKS["spear"].make(), replace(seen, messages=(GradientMessage(rounded, "gradient"),)), RUN)
    assert int(found.proved.sum()) == 4
    assert worst_error(found.images, private.images) < 0.02


def test_the_first_linear_layer_is_found_through_the_models_own_normalisation() -> None:
    seen, _ = observe("mlp", size=16, batch=2)
    layer, missing = find_first_linear(seen)
    assert missing == ""
    assert layer is not None
    assert layer.relu
    images = torch.rand(3, *seen.image_shape)
    assert seen.domain.mean != (0.0,)
    inputs = seen.domain.normalise(images).flatten(1)
    torch.testing.assert_close(layer.to_images(inputs, seen.image_shape), images, atol=1e-5, rtol=1e-5)


def test_models_without_such_a_layer_are_refused_in_words() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    for name in ("spear", "linear_exact"):
        problems = ATTACKS[name].make().check(seen)
        assert len(problems) == 1
        assert "Linear" in problems[0]


class Clamped(nn.Module):
    """A ReLU that is no module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0)


def behind(activation: nn.Module) -> tuple[Observation, Batch]:
    """Two photographs through a first layer of 64 units with this activation."""
    seen, private = observe("mlp", batch=2, knows=ONLY_COUNT)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), activation, nn.Linear(64, 10))
    sent = local_update(model, private.images, private.targets, LocalPlan()).gradients
    return replace(seen, model=model, messages=(GradientMessage(sent, "gradient"),)), private


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.LeakyReLU()])
def test_spear_refuses_a_first_layer_without_relu(activation: nn.Module) -> None:
    assert any("ReLU" in p for p in ATTACKS["spear"].make().check(behind(activation)[0]))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.ReLU6(), Clamped(), nn.Sequential(nn.Tanh(), nn.ReLU())]
)
def test_spear_reads_the_zeros_of_a_relu_however_it_is_written(activation: nn.Module) -> None:
    seen, private = behind(activation)
    found = drive(ATTACKS["spear"].make(), seen, RUN)
    assert found.proved.tolist() == [True, True]
    assert worst_error(found.images, private.images) < 1e-3


def times(seen: Observation, factor: float) -> Observation:
    """The update of a loss that was multiplied."""
    sent = {n: factor * g for n, g in seen.gradients.items()}
    return replace(seen, messages=(GradientMessage(sent, "gradient"),))


@pytest.mark.parametrize("factor", [4.0, 65536.0, 0.01], ids=["a sum", "a loss scale", "clipped"])
@pytest.mark.parametrize("name", ["spear", "linear_exact"])
def test_a_loss_that_is_no_mean_is_proved_with_its_factor_and_its_labels(name: str, factor: float) -> None:
    seen, private = observe("mlp", size=16, batch=4, knows=ONLY_COUNT, hidden=(256, 64))
    found = drive(ATTACKS[name].make(), times(seen, factor), RUN)
    assert found.proved.tolist() == [True] * 4
    assert found.info["loss_factor"] == pytest.approx(factor, rel=1e-5)
    assert found.targets is not None
    assert torch.equal(found.targets[assign(found.images, private.images)], private.targets)
    assert "loss_factor" not in drive(ATTACKS[name].make(), seen, RUN).info


@pytest.mark.parametrize("ending", [lambda z: 4 * z, lambda z: z / 4, lambda z: z.softmax(1)])
def test_a_network_that_changes_its_logits_is_proved_too(ending: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Ending(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ending(self.inner(x))

    seen, private = observe("mlp", size=16, batch=4, knows=ONLY_COUNT, hidden=(256, 64))
    model = Ending(seen.model)
    sent = local_update(model, private.images, private.targets, LocalPlan()).gradients
    seen = replace(seen, model=model, messages=(GradientMessage(sent, "gradient"),))
    right, wrong = prove(seen, private.images), prove(seen, private.images.flip(-1))
    assert right is not None
    assert right.holds
    assert torch.equal(right.targets, private.targets)
    assert wrong is not None
    assert not wrong.holds


def test_soft_labels_are_proved_from_a_mean_and_from_a_sum_and_not_from_any_factor() -> None:
    seen, private = observe("mlp", size=16, batch=4, knows=ONLY_COUNT, hidden=(256, 64))
    mixed = 0.6 * private.targets + 0.4 * private.targets.roll(1, 1)
    sent = local_update(seen.model, private.images, mixed, LocalPlan()).gradients
    seen = replace(seen, messages=(GradientMessage(sent, "gradient"),))
    for factor in (1.0, 4.0):
        proof = prove(times(seen, factor), private.images)
        assert proof is not None
        assert proof.holds
        assert proof.factor == factor
        torch.testing.assert_close(proof.targets, mixed)
    for factor in (100.0, -1.0):
        proof = prove(times(seen, factor), private.images)
        assert proof is not None
        assert not proof.holds


@pytest.mark.parametrize("batch", [1, 3])
def test_smoothed_labels_are_not_proved_by_a_factor_that_takes_them_up(batch: int) -> None:
    seen, private = observe("mlp", size=16, batch=batch, knows=ONLY_COUNT, hidden=(256, 64))
    sent = local_update(seen.model, private.images, 0.9 * private.targets + 0.01, LocalPlan()).gradients
    proof = prove(times(replace(seen, messages=(GradientMessage(sent, "gradient"),)), 1024.0), private.images)
    assert proof is not None
    assert not proof.holds


def test_labels_of_known_images_are_solved_exactly_and_a_wrong_image_is_noticed() -> None:
    seen, private = observe("mlp", size=16, batch=6, hidden=(64, 32))
    targets = solve_targets(seen, private.images)
    assert targets is not None
    assert torch.equal(targets, private.targets)
    right = prove(seen, private.images)
    assert right is not None
    assert right.holds
    wrong = private.images.clone()
    wrong[2] = wrong[2].flip(-1)
    proof = prove(seen, wrong)
    assert proof is not None
    assert not proof.holds


@pytest.mark.parametrize("name", ["linear_exact", "spear"])
def test_a_proof_under_dropout_neither_follows_nor_moves_the_generator_of_the_process(name: str) -> None:
    seen, _ = observe("mlp", size=16, batch=1, knows=ONLY_COUNT, hidden=(64, 32))
    dropping = replace(seen, model=nn.Sequential(seen.model, nn.Dropout(0.3)), mode="train")
    gradients = {f"0.{n}": g for n, g in seen.gradients.items()}
    dropping = replace(dropping, messages=(GradientMessage(gradients, "gradient"),))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(drive(ATTACKS[name].make(), dropping, RUN).info["recomputed_gradient_error"])
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


class Auxiliary(nn.Module):
    """A second head that nothing uses, registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.auxiliary = nn.Linear(3 * 16 * 16, 64), nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x.flatten(1)).relu())  # type: ignore[no-any-return]


def test_a_batch_is_proved_where_an_unused_head_is_registered_last() -> None:
    seen, private = observe("mlp", batch=2, knows=ONLY_COUNT)
    torch.manual_seed(0)
    model = Auxiliary()
    sent = local_update(model, private.images, private.targets, LocalPlan()).gradients
    seen = replace(seen, model=model, messages=(GradientMessage(sent, "gradient"),))
    found = drive(ATTACKS["spear"].make(), seen, RUN)
    assert found.proved.tolist() == [True, True]
    assert torch.equal(targets_of(seen, by_counts())[0].sum(0), private.targets.sum(0))
