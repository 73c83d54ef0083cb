"""Peeling: nearly exact pixels with a certificate, none where the gradient was touched, refusals in sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.attacks.analytic.chain import find_chain
from frostglass.attacks.registry import ATTACKS
from frostglass.core.batch import Batch
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Facts, GradientMessage, Knows, Observation, ThreatModel
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.assign import assign
from frostglass.numerics.local_update import local_update
from frostglass.vision import networks
from victims import ALL, observe, photo_batch

RUN = Runtime(Rng.from_seed(0, "peel"))
SEEN_STATISTICS = frozenset({Knows.EXAMPLES, Knows.BN_BATCH})


def psnr(found: Tensor, truth: Tensor) -> list[float]:
    order = assign(found, truth)
    assert bool((order >= 0).all())
    return (-10 * (found[order] - truth).square().mean((1, 2, 3)).log10()).tolist()


def peeled(seen: Observation, **options: Any) -> Reconstruction:
    attack = ATTACKS["peel"].make(**options)
    assert attack.check(seen) == []
    return drive(attack, seen, RUN)


def changed(seen: Observation, change: Callable[[str, Tensor], Tensor]) -> Observation:
    touched = {n: change(n, g) for n, g in seen.gradients.items()}
    return replace(seen, messages=(GradientMessage(touched, "gradient"),))


def watched(model: nn.Module, size: int, batch: int, plan: LocalPlan, channels: int = 3) -> tuple[Observation, Batch]:
    """What a server sees of a client with the user's own network."""
    private = photo_batch(size, batch)
    private = replace(private, images=private.images[:, :channels], domain=networks.domain_of(model))
    trace = local_update(model, private.images, private.targets, plan)
    facts = Facts(private.domain, plan.mode, private.image_shape, 10, private.targets, plan)
    return ThreatModel("test", ALL).observe(model, [Update(trace.gradients, trace.bn, batch, plan)], facts), private


@pytest.mark.parametrize("batch", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_photographs_come_back_with_a_certificate(batch: int) -> None:
    seen, private = observe("small_bn_cnn", size=32, batch=batch)
    found = peeled(seen, steps=300)
    assert min(psnr(found.images, private.images)) > 30
    assert found.info["certificate"] is True
    assert "warning" not in found.info
    assert found.info["heads_residual"] < 1e-6
    assert found.info["peel_residual"] < 1e-5
    assert found.objective < 0.01


@pytest.mark.parametrize(("mode", "norm"), [("eval", "batch"), ("train", "none")])
def test_other_norms_are_peeled_too(mode: str, norm: str) -> None:
    seen, private = observe("small_bn_cnn", size=32, batch=2, mode=mode, norm=norm)
    found = peeled(seen, steps=250)
    assert found.info["certificate"] is True
    assert min(psnr(found.images, private.images)) > 25


@pytest.mark.slow
def test_group_norm_gives_all_but_the_contrast() -> None:
    seen, private = observe("small_bn_cnn", size=32, batch=2, norm="group")
    found = peeled(seen)
    assert found.info["certificate"] is True
    assert "contrast" in found.info
    order = assign(found.images, private.images)
    for shown, truth in zip(found.images[order], private.images, strict=True):
        z, t = (private.domain.normalise(v).flatten() for v in (shown, truth))
        assert float(torch.nn.functional.cosine_similarity(z, t, 0)) > 0.95  # up to the clamp of overdone contrast


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_neither_labels_nor_batch_statistics_are_needed_but_for_the_contrast(batch: int) -> None:
    seen, private = observe("small_bn_cnn", size=32, batch=batch, knows=frozenset({Knows.EXAMPLES}))
    found = peeled(seen, steps=300 if batch == 1 else 500)
    assert found.info["certificate"] is True
    assert "contrast" in found.info
    order = assign(found.images, private.images)
    z, t = (private.domain.normalise(v).flatten(1) for v in (found.images[order], private.images))
    assert float(torch.nn.functional.cosine_similarity(z, t).min()) > 0.97  # up to the clamp of overdone contrast


def test_labels_need_not_be_granted() -> None:
    seen, private = observe("small_bn_cnn", size=32, batch=2, knows=SEEN_STATISTICS)
    found = peeled(seen, steps=250)
    assert found.info["certificate"] is True
    assert found.label_counts is not None
    assert torch.equal(found.label_counts, private.targets.sum(0))
    assert min(psnr(found.images, private.images)) > 25


def test_the_first_wrong_guess_of_the_labels_is_put_right_by_the_residual() -> None:
    model = networks.build("small_bn_cnn", classes=10, channels=3, size=16, rng=Rng.from_seed(1))
    with torch.no_grad():
        model.get_submodule("head").weight.mul_(8)  # a confident network: counting rules err
    plan = LocalPlan(mode="train")
    private = photo_batch(16, 3)
    private = replace(private, targets=private.targets[[2, 2, 0]])
    trace = local_update(model, private.images, private.targets, plan)
    facts = Facts(private.domain, "train", private.image_shape, 10, private.targets, plan)
    update = Update(trace.gradients, trace.bn, 3, plan)
    seen = ThreatModel("test", SEEN_STATISTICS).observe(model, [update], facts)
    found = peeled(seen, steps=100)
    assert found.info["heads_residual"] < 1e-4
    assert found.label_counts is not None
    assert torch.equal(found.label_counts, private.targets.sum(0))


def test_images_behind_one_convolution_are_exact_and_proved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 128, 5, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 256, 10))
    seen, private = watched(model, 16, 3, LocalPlan(mode="eval"))
    found = peeled(seen)
    assert float((found.images[assign(found.images, private.images)] - private.images).abs().max()) < 1e-3
    assert found.info["certificate"] is True
    assert found.proved.tolist() == [True] * 3


