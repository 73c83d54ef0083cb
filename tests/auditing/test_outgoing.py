"""What the gate's checks measure on real updates of real images, and what they leave unsaid."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from frostglass.auditing import outgoing as checking
from frostglass.auditing.outgoing import outgoing_checks
from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.defense import Defense, stack
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.threat import Observation
from frostglass.core.update import LocalPlan
from frostglass.defenses.registry import DEFENSES
from frostglass.federated.gate import Decision, Finding, Gate, Outgoing
from frostglass.numerics.client_step import computed_step
from frostglass.vision import networks

NONE = Defense("none", claim="none")


def digits() -> tuple[Tensor, Tensor]:
    held = load_digits()
    return torch.tensor(held.images / 16, dtype=torch.float32)[:, None], torch.tensor(held.target)


def leaving(
    count: int = 4,
    *,
    model: str = "mlp",
    plan: LocalPlan | None = None,
    defence: Defense = NONE,
    options: dict[str, Any] | None = None,
    alike: bool = False,
) -> Outgoing:
    """A client's update of the first digits (of one class), after its defence."""
    x, y = digits()
    rows = (y == 3).nonzero().flatten()[:count] if alike else torch.arange(count)
    private = Batch(x[rows], one_hot(y[rows], 10), Domain(), tuple(f"digit {i}" for i in rows.tolist()))
    net = networks.build(model, classes=10, channels=1, size=8, options=options or {}, rng=Rng.from_seed(3))
    local = plan or LocalPlan(mode="eval")
    update = computed_step(net, private, local, defence, Rng.from_seed(4)).update
    update = defence.protect(update, Insecure(5))
    sent = {n: t.clone() for n, t in net.state_dict().items()}
    with torch.no_grad():  # a client's model has been trained when its update leaves
        for p in net.parameters():
            p.add_(1.0)
    return Outgoing(net, sent, update, private, defence, 1, "site-1")


def only(found: Decision, check: str) -> Finding:
    (one,) = [f for f in found.findings if f.check == check]
    return one


def decide(**settings: Any) -> Any:
    off: dict[str, Any] = {"label_leakage": None, "exact_recovery": False, "linter": False}
    return outgoing_checks(**{**off, **settings}, randomness=Insecure(0))


def noisy(sigma: float = 5.0) -> Defense:
    return DEFENSES["clip_and_noise"].make(clipping_norm=1.0, noise_multiplier=sigma)


def test_labels_of_a_plain_gradient_leak() -> None:
    found = only(decide(label_leakage=0.8)(leaving()), "label_leakage")
    assert found.exceeded
    assert found.value == 1.0
    assert "guessing gets 40%" in found.text  # digits 0, 1, 2, 3: a tenth of each class would be right for 0.4 of each


def test_noise_hides_the_labels() -> None:
    found = only(decide(label_leakage=0.8)(leaving(defence=noisy())), "label_leakage")
    assert not found.exceeded
    assert found.value < 0.8


def test_labels_that_guessing_gets_are_no_leak() -> None:
    """One image of each class: all counts are 1, and so says whoever guesses."""
    x, y = digits()
    rows = torch.stack([(y == k).nonzero()[0, 0] for k in range(10)])
    given = leaving(10)
    private = replace(given.private, images=x[rows], targets=one_hot(y[rows], 10))
    update = computed_step(_at(given), private, given.update.plan, NONE, Rng.from_seed(4)).update
    found = only(decide(label_leakage=0.5)(replace(given, private=private, update=update)), "label_leakage")
    assert found.value > 0.5
    assert "guessing gets 100%" in found.text
    assert not found.exceeded


def _at(given: Outgoing) -> nn.Module:
    given.model.load_state_dict(dict(given.sent))
    return given.model


def test_labels_of_a_delta_of_several_steps() -> None:
    plan = LocalPlan(kind="delta", mode="eval", local_steps=3, lr=0.05)
    assert only(decide(label_leakage=0.8)(leaving(plan=plan)), "label_leakage").value == 1.0


def test_exact_recovery_of_a_linear_network() -> None:
    found = only(decide(exact_recovery=True)(leaving()), "exact_recovery")
    assert found.exceeded
    assert found.value == 4
    assert "spear recovered 4 of 4" in found.text


def test_exact_recovery_from_the_difference_of_one_step() -> None:
    plan = LocalPlan(kind="delta", mode="eval", lr=0.1)
    assert only(decide(exact_recovery=True)(leaving(2, plan=plan)), "exact_recovery").exceeded


def test_exact_recovery_of_a_convolutional_network() -> None:
    given = leaving(1, model="small_bn_cnn")
    found = decide(exact_recovery=True)(given)
    assert only(found, "exact_recovery").exceeded
    assert "peel" in only(found, "exact_recovery").text


def test_noise_stops_exact_recovery_without_a_proof_of_anything() -> None:
    found = only(decide(exact_recovery=True)(leaving(defence=noisy())), "exact_recovery")
    assert not found.exceeded
    assert "proves nothing" in found.text


