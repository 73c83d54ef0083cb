"""What every registered attack must hold to; a new file below frostglass/attacks is tested by existing."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.store import CheckpointStore
from frostglass.core.drive import Attack, drive
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import ALWAYS, GradientMessage, Knows, Observation
from victims import frozen_copy, observe

RUN = Runtime(Rng.from_seed(3, "contract"))
VICTIMS = [
    ("mlp", {"hidden": (64, 32)}),
    ("small_bn_cnn", {"width": 8}),
    ("lenet", {}),
    ("imprinted", {"bins": 64, "inner_options": {"width": 8}}),
    ("resnet20", {"batch": 1}),
    ("resnet20", {"batch": 1, "mode": "eval"}),
]


def short(name: str) -> Attack[Any]:
    """The attack with few steps, where it has any to set."""
    entry = ATTACKS[name]
    wanted = {"steps": 12, "every": 4, "rehearsals": 60, "training": 10}
    return entry.make(**{k: v for k, v in wanted.items() if k in entry.parameters})


def victim_for(attack: Attack[Any]) -> Observation:
    """The first victim that the attack accepts."""
    refusals = []
    for name, options in VICTIMS:
        seen, _ = observe(name, auxiliary=Knows.AUXILIARY in attack.needs, **options)
        problems = attack.check(seen)
        if not problems:
            return seen
        refusals += problems
    raise AssertionError(f"{attack.name} refuses every victim: {refusals}")


ON_UPDATES = [entry.name for entry in ATTACKS if entry.about.get("reads", "an update") == "an update"]
"""Attacks on encodings have contracts of their own: test_encoding_attack_contract.py."""


@pytest.fixture(params=ON_UPDATES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_it_has_a_summary_and_a_source(name: str) -> None:
    entry = ATTACKS[name]
    assert len(entry.summary) > 20
    assert entry.paper
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in entry.parameters.values())


def test_result_has_the_shape_and_range_of_images(name: str) -> None:
    attack = short(name)
    seen = victim_for(attack)
    found = drive(attack, seen, RUN)
    assert found.images.shape[1:] == seen.image_shape
    assert found.images.dtype == torch.float32
    assert len(found.proved) == len(found.images)
    assert found.proved.dtype == torch.bool
    assert bool((found.images >= seen.domain.low).all())
    assert bool((found.images <= seen.domain.high).all())


def test_it_leaves_the_observation_and_the_model_unchanged(name: str) -> None:
    attack = short(name)
    seen = victim_for(attack)
    before, training = frozen_copy(seen), [m.training for m in seen.model.modules()]
    hooks = hooks_of(seen.model)
    drive(attack, seen, RUN)
    after = frozen_copy(seen)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert training == [m.training for m in seen.model.modules()]
    assert all(p.requires_grad for p in seen.model.parameters())
    assert all(p.grad is None for p in seen.model.parameters())
    assert hooks == hooks_of(seen.model)


def hooks_of(model: nn.Module) -> int:
    """Of all layers and parameters, forwards and backwards."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_layers = sum(len(getattr(layer, kind)) for layer in model.modules() for kind in kinds)
    return on_layers + sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_it_neither_draws_from_nor_seeds_a_generator_of_the_process(name: str) -> None:
    """Seeding is no better than drawing: the caller's next random numbers would be others."""
    attack = short(name)
    seen = victim_for(attack)
    torch.manual_seed(4711)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]
    drive(attack, seen, RUN)
    assert torch.equal(torch.get_rng_state(), before[0])
    after = np.random.get_state(legacy=False)["state"]  # Python's own moves by itself here: beartype draws from it
    assert after["pos"] == before[1]["pos"]
    assert np.array_equal(after["key"], before[1]["key"])


