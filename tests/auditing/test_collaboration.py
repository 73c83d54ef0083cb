"""One federation under several defences: real Flower apps, real audits, one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from PIL import Image

from command_line import call
from documented import misfits
from frostglass.auditing import collaboration
from frostglass.auditing.collaboration_plan import BUNDLED_POOL, digits, load_collaboration, parse_collaboration
from frostglass.auditing.collaboration_report import told_game
from frostglass.core.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")
PLANS = Path(__file__).parents[2] / "plans"


def values(**more: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "seeds": [0, 1],
        "job": {
            "data": {"source": "digits", "limit": 120, "test_limit": 60},
            "model": {"name": "mlp"},
            "split": {"clients": 2, "alpha": 1.0},
            "client": {"epochs": 1, "minibatch": 16, "lr": 0.1},
            "server": {"rounds": 2},
        },
        "method": [
            {"name": "plain"},
            {"name": "inside", "defense": [{"name": "instahide", "k": 2, "sees": "magnitudes"}]},
            {"name": "cross", "defense": [{"name": "instahide", "k": 4, "private": 2, "public": BUNDLED_POOL}]},
            {"name": "dp", "defense": [{"name": "dp_sgd"}], "change": {"client.lr": 0.5}},
        ],
        "leakage": {"rounds": [1], "targets": 1, "candidates": 2},
    } | more


def as_toml(folder: Path, value: dict[str, Any]) -> Path:
    path = folder / "plan.toml"
    path.write_text(parse_collaboration(value).to_toml())
    return path


@pytest.mark.slow
@pytest.mark.xdist_group("flower")
def test_accuracy_and_leakage_in_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flwr")
    plan, out = as_toml(tmp_path, values()), tmp_path / "out"
    code, text, err = call(capsys, "collaborate", plan, "--out", out)
    assert code == 0, err
    value = json.loads((out / "collaboration.json").read_text())
    assert misfits("collaboration.json", value) == []
    assert [m["name"] for m in value["methods"]] == ["plain", "inside", "cross", "dp"]
    for method in value["methods"]:
        assert [text for run in method["runs"] for text in misfits("history.json", run)] == []
        assert [run["seed"] for run in method["runs"]] == [0, 1]
        assert all(len(run["rounds"]) == 3 for run in method["runs"])
        assert {(row["round"], row["client"]) for row in method["leakage"]} == {(1, "0"), (1, "1")}
        assert all("share" in row["game"] or row["game"]["reason"] for row in method["leakage"])
        assert method["verdict"] in ("INCONCLUSIVE", "VIOLATED")
    plain, inside, cross, dp = value["methods"]
    assert plain["runs"][0]["rounds"][-1]["accuracy_encoded"] is None
    assert inside["runs"][0]["rounds"][-1]["accuracy_encoded"] is not None
    assert max(c["exposure-max"] for c in cross["runs"][0]["rounds"][-1]["clients"]) >= 2
    assert all(c["epsilon"] > 0 for c in dp["runs"][0]["rounds"][-1]["clients"])
    page = (out / "report.html").read_text()
    assert all(f'id="method-{i}"' in page for i in range(1, 5))
    assert "<script" not in page
    assert "2 seeds" in page
    assert "dp" in text
    before = (out / "collaboration.json").read_text()
    (out / "runs" / "inside-1" / "history.json").unlink()
    (out / "runs" / "cross-1" / ".whole").unlink()  # killed between its history and the rest of its record
    (out / "runs" / "plain-0" / "audit" / "report.html").unlink()  # between an audit's scorecard and its report
    (out / "report.html").unlink()
    code, _, err = call(capsys, "collaborate", plan, "--out", out, "--resume")
    assert code == 0, err
    assert "small: inside, seed 1" in err
    assert "small: cross, seed 1" in err
    assert "small: plain, seed 0" not in err
    again = json.loads((out / "collaboration.json").read_text())
    assert again["methods"][0] == json.loads(before)["methods"][0]
    assert (out / "report.html").is_file()
    assert (out / "runs" / "plain-0" / "audit" / "report.html").is_file()
    assert "audit of the recorded updates" not in err.split("small: inside, seed 1")[0], (
        "it is written, not audited anew"
    )


def test_the_bundled_plan_is_the_one_in_plans() -> None:
    assert load_collaboration(PLANS / "collaborate-digits.toml") == digits()
    assert digits(["seeds=[7]"]).seeds == [7]


def test_public_pools_are_taken_from_the_folder_of_the_plan(tmp_path: Path) -> None:
    encoder = {"name": "instahide", "k": 4, "private": 2}
    pools = [{**encoder, "public": "pool/"}, {**encoder, "public": BUNDLED_POOL}]
    methods = [{"name": f"m{i}", "defense": [part]} for i, part in enumerate(pools)]
    (tmp_path / "plan.toml").write_text(tomli_w.dumps(values(method=methods)))
    found = [m.defense[0].settings["public"] for m in load_collaboration(tmp_path / "plan.toml").method]
    assert found == [(tmp_path / "pool").resolve().as_posix(), BUNDLED_POOL]


def test_every_problem_comes_out_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = values(
        seeds=[0, 0],
        method=[
            {"name": "a", "defense": [{"name": "instahid"}]},
            {"name": "A", "change": {"client.lr": -1.0}},
            {"name": "b", "change": {"client.learning": 1.0}},
            {"name": "c", "change": {"client.lr.x": 1, "server.rounds": 3}},
            {"name": "d", "change": {"seed": 3, "server.rounds": 3}},
        ],
        leakage={"rounds": [4]},
    )
    bad["job"] |= {"defense": [{"name": "pruning"}]}
    with pytest.raises(BadInput) as caught:
        parse_collaboration(bad)
    told = "\n".join(caught.value.problems)
    for part in (
        "two of them have one name", "stands there twice", "instahid", "client.lr", "client.learning",
        "c: change: 'client.lr.x' goes into a value that is no table", "d: change: 'seed' comes from seeds",
        "leakage.rounds: 4 is beyond the 3 rounds", "job.defense: a method's defense sets it",
    ):  # fmt: skip
        assert part in told, told


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for override, sentence in (
        ("seeds=[-1]", "seeds.0: -1 is not valid"),
        ("job.foo=1", "job.foo: unknown key"),
        ("job.client.lr=-1.0", "job.client.lr: -1.0 is not valid"),
        ("job.seed=3", "job.seed: seeds sets it"),
        ('leakage.budget="huge"', "leakage.budget: 'huge' is not valid"),
        ("leakage.rounds=[0]", "leakage.rounds.0: 0 is not valid"),
        ("leakage.rounds=[11]", "leakage.rounds: 11 is beyond the 10 rounds"),
    ):
        code, _, err = call(capsys, "collaborate", "--out", tmp_path / "x", "--set", override)
        assert (code, err.count("error:")) == (2, 1), err
        assert sentence in err
        assert "no defence" not in err, "what all methods share is no matter of one of them"
        assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, err = call(capsys, "collaborate", as_toml(tmp_path, values()), "--out", tmp_path / "full")
    assert code == 2
    assert "not empty" in err or "flower" in err
    code, _, err = call(capsys, "collaborate", as_toml(tmp_path, values()), "--out", tmp_path / "full", "--resume")
    assert code == 2
    assert "holds no comparison of this plan" in err or "flower" in err


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_was_killed_before_its_plan_was_whole_blocks_nothing(tmp_path: Path, resume: bool) -> None:
    plan = parse_collaboration(values())
    collaboration._claim(plan, tmp_path / "absent", resume)
    collaboration._claim(plan, tmp_path, resume)
    (tmp_path / ".plan.toml.abc.part").write_text("na")
    collaboration._claim(plan, tmp_path, resume)
    (tmp_path / collaboration.POOL).mkdir()
    collaboration._claim(plan, tmp_path, resume)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"not empty|holds no comparison"):
        collaboration._claim(plan, tmp_path, resume)


def test_a_plan_that_is_refused_late_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool of the bundled photographs is cut before the last method is built."""
    pytest.importorskip("flwr")
    methods = [values()["method"][2], {"name": "other", "change": {"model.name": "no_such_network"}}]
    plan, out = as_toml(tmp_path, values(method=methods)), tmp_path / "out"
    cut: list[Path] = []
    real = collaboration.make_pool

    def watched(source: str, folder: Path, *rest: Any) -> Any:
        cut.append(folder)
        return real(source, folder, *rest)

    monkeypatch.setattr(collaboration, "make_pool", watched)
    code, _, err = call(capsys, "collaborate", plan, "--out", out)
    assert code == 2
    assert "no_such_network" in err
    assert cut
    assert not out.exists()


