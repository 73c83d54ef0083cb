"""What does not fit between an update and its model is said in words, before compute; an honest update is silent."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.attacks.inversion.validate import errors_of, mismatches, warnings_of
from frostglass.attacks.registry import ATTACKS
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import BNStatistics, LocalPlan
from frostglass.numerics.local_update import local_update
from victims import observe

Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def sent(seen: Observation, change: Change) -> Observation:
    return replace(seen, messages=(GradientMessage(dict(change(seen.gradients)), "gradient"),))


def with_first(change: Callable[[Tensor], Tensor], which: str) -> Change:
    def apply(gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        name = next(n for n in gradients if which in n)
        return {**gradients, name: change(gradients[name])}

    return apply


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("name", "batch"), [("small_bn_cnn", 1), ("small_bn_cnn", 4), ("resnet20", 2), ("mlp", 1), ("mlp", 3), ("lenet", 1)]
)
def test_an_honest_update_raises_no_suspicion(name: str, batch: int, mode: str) -> None:
    seen, _ = observe(name, batch=batch, mode=mode)
    honest = seen if mode == "train" else replace(seen, bn_batch=None)
    assert mismatches(honest) == []


@pytest.mark.parametrize("plan", [
    LocalPlan("delta", lr=0.05), LocalPlan("delta", lr=0.05, weight_decay=0.1),
    LocalPlan("delta", epochs=2, minibatch=1),
    LocalPlan("delta", optimizer="adam", lr=0.01), LocalPlan("delta", local_steps=3, momentum=0.9),
])  # fmt: skip
def test_an_honest_difference_raises_none_either(plan: LocalPlan) -> None:
    seen, _ = observe("small_bn_cnn", width=8, plan=plan)
    assert mismatches(seen) == []


ERRORS: dict[str, tuple[Change, str]] = {
    "DDP": (lambda g: {"module." + n: v for n, v in g.items()}, r"strip it"),
    "Opacus": (lambda g: {"_module." + n: v for n, v in g.items()}, r"Opacus puts '_module.'"),
    "renamed": (lambda g: {n.replace("d.weight", "d.w.weight"): v for n, v in g.items()},
                r"'head.weight' has the same shape"),
    "buffer": (lambda g: {**g, "body.1.running_mean": torch.zeros(32)}, r"is a buffer"),
    "none": (lambda g: {}, r"nothing to match"),
    "transposed": (with_first(lambda v: v.T, "head.weight"), r"transposed, as Keras"),
    "flax convolution": (with_first(lambda v: v.permute(2, 3, 1, 0), "body.3.weight"), r"permute\(3, 2, 0, 1\)"),
    "flat": (with_first(lambda v: v.flatten(), "body.3.weight"), r"flattened or reshaped"),
    "per example": (with_first(lambda v: v.expand(4, *v.shape), "body.3.weight"), r"send their mean"),
    "other classes": (with_first(lambda v: v[:7], "head.weight"), r"number of classes"),
    "bytes": (with_first(lambda v: v.to(torch.int8), "head.weight"), r"quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_matched_is_refused_in_words(case: str) -> None:
    change, words = ERRORS[case]
    seen, _ = observe("small_bn_cnn")
    broken = sent(seen, change)
    found = errors_of(broken)
    assert len(found) == 1
    assert found[0].startswith("update: ")
    assert re.search(words, found[0]), found
    assert {m.severity for m in mismatches(broken)} == {"error"}
    assert found[0] in ATTACKS["thaw"].make().check(broken)


def test_a_wrapped_model_is_told_from_a_wrapped_update() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    wrapped = nn.Module()
    wrapped.add_module("module", seen.model)
    assert "give the model inside" in errors_of(replace(seen, model=wrapped))[0]


def test_frozen_parameters_alone_are_no_update() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    seen.model.requires_grad_(False)
    assert "only frozen parameters" in errors_of(seen)[0]


WARNINGS: dict[str, tuple[Change, int, str]] = {
    "partly sent": (lambda g: dict(list(g.items())[-3:]), 4, r"were not sent"),
    "a silent layer": (with_first(lambda v: v * 0, "body.3.weight"), 4, r"1 of 14 tensors are zero throughout"),
    "half": (lambda g: {n: v.half() for n, v in g.items()}, 4, r"half precision, about 3 digits"),
    "rounded to half": (lambda g: {n: v.half().float() for n, v in g.items()}, 4, r"half precision"),
    "rounded to bfloat16": (lambda g: {n: v.bfloat16().float() for n, v in g.items()}, 4, r"bfloat16"),
    "half the loss": (lambda g: {n: 0.5 * v for n, v in g.items()}, 1, r"multiplied by 0\.5 "),
    "turned sign": (lambda g: {n: -v for n, v in g.items()}, 1, r"the sign is turned"),
    "sum instead of mean": (lambda g: {n: 4 * v for n, v in g.items()}, 4, r"multiplied by 2\.\d+ or more"),
    "another loss": (with_first(lambda v: v + 0.3, "head.bias"), 4, r"and not to 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNINGS)
def test_what_misleads_is_a_warning(case: str) -> None:
    change, batch, words = WARNINGS[case]
    seen, _ = observe("small_bn_cnn", batch=batch)
    broken = sent(seen, change)
    assert errors_of(broken) == []
    assert re.search(words, "\n".join(warnings_of(broken))), warnings_of(broken)
    assert ATTACKS["thaw"].make().warnings(broken) == warnings_of(broken)


@pytest.mark.parametrize(
    ("name", "told"), [("small_bn_cnn", "eval"), ("small_bn_cnn", "train"), ("resnet20", "eval"), ("resnet20", "train")]
)
def test_the_wrong_mode_shows_in_the_gradient(name: str, told: str) -> None:
    """Normalised by the batch, <w, g> is 0 for each channel of a convolution; otherwise it is not."""
    real = "train" if told == "eval" else "eval"
    seen, _ = observe(name, batch=3, mode=real)
    seen.model.train(told == "train")
    found = warnings_of(replace(seen, mode=told, bn_batch=None))
    assert len(found) == 1
    assert f"looks like one of {real} mode" in found[0]


def test_batch_statistics_of_a_client_in_eval_mode_are_strange() -> None:
    seen, _ = observe("small_bn_cnn", mode="eval")
    assert any("neither uses nor sends" in w for w in warnings_of(seen))


def test_another_normalisation_shows_in_the_first_layer() -> None:
    seen, _ = observe("small_bn_cnn", batch=3)
    assert seen.bn_batch is not None
    name, first = next(iter(seen.bn_batch.items()))
    raw = {**seen.bn_batch, name: BNStatistics(first.mean * 8, first.var * 64, first.count)}  # as of images in bytes
    assert any("normalised otherwise" in w for w in warnings_of(replace(seen, bn_batch=raw)))
    one, _ = observe("mlp", batch=1)
    bias = next(n for n in one.gradients if n.endswith("bias"))
    other = sent(one, lambda g: {**g, bias: g[bias] * 4})
    assert warnings_of(other) == []  # a quarter of each normalised pixel is in range: nothing is proved
    narrow = sent(one, lambda g: {**g, bias: g[bias] / 4})
    assert any("normalised otherwise" in w for w in warnings_of(narrow))


def test_broken_values_are_no_mismatch_but_a_failed_run() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    broken = sent(seen, with_first(lambda v: v * float("nan"), "head.weight"))
    assert mismatches(broken) == []
    zeros = sent(seen, lambda g: {n: v * 0 for n, v in g.items()})
    assert mismatches(zeros) == []


def test_warnings_reach_the_report_of_an_audit(tmp_path: Any) -> None:
    import frostglass
    from scenes import small

    noisy = {"name": "dp_sgd", "noise_multiplier": 1.0}
    plan = small({"name": "thaw", "steps": 5, "every": 5}, defense=[{"name": "none"}, noisy])
    report = frostglass.audit(plan, out=tmp_path / "a", device="cpu")
    told = [[w for w in cell.warnings if w.startswith("Update:")] for cell in report.cells]
    assert told[0] == []
    assert any("a defence that changed the update" in w for w in told[1])


def test_what_the_simulation_makes_up_is_said() -> None:
    seen, _ = observe("small_bn_cnn", width=8, plan=LocalPlan("delta", lr=0.05))
    (said,) = warnings_of(replace(seen, local_plan=None))
    assert "one step of SGD at lr 0.1 is assumed" in said
    seen, _ = observe("small_bn_cnn", width=8)
    seen.model.add_module("drop", nn.Dropout(0.5))
    (said,) = warnings_of(seen)
    assert "1 Dropout layers are active in train mode ('drop')" in said
    seen, _ = observe("mlp", mode="eval")
    seen.model.add_module("drop", nn.Dropout(0.5))
    assert warnings_of(replace(seen, bn_batch=None)) == []


def test_labels_and_number_of_images_must_agree() -> None:
    seen, _ = observe("mlp", batch=2)
    assert errors_of(replace(seen, examples=3)) == [
        "labels: 2 rows were granted for 3 images; they must agree.",
    ]
    assert errors_of(replace(seen, labels=None, examples=0)) == [
        "examples: 0 images cannot have made an update; give a whole number from 1.",
    ]
    for labels in (torch.tensor([1, 2]), torch.eye(9)[:2]):
        (said,) = ATTACKS["thaw"].make().check(replace(seen, labels=labels))
        assert said.endswith("give a row of 10 for every image, 1 at its class.")


class Sharper(nn.Module):
    """A network with a temperature of 1/4."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """[b, classes] logits."""
        return 4 * torch.Tensor(self.inner(x))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("zero", [False, True])
def test_a_temperature_of_the_network_is_no_factor_of_the_loss(batch: int, zero: bool) -> None:
    """Nor where the classifier begins with zeros, whose logits no temperature changes."""
    seen, private = observe("mlp", batch=batch)
    model = Sharper(seen.model)
    if zero:
        for weight in model.inner.head.parameters():
            torch.nn.init.zeros_(weight)
    gradients = local_update(model, private.images, private.targets, LocalPlan()).gradients
    told = warnings_of(replace(seen, model=model, messages=(GradientMessage(gradients, "gradient"),)))
    assert [text for text in told if "zero throughout" not in text] == []  # layers behind a classifier of zeros
