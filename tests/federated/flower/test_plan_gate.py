"""The gate of a federation's plan: every client's update is looked at before it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from federations import federate, plan
from frostglass.core.errors import BadInput
from frostglass.federated.federate_plan import plan_of
from frostglass.federated.federation import prepared
from frostglass.federated.recorded import read_record

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