def test_a_users_own_network_in_grey_by_one_step_of_sgd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 5, 1, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 48, 5, 2, 2), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Flatten(), nn.Linear(48 * 64, 10),
    )  # fmt: skip
    plan = LocalPlan(kind="delta", mode="train", lr=0.05, weight_decay=1e-3)
    seen, private = watched(model, 16, 1, plan, channels=1)
    found = peeled(seen, steps=300)
    assert found.info["certificate"] is True
    assert min(psnr(found.images, private.images)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("what", ["noise", "half"])
def test_a_touched_gradient_falls_back_to_matching_without_a_certificate(what: str) -> None:
    seen, private = observe("small_bn_cnn", size=32, batch=1)
    rng = Rng.from_seed(5)

    def noise(name: str, g: Tensor) -> Tensor:
        return g + 1e-2 * g.square().mean().sqrt() * rng.at(name).normal(g.shape)

    found = peeled(changed(seen, noise if what == "noise" else lambda n, g: g.bfloat16().float()), steps=100)
    assert found.info["certificate"] is False
    assert "warning" in found.info
    assert not bool(found.proved.any())
    assert min(psnr(found.images, private.images)) > 15


def test_wrong_labels_get_no_certificate() -> None:
    seen, _ = observe("small_bn_cnn", size=16, batch=2)
    assert seen.labels is not None
    found = peeled(replace(seen, labels=seen.labels.roll(1, 1)), steps=5)
    assert found.info["certificate"] is False
    assert "warning" in found.info


def test_the_objective_is_zero_at_the_truth_and_not_elsewhere() -> None:
    seen, private = observe("small_bn_cnn", size=16, batch=2)
    attack = ATTACKS["peel"].make()
    assert attack.objective_of(seen, private.images, private.targets, RUN) < 1e-9
    assert attack.objective_of(seen, 1 - private.images, private.targets, RUN) > 0.1


def test_opacus_version_is_recognised() -> None:
    model = networks.build("small_bn_cnn", classes=10, channels=3, size=16, options={"width": 8}, rng=Rng.from_seed(1))
    seen, _ = watched(networks.fix_for_opacus(model), 16, 2, LocalPlan(mode="train"))
    chain, misfit = find_chain(seen)
    assert misfit == ""
    assert chain is not None
    assert [type(b.norm) for b in chain.blocks] == [nn.GroupNorm] * 4


class Functional(nn.Module):
    """A user's network whose ReLUs are no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second = nn.Linear(16 * 64, 10), nn.Conv2d(8, 16, 3, 2, 1)
        self.first = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(2 * x - 1)))).flatten(1))
        return y


def test_modules_are_found_by_what_they_do() -> None:
    seen, _ = watched(Functional(), 16, 1, LocalPlan(mode="eval"))
    chain, misfit = find_chain(seen)
    assert misfit == ""
    assert chain is not None
    assert [b.name for b in chain.blocks] == ["first", "second"]
    torch.testing.assert_close(chain.scale, torch.full((3, 16, 16), 2.0))


def conv(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *more)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (conv(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 64, 10)), "MaxPool2d"),
        (conv(nn.Sigmoid(), nn.Flatten(), nn.Linear(8 * 256, 10)), "does not read every value of the ReLU"),
        (conv(nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)), "groups"),
        (conv(nn.ReLU(), nn.Flatten(), nn.Linear(8 * 256, 10, bias=False)), "no bias"),
        (conv(nn.ReLU(), nn.Flatten(), nn.Linear(8 * 256, 20), nn.ReLU(), nn.Linear(20, 10)), "more than one Linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), "does not begin with a Conv2d"),
        (conv(nn.Tanh(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)), "is not the ReLU"),
        (conv(nn.PReLU(), nn.Flatten(), nn.Linear(2048, 10)), "PReLU"),
    ],
)
def test_other_networks_are_refused_in_one_sentence(model: nn.Module, words: str) -> None:
    seen, _ = watched(model, 16, 1, LocalPlan(mode="eval"))
    problems = ATTACKS["peel"].make().check(seen)
    assert len(problems) == 1
    assert words in problems[0]


def test_a_shortcut_is_refused() -> None:
    seen, _ = observe("resnet20", size=16, batch=1)
    (problem,) = ATTACKS["peel"].make().check(seen)
    assert "not the ReLU" in problem


def test_missing_grants_and_sizes_are_refused() -> None:
    attack = ATTACKS["peel"].make()
    seen, _ = observe("small_bn_cnn", size=16, batch=2)
    assert "up to which" in attack.check(replace(seen, examples=10, labels=None))[0]
    assert "grant 'examples'" in attack.check(replace(seen, examples=None))[0]
    assert "equations" in attack.check(observe("small_bn_cnn", size=64, batch=3)[0])[0]
    assert "clients are summed" in attack.check(replace(seen, cohort=2))[0]
    head = {n: g for n, g in seen.gradients.items() if "head" not in n}
    left = attack.check(replace(seen, messages=(GradientMessage(head, "gradient"),)))
    assert any("was not sent" in p for p in left)
    delta = replace(seen, messages=(GradientMessage(seen.gradients, "delta"),), local_plan=None)
    assert any("one step" in p for p in attack.check(delta))


def test_a_loss_that_is_no_mean_is_said_to_end_the_algebra() -> None:
    seen, _ = observe("small_bn_cnn", batch=2, knows=SEEN_STATISTICS)
    found = peeled(changed(seen, lambda _, g: 2 * g), steps=2)
    assert not found.proved.any()
    assert "no mean over the batch" in str(found.info["warning"])
    assert found.info["labels"] == "restored; nothing certifies them"
