"""Seeds in one pass: the same as one by one, or one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.attacks.inversion import together
from frostglass.attacks.inversion.engine import Objective
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.spaces import pixels, random_shift, with_labels
from frostglass.attacks.inversion.target import lay_out
from frostglass.attacks.inversion.terms import bn_statistics, live, match_cosine, match_layer_norms, total_variation
from frostglass.attacks.inversion.together import can_be_together, evaluate_all, seeds_at_once
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.core.update import LocalPlan
from victims import observe

RUN = Runtime(Rng.from_seed(0, "together"), dtype=torch.float64)


def problems_of(seen: Observation, count: int) -> tuple[Tensor, list[Objective]]:
    """Starts of some seeds, and what each minimises."""
    run, target = RUN, lay_out(seen, RUN)
    terms = live((match_cosine(), total_variation(0.1), bn_statistics(0.1, Knows.BN_BATCH)))
    if not seen.bn_batch:
        terms = terms[:2]
    assert seen.labels is not None
    labels = seen.labels.to(run.dtype)
    made = Objective(target, terms, pixels(), "double_backward", 0, 10, labels)
    z = torch.stack([made.space.start(target, len(labels), run.rng.at(s), labels) for s in range(count)])
    jitter = random_shift(2, flip=True)
    own = [replace(made, augment=jitter(run.rng.at("jitter", s)), draws=run.rng.at("draws", s)) for s in range(count)]
    return z, own


@pytest.mark.parametrize("name", ["lenet", "mlp", "small_bn_cnn", "resnet20"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_seeds_in_one_pass_are_those_one_by_one(name: str, mode: str) -> None:
    seen, _ = observe(name, size=32, mode=mode, dtype=torch.float64)
    z, problems = problems_of(seen, 3)
    assert can_be_together(z, problems)
    apart, found = (evaluate_all(z, problems, n) for n in (1, 2))  # two and one
    for one, other in ((found.own, apart.own), (found.total, apart.total), (found.gradient, apart.gradient)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * float(other.abs().max()))
    assert found.values.keys() == apart.values.keys()
    for key, value in found.values.items():
        torch.testing.assert_close(value, apart.values[key], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("settings", [{"seeds": 5, "at_once": 2}, {"seeds": 3}, {"seeds": 3, "anew": "labels"}])
def test_a_run_ends_where_one_by_one_ends(settings: dict[str, Any]) -> None:
    seen, _ = observe("small_bn_cnn", width=4, dtype=torch.float64)
    made = ATTACKS["grad_inversion"].make(
        steps=12, every=4, seeds=settings["seeds"], consensus="lazy", consensus_start=4, consensus_every=4
    )
    assert isinstance(made, Inversion)
    if "anew" in settings:
        made = replace(made, space=with_labels(pixels()), consensus=None)
    found = drive(replace(made, at_once=settings.get("at_once")), seen, RUN)
    alone = drive(replace(made, at_once=1), seen, RUN)
    assert found.info["seed"] == alone.info["seed"]
    assert found.objective == pytest.approx(alone.objective, rel=1e-7)
    torch.testing.assert_close(found.images, alone.images, rtol=0, atol=1e-5)


def test_a_seed_that_breaks_leaves_the_others_alone() -> None:
    seen, _ = observe("small_bn_cnn", width=4, dtype=torch.float64)
    z, problems = problems_of(seen, 3)
    whole = evaluate_all(z, problems, 3)
    broken = evaluate_all(torch.stack([z[0], z[1] * float("nan"), z[2]]), problems, 3)
    assert broken.own.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(broken.gradient[[0, 2]], whole.gradient[[0, 2]])


class Mixing(nn.Module):
    """Subtracts the mean image of the batch, as no layer of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - 0.5 * x.mean(0))


class Drawing(nn.Module):
    """Dropout before a network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.dropout(x))


class Picky(nn.Module):
    """Takes batches of two only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 2:
            raise ValueError("two images, please")
        return self.inner(x)


class Bending(nn.Module):
    """A weight that no layer here knows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.bend = inner, nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.bend(x - 0.5))


def wrapped(seen: Observation, wrap: type[nn.Module]) -> Observation:
    """The network inside another, and its update under the names that has then."""
    model = wrap(seen.model).to(torch.float64).train(seen.mode == "train")
    sent = replace(seen.messages[0], gradients={f"inner.{n}": g for n, g in seen.gradients.items()})
    statistics = {f"inner.{n}": s for n, s in (seen.bn_batch or {}).items()}
    return replace(seen, model=model, messages=(sent,), bn_batch=statistics)


@pytest.mark.parametrize("wrap", [Mixing, Drawing, Picky])
def test_networks_that_do_not_keep_images_apart_are_told_by_trying(wrap: type[nn.Module]) -> None:
    seen = wrapped(observe("small_bn_cnn", width=4, dtype=torch.float64)[0], wrap)
    z, problems = problems_of(seen, 2)
    assert not can_be_together(z, problems)


def test_weights_that_no_layer_knows_are_told_by_trying() -> None:
    """Where the weight was not sent it has no gradient, and the seeds can share a pass."""
    seen = wrapped(observe("small_bn_cnn", width=4, dtype=torch.float64)[0], Bending)
    z, problems = problems_of(seen, 2)
    assert can_be_together(z, problems)
    (sent,) = seen.messages
    more = replace(seen, messages=(replace(sent, gradients={**sent.gradients, "bend.weight": torch.ones(1)}),))
    z, problems = problems_of(more, 2)
    assert not can_be_together(z, problems)


def test_only_gradients_by_double_backward_share_a_pass() -> None:
    seen, _ = observe("small_bn_cnn", width=4, dtype=torch.float64)
    z, problems = problems_of(seen, 2)
    assert can_be_together(z, problems)
    assert not can_be_together(z, [replace(p, engine="frozen_fd") for p in problems])
    assert not can_be_together(z, [replace(p, terms=(total_variation(1.0),)) for p in problems])
    steps = LocalPlan("delta", local_steps=2, lr=0.01)
    target = lay_out(observe("small_bn_cnn", width=4, plan=steps, dtype=torch.float64)[0], RUN)
    assert not can_be_together(z, [replace(p, target=target) for p in problems])


def test_a_run_of_a_network_that_mixes_images_is_that_of_one_by_one() -> None:
    seen = wrapped(observe("small_bn_cnn", width=4, dtype=torch.float64)[0], Mixing)
    attack = Inversion(
        "plain", lambda seen: (match_layer_norms(),), ATTACKS["thaw"].make().update, steps=4, seeds=2, every=2
    )
    found, alone = drive(attack, seen, RUN), drive(replace(attack, at_once=1), seen, RUN)
    assert torch.equal(found.images, alone.images)


def test_small_batches_share_a_pass_and_large_ones_or_networks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, _ = observe("small_bn_cnn", width=4, size=32)
    target = lay_out(seen, RUN)
    assert [seeds_at_once(target, rows) for rows in (1, 2, 4, 8, 48)] == [8, 4, 2, 1, 1]
    weights = sum(p.numel() for p in target.model.parameters())
    monkeypatch.setitem(together.WEIGHTS, "cpu", 3 * weights)
    assert seeds_at_once(target, 1) == 3
    monkeypatch.setitem(together.WEIGHTS, "cpu", weights - 1)
    assert seeds_at_once(target, 1) == 1