def test_a_run_that_was_interrupted_before_any_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its message says: the bundled photographs were being cut."""
    pytest.importorskip("flwr")
    plan, out = parse_collaboration(values()), tmp_path / "out"
    real = collaboration.make_pool

    def interrupted(source: str, folder: Path, *_: Any) -> Any:
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(collaboration, "make_pool", interrupted)
    code, _, err = call(capsys, "collaborate", as_toml(tmp_path, values()), "--out", out)
    assert code == 130
    assert "--resume goes on" in err
    monkeypatch.setattr(collaboration, "make_pool", real)
    collaboration._claim(plan, out, resume=True)
    assert len(collaboration._texts(plan, out)[0]) == 8


def test_an_interruption_before_anything_was_written_promises_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(collaboration, "run_collaboration", interrupted)
    for out in ("--out", tmp_path / "out"), (f"--out={tmp_path / 'out'}",):
        code, _, err = call(capsys, "collaborate", as_toml(tmp_path, values()), *out)
        assert (code, err.strip()) == (130, "Interrupted.")


def test_a_comparison_does_not_go_on_with_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Federations that are whole are kept, and would stand beside those of other images."""
    pytest.importorskip("flwr")
    for i in range(40):
        place = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 3 * i).save(place)
    job = values()["job"] | {"data": {"source": f"folder:{tmp_path / 'photos'}"}, "split": {"clients": 2}}
    plan, out = parse_collaboration(values(job=job, method=[{"name": "plain"}])), tmp_path / "out"
    monkeypatch.setattr(collaboration, "_compared", lambda *_: {"whole": True})
    for resume in (False, True):
        assert collaboration.run_collaboration(plan, out, tell=print, resume=resume) == {"whole": True}
    Image.new("L", (8, 8), 255).save(tmp_path / "photos" / "a" / "0.png")
    collaboration.federation_of.cache_clear()  # as in another process
    with pytest.raises(BadInput, match="the images, labels or weights are not those"):
        collaboration.run_collaboration(plan, out, tell=print, resume=True)
    (out / collaboration.DATA).write_text("{")
    with pytest.raises(BadInput, match=r"data\.json cannot be used"):
        collaboration.run_collaboration(plan, out, tell=print, resume=True)


