"""Label restoration from real observations: every rule, every kind of update, and what is refused in which words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from frostglass.attacks.inversion import restore
from frostglass.attacks.inversion.head import dummy_images, feature_groups, fresh, varied_images
from frostglass.core.errors import BadInput
from frostglass.core.threat import GradientMessage, Knows, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.label_counts import guess
from frostglass.numerics.local_update import local_update
from victims import frozen_copy, observe

SIZE_ONLY = frozenset({Knows.EXAMPLES})


def relabelled(
    name: str, counts: list[int], mode: str = "eval", plan: LocalPlan | None = None, **options: object
) -> tuple[Observation, Tensor]:
    """(observation, counts) of photographs with labels of our choice, repeated ones too."""
    knows = frozenset({Knows.EXAMPLES, Knows.LOCAL_PLAN})
    total = sum(counts)
    seen, private = observe(name, batch=8, mode=mode, knows=knows, **options)
    made = torch.Generator().manual_seed(1)
    images = private.images[torch.arange(total) % 8] + 0.02 * torch.randn(total, *private.image_shape, generator=made)
    truth = torch.tensor(counts + [0] * (10 - len(counts)), dtype=torch.float32)
    targets = restore.counts_to_targets(truth)
    local = plan or LocalPlan(mode="train" if mode == "train" else "eval")
    sent = local_update(seen.model, images.clamp(0, 1), targets, local).gradients
    return replace(
        seen, messages=(GradientMessage(sent, local.kind),), examples=total, local_plan=local, labels=None
    ), truth


def without(seen: Observation, *ends: str) -> Observation:
    kept = {n: g for n, g in seen.gradients.items() if not n.endswith(ends)}
    return replace(seen, messages=(GradientMessage(kept, "gradient"),))


@pytest.mark.parametrize(
    ("name", "mode"),
    [("mlp", "eval"), ("small_bn_cnn", "eval"), ("small_bn_cnn", "train"), ("resnet20", "eval"), ("resnet20", "train")],
)
@pytest.mark.parametrize("counts", [[1, 0, 1, 0, 1, 0, 1, 0, 0, 0], [3, 0, 0, 5, 0, 0, 0, 0, 0, 0]])
def test_counts_are_exact_on_random_networks_distinct_and_repeated(name: str, mode: str, counts: list[int]) -> None:
    seen, truth = relabelled(name, counts, mode)
    found = restore.restored_of(seen, restore.by_counts())
    assert torch.equal(found.counts, truth)
    assert found.confidence in ("high", "low")
    assert torch.equal(found.targets.sum(0), truth)


def test_a_large_batch_on_a_network_of_varied_posteriors_is_counted_by_likelihood() -> None:
    counts = [9, 0, 6, 1, 0, 4, 2, 0, 7, 3]
    seen, truth = relabelled("small_bn_cnn", counts, "train")
    found = restore.restored_of(seen, restore.by_counts())
    assert found.rule == "counts: likelihood"
    assert float((found.counts - truth).abs().sum()) <= 2  # one label off at most
    granted = replace(seen, auxiliary=varied_images(seen, 240, seed=99))
    again = restore.restored_of(granted, restore.by_counts())
    assert float((again.counts - truth).abs().sum()) <= 4


@pytest.mark.parametrize(("mode", "size"), [("train", 20), ("eval", 60)])
def test_simulated_batches_come_from_groups_that_belong_together(mode: str, size: int) -> None:
    seen, _ = observe("small_bn_cnn", batch=4, mode=mode, knows=SIZE_ONLY, width=4, size=8)
    twenty = replace(seen, examples=20)
    groups = feature_groups(twenty, None)
    assert {len(group) for group in groups} == {size}
    assert all(torch.equal(a, b) for a, b in zip(groups, feature_groups(twenty, None), strict=True))
    granted = feature_groups(twenty, torch.rand(45, 16))
    assert [len(group) for group in granted] == ([20, 20] if mode == "train" else [45])


def test_a_network_is_fresh_until_its_normalisation_was_trained() -> None:
    seen, _ = observe("small_bn_cnn", width=4, size=8)
    assert fresh(seen)
    trained = copy.deepcopy(seen.model)
    norm = next(m for m in trained.modules() if isinstance(m, torch.nn.BatchNorm2d))
    with torch.no_grad():
        norm.bias[0] += 1e-3
    assert not fresh(replace(seen, model=trained))
    assert not fresh(observe("mlp")[0])


def test_varied_images_stay_in_the_domain_and_differ_between_groups() -> None:
    seen, _ = observe("small_bn_cnn", width=4, size=8)
    first, second = (varied_images(seen, 64, seed) for seed in (0, 1))
    for images in (first, second):
        assert images.shape == (64, *seen.image_shape)
        assert float(images.min()) >= seen.domain.low
        assert float(images.max()) <= seen.domain.high
    assert abs(float(first.mean() - second.mean())) + abs(float(first.std() - second.std())) > 0.01
    assert torch.equal(first, varied_images(seen, 64, 0))


def test_more_images_than_classes_are_counted_and_refused_by_distinct_rules() -> None:
    seen, truth = relabelled("small_bn_cnn", [5, 0, 2, 0, 0, 9, 0, 0, 0, 1])
    assert torch.equal(restore.restored_of(seen, restore.by_counts()).counts, truth)
    for name in ("row_minimum", "sum"):
        with pytest.raises(BadInput, match=r"exceed 10 classes; use restore = 'counts'"):
            restore.restored_of(seen, restore.RESTORE[name]())
    with pytest.raises(BadInput, match="names one label"):
        restore.restored_of(seen, restore.RESTORE["idlg"]())


@pytest.mark.parametrize("name", sorted(restore.RESTORE))
def test_every_rule_finds_the_label_of_one_image(name: str) -> None:
    seen, truth = relabelled("mlp", [0, 0, 0, 1])
    found = restore.restored_of(seen, restore.RESTORE[name]())
    assert torch.equal(found.counts, truth)
    assert found.info["labels_rule"] == found.rule


@pytest.mark.parametrize("counts", [[0, 0, 1], [1, 0, 1, 1], [4, 0, 0, 2]])
def test_a_missing_bias_gradient_is_made_up_for(counts: list[int]) -> None:
    seen, truth = relabelled("small_bn_cnn", counts)
    found = restore.restored_of(without(seen, "head.bias", "linear.bias", "fc.bias"), restore.by_counts())
    assert torch.equal(found.counts, truth)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_counts_from_a_difference_of_several_steps(momentum: float, decay: float) -> None:
    plan = LocalPlan("delta", "eval", local_steps=2, epochs=2, lr=0.01, momentum=momentum, weight_decay=decay)
    seen, truth = relabelled("small_bn_cnn", [3, 0, 1, 0, 0, 2], plan=plan)
    assert torch.equal(restore.restored_of(seen, restore.by_counts()).counts, truth)
    assert int(restore.restored_of(seen, restore.by_row_minimum()).counts.sum()) == 6
    unknown = replace(seen, local_plan=None)
    with pytest.raises(BadInput, match="grant 'local_plan', or restore by 'row_minimum'"):
        restore.restored_of(unknown, restore.by_counts())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_saturated_or_broken_gradient_gives_the_guess_and_says_so(value: float) -> None:
    seen, _ = relabelled("mlp", [1, 1])
    zero = {n: torch.full_like(g, value) for n, g in seen.gradients.items()}
    found = restore.restored_of(replace(seen, messages=(GradientMessage(zero, "gradient"),)), restore.by_counts())
    assert found.confidence == "none"
    assert torch.equal(found.counts.double(), guess(10, 2))
    assert found.info["labels_confidence"] == "none"


def test_a_missing_classifier_gradient_or_number_of_images_is_named() -> None:
    seen, _ = observe("mlp", knows=SIZE_ONLY)
    head = [n for n in seen.gradients if n.startswith("head")]
    for name in ("counts", "least_squares", "row_minimum", "sum", "idlg"):
        with pytest.raises(BadInput, match="final Linear layer"):
            restore.restored_of(without(seen, *head), restore.RESTORE[name]())
    unknown = replace(seen, examples=None)
    for name in ("counts", "row_minimum"):
        with pytest.raises(BadInput, match="grant 'examples'"):
            restore.restored_of(unknown, restore.RESTORE[name]())
    with pytest.raises(BadInput, match="at least 1"):
        restore.restored_of(replace(seen, examples=0), restore.by_counts())


def test_granted_labels_are_passed_on() -> None:
    seen, private = observe("mlp")
    found = restore.restored_of(seen, restore.by_counts())
    assert found.confidence == "granted"
    assert found.counts is None
    assert torch.equal(found.targets, private.targets)
    assert restore.targets_of(seen, restore.by_counts())[1] is None


def test_least_squares_takes_each_posterior_and_asks_for_auxiliary_images() -> None:
    seen, truth = relabelled("small_bn_cnn", [2, 0, 1, 0, 0, 1])
    for source in ("observed", "simulated", "uniform"):
        assert torch.equal(restore.restored_of(seen, restore.by_least_squares(source)).counts, truth)
    with pytest.raises(BadInput, match="grant 'auxiliary'"):
        restore.restored_of(seen, restore.by_least_squares("auxiliary"))
    granted = replace(seen, auxiliary=dummy_images(seen, 40))
    assert torch.equal(restore.restored_of(granted, restore.by_least_squares("auxiliary")).counts, truth)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_restoring_changes_neither_the_observation_nor_the_model_nor_the_generator(mode: str) -> None:
    seen, _ = relabelled("small_bn_cnn", [2, 1, 1], mode)
    before, state = frozen_copy(seen), torch.get_rng_state()
    restore.restored_of(seen, restore.by_counts())
    after = frozen_copy(seen)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_pre_hooks for m in seen.model.modules())
    assert seen.model.training == (mode == "train")


def confident(seen: Observation) -> Observation:
    """The same network, sure of everything and right but for two images, and the gradient that it would send."""
    model = copy.deepcopy(seen.model)
    with torch.no_grad():
        model.head.weight.mul_(400)
        images = dummy_images(seen, 12, seed=1)
        picked = model(images).argmax(1)
    picked[:2] = (picked[:2] + 1) % 10
    targets = torch.nn.functional.one_hot(picked, 10).float()
    sent = local_update(model, images, targets, LocalPlan(mode="eval")).gradients
    return replace(seen, model=model, messages=(GradientMessage(sent, "gradient"),), examples=12)


def test_a_confident_network_is_left_to_the_learned_rule_and_no_high_confidence_is_claimed() -> None:
    """The batch holds one class ten times, which no simulated batch looks like."""
    seen, _ = relabelled("small_bn_cnn", [1, 1], width=8)
    found = restore.restored_of(confident(seen), restore.by_counts())
    assert int(found.counts.sum()) == 12
    assert found.confidence in ("low", "none")
    assert found.rule == "counts: learned"


def test_a_restoration_is_done_once_an_observation() -> None:
    seen, _ = relabelled("mlp", [1, 1, 1])
    assert restore.restored_of(seen, restore.by_counts()) is restore.restored_of(seen, restore.RESTORE["counts"]())


def test_minibatches_of_one_size_are_counted_and_uneven_ones_refused() -> None:
    even = LocalPlan("delta", "eval", epochs=2, lr=0.01, minibatch=2)
    seen, truth = relabelled("small_bn_cnn", [3, 0, 1, 0, 0, 2], plan=even)
    assert torch.equal(restore.restored_of(seen, restore.by_counts()).counts, truth)
    for plan, times in (
        (LocalPlan("delta", "eval", lr=0.01, minibatch=5), "5.0 times"),  # the last step sees one image
        (LocalPlan("delta", "eval", lr=0.01, minibatch=2, momentum=0.9), r"2\.7 times"),
    ):
        uneven, _ = relabelled("small_bn_cnn", [3, 0, 1, 0, 0, 2], plan=plan)
        with pytest.raises(BadInput, match=times):
            restore.restored_of(uneven, restore.by_counts())
        assert int(restore.restored_of(uneven, restore.by_row_minimum()).counts.sum()) == 6


@pytest.mark.parametrize(
    ("mode", "true", "said"),  # one image has no batch statistics on this network
    [("train", 2, 3), ("train", 6, 2), ("eval", 2, 3), ("eval", 6, 2), ("eval", 2, 1)],
)
def test_a_wrong_number_of_images_is_not_counted_with_high_confidence(mode: str, true: int, said: int) -> None:
    seen, _ = observe("small_bn_cnn", size=16, batch=true, mode=mode)
    seen = replace(seen, labels=None)
    assert restore.restored_of(replace(seen, examples=true), restore.by_counts()).confidence == "high"
    assert restore.restored_of(replace(seen, examples=said), restore.by_counts()).confidence == "low"


@pytest.mark.parametrize(("steps", "said"), [(1, "high"), (4, "low")])
def test_counts_of_several_steps_are_never_sure(steps: int, said: str) -> None:
    """Posteriors move between the steps, so that no equation of one gradient holds exactly."""
    plan = LocalPlan("delta", local_steps=steps, lr=0.05)
    seen, private = observe("mlp", batch=8, knows=SIZE_ONLY)
    sent = local_update(seen.model, private.images, private.targets, plan).gradients
    held = replace(seen, local_plan=plan, messages=(GradientMessage(sent, "delta"),))
    assert restore.restored_of(held, restore.by_counts()).confidence == said


class Ending(torch.nn.Module):
    """A network with a further function of its logits."""

    def __init__(self, inner: torch.nn.Module, ending: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.ending = inner, ending

    def forward(self, x: Tensor) -> Tensor:
        """[b, classes]."""
        return self.ending(self.inner(x))


@pytest.mark.parametrize(
    ("ending", "sure"),
    [
        (lambda z: z, True),
        (lambda z: z.log_softmax(1), True),
        (lambda z: z.softmax(1), False),
        (lambda z: z / 4, False),
    ],
)
def test_counts_are_high_only_where_the_network_answers_what_its_classifier_gives(
    ending: Callable[[Tensor], Tensor], sure: bool
) -> None:
    """The gradient at the classifier is p - y there, and nowhere else."""
    seen, private = observe("mlp", batch=8, knows=SIZE_ONLY)
    model = Ending(seen.model, ending)
    sent = local_update(model, private.images, private.targets, LocalPlan()).gradients
    held = replace(seen, model=model, messages=(GradientMessage(sent, "gradient"),))
    assert (restore.restored_of(held, restore.by_counts()).confidence == "high") is sure