def test_what_it_calls_proved_is_a_private_image(name: str) -> None:
    attack = short(name)
    for victim, options in VICTIMS:
        seen, private = observe(victim, auxiliary=Knows.AUXILIARY in attack.needs, **options)
        if attack.check(seen):
            continue
        found = drive(attack, seen, RUN)
        for image in found.images[found.proved]:
            assert float((private.images - image).abs().amax((1, 2, 3)).min()) < 0.01
        return


def test_what_else_it_is_asked_has_an_answer(name: str) -> None:
    """Both methods may be missing; scoring takes sentences and one finite number."""
    attack: Any = short(name)
    seen, private = next(
        (seen, private)
        for victim, options in VICTIMS
        for seen, private in [observe(victim, auxiliary=Knows.AUXILIARY in attack.needs, **options)]
        if not attack.check(seen)
    )
    drive(attack, seen, RUN)
    if hasattr(attack, "warnings"):
        said = attack.warnings(seen)
        assert isinstance(said, list)
        assert all(isinstance(sentence, str) for sentence in said)
    if hasattr(attack, "objective_of"):
        assert math.isfinite(float(attack.objective_of(seen, private.images, private.targets, RUN)))


def test_the_same_run_twice_gives_the_same_result(name: str) -> None:
    results = []
    for _ in range(2):
        attack = short(name)
        results.append(drive(attack, victim_for(attack), RUN))
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].proved, results[1].proved)


def test_resumed_equals_uninterrupted(name: str, tmp_path: Any) -> None:
    whole = drive(short(name), victim_for(short(name)), RUN)
    attack = short(name)
    store = CheckpointStore(tmp_path / "c.safetensors", torch.device("cpu"))

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if event.kind == "checkpoint" and event.step == 5:
            raise Killed

    resumable = attack.steps > 5 and not isinstance(whole, type(None))
    try:
        drive(attack, victim_for(attack), RUN, emit=kill, store=store, save_every=5)
    except Killed:
        assert resumable
    again = short(name)
    resumed = drive(again, victim_for(again), RUN, store=store, save_every=5)
    assert torch.equal(whole.images, resumed.images)
    assert torch.equal(whole.proved, resumed.proved)


def test_values_that_are_not_finite_end_as_a_failed_run(name: str) -> None:
    attack = short(name)
    seen = victim_for(attack)
    broken = {n: g.clone() for n, g in seen.gradients.items()}
    for g in broken.values():
        g.view(-1)[0] = float("nan")
    poisoned = replace(seen, messages=(GradientMessage(broken, "gradient"),))
    with pytest.raises(AttackFailed):
        drive(short(name), poisoned, RUN)


def test_an_update_of_zeros_ends_as_a_failed_run(name: str) -> None:
    seen = victim_for(short(name))
    zeros = {n: torch.zeros_like(g) for n, g in seen.gradients.items()}
    with pytest.raises(AttackFailed):
        drive(short(name), replace(seen, messages=(GradientMessage(zeros, "gradient"),)), RUN)


def test_a_plan_that_grants_too_little_is_refused_before_compute(name: str) -> None:
    needs = short(name).needs - ALWAYS
    if not needs:
        pytest.skip(f"{name} needs nothing beyond what every server holds")
    scenario = {"attack": [{"name": name}]}
    with pytest.raises(BadInput, match="needs the grant"):
        parse_plan({"scenario": [scenario], "threat": {"grants": []}})
    threat = {"grants": [k.value for k in needs]} | ({"auxiliary": "photos"} if Knows.AUXILIARY in needs else {})
    parse_plan({"scenario": [scenario], "threat": threat})


def test_it_runs_without_the_grants_that_it_does_not_need(name: str) -> None:
    attack = short(name)
    for victim, options in VICTIMS:
        auxiliary = Knows.AUXILIARY in attack.needs
        seen, _ = observe(victim, knows=attack.needs | {Knows.EXAMPLES}, auxiliary=auxiliary, **options)
        if not attack.check(seen):
            drive(attack, seen, RUN)
            return
    pytest.fail(f"{name} needs more than it says")
