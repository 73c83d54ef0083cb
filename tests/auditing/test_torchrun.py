"""`torchrun -m frostglass audit`, with real processes: the result of one, and the end of all when one is killed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import frostglass
from frostglass.attacks.inversion import ranks
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.scorecard import load_scorecard
from frostglass.core.errors import BadInput
from frostglass.core.runtime import World
from scenes import outcome_of, small

SOURCE = str(Path(frostglass.__file__).parents[1])

DRIVER = """
import functools, os, signal, sys
import torch
from frostglass.app.cli import main
from frostglass.attacks.inversion.machine import Inversion
from frostglass.auditing import run
torch.set_num_threads(1)
run.Runtime = functools.partial(run.Runtime, dtype=torch.float64)
mortal, last = os.environ.get("MORTAL"), int(os.environ.get("LAST", "0"))
step = Inversion.step
def dying(self, seen, state, runtime, t):
    if mortal and os.environ.get("RANK") == mortal and t == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, seen, state, runtime, t)
Inversion.step = dying
main(sys.argv[1:])
"""

ATTACKS = [
    {
        "name": "grad_inversion",
        "steps": 20,
        "every": 5,
        "seeds": 3,
        "consensus_start": 10,
        "consensus_every": 20,
        "register": "phase",
        "group": 0.05,
        "matching": "cosine",
    },
    {"name": "linear_exact"},
    {"name": "thaw", "steps": 20, "every": 5, "seeds": 1},
]


def plan_file(folder: Path, attacks: list[dict[str, Any]] = ATTACKS, **parts: Any) -> Path:
    path = folder / "plan.toml"
    made = parse_plan(small(attacks, model={"options": {"hidden": [48]}}, report={"show_images": True}, **parts))
    path.write_text(made.to_toml())
    (folder / "driver.py").write_text(DRIVER)
    return path


def go(folder: Path, *arguments: object, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*(starter if processes > 1 else [sys.executable]), str(folder / "driver.py"), *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment,
        check=False,
    )


def numbers(folder: Path) -> list[float]:
    """Everything that was measured and does not depend on the clock."""
    card = load_scorecard(folder / "scorecard.json")
    found: list[float] = []
    for cell in card.cells:
        for one in cell.images:
            found += [one.psnr or math.nan, one.ssim or math.nan]
        found += [math.nan if value is None else value for value in (cell.objective, cell.objective_at_truth)]
    return found


@pytest.mark.slow
def test_two_ranks_write_the_scorecard_of_one(tmp_path: Path) -> None:
    plan = plan_file(tmp_path)
    alone = go(tmp_path, "audit", plan, "--out", tmp_path / "one", processes=1)
    both = go(tmp_path, "audit", plan, "--out", tmp_path / "two")
    assert alone.returncode == both.returncode == 0, both.stderr
    assert both.stdout.count("Report:") == 1
    assert both.stderr.count("thaw against no defence") == 1
    mine, theirs = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(mine) > 12
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=1e-9, atol=0, equal_nan=True)
    left = {p.name for p in (tmp_path / "two" / "checkpoints").glob("*.safetensors")}
    assert left == {p.name for p in (tmp_path / "one" / "checkpoints").glob("*.safetensors")}


@pytest.mark.slow
def test_a_killed_rank_ends_all_in_words_and_the_run_goes_on_later(tmp_path: Path) -> None:
    attacks = [{"name": "thaw", "steps": 20, "every": 5, "seeds": 2}]
    plan = plan_file(tmp_path, attacks)
    out = tmp_path / "run"
    killed = go(tmp_path, "audit", plan, "--out", out, MORTAL="1", LAST="12")
    assert killed.returncode != 0
    assert "another rank" in killed.stderr
    assert "start all ranks again with --resume" in killed.stderr
    assert not (out / "scorecard.json").exists()
    kinds = [json.loads(line)["kind"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert "cell_failed" not in kinds
    assert len(list((out / "checkpoints").glob("*rank?of2*"))) == 4
    assert go(tmp_path, "audit", plan, "--out", out, "--resume").returncode == 0
    whole = tmp_path / "whole"
    assert go(tmp_path, "audit", plan, "--out", whole).returncode == 0
    cards, found = zip(*(outcome_of(folder)[:2] for folder in (whole, out)), strict=True)
    assert cards[0] == cards[1]
    for name, images in found[0].items():  # the filmstrip shows rank 0's seeds alone until the end
        assert torch.equal(images, found[1][name]), name
    assert not list((out / "checkpoints").glob("*rank?of2*"))
    # rank 0 alone refuses a folder that holds a run, and says so once
    again = go(tmp_path, "audit", plan, "--out", out)
    assert again.returncode != 0
    assert again.stderr.count("already holds this run") == 1


def test_ranks_must_hold_the_same_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = World(0, 2)
    monkeypatch.setattr(ranks, "gathered", lambda value, world, what: [value, "other"])
    with pytest.raises(BadInput, match="different images"):
        ranks.same_on_all("mine", pair, "images, labels and weights")
    monkeypatch.setattr(ranks, "gathered", lambda value, world, what: [value, ("no such file.",)])
    with pytest.raises(BadInput, match="no such file"):
        ranks.on_all(lambda: 1, pair, "")
    monkeypatch.setattr(ranks, "gathered", lambda value, world, what: [value, (None, None)])
    assert ranks.from_first(lambda: 5, pair, "") == 5

    def refuses() -> int:
        raise BadInput("--out: is full.")

    with pytest.raises(BadInput, match="is full"):
        ranks.from_first(refuses, pair, "")


def test_a_run_of_ranks_from_python_needs_a_folder() -> None:
    with pytest.raises(BadInput, match="one folder"):
        frostglass.audit(parse_plan(small()), ranks=True)