def test_several_local_steps_are_named_as_no_gradient() -> None:
    plan = LocalPlan(kind="delta", mode="eval", local_steps=3, lr=0.05)
    found = decide(exact_recovery=True)(leaving(plan=plan))
    assert not found.findings
    assert found.not_run[0].reason == "3 local steps are no single gradient"
    assert not found.not_run[0].failed


def test_attacks_get_the_update_and_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall: everything that an attack is driven on holds no private image and no label."""
    seen: list[Observation] = []
    driven = checking.drive
    monkeypatch.setattr(
        checking, "drive", lambda attack, obs, *a, **k: (seen.append(obs), driven(attack, obs, *a, **k))[1]
    )
    given = leaving()
    decide(exact_recovery=True, label_leakage=0.5)(given)
    assert seen
    for obs in seen:
        assert obs.labels is None
        assert obs.gallery is None
        assert obs.auxiliary is None
        assert obs.model is not given.model
        assert all(torch.equal(obs.model.state_dict()[n], t) for n, t in given.sent.items())


def test_the_gallery_names_images_of_a_plain_gradient() -> None:
    x, y = digits()
    found = only(decide(gallery=0.5, decoys=(x[100:], y[100:]))(leaving(3, alike=True)), "gallery")
    assert found.exceeded
    assert found.value == 1.0
    assert "3 of 3 images were named among 10" in found.text
    assert "chance 0.1" in found.text
    assert "no independent trials" in found.text
    assert "at most 0.1." in found.text


def test_the_gallery_is_at_chance_under_much_noise() -> None:
    """24 games on 24 updates are independent: at chance 1/10 more than 8 hits come up once in 1000 times."""
    x, y = digits()
    check = outgoing_checks(
        label_leakage=None, exact_recovery=False, linter=False, gallery=0.9, decoys=(x[100:], y[100:]), targets=1
    )
    hits = 0
    for seed in range(24):
        given = leaving(2, alike=True)
        hidden = noisy(1e4).protect(given.update, Insecure(seed))
        found = only(check(replace(given, update=hidden, defence=noisy(1e4))), "gallery")
        assert "tells no rate" in found.text
        hits += found.value == 1.0
    assert hits <= 8


def test_decoys_equal_to_a_private_image_are_left_out() -> None:
    x, y = digits()
    own = leaving(3, alike=True).private.images
    decoys = torch.cat([own, x[(y == 3).nonzero().flatten()[10:14]]]), torch.full((7,), 3)
    found = decide(gallery=0.5, decoys=decoys, candidates=5)(leaving(3, alike=True))
    assert "among 5" in only(found, "gallery").text
    found = decide(gallery=0.5, decoys=decoys, candidates=6)(leaving(3, alike=True))
    assert "lacking" in found.not_run[0].reason
    assert not found.not_run[0].failed


def test_an_image_that_stands_twice_in_the_update_is_asked_for_in_no_game() -> None:
    """Decoys are none of the update's images, so whoever knows the other copy names it without the update."""
    x, y = digits()
    given = leaving(2, alike=True)
    twins = replace(given, private=replace(given.private, images=given.private.images[:1].repeat(2, 1, 1, 1)))
    found = decide(gallery=0.5, decoys=(x[100:], y[100:]))(twins)
    assert "gallery" not in [f.check for f in found.findings]
    assert "stand twice" in found.not_run[0].reason


def test_the_linter_reads_the_running_defence() -> None:
    private = DEFENSES["dp_sgd"].make(clipping_norm=1.0, noise_multiplier=1.0)
    assert not only(decide(linter=True)(leaving(defence=private)), "linter").exceeded
    unprotected = DEFENSES["dp_sgd"].make(clipping_norm=1.0, noise_multiplier=0.0)
    found = only(decide(linter=True)(leaving(defence=stack(unprotected, DEFENSES["pruning"].make()))), "linter")
    assert found.exceeded
    assert found.value >= 1
    assert "dp_sgd" in found.text
    assert decide(linter=True)(leaving()).not_run[0].check == "linter"


def test_checks_whose_time_is_over_are_named_and_stop_the_attack() -> None:
    given = replace(leaving(), deadline=time.monotonic() - 1)
    found = outgoing_checks()(given)
    assert not found.findings
    assert [n.check for n in found.not_run] == ["linter", "label_leakage", "exact_recovery"]
    assert all(n.failed for n in found.not_run)


