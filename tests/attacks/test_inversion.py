"""The inversion machine: what makes a gradient inversion honest, on small real networks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.restore import by_counts, by_row_minimum
from frostglass.attacks.inversion.rules import adam, chain, scale
from frostglass.attacks.inversion.target import lay_out
from frostglass.attacks.inversion.terms import match_cosine
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Knows
from frostglass.core.update import LocalPlan
from victims import observe

RUN = Runtime(Rng.from_seed(0, "inversion"))


def plain(steps: int = 30, seeds: int = 1) -> Inversion:
    return Inversion(
        "plain",
        terms=lambda seen: (match_cosine(),),
        update=chain(adam(), scale(0.1)),
        steps=steps,
        seeds=seeds,
        every=10,
    )


def test_the_objective_falls_and_best_rescores_to_its_stated_value() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    events: list[Event] = []
    attack = plain(60)
    found = drive(attack, seen, RUN, emit=events.append)
    progress = [e.values["objective"] for e in events if e.kind == "progress"]
    assert progress[-1] < 0.6 * progress[0]
    assert found.targets is not None
    assert attack.objective_of(seen, found.images, found.targets, RUN) == pytest.approx(found.objective, rel=1e-3)


def test_the_truth_has_a_lower_objective_than_any_attack_reaches() -> None:
    seen, private = observe("small_bn_cnn", width=8)
    attack = plain(20)
    found = drive(attack, seen, RUN)
    order_free = attack.objective_of(seen, private.images, private.targets, RUN)
    assert order_free < 1e-4 < found.objective


def test_more_seeds_never_end_worse_and_seed_zero_is_the_same() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    one, three = drive(plain(20, seeds=1), seen, RUN), drive(plain(20, seeds=3), seen, RUN)
    assert three.objective <= one.objective + 1e-6


def test_granted_labels_are_used_and_missing_ones_are_restored() -> None:
    granted, _ = observe("small_bn_cnn", width=8, batch=3)
    found = drive(plain(5), granted, RUN)
    assert found.label_counts is None
    restored, private = observe("small_bn_cnn", width=8, batch=3, knows=frozenset({Knows.EXAMPLES}))
    again = drive(plain(5), restored, RUN)
    assert again.label_counts is not None
    assert torch.equal(again.label_counts, private.targets.sum(0))


def test_label_rules_find_distinct_and_repeated_labels_of_a_random_network() -> None:
    seen, private = observe("small_bn_cnn", width=8, batch=8)
    assert torch.equal(by_counts()(seen).counts, private.targets.sum(0))
    assert torch.equal(by_row_minimum()(seen).counts, private.targets.sum(0))
    many = replace(seen, examples=11)
    with pytest.raises(BadInput, match="distinct"):
        by_row_minimum()(many)


def test_only_the_layers_that_were_sent_are_matched() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    some = dict(list(seen.gradients.items())[-3:])
    partial = replace(seen, messages=(GradientMessage(some, "gradient"),))
    found = drive(plain(20), partial, RUN)
    assert found.objective < 1


@pytest.mark.parametrize("kept", [slice(0, 2), slice(-2, None)])
def test_layers_that_were_trained_and_not_sent_move_in_the_simulation(kept: slice) -> None:
    plan = LocalPlan(kind="delta", local_steps=3, lr=0.5)
    seen, private = observe("small_bn_cnn", width=8, plan=plan)
    some = dict(list(seen.gradients.items())[kept])
    partial = replace(seen, messages=(GradientMessage(some, "delta"),))
    assert plain().objective_of(partial, private.images, private.targets, RUN) == pytest.approx(0, abs=1e-5)
    single = replace(seen, messages=(GradientMessage(some, "gradient"),), local_plan=None)
    trained = lay_out(single, RUN).model.named_parameters()
    assert {name for name, weight in trained if weight.requires_grad} == set(some)


def test_updates_that_do_not_fit_the_model_are_explained() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    name, g = next(iter(seen.gradients.items()))
    renamed = replace(seen, messages=(GradientMessage({"module." + name: g}, "gradient"),))
    assert any("not in the model" in p for p in plain().check(renamed))
    reshaped = replace(seen, messages=(GradientMessage({**seen.gradients, name: g[:1]}, "gradient"),))
    assert any("shape" in p for p in plain().check(reshaped))


def test_inverting_gradients_pins_the_papers_constants() -> None:
    defaults = {k: p.default for k, p in ATTACKS["inverting_gradients"].parameters.items()}
    assert defaults["steps"] == 4800
    assert defaults["lr"] == 0.1
    assert defaults["tv"] == 1e-1
    assert ATTACKS["inverting_gradients"].make().needs >= {Knows.LABELS}


def test_a_weight_difference_of_several_local_steps_is_simulated() -> None:
    plan = LocalPlan(kind="delta", local_steps=3, lr=0.05, momentum=0.9)
    seen, private = observe("small_bn_cnn", width=8, plan=plan)
    attack = plain(10)
    assert attack.objective_of(seen, private.images, private.targets, RUN) < 1e-4
    assert drive(attack, seen, RUN).objective < 1
