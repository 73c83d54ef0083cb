"""The gate of a federation's plan: every client's update is looked at before it leaves."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("flwr")

from federations import federate, plan
from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan, Update
from frostglass.federated.federate_plan import plan_of
from frostglass.federated.federation import prepared
from frostglass.federated.flower import engines
from frostglass.federated.gate import Decision, Gate, Outgoing
from frostglass.federated.local_client import NOTHING
from frostglass.federated.recorded import read_record

GATES = importlib.import_module("frostglass.federated.flower.gate_mod")  # the package exports its function

ONE_STEP = """
[gate]
action = "{action}"
budget = 60.0
decoys = {decoys}
settings = {settings}
"""


def text(folder: Path, settings: str, *, action: str = "block", decoys: str = "false", **replaced: str) -> str:
    """Four digits a client, one step over all of them: a gradient, whose labels and images can be told."""
    gate = ONE_STEP.format(action=action, settings=settings, decoys=decoys)
    small = {"limit": "15", "rounds": f'1\nfolder = "{folder.as_posix()}"', "minibatch": "4\nwhole_batch = true"}
    return plan(gate, **(small | replaced))


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "gate.jsonl").read_text().splitlines()]


def test_what_gives_images_away_does_not_leave(tmp_path: Path) -> None:
    history = federate(text(tmp_path, "{ label_leakage = 0.99 }"), tmp_path)
    row = history["rounds"][1]
    assert row["clients"] == []
    assert {c["client"] for c in row["left_out"]} == {"0", "1", "2"}
    assert all("blocked by the client's gate" in c["reason"] for c in row["left_out"])
    assert all(u.header.file is None for u in read_record(tmp_path / "recorded").updates)
    assert len(journal(tmp_path)) == 3
    assert not any(line["passed"] for line in journal(tmp_path))


def test_what_is_tolerated_leaves(tmp_path: Path) -> None:
    settings = "{ label_leakage = 1.0, exact_recovery = false, gallery = 1.0, candidates = 2, targets = 1 }"
    history = federate(text(tmp_path, settings, decoys="true"), tmp_path)
    assert [c["client"] for c in history["rounds"][1]["clients"]] == ["0", "1", "2"]
    found = [f["check"] for line in journal(tmp_path) for f in line["findings"]]
    assert "label_leakage" in found
    assert "gallery" in found


def test_warnings_let_everything_out(tmp_path: Path) -> None:
    settings = "{ label_leakage = 0.1, exact_recovery = false }"
    history = federate(text(tmp_path, settings, action="warn"), tmp_path)
    assert len(history["rounds"][1]["clients"]) == 3
    assert all(line["passed"] for line in journal(tmp_path))


def test_plain_images_are_compared_in_the_range_of_encodings(tmp_path: Path) -> None:
    made = prepared(plan_of(plan('\n[[defense]]\nname = "instahide"\nk = 2\n')))
    private = made.private(0)
    assert float(private.images.min()) == pytest.approx(-1)
    assert private.domain.low == -1


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ('checks = "frostglass.nowhere:checks"', "cannot be imported"),
        ("settings = { label_leakage = 2.0 }", "label_leakage"),
        ("settings = { leakage = 0.5 }", "did you mean 'label_leakage'"),
        ("settings = { gallery = 0.5 }", "decoys"),
    ],
)
def test_a_gate_that_cannot_be_made_is_told_before_anything_starts(gate: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        prepared(plan_of(plan(f"[gate]\n{gate}\n")))


def waiting(release: threading.Event) -> Gate:
    """One that records, with a check under way that outlasts its patience."""

    def decide(_: Outgoing) -> Decision:
        release.wait(60)
        return Decision((), 0.0)

    gate = Gate(decide, action="record", budget=0.05)
    model = nn.Linear(2, 2)
    held = Batch(torch.rand(1, 1, 1, 2), one_hot([0], 2), Domain(), ("a",))
    gate(Outgoing(model, model.state_dict(), Update({}, {}, 1, LocalPlan("delta")), held, NOTHING, 1, "0"))
    return gate


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


class Stuck:
    """A gate whose checks never end: who waits for it waits as long as allowed, on a clock of this test's own."""

    patience = 60.0

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.waits = clock, list[float]()

    def close(self, limit: float) -> bool:
        self.waits.append(limit)
        self.clock[0] += limit
        return False


def test_many_gates_are_waited_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    stuck = [Stuck(clock) for _ in range(4)]
    monkeypatch.setattr(GATES, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(GATES, "_GATES", {("plan", i): gate for i, gate in enumerate(stuck)})
    GATES.close_gates()
    assert [gate.waits for gate in stuck] == [[60.0], [0.0], [0.0], [0.0]]
    assert not GATES._GATES


def test_a_gate_that_does_not_end_is_given_up(release: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = {("plan", i): waiting(release) for i in range(4)}
    monkeypatch.setattr(GATES, "_GATES", dict(gates))
    GATES.close_gates()
    assert not any(gate.close(0) for gate in gates.values())  # all still wait for their release
    release.set()
    assert all(gate.close(60) for gate in gates.values())


def test_an_interrupted_run_waits_for_no_gate(
    release: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    gate = waiting(release)
    monkeypatch.setattr(gate, "close", lambda *_: pytest.fail("waited for"))
    monkeypatch.setattr(GATES, "_GATES", {("plan", 0): gate})
    monkeypatch.setattr(engines, "run_local", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engines.on_local(plan(), tmp_path, lambda words: None)
    assert not GATES._GATES


ENDLESS = """
import torch

def check():
    def decide(outgoing):
        x = torch.ones(64, 64)
        while True:
            x = (x @ x).clamp(0, 1)
    return decide
"""


def test_a_check_that_still_runs_at_the_end_does_not_abort_the_process(tmp_path: Path) -> None:
    """Python ends its thread inside of PyTorch, whose C++ then aborts: exit status 134, after a whole run."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    (tmp_path / "plan.toml").write_text(plan('[gate]\naction = "warn"\nbudget = 0.2\nchecks = "endless:check"\n'))
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "frostglass", "federate", "plan.toml", "--out", "run"]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Next: frostglass audit-updates" in done.stdout
    assert "the checks were not done after 0.2 seconds" in (tmp_path / "run" / "gate.jsonl").read_text()


def test_the_clients_app_travels_to_ray_without_the_gates_of_this_process(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    monkeypatch.setattr(GATES, "_GATES", {("plan", 0): waiting(release)})
    mod = cloudpickle.loads(cloudpickle.dumps(GATES.plan_gate_mod(prepared)))
    assert mod.__globals__["_kept"].__globals__["_GATES"] is GATES._GATES
    assert "_GATES" not in mod.__globals__
    release.set()
    GATES.close_gates()
