"""Attacks on FedAvg differences: the attacker simulates the client's optimiser, and never learns its order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import frostglass
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import adam, chain, scale
from frostglass.attacks.inversion.terms import match_cosine
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.plan import parse_plan
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows
from frostglass.core.update import LocalPlan
from scenes import small
from victims import observe

RUN = Runtime(Rng.from_seed(0, "fedavg"))
PLANS = {
    "steps": LocalPlan("delta", local_steps=2, lr=0.05, weight_decay=0.01),
    "momentum": LocalPlan("delta", epochs=3, lr=0.05, momentum=0.9),
    "minibatches": LocalPlan("delta", epochs=2, lr=0.05, minibatch=1),
    "adam": LocalPlan("delta", local_steps=2, lr=0.01, optimizer="adam"),
}


def plain(steps: int) -> Inversion:
    return Inversion("plain", lambda seen: (match_cosine(),), chain(adam(), scale(0.1)), steps=steps, every=10)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", PLANS)
def test_the_truth_is_optimal_and_the_objective_falls(name: str, mode: str) -> None:
    plan = replace(PLANS[name], mode=mode)  # type: ignore[arg-type]
    seen, private = observe("small_bn_cnn", width=8, mode=mode, plan=plan)
    attack = plain(25)
    assert attack.check(seen) == []
    assert attack.objective_of(seen, private.images, private.targets, RUN) < 1e-5
    events: list[Event] = []
    found = drive(replace(attack, every=1), seen, RUN, emit=events.append)
    assert found.objective < 0.8 * next(e.values["objective"] for e in events if e.kind == "progress")


def test_shuffled_epochs_are_searched_one_by_one_and_merged() -> None:
    plan = LocalPlan("delta", epochs=2, lr=0.05, minibatch=1)
    seen, private = observe("small_bn_cnn", width=8, plan=plan)
    attack = plain(20)
    events: list[Event] = []
    state = attack.init(seen, RUN)
    assert state.z.shape == (1, 4, 3, 16, 16)  # two images, two epochs
    found = drive(attack, seen, RUN, emit=events.append)
    assert found.images.shape == private.images.shape
    assert found.targets is not None
    assert len(found.targets) == 2
    progress = [e.values for e in events if e.kind == "progress"]
    assert progress[-1]["objective"] < progress[0]["objective"]
    assert progress[-1]["epochs"] > 0
    one_epoch, _ = observe("small_bn_cnn", width=8, plan=LocalPlan("delta", lr=0.05, minibatch=1))
    assert len(attack.init(one_epoch, RUN).z[0]) == 2  # its order only names the images
    whole, _ = observe("small_bn_cnn", width=8, plan=LocalPlan("delta", epochs=2, lr=0.05))
    assert len(attack.init(whole, RUN).z[0]) == 2


def test_equal_epochs_at_the_truth_agree_and_cost_nothing() -> None:
    from frostglass.attacks.inversion.engine import Objective, evaluate
    from frostglass.attacks.inversion.spaces import pixels
    from frostglass.attacks.inversion.target import lay_out
    from frostglass.attacks.inversion.terms import epoch_agreement

    seen, private = observe("small_bn_cnn", width=8, plan=LocalPlan("delta", epochs=2, lr=0.05, minibatch=1))
    target = lay_out(seen, RUN)
    problem = Objective(target, (match_cosine(), epoch_agreement()), pixels(), "double_backward", 0, 1, private.targets)
    z = seen.domain.normalise(private.images).repeat(2, 1, 1, 1)
    found = evaluate(z, problem)
    assert float(found.own) < 1e-5
    z[2:] += 0.3
    assert float(evaluate(z, problem).values["epochs"]) == pytest.approx(0.15**2, rel=1e-3)


def test_adams_sign_is_followed_through_a_smoothed_derivative() -> None:
    seen, _ = observe("small_bn_cnn", width=8, batch=1, plan=LocalPlan("delta", lr=1e-3, optimizer="adam"))
    assert drive(plain(40), seen, RUN).objective < 0.7  # 0.95 without: a sign has no slope


def test_long_differences_can_be_attacked() -> None:
    plan = LocalPlan("delta", local_steps=12, lr=0.02)
    seen, _ = observe("small_bn_cnn", width=4, size=8, plan=plan)
    attack = plain(6)
    found = drive(attack, seen, RUN)
    assert found.objective < 1


def test_without_the_local_plan_one_step_is_assumed() -> None:
    plan = LocalPlan("delta", local_steps=2, lr=0.05)
    seen, _ = observe("small_bn_cnn", width=8, plan=plan, knows=frozenset({Knows.EXAMPLES, Knows.LABELS}))
    assert drive(plain(10), seen, RUN).objective < 1


def test_labels_cannot_be_read_off_adams_difference() -> None:
    plan = LocalPlan("delta", optimizer="adam")
    seen, _ = observe("small_bn_cnn", width=8, plan=plan, knows=frozenset({Knows.EXAMPLES, Knows.LOCAL_PLAN}))
    assert any("Adam" in p for p in plain(5).check(seen))


def test_the_order_is_the_clients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows from keys that mix in the private images, and is in no field of the observation."""
    from frostglass.auditing import simulate
    from frostglass.auditing.prepare import prepare
    from frostglass.defenses.none import none
    from frostglass.numerics import client_step

    orders: list[Any] = []
    real = client_step.drawn_order
    monkeypatch.setattr(client_step, "drawn_order", lambda *given: orders.append(real(*given)) or orders[-1])
    client = {"batch": 4, "update": "delta", "minibatch": 2, "epochs": 2}
    plan = parse_plan(small(client=client))
    prepared = prepare(plan, 0, torch.device("cpu"))
    first = simulate.play(prepared, none(), 0).seen
    again = simulate.play(prepared, none(), 0).seen
    simulate.play(prepared, none(), 1)
    assert [len(o) for o in orders] == [4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(orders[0], orders[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(orders[0], orders[2], strict=True))
    assert all(torch.equal(g, again.gradients[n]) for n, g in first.gradients.items())
    assert "order" not in vars(first)


WRONG = {
    "minibatches of a gradient": ({"minibatch": 1}, 'minibatch: 1 needs update = "delta"'),
    "larger than the batch": ({"update": "delta", "minibatch": 9}, "exceeds batch = 2"),
    "both": ({"update": "delta", "minibatch": 1, "local_steps": 2}, "set epochs instead"),
    "adam's gradient": ({"optimizer": "adam"}, '"adam" needs update = "delta"'),
    "adam with momentum": ({"optimizer": "adam", "update": "delta", "momentum": 0.5}, "leave it out"),
    "another": ({"optimizer": "lion"}, "'sgd' or 'adam'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_plans_that_make_no_sense_are_refused(case: str) -> None:
    client, words = WRONG[case]
    with pytest.raises(BadInput) as refused:
        parse_plan(small(client=client))
    assert any(words in p for p in refused.value.problems), refused.value.problems


def test_dp_sgd_refuses_what_it_does_not_account_for() -> None:
    plan = small(client={"update": "delta", "optimizer": "adam"}, defense=[{"name": "dp_sgd"}])
    with pytest.raises(BadInput, match="dp_sgd"):
        frostglass.audit(plan, device="cpu")


def test_an_audit_of_minibatches_and_adam_runs() -> None:
    client = {"batch": 2, "update": "delta", "minibatch": 1, "epochs": 2, "optimizer": "adam", "lr": 0.01}
    plan = small({"name": "thaw", "steps": 5, "every": 5}, client=client, model={"name": "mlp"})
    plan["threat"] = {"grants": ["examples", "labels", "local_plan"]}
    cell = frostglass.audit(plan, device="cpu").cells[0]
    assert cell.status == "done"
    assert not any("One local step" in w for w in cell.warnings)
    assert ATTACKS["thaw"]
