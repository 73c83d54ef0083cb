"""All 14 pitfalls in every cell, and the fields that standards ask for."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import pytest
import torch

from frostglass.auditing.cells import expand
from frostglass.auditing.pitfalls import CHECKS, SAID_ALREADY
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.run import run_plan
from frostglass.auditing.scorecard import AuditReport, Cell, PitfallCheck, load_scorecard
from frostglass.auditing.standards import beyond_letter, threat_letter
from frostglass.core.threat import Knows
from scenes import small


def run(folder: Path, **parts: Any) -> AuditReport:
    attack = parts.pop("attack", {"name": "linear_exact"})
    plan = small(attack, **({"data": {"source": "digits"}, "client": {"batch": 1, "batches": 2}} | parts))
    return run_plan(parse_plan(plan), folder, device=torch.device("cpu"))


def status(cell: Cell) -> dict[int, str]:
    return {p.number: p.status for p in cell.pitfalls}


def found(cell: Cell, number: int) -> PitfallCheck:
    return cell.pitfalls[number - 1]


def test_every_cell_has_all_fourteen_in_order(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    (cell,) = load_scorecard(tmp_path / "run" / "scorecard.json").cells
    assert [p.number for p in cell.pitfalls] == list(range(1, 15))
    assert len({p.about for p in cell.pitfalls}) == 14
    held = status(cell)
    assert {n for n, s in held.items() if s == "warning"} == {1, 4, 5, 6, 10, 13}
    assert {n for n, s in held.items() if s == "not_applicable"} == {2, 7}
    page = html.unescape(report.html.read_text(encoding="utf-8"))
    assert all(p.about in page and p.found in page for p in cell.pitfalls)
    for p in cell.pitfalls:
        if p.status == "warning" and p.number not in SAID_ALREADY:
            assert p.found in cell.warnings


def test_each_can_be_ruled_out(tmp_path: Path) -> None:
    """A setting that does better is not warned about."""
    report = run(
        tmp_path / "run",
        attack={"name": "thaw", "steps": 3, "every": 1},
        threat={"grants": ["examples", "local_plan"]},
        model={"name": "small_bn_cnn", "options": {"width": 4}},
        data={"source": "digits", "size": 8},
        client={"batch": 2, "batches": 2, "update": "delta", "local_steps": 2, "augmentation": "flip"},
        report={"metrics": ["psnr", "ssim", "iip_pixels", "iip_features"]},
    )
    (cell,) = report.cells
    held = status(cell)
    assert {n for n in (1, 2, 3, 5, 6, 8, 9, 10, 11, 14) if held[n] != "ok"} == set()
    assert held[12] == "warning", "three steps from noise show nothing, and no control passed"


def test_enough_trials_a_control_and_a_proof_are_no_pitfalls(tmp_path: Path) -> None:
    (cell,) = run(tmp_path / "run", client={"batch": 1, "batches": 30}, report={"null": False}).cells
    assert [status(cell)[n] for n in (12, 13)] == ["ok", "ok"]


def test_bn_labels_and_mode_are_flagged(tmp_path: Path) -> None:
    (cell,) = run(
        tmp_path / "run",
        attack={"name": "thaw", "steps": 1, "every": 1},
        threat={"grants": ["examples", "labels", "bn_batch"]},
        model={"name": "small_bn_cnn", "options": {"width": 4}, "mode": "eval"},
        report={"null": False},
    ).cells
    held = status(cell)
    assert [held[n] for n in (1, 2, 3, 11)] == ["warning"] * 4
    assert found(cell, 1).found.startswith("labels: oracle")
    assert found(cell, 2).found.startswith("bn: exact")


def test_an_adaptive_attack_is_asked_for(tmp_path: Path) -> None:
    report = run(tmp_path / "run", defense=[{"name": "noise", "std": 0.01}])
    assert found(report.cells[0], 7).status == "warning"
    assert "gallery" in found(report.cells[0], 7).found


def test_there_are_fourteen() -> None:
    assert len(CHECKS) == 14


@pytest.mark.parametrize(
    ("grants", "letter"),
    [
        ([], "A"), (["examples"], "B"), (["labels"], "B"), (["local_plan"], "C"), (["defence"], "C"),
        (["auxiliary", "local_plan"], "D"), (["bn_batch"], "E"), (["gallery"], "E"), (["modified_model"], "F"),
        (["modified_model", "auxiliary"], "G"),
    ],
)  # fmt: skip
def test_threat_letters(grants: list[str], letter: str) -> None:
    assert threat_letter(["model", "messages", "domain", "mode", *grants]) == letter


def test_more_grants_never_make_a_weaker_letter() -> None:
    everything = [k.value for k in Knows]
    for i in range(len(everything)):
        assert threat_letter(everything[:i]) <= threat_letter(everything[: i + 1])
    assert beyond_letter(["labels", "examples"]) == ["labels"]


def test_an_epsilon_stands_beside_its_own_adjacency(tmp_path: Path) -> None:
    claim = {"unit": "client", "adjacency": "add_remove", "epsilon": 3.0, "delta": 1e-6, "defense": "clip_and_noise"}
    parts = [{"name": "dp_sgd"}, {"name": "clip_and_noise"}, {"name": "dp_instahide", "k": 1}, {"name": "pruning"}]
    own = run(tmp_path / "own", defense=parts)
    held = [t["dp"] for t in own.scorecard.standards["tests"]]
    assert [dp and dp["adjacency"] for dp in held] == ["add_remove", "replace_one", "replace_one", None]
    said = run(tmp_path / "claimed", defense=parts, verdict={"claim": claim})
    of_claim = [t["dp"] for t in said.scorecard.standards["tests"]]
    assert [of_claim[1][k] for k in ("adjacency", "epsilon", "delta")] == ["add_remove", 3.0, 1e-6]
    assert [of_claim[i] for i in (0, 2, 3)] == [held[i] for i in (0, 2, 3)]
    noise = claim | {"epsilon": None, "noise_multiplier": 1.0, "defense": None}
    counted = run(tmp_path / "noise", defense=parts, verdict={"claim": {k: v for k, v in noise.items() if v}})
    dp = counted.scorecard.standards["tests"][1]["dp"]
    assert dp["adjacency"] == "replace_one"  # what the epsilon that is printed was accounted for
    assert dp["epsilon"] == held[1]["epsilon"]


def test_standards_are_whole(tmp_path: Path) -> None:
    report = run(tmp_path / "run", defense=[{"name": "none"}, {"name": "dp_sgd", "noise_multiplier": 8.0}])
    held = load_scorecard(tmp_path / "run" / "scorecard.json").standards
    ids = [c.id for c in expand(parse_plan(small()))]
    assert ids
    assert [t["cell"] for t in held["tests"]] == [c.id for c in report.cells]
    assert held["tests"][0]["dp"] is None
    dp = held["tests"][1]["dp"]
    for key in (
        "unit",
        "adjacency",
        "trust_model",
        "accounting",
        "sampling",
        "rng",
        "floating_point",
        "data_collection",
    ):
        assert dp[key], key
    assert dp["epsilon"] > 0
    assert [s["section"] for s in held["iso_27559"]] == ["6.2", "7.3", "8.2.3", "8.3", "9"]
    assert held["risk"]["tests"] == 1
    assert held["risk"]["max"] == held["risk"]["avg"] == 0.0
    assert held["risk"]["max_interval"][0] == 0.0
    evidence = held["evidence"]
    assert evidence["plan_sha256"] == report.scorecard.plan_sha256
    assert len(evidence["data_sha256"]) == 64
    assert evidence["seed"] == 0
    assert evidence["versions"]["torch"] == torch.__version__
    assert evidence["sample_sizes"] == {c.id: 2 for c in report.cells}
    assert evidence["positive_controls"] == [report.cells[0].id]
    assert len(evidence["assumptions"]) >= 4
    assert len(evidence["date"]) == 10
    page = report.html.read_text(encoding="utf-8")
    assert "ISO/IEC 27559" in page
    assert "SP 800-226" in page
