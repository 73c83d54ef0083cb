"""What the validator says of updates that do not fit, from what the server holds alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from frostglass.auditing.recorded_choice import PLACEHOLDER, scenario_of, seen_of
from frostglass.auditing.recorded_finding import Finding
from frostglass.auditing.recorded_plan import UpdatesPlan
from frostglass.auditing.recorded_validator import same_norms, validate
from frostglass.auditing.recorded_view import load_recording
from frostglass.core.batch import one_hot
from frostglass.core.update import LocalPlan
from frostglass.federated.recording import Received, Recorder
from frostglass.numerics.local_update import local_update
from frostglass.vision.weights import save_weights
from recorded_scenes import ONE_STEP, Federation

State = dict[str, torch.Tensor]


def found(record: Path, **known: Any) -> list[Finding]:
    recording = load_recording(UpdatesPlan(record=str(record), **known))
    sent = recording.source.updates[0]
    seen = seen_of(recording, scenario_of(recording, sent, [PLACEHOLDER]), 0, torch.device("cpu"))
    return validate(recording, sent, seen)


def told(findings: list[Finding], about: str) -> str:
    return " ".join(f.text for f in findings if f.about == about)


def spoiled(folder: Path, change: Callable[[State], State], **parts: Any) -> list[Finding]:
    made = Federation(folder, **parts)
    return found(made.run(spoil={(1, 0): lambda g: change(dict(g))}))


def recorded(folder: Path, made: Federation, **fields: Any) -> Path:
    """The update of client 0 as an engine of another kind would have recorded it."""
    state = made.model.state_dict()
    returned, update = made.message(0, state, 1)
    got = made.received(1, "c0", returned, update, update.gradients)
    with Recorder(folder, engine="other", model={"name": made.network, "options": made.options, "classes": 10},
                  image_shape=made.shape) as recorder:  # fmt: skip
        recorder.sent(1, fields.pop("sent", state))
        recorder.received(replace(got, **fields) if fields else got)
    return folder


def test_an_honest_update_has_no_warning(tmp_path: Path) -> None:
    assert [f for f in found(Federation(tmp_path).run()) if f.severity != "note"] == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_of_a_wrapper_are_read_without_it(tmp_path: Path, prefix: str) -> None:
    made = Federation(tmp_path / "a")
    state = made.model.state_dict()
    _, update = made.message(0, state, 1)
    with Recorder(
        tmp_path / "r", engine="ddp", model={"name": "small_bn_cnn", "classes": 10}, image_shape=made.shape
    ) as r:
        r.sent(1, {f"{prefix}{n}": t for n, t in state.items()})
        gradients = {f"{prefix}{n}": t for n, t in update.gradients.items()}
        r.received(Received(1, "c0", gradients, {}, examples=4, plan=ONE_STEP))
    text = told(found(tmp_path / "r"), "names")
    assert all(f"'{part}.' (" in text for part in prefix.split(".")[:-1])
    assert "of no parameter" not in text


def test_wrappers_of_a_part_of_the_network(tmp_path: Path) -> None:
    def compiled(state: State) -> State:
        return {(n.replace(".", "._orig_mod.", 1) if n == next(iter(state)) else n): t for n, t in state.items()}

    made = Federation(tmp_path / "a")
    state = made.model.state_dict()
    _, update = made.message(0, state, 1)
    with Recorder(
        tmp_path / "r", engine="ddp", model={"name": "small_bn_cnn", "classes": 10}, image_shape=made.shape
    ) as r:
        r.sent(1, compiled(state))
        r.received(Received(1, "c0", compiled(dict(update.gradients)), {}, examples=4, plan=ONE_STEP))
    assert "of no parameter" not in told(found(tmp_path / "r"), "names")


def test_tied_weights_and_buffers_of_two_states_are_no_strangers(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3)
            self.b.weight = self.a.weight
            self.register_buffer("scale", torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.b(self.a(x.flatten(1) * self.scale).relu()).relu())  # type: ignore[no-any-return]

    net = Tied()
    save_weights(net, tmp_path / "before.safetensors")
    net(torch.rand(2, 1, 4, 4))[:, 0].sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    save_weights(net, tmp_path / "after.safetensors")
    plan = UpdatesPlan(
        before=str(tmp_path / "before.safetensors"), after=str(tmp_path / "after.safetensors"), model="python:Tied",
        channels=1, size=4, examples=2, local={"lr": 0.1},
    )  # fmt: skip
    recording = load_recording(plan, net)
    (sent,) = recording.source.updates
    seen = seen_of(recording, scenario_of(recording, sent, [PLACEHOLDER]), 0, torch.device("cpu"))
    assert told(validate(recording, sent, seen), "names") == ""


def test_strange_names_come_with_the_renaming_that_would_fit(tmp_path: Path) -> None:
    def renamed(g: State) -> State:
        first = next(iter(g))
        return {(f"net.{n}" if n == first else n): t for n, t in g.items()}

    text = told(spoiled(tmp_path, renamed), "names")
    assert "without 'net.' they would fit" in text


def test_a_mode_that_contradicts_the_buffers(tmp_path: Path) -> None:
    made = Federation(tmp_path / "a")
    text = told(found(recorded(tmp_path / "b", made, plan=replace(ONE_STEP, mode="eval"))), "mode")
    assert "the client trained in train mode" in text
    made = Federation(tmp_path / "c", plan=replace(ONE_STEP, mode="eval"))
    text = told(found(recorded(tmp_path / "d", made, plan=ONE_STEP)), "mode")
    assert "no running statistic moved" in text


def test_counters_of_forward_passes_contradict_the_plan(tmp_path: Path) -> None:
    made = Federation(tmp_path / "a", plan=LocalPlan(kind="delta", lr=0.1, local_steps=3))
    assert "moved by 3, and the local plan makes 1" in told(
        found(recorded(tmp_path / "b", made, plan=ONE_STEP)), "steps"
    )


def test_buffers_that_were_not_sent_out_or_not_returned(tmp_path: Path) -> None:
    made = Federation(tmp_path / "a")
    weights = {n: t for n, t in made.model.state_dict().items() if "running" not in n}
    assert "not sent out" in told(found(recorded(tmp_path / "b", made, sent=weights)), "buffers")
    assert "kept its BatchNorm statistics" in told(found(Federation(tmp_path / "c", buffers=False).run()), "buffers")


def test_a_turned_sign(tmp_path: Path) -> None:
    findings = spoiled(tmp_path, lambda g: {n: -t for n, t in g.items()})
    assert "W_after - W_before" in told(findings, "scale")


def test_a_difference_that_was_recorded_as_a_gradient(tmp_path: Path) -> None:
    made = Federation(tmp_path / "a", network="mlp", options={"hidden": [64]})
    text = told(found(recorded(tmp_path / "b", made, kind="gradient", plan=None)), "scale")
    assert "recorded as a gradient" in text
    text = told(found(recorded(tmp_path / "c", made, plan=replace(ONE_STEP, lr=0.01))), "scale")
    assert "another learning rate" in text


def test_rounding_pruning_and_quantisation(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"network": "mlp", "options": {"hidden": [128]}}
    findings = spoiled(tmp_path / "a", lambda g: {n: t.half().float() for n, t in g.items()}, **parts)
    assert told(findings, "noise")  # the columns of the classifier no longer sum to 0
    pruned = spoiled(tmp_path / "b", lambda g: {n: t * (t.abs() > t.abs().median()) for n, t in g.items()}, **parts)
    assert "exactly zero" in told(pruned, "pruning")

    def to_levels(g: State) -> State:
        return {n: (t / t.abs().max() * 7).round() * t.abs().max() / 7 for n, t in g.items()}

    coarse = spoiled(tmp_path / "c", to_levels, **parts)
    assert "quantised" in told(coarse, "quantised")


def test_noise_is_measured(tmp_path: Path) -> None:
    findings = spoiled(
        tmp_path, lambda g: {n: t + 0.002 * torch.randn_like(t) for n, t in g.items()}, network="mlp",
        options={"hidden": [256]},
    )  # fmt: skip
    text = told(findings, "noise")  # 0.002 on the difference, divided by lr = 0.1
    level = float(text.split("noise of about ")[1].split(" ")[0])
    assert level == pytest.approx(0.02, rel=0.2)


def test_updates_of_equal_length_are_clipped(tmp_path: Path) -> None:
    def clipped(g: State) -> State:
        norm = torch.stack([t.norm() for t in g.values()]).norm()
        return {n: t * (0.01 / norm) for n, t in g.items()}

    made = Federation(tmp_path, network="mlp", options={"hidden": [32]}, clients=3)
    made.run(2, spoil={(1, c): lambda g: clipped(dict(g)) for c in range(3)})
    recording = load_recording(UpdatesPlan(record=str(made.record)))
    notes = same_norms(recording, recording.source.updates)
    assert set(notes) == {1, 2, 3}  # those of round 1
    assert "L2 norm 0.01" in notes[1].text


def test_what_the_client_did_not_say(tmp_path: Path) -> None:
    made = Federation(tmp_path / "a")
    findings = found(recorded(tmp_path / "b", made, examples=None, plan=None))
    assert "how many images" in told(findings, "examples")
    assert "local steps and learning rate are unknown" in told(findings, "steps")
    assert "train mode is assumed, as the running statistics moved" in told(findings, "mode")
    guessed = found(tmp_path / "b", examples=4)
    assert "upper bound" in told(guessed, "examples")


def test_a_difference_longer_than_the_weights(tmp_path: Path) -> None:
    findings = spoiled(tmp_path, lambda g: {n: 1e4 * t for n, t in g.items()})
    assert "times as long as the weights" in told(findings, "scale")


def test_findings_need_no_truth_and_change_nothing(tmp_path: Path) -> None:
    made = Federation(tmp_path, network="mlp", options={"hidden": [16]})
    made.run()
    recording = load_recording(UpdatesPlan(record=str(made.record)))
    sent = recording.source.updates[0]
    before = {n: t.clone() for n, t in recording.source.tensors(sent).update.items()}
    seen = seen_of(recording, scenario_of(recording, sent, [PLACEHOLDER]), 0, torch.device("cpu"))
    validate(recording, sent, seen)
    assert all(torch.equal(before[n], t) for n, t in recording.source.tensors(sent).update.items())
    trace = local_update(
        made.model, made.data.images[:4], one_hot(made.data.labels[:4], 10), LocalPlan(mode="train")
    )  # fmt: skip
    for n, g in trace.gradients.items():  # what the view reads is the gradient that the client computed
        assert torch.allclose(seen.gradients[n], g, atol=2e-6)