def test_a_federation_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr")
    from frostglass.federated.local_client import LocalClient

    plan = parse_collaboration(values(method=[{"name": "plain"}]))
    text, folder = collaboration._texts(plan, tmp_path)[0]["plain", 0], tmp_path / "runs" / "plain-0"
    train, left, said = LocalClient.train, [3], list[str]()

    def interrupted(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LocalClient, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collaboration._trained(text, folder, said.append)
    del said[:]
    held = collaboration._trained(text, folder, said.append)
    assert [line.split(":")[0].strip() for line in said[1:]] == ["goes on after round 1/2", "round 2/2"]
    assert len(held["rounds"]) == 3
    assert (folder / collaboration.WHOLE).exists()


def test_an_attack_that_broke_is_not_called_one_that_does_not_fit() -> None:
    cell = {"id": "a", "attack": "peel", "status": "failed", "summary": None, "error": "no memory."}
    update = {
        "status": "audited", "cells": ["a"], "round": 1, "client": "0", "examples": 4, "labels": None, "linter": [],
        "reason": "",
    }  # fmt: skip
    found = collaboration.leakage_of({"cells": [cell], "recorded": {"updates": [update]}, "headline": "h"})
    assert found["leakage"][0]["broken"] == ["peel failed: no memory."]


def test_a_share_is_0_or_100_percent_only_where_none_or_all_is_meant() -> None:
    """Among 300 candidates chance is not "0 %", and one game of 200 that was lost is not "100 %"."""
    words = told_game({"share": 199 / 200, "chance": 1 / 300})
    assert words == ">99 % of the images asked for; chance <1 %"


def test_a_pool_left_by_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    plan = parse_collaboration(values())
    (tmp_path / "out" / collaboration.POOL).mkdir(parents=True)
    collaboration._claim(plan, tmp_path / "out", resume=False)
    (tmp_path / "out" / "else").touch()
    with pytest.raises(BadInput, match="not empty"):
        collaboration._claim(plan, tmp_path / "out", resume=False)
