"""The gate: what leaves, what does not, what time and broken checks do, and what is written down."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.defense import Defense
from frostglass.core.draws import kept_draws
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng, global_draws
from frostglass.core.update import LocalPlan, Update
from frostglass.federated.gate import Decision, Finding, Gate, NotRun, Outgoing


def outgoing(round: int = 1) -> Outgoing:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.full((1, 1, 2, 2), 0.123456)
    update = Update({n: torch.ones_like(p) for n, p in model.named_parameters()}, {}, 1, LocalPlan())
    private = Batch(images, one_hot([1], 2), Domain(), ("a",))
    return Outgoing(model, model.state_dict(), update, private, Defense("none", claim="none"), round, "site-1")


def finds(exceeded: bool) -> Callable[[Outgoing], Decision]:
    return lambda out: Decision((Finding("labels", exceeded, 0.9, 0.5, "Labels leak."),), 0.1)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def broken(out: Outgoing) -> Decision:
    raise RuntimeError("no head\nmore")


@pytest.mark.parametrize(("action", "passed"), [("block", False), ("warn", True)])
def test_an_exceeded_tolerance_blocks_or_warns(action: Any, passed: bool, tmp_path: Path, caplog: Any) -> None:
    gate = Gate(finds(True), action=action, journal=tmp_path / "gate.jsonl")
    ruling = gate(outgoing())
    assert ruling.passed is passed
    assert "Labels leak." in ruling.reason
    assert "Labels leak." in caplog.text
    (row,) = lines(tmp_path / "gate.jsonl")
    assert (row["passed"], row["round"], row["client"], row["action"]) == (passed, 1, "site-1", action)
    assert row["findings"] == [
        {"check": "labels", "exceeded": True, "value": 0.9, "tolerance": 0.5, "text": "Labels leak."}
    ]


def test_what_stays_below_passes_in_silence(tmp_path: Path, caplog: Any) -> None:
    assert Gate(finds(False), journal=tmp_path / "gate.jsonl")(outgoing()).passed
    assert not caplog.text
    assert not lines(tmp_path / "gate.jsonl")[0]["failed"]


@pytest.mark.parametrize(("on_failure", "passed"), [("open", True), ("closed", False)])
def test_a_broken_check_fails_open_or_closed(on_failure: Any, passed: bool, tmp_path: Path) -> None:
    ruling = Gate(broken, on_failure=on_failure, journal=tmp_path / "gate.jsonl")(outgoing())
    assert ruling.passed is passed
    assert ruling.failed
    assert "RuntimeError: no head" in ruling.reason
    assert "more" not in ruling.reason
    assert lines(tmp_path / "gate.jsonl")[0]["failed"]


def leaves(out: Outgoing) -> Decision:
    raise SystemExit(3)


def forgets(out: Outgoing) -> Any:
    return None


@pytest.mark.parametrize("decide", [leaves, forgets])
@pytest.mark.parametrize(("on_failure", "passed"), [("open", True), ("closed", False)])
def test_a_check_that_exits_or_decides_nothing_is_a_failure(
    decide: Any, on_failure: Any, passed: bool, tmp_path: Path
) -> None:
    ruling = Gate(decide, on_failure=on_failure)(outgoing())
    assert (ruling.passed, ruling.failed) == (passed, True)
    with Gate(decide, action="record", journal=tmp_path / "j") as gate:
        for number in (1, 2):
            gate(outgoing(number))
            gate.close()
    assert [row["failed"] for row in lines(tmp_path / "j")] == [True, True]


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_checks_take_no_random_numbers_from_training(seconds: float) -> None:
    def draws(out: Outgoing) -> Decision:
        nn.Dropout()(torch.ones(100))
        time.sleep(seconds)
        return Decision((), 0.1)

    leaving = outgoing()  # its network draws its weights
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    Gate(draws, budget=0.25)(leaving)
    assert torch.equal(torch.rand(3), wanted)


def test_training_is_the_same_to_the_bit_beside_a_gate_that_records() -> None:
    """The check draws, forks and restores between every two draws of the training, in lockstep."""
    turn, done = threading.Semaphore(0), threading.Semaphore(0)

    def draws(out: Outgoing) -> Decision:
        device = torch.device("cpu")
        for step in range(4):
            with global_draws(Rng.from_seed(step), device), kept_draws():
                turn.acquire(timeout=30)
                nn.Dropout()(torch.ones(100))
                torch.randn(3)
                done.release()
                turn.acquire(timeout=30)
            done.release()
        return Decision((), 0.1)

    def trained(beside: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        found = []
        for _ in range(8):
            if beside:
                turn.release()
                done.acquire(timeout=30)
            loss = model(torch.rand(6, 4)).square().sum()
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.data -= 0.1 * g
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return found

    wanted = trained(beside=False)
    with Gate(draws, action="record") as gate:
        gate(outgoing())
        found = trained(beside=True)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_warning_never_blocks() -> None:
    ruling = Gate(broken, action="warn", on_failure="closed")(outgoing())
    assert ruling.passed
    assert ruling.reason == "the checks broke (RuntimeError: no head). Let out, as the gate only warns."


@pytest.mark.parametrize(("on_failure", "passed"), [("open", True), ("closed", False)])
def test_a_check_that_does_not_end_is_given_up(on_failure: Any, passed: bool) -> None:
    release, begun = threading.Event(), []

    def stuck(out: Outgoing) -> Decision:
        begun.append(out.round)
        release.wait(30)
        return finds(True)(out)

    gate = Gate(stuck, on_failure=on_failure, budget=0.2)
    first = gate(outgoing(1))
    assert (first.passed, first.failed) == (passed, True)
    assert "0.2 seconds" in first.reason
    second = gate(outgoing(2))  # no second thread beside one that was given up
    assert begun == [1]
    assert "round 1" in second.reason
    assert not gate.close(0.05)
    release.set()
    assert gate.close(30)
    gate.budget = 30.0
    assert not gate(outgoing(3)).passed  # the next one is checked again, and what it finds counts
    assert begun == [1, 3]


def test_checks_are_told_when_to_stop() -> None:
    def patient(out: Outgoing) -> Decision:
        while not out.expired():
            time.sleep(0.01)
        return Decision((), 1.0, (NotRun("gallery", "the time was over", True),))

    ruling = Gate(patient, on_failure="closed", budget=2.0)(outgoing())
    assert not ruling.passed
    assert "gallery did not run: the time was over" in ruling.reason


def test_a_check_that_does_not_apply_is_no_failure() -> None:
    skips = Decision((), 0.0, (NotRun("exact_recovery", "no linear layer", False),))
    ruling = Gate(lambda out: skips, on_failure="closed")(outgoing())
    assert ruling.passed
    assert not ruling.failed


def test_what_was_exceeded_blocks_even_if_others_did_not_run() -> None:
    both = Decision(finds(True)(outgoing()).findings, 0.0, (NotRun("gallery", "the time was over", True),))
    assert not Gate(lambda out: both, on_failure="open")(outgoing()).passed


def test_checks_see_copies() -> None:
    given = outgoing()
    before = {n: t.clone() for n, t in given.model.state_dict().items()}

    def vandal(out: Outgoing) -> Decision:
        with torch.no_grad():
            for tensor in (*out.model.parameters(), *out.sent.values(), *out.update.gradients.values()):
                tensor.zero_()
            out.private.images.zero_()
        return Decision((), 0.0)

    Gate(vandal)(given)
    assert all(torch.equal(before[n], t) for n, t in given.model.state_dict().items())
    assert all(bool((g == 1).all()) for g in given.update.gradients.values())
    assert float(given.private.images[0, 0, 0, 0]) == pytest.approx(0.123456)


def test_recording_lets_out_at_once_and_writes_later(tmp_path: Path) -> None:
    release = threading.Event()

    def slow(out: Outgoing) -> Decision:
        release.wait(30)
        value = float(next(iter(out.update.gradients.values())).flatten()[0])
        return Decision((Finding("labels", True, value, 0.5, "Labels leak."),), 0.1)

    gate = Gate(slow, action="record", on_failure="closed", journal=tmp_path / "gate.jsonl", waiting=1)
    given = outgoing(1)
    assert gate(given).passed
    for gradient in given.update.gradients.values():
        gradient.zero_()  # training goes on
    until = time.monotonic() + 20
    while not gate._queue.empty() and time.monotonic() < until:  # the worker has taken round 1
        time.sleep(0.01)
    assert gate(outgoing(2)).passed
    dropped = gate(outgoing(3))
    assert dropped.passed
    assert "slower" in dropped.reason
    release.set()
    assert gate.close(30)
    rows = {row["round"]: row for row in lines(tmp_path / "gate.jsonl")}
    assert sorted(rows) == [1, 2, 3]
    assert rows[1]["reason"] == "Labels leak. Let out, as the gate only records."
    assert all(row["passed"] for row in rows.values())
    assert rows[1]["findings"][0]["value"] == 1.0  # of the update as it was when it left
    assert rows[3]["failed"]
    assert "findings" not in rows[3]
    again = gate(outgoing(4))  # a closed gate can be used again
    assert again.passed
    assert gate.close(30)


def test_a_recording_gate_survives_broken_checks(tmp_path: Path) -> None:
    with Gate(broken, action="record", on_failure="closed", journal=tmp_path / "gate.jsonl") as gate:
        assert gate(outgoing(1)).passed
        assert gate(outgoing(2)).passed
    assert [row["failed"] for row in lines(tmp_path / "gate.jsonl")] == [True, True]


def test_no_pixel_is_written(tmp_path: Path) -> None:
    Gate(finds(True), journal=tmp_path / "gate.jsonl")(outgoing())
    assert "0.1234" not in (tmp_path / "gate.jsonl").read_text()


def test_a_journal_that_cannot_be_written_breaks_no_round(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "file").write_text("")
    assert Gate(finds(False), journal=tmp_path / "file" / "gate.jsonl")(outgoing()).passed
    assert "cannot be written" in caplog.text


def test_a_model_that_cannot_be_copied_is_a_failure() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("has a lock")

    ruling = Gate(finds(False), on_failure="closed")(replace(outgoing(), model=Stubborn()))
    assert not ruling.passed
    assert "has a lock" in ruling.reason


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"action": "blok"}, "'block'"),
        ({"on_failure": "shut"}, "open"),
        ({"budget": 0}, "budget"),
        ({"budget": "30"}, "budget = '30'"),
        ({"waiting": 1.5}, "waiting = 1.5"),
    ],
)
def test_wrong_settings_are_named(settings: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        Gate(finds(True), **settings)


def test_checks_that_cannot_be_called_are_refused_before_any_update() -> None:
    with pytest.raises(BadInput, match=r"gate\.decide: None"):
        Gate(None)  # type: ignore[arg-type]