def test_a_deadline_in_the_middle_of_an_attack_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock runs out after the first step of the search; nothing waits for the others."""
    steps: list[int] = []
    given = leaving(20, options={"hidden": [24]})  # more images than this layer gives away at once
    monkeypatch.setattr(Outgoing, "expired", lambda self: len(steps) >= 2)
    driven = checking.drive

    def counted(attack: Any, *args: Any, emit: Any, stop: Any) -> Any:
        return driven(
            attack, *args, emit=lambda e: (steps.append(e.step) if e.kind == "progress" else 0, emit(e)), stop=stop
        )

    monkeypatch.setattr(checking, "drive", counted)
    found = decide(exact_recovery=True)(given)
    assert len(steps) == 2
    assert "when the time was over" in found.not_run[0].reason
    assert found.not_run[0].failed


def test_an_update_of_another_network_is_a_failure_not_a_pass() -> None:
    given = leaving()
    found = decide(label_leakage=0.5)(replace(given, sent={n: t for n, t in given.sent.items() if "bias" not in n}))
    assert found.not_run[0].failed
    assert "missing" in found.not_run[0].reason
    bad = {n: g * math.nan for n, g in given.update.gradients.items()}
    found = decide(label_leakage=0.5, exact_recovery=True)(replace(given, update=replace(given.update, gradients=bad)))
    assert [n.failed for n in found.not_run] == [True, True]
    assert "not finite" in found.not_run[0].reason


def test_encodings_are_not_taken_for_images() -> None:
    """InstaHide's rows are recovered exactly, and none of them is a private image."""
    hidden = DEFENSES["instahide"].make(k=2)
    given = leaving(4)
    encoded = hidden.encode(given.private, Insecure(1))
    update = computed_step(_at(given), encoded, given.update.plan, NONE, Rng.from_seed(4)).update
    found = only(decide(exact_recovery=True)(replace(given, update=update, defence=hidden)), "exact_recovery")
    assert not found.exceeded
    assert "4 rows that were trained on were recovered with a proof, none of them a private image" in found.text


@pytest.mark.parametrize("scripted", [lambda net: nn.Sequential(torch.jit.script(net[0]), *net[1:]), torch.jit.script])
def test_a_network_whose_layers_cannot_be_seen_is_a_failure_not_a_pass(scripted: Any) -> None:
    """Attacks that find no layer to read would not apply, and the gate would let a leaking update go."""
    net, given = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(64, 10)), leaving(4)
    update = computed_step(net, given.private, given.update.plan, NONE, Rng.from_seed(4)).update
    sent = {n: t.clone() for n, t in net.state_dict().items()}
    held = replace(given, model=scripted(net), sent=sent, update=update)
    left = decide(exact_recovery=True, label_leakage=0.8)(held).not_run
    assert [(one.check, one.failed) for one in left] == [("label_leakage", True), ("exact_recovery", True)]
    assert all("is a ScriptModule" in one.reason for one in left)
    with Gate(outgoing_checks(), on_failure="closed") as gate:
        assert not gate(held).passed


def test_a_defence_that_breaks_is_told_by_its_name() -> None:
    broken = replace(DEFENSES["instahide"].make(k=2), name="theirs", encode=lambda *_: 1 / 0)
    (left,) = decide(exact_recovery=True)(replace(leaving(4), defence=broken)).not_run
    assert left.reason.startswith("defense 'theirs': encode raised ZeroDivisionError: division by zero")


@pytest.mark.parametrize("settings", [{"label_leakage": None}, {"exact_recovery": False}])
def test_a_gate_that_records_neither_reads_nor_writes_the_generators_of_training(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch, name, lambda *_, name=name: touched.append(name))
    given = leaving()
    before = torch.default_generator.get_state()
    with Gate(outgoing_checks(**settings), action="record", budget=120) as gate:
        touched.clear()
        assert gate(given).passed
    assert not touched
    assert torch.equal(torch.default_generator.get_state(), before)


def test_in_the_gate(tmp_path: Any) -> None:
    gate = Gate(outgoing_checks(), budget=120, journal=tmp_path / "gate.jsonl")
    ruling = gate(leaving())
    assert not ruling.passed
    assert "spear recovered 4 of 4" in ruling.reason
    written = (tmp_path / "gate.jsonl").read_text()
    assert written.count("\n") == 1
    assert gate(leaving(defence=noisy())).passed


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"label_leakage": 2}, "label_leakage"), ({"gallery": 0.5}, "decoys"), ({"candidates": 1}, "candidates"),
        ({"label_leakage": "0.8"}, "label_leakage: '0.8'"), ({"candidates": 2.5}, "candidates = 2.5"),
        ({"targets": None}, "targets = None"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        outgoing_checks(**settings)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x, y: 5, "two tensors"),
        (lambda x, y: (x, y.tolist()), "two tensors"),
        (lambda x, y: ((x * 255).byte(), y), "torch.uint8"),
        (lambda x, y: (x * 255, y), r"from 0 to 255 must be in \[0, 1\]"),
        (lambda x, y: (x * math.nan, y), "from nan"),
        (lambda x, y: (x, one_hot(y, 10)), r"whole numbers \[n\]"),
        (lambda x, y: (x, y[:5]), r"labels \(5,\)"),
        (lambda x, y: (x[:, 0], y), r"\[n, c, h, w\]"),
    ],
)
def test_decoys_that_are_no_images_with_labels_are_refused_before_any_update(change: Any, word: str) -> None:
    """A gate that fails open would let every update out."""
    with pytest.raises(BadInput, match=word):
        outgoing_checks(gallery=0.5, decoys=change(*digits()))
