"""The recipes against the constants of their papers, and each one's ingredients by one key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import StepInfo
from frostglass.attacks.inversion.schedules import as_schedule
from frostglass.attacks.inversion.terms import Term
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.plan import parse_plan
from frostglass.core.drive import drive
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Knows, Observation
from frostglass.numerics import registration
from victims import observe

RUN = Runtime(Rng.from_seed(0, "recipes"))

CONSTANTS: dict[str, dict[str, Any]] = {
    # Yin et al. 2021: Eq. 3, 9, 11 and sec. 4.1; 8 seeds, registration from 5,000 every 100 of 20,000
    "grad_inversion": {
        "steps": 20_000,
        "lr": 0.1,
        "warmup": 50,
        "matching": "l2",
        "gradient": 1e-3,
        "cosine_gradient": 1.0,
        "tv": 1e-4,
        "l2": 1e-6,
        "bn": "auto",
        "bn_weight": 0.1,
        "bn_relative": False,
        "noise": 0.2,
        "consensus": "registered",
        "group": 0.01,
        "consensus_start": None,
        "consensus_every": 100,
        "seeds": 8,
    },
    # Zhu et al. 2019: L-BFGS, learning rate 1, 300 iterations (of 20, torch's default)
    "dlg": {"steps": 300, "lr": 1.0, "inner": 20, "history": 100, "squared": 1.0, "seeds": 1},
    "idlg": {"steps": 300, "lr": 1.0, "inner": 20, "history": 100, "squared": 1.0, "seeds": 1},
    # Geiping et al. 2020
    "inverting_gradients": {"steps": 4800, "lr": 0.1, "tv": 1e-1, "seeds": 1},
    # Yin et al. 2020, with GradInversion's weights of the priors
    "deep_inversion": {"ce": 1.0, "tv": 1e-4, "l2": 1e-6, "bn": 0.1, "shift": 2, "flip": True, "seeds": 1},
}


def made(name: str, **settings: Any) -> Inversion:
    attack = ATTACKS[name].make(**settings)
    assert isinstance(attack, Inversion)
    return attack


def weights(attack: Inversion, seen: Observation) -> dict[str, float]:
    def at_start(term: Term) -> float:
        return as_schedule(term.weight)(0, attack.steps)

    return {t.name: at_start(t) for t in attack.terms(seen)}


@pytest.mark.parametrize("name", CONSTANTS)
def test_defaults_are_the_papers_constants(name: str) -> None:
    defaults = {k: p.default for k, p in ATTACKS[name].parameters.items()}
    assert {k: defaults[k] for k in CONSTANTS[name]} == CONSTANTS[name]


def test_grad_inversions_constants_reach_the_machine() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    attack = made("grad_inversion")
    assert weights(attack, seen) == {"layer_norms": 1e-3, "tv": 1e-4, "l2": 1e-6, "bn": 0.1}
    how = attack.consensus
    assert how is not None
    assert (how.weight, how.start, how.every) == (0.01, 5000, 100)
    assert [t for t in range(5301) if how.due(t)] == [5000, 5100, 5200, 5300]
    assert how.register is not registration.none
    assert (attack.seeds, attack.steps) == (8, 20_000)
    zero = torch.zeros(1, 1, 3, 32, 32)
    for t, lr in ((50, 0.1), (20_000 - 1, 0.0), (50 + 19_950 // 2, 0.05)):
        change, _ = attack.update.apply(zero, attack.update.init(zero), StepInfo(t, 20_000, Rng.from_seed(t)))
        assert float(change.std()) == pytest.approx(0.2 * lr, rel=0.05, abs=1e-6)
    assert made("grad_inversion", steps=400).consensus.start == 100  # type: ignore[union-attr]


OFF = [
    ("grad_inversion", {"gradient": 0.0}, "layer_norms"),
    ("grad_inversion", {"matching": "cosine", "cosine_gradient": 0.0}, "cosine"),
    ("grad_inversion", {"tv": 0.0}, "tv"),
    ("grad_inversion", {"l2": 0.0}, "l2"),
    ("grad_inversion", {"bn_weight": 0.0}, "bn"),
    ("grad_inversion", {"bn": "none"}, "bn"),
    ("grad_inversion", {"group": 0.0}, "group"),
    ("grad_inversion", {"consensus": "none"}, "group"),
    ("inverting_gradients", {"tv": 0.0}, "tv"),
    ("inverting_gradients", {"gradient": 0.0}, "cosine"),
    ("thaw", {"gradient": 0.0}, "cosine"),
    ("thaw", {"tv": 0.0}, "tv"),
    ("thaw", {"bn_batch": 0.0}, "bn"),
    ("latent_projection", {"gradient": 0.0}, "cosine"),
    ("latent_projection", {"tv": 0.0}, "tv"),
    ("deep_inversion", {"ce": 0.0}, "cross_entropy"),
    ("deep_inversion", {"tv": 0.0}, "tv"),
    ("deep_inversion", {"l2": 0.0}, "l2"),
    ("deep_inversion", {"bn": 0.0}, "bn"),
]


@pytest.mark.parametrize(("name", "key", "gone"), OFF)
def test_every_term_goes_with_one_key(name: str, key: dict[str, Any], gone: str) -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    few = {"consensus_start": 0, "seeds": 2} if name == "grad_inversion" else {}
    on = {"matching": key["matching"]} if "matching" in key else {}

    def logged(**settings: Any) -> set[str]:
        attack = made(name, steps=2, every=1, **few, **settings)
        return set(attack.step(seen, attack.init(seen, RUN), RUN, 0)[1])

    before, after = logged(**on), logged(**key)
    assert before - after == {gone}
    assert after < before


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("thaw", {"tv": -0.001}),
        ("thaw", {"lr": -0.5}),
        ("thaw", {"bn_batch": float("nan")}),
        ("inverting_gradients", {"tv": -1.0}),
        ("grad_inversion", {"noise": -0.1}),
        ("grad_inversion", {"group": -0.1}),
        ("grad_inversion", {"warmup": -5}),
        ("dlg", {"inner": 0}),
        ("dlg", {"history": 0}),
        ("dlg", {"restart_every": -1}),
        ("deep_inversion", {"shift": -1}),
        ("deep_inversion", {"coarse": 0}),
        ("latent_projection", {"width": 0}),
        ("thaw", {"restore": "guess"}),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_run(name: str, settings: dict[str, Any]) -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    try:
        found = made(name, **settings).check(seen)
    except BadInput as wrong:
        found = list(wrong.problems)
    assert any("attack" in problem for problem in found)


def test_a_plan_names_the_rule_for_labels() -> None:
    seen, _ = observe("small_bn_cnn", width=4, batch=2)
    seen = replace(seen, labels=None)
    for name, default in (("thaw", "counts"), ("grad_inversion", "row_minimum")):
        for rule in (default, "sum"):
            attack = made(name, steps=1, seeds=1, **({} if rule == default else {"restore": rule}))
            state = attack.step(seen, attack.init(seen, RUN), RUN, 0)[0]
            assert str(attack.read(seen, state).info["labels_rule"]).startswith(rule)


def test_a_warmup_leaves_half_of_a_short_run() -> None:
    zero = torch.zeros(1, 1, 3, 8, 8)
    attack = made("grad_inversion", steps=20)

    def size(t: int) -> float:
        info = StepInfo(t, 20, Rng.from_seed(t))
        return float(attack.update.apply(zero, attack.update.init(zero), info)[0].std())

    assert size(10) == pytest.approx(0.2 * 0.1, rel=0.3)
    assert size(19) < 0.2 * size(10)


def test_thaw_can_drop_seeds_on_the_way() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    attack = made("thaw", steps=10, seeds=4, eliminate=True)
    state = attack.init(seen, RUN)
    for t in range(9):
        state, _ = attack.step(seen, state, RUN, t)
    assert len(state.seeds) == 1


def test_noise_and_matching_are_keys_too() -> None:
    zero = torch.zeros(1, 1, 3, 8, 8)
    quiet = made("grad_inversion", noise=0.0).update
    assert not quiet.apply(zero, quiet.init(zero), StepInfo(60, 100, Rng.from_seed(0)))[0].any()
    seen, _ = observe("small_bn_cnn", width=4)
    assert weights(made("grad_inversion", matching="cosine"), seen)["cosine"] == 1.0
    assert made("grad_inversion", consensus="lazy").consensus.register is registration.none  # type: ignore[union-attr]


def test_batchnorm_statistics_are_those_asked_for() -> None:
    some = frozenset({Knows.EXAMPLES})
    for grants, granted in (
        (some, None),
        (some | {Knows.BN_RUNNING}, Knows.BN_RUNNING),
        (frozenset(Knows), Knows.BN_BATCH),
    ):
        seen, _ = observe("small_bn_cnn", width=4, knows=grants)
        found = {n for t in made("grad_inversion").terms(seen) for n in t.needs}
        assert found == ({granted} if granted else set())
    assert Knows.BN_BATCH in made("grad_inversion", bn="batch").needs
    assert Knows.BN_RUNNING in made("grad_inversion", bn="running").needs
    plain, _ = observe("mlp", hidden=(4,))
    for name, settings in (("grad_inversion", {"bn": "batch"}), ("deep_inversion", {})):
        assert any("no such statistics" in p for p in made(name, **settings).check(plain))
    assert not made("deep_inversion", bn=0.0).check(plain)


def test_statistics_of_layers_that_no_image_passes_are_named() -> None:
    seen, _ = observe("small_bn_cnn", size=8, width=4)
    assert seen.bn_running is not None
    aside = {f"aside.{name}": held for name, held in seen.bn_running.items()}
    with pytest.raises(AttackFailed, match=r"aside.*no image passes there; set its weight to 0"):
        drive(made("grad_inversion", steps=1, seeds=1, bn="running"), replace(seen, bn_running=aside), RUN)


@pytest.mark.parametrize(
    "wrong", [{"register": "ransac"}, {"register": "no.module:f"}, {"consensus_every": 0}, {"consensus_start": -1}]
)
def test_wrong_settings_are_refused_when_the_plan_is_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        made("grad_inversion", **wrong)
    plan = {"scenario": [{"attack": [{"name": "grad_inversion", **wrong}]}], "threat": {"grants": ["examples"]}}
    with pytest.raises(BadInput):
        parse_plan(plan)


def test_every_recipe_runs_from_a_plan() -> None:
    grants = ["examples", "labels", "bn_running"]
    for name in CONSTANTS:
        parse_plan({"scenario": [{"attack": [{"name": name, "seeds": 2}]}], "threat": {"grants": grants}})


def test_more_images_than_classes_are_refused_under_distinct_labels() -> None:
    seen, _ = observe("small_bn_cnn", width=4, knows=frozenset({Knows.EXAMPLES, Knows.BN_RUNNING}))
    many = replace(seen, examples=11)
    assert any("distinct" in p for p in made("grad_inversion").check(many))
    unknown = replace(seen, examples=None)
    for name in ("grad_inversion", "dlg", "idlg"):
        assert any("examples" in p for p in made(name).check(unknown))


def test_deep_inversion_reads_the_gradient_for_labels_alone() -> None:
    seen, _ = observe("small_bn_cnn", width=4, knows=frozenset({Knows.EXAMPLES, Knows.LABELS, Knows.BN_RUNNING}))
    other = {n: torch.randn_like(g) for n, g in seen.gradients.items()}
    attack = made("deep_inversion", steps=8)
    runs = [
        drive(attack, replace(seen, messages=(GradientMessage(g, "gradient"),)), RUN) for g in (seen.gradients, other)
    ]
    assert torch.equal(runs[0].images, runs[1].images)
    assert runs[0].objective == runs[1].objective
    assert not any(t.gradient for t in attack.terms(seen))


def test_deep_inversion_starts_in_blocks_and_goes_on_in_pixels() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    attack = made("deep_inversion", steps=40)
    state = attack.init(seen, RUN)
    z = state.z
    assert torch.equal(z[..., ::2, ::2], z[..., 1::2, 1::2])
    for t in range(10):
        state, _ = attack.step(seen, state, RUN, t)
    z = state.z
    torch.testing.assert_close(z[..., ::2, ::2], z[..., 1::2, 1::2])
    later, _ = attack.step(seen, state, RUN, 10)
    assert not torch.allclose(later.z[..., ::2, ::2], later.z[..., 1::2, 1::2])


def test_deep_inversion_finds_images_that_the_network_recognises() -> None:
    seen, private = observe("small_bn_cnn", width=8)
    attack = made("deep_inversion", steps=20, bn=0.0, shift=1)
    start = seen.domain.denormalise(attack.init(seen, RUN).z[0])
    found = drive(attack, seen, RUN).images
    model = seen.model.eval()
    with torch.no_grad():
        losses = [-(torch.log_softmax(model(x), 1) * private.targets).sum(1).mean() for x in (start, found)]
    assert float(losses[1]) < float(losses[0])


def test_shifts_and_mirrors_are_addressed_by_step_and_seed() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    attack = made("deep_inversion", steps=6, seeds=2)
    assert attack.jitter is not None
    x = torch.randn(1, 3, 16, 16)
    views = [attack.jitter(RUN.rng.at("step", t).at("jitter", s))(x) for t in range(8) for s in (0, 1)]
    again = [attack.jitter(RUN.rng.at("step", t).at("jitter", s))(x) for t in range(8) for s in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({v.numpy().tobytes() for v in views}) > 4
    assert torch.equal(drive(attack, seen, RUN).images, drive(attack, seen, RUN).images)


@pytest.mark.slow
def test_dlg_finds_image_and_label_of_a_smooth_network() -> None:
    seen, private = observe("lenet", size=12, batch=1, knows=frozenset({Knows.EXAMPLES}))
    for name in ("dlg", "idlg"):
        found = drive(made(name, steps=12, every=4), seen, RUN)
        psnr = -10 * (found.images - private.images).square().mean().log10()
        assert float(psnr) > 30
        assert found.targets is not None
        assert torch.equal(found.targets.argmax(1), private.targets.argmax(1))
        assert found.label_counts is not None
        assert torch.equal(found.label_counts, private.targets.sum(0))


@pytest.mark.slow
def test_grad_inversion_nears_the_image_as_its_objective_falls() -> None:
    seen, private = observe("small_bn_cnn", width=8, batch=1)
    attack = made("grad_inversion", steps=120, seeds=2, matching="cosine", bn_weight=1e-2, bn_relative=True, tv=1e-3)
    state = attack.init(seen, RUN)
    start = seen.domain.clamp(seen.domain.denormalise(state.z[0]))
    found = drive(attack, seen, RUN)
    errors = [float((x - private.images).square().mean()) for x in (start, found.images)]
    assert errors[1] < 0.7 * errors[0]
