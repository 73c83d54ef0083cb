"""Killed, resumed, and the result is that of the uninterrupted run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from frostglass.auditing import run as running
from frostglass.auditing import store
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.run import run_plan
from frostglass.auditing.store import RunFolder
from frostglass.core.errors import BadInput
from frostglass.core.events import Event
from frostglass.core.reconstruction import Reconstruction
from scenes import outcome_of, same_outcome, small

PLAN = parse_plan(
    small(
        [{"name": "thaw", "steps": 40, "every": 10}, {"name": "spear"}],
        model={"options": {"hidden": [48]}},
        report={"show_images": True},
    )
)


class Killed(BaseException):
    """As sudden as a signal: no handler for errors may catch it."""


def go(out: Path, **keywords: Any) -> None:
    run_plan(PLAN, out, device=torch.device("cpu"), **keywords)


@pytest.fixture(autouse=True, scope="module")
def _no_report() -> Iterator[None]:
    """A page is drawn from the files that are compared here, and takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    go(out)
    return out


def killed_after(count: int, out: Path) -> list[str]:
    """Runs until the event `count`; the kinds that were heard."""
    heard: list[str] = []

    def listen(event: Event) -> None:
        heard.append(event.kind)
        if len(heard) == count:
            raise Killed

    with contextlib.suppress(Killed):
        go(out, emit=listen, resume=out.exists())
    return heard


@pytest.mark.slow
def test_a_kill_at_any_event_changes_nothing(tmp_path: Path, whole: Path) -> None:
    total = len((whole / "events.jsonl").read_text().splitlines())
    for count in range(1, total + 1, 4):
        out = tmp_path / f"run{count}"
        killed_after(count, out)
        go(out, resume=True)
        same_outcome(whole, out)
        shutil.rmtree(out)


def test_a_run_killed_again_and_again_arrives(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    for _ in range(40):
        if "run_finished" in killed_after(9, out):
            break
    same_outcome(whole, out)


def test_resuming_a_finished_run_computes_nothing_and_changes_nothing(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    heard: list[str] = []
    go(out, resume=True, emit=lambda e: heard.append(e.kind))
    assert "progress" not in heard
    same_outcome(whole, out)
    seconds = [[c["seconds"] for c in json.loads((f / "scorecard.json").read_text())["cells"]] for f in (whole, out)]
    assert seconds[0] == seconds[1]


@pytest.mark.parametrize("kill", ["checkpoint", "progress"])
def test_seconds_are_those_of_all_runs_that_made_the_result(
    tmp_path: Path, kill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that strikes at every report: what was done twice counts once, what lies before the kill too."""
    now = [0.0]
    monkeypatch.setattr(store, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def strike(event: Event) -> None:
        now[0] += event.kind == "progress"

    def until(event: Event) -> None:
        strike(event)
        if event.kind == kill and event.step >= 28:
            raise Killed

    def seconds(out: Path) -> list[float]:
        return [c["seconds"] for c in json.loads((out / "scorecard.json").read_text())["cells"]]

    go(tmp_path / "straight", emit=strike)
    with contextlib.suppress(Killed):
        go(tmp_path / "cut", emit=until)
    go(tmp_path / "cut", emit=strike, resume=True)
    assert seconds(tmp_path / "straight") == seconds(tmp_path / "cut") == [8.0, 2.0]  # 2 x 40 steps, 2 x 1 step


def test_the_checkpoint_is_gone_when_the_result_is_there(whole: Path) -> None:
    names = {p.name for p in (whole / "checkpoints").iterdir() if p.is_file()}
    assert all(name.endswith(".done.safetensors") for name in names)
    assert len(names) == 4


def test_files_cut_off_by_a_kill_are_swept_up(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "scorecard.json").unlink()
    strays = [out / ".scorecard.json.abc.part", out / "checkpoints" / ".x.safetensors.abc.part"]
    for stray in strays:
        stray.write_bytes(b"half")
    with (out / "events.jsonl").open("a") as journal:
        journal.write('{"kind": "prog')
    go(out, resume=True)
    assert not any(stray.exists() for stray in strays)
    same_outcome(whole, out)


@pytest.mark.parametrize("left", [[], [".run.json.x.part"], [".run.json"], [".run.json", ".plan.toml.x.part"]])
def test_a_kill_while_the_folder_is_made_does_not_block_it(tmp_path: Path, whole: Path, left: list[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in left:
        (out / name).write_bytes((whole / ".run.json").read_bytes() if name == ".run.json" else b"half")
    go(out, resume=True)
    same_outcome(whole, out)


def test_a_broken_result_file_fails_its_cell_and_says_what_to_do(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    broken = next((out / "checkpoints").glob("01-*-0.done.safetensors"))
    broken.write_bytes(b"not a result")
    go(out, resume=True)
    cells = outcome_of(out)[0]["cells"]
    assert [c["status"] for c in cells] == ["failed", "done"]
    assert "delete it and run again" in cells[0]["error"]
    broken.unlink()
    go(out, resume=True)
    same_outcome(whole, out)


def test_a_folder_of_this_run_is_not_overwritten_unasked(whole: Path) -> None:
    before = outcome_of(whole)[0]
    with pytest.raises(BadInput, match="already holds this run; add --resume"):
        go(whole)
    assert outcome_of(whole)[0] == before


def test_a_folder_of_another_plan_is_left_alone(whole: Path) -> None:
    other = parse_plan(small(seed=9))
    for resume in (False, True):
        with pytest.raises(BadInput, match="belongs to another plan"):
            run_plan(other, whole, device=torch.device("cpu"), resume=resume)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    file = tmp_path / "thesis.txt"
    for out in (tmp_path, file, file / "below"):
        with pytest.raises(BadInput, match="--out"):
            go(out)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_images_that_changed_since_are_noticed(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9), (40 * i, 9, 9)).save(folder / f"{i}.png")
    plan = parse_plan(small(data={"source": f"folder:{folder}"}, client={"batches": 1}))
    run_plan(plan, tmp_path / "run", device=torch.device("cpu"))
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "0.png")
    with pytest.raises(BadInput, match="the images, labels or weights are not those"):
        run_plan(plan, tmp_path / "run", device=torch.device("cpu"), resume=True)


def test_another_number_of_threads_is_said(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    began = running.environment_of(torch.device("cpu"))
    heard: list[Event] = []
    for threads, said in (("64", f"threads {began['threads']}, then 64"), (began["threads"], "")):
        monkeypatch.setattr(running, "environment_of", lambda _, n=threads: {**began, "threads": n})
        heard.clear()
        go(out, resume=True, emit=heard.append)
        notes = [str(event.values["text"]) for event in heard if event.kind == "note"]
        assert len(notes) == bool(said)
        assert all(said in note for note in notes)
        card = json.loads((out / "scorecard.json").read_text())
        assert card["environment"]["threads"] == (said.removeprefix("threads ") or threads)
        assert card["standards"] is None or card["environment"]["threads"] in json.dumps(card["standards"])


def test_a_damaged_mark_is_another_plan(tmp_path: Path) -> None:
    (tmp_path / ".run.json").write_text("{")
    with pytest.raises(BadInput, match="another plan"):
        RunFolder(tmp_path).check("0", resume=True)


def test_a_finished_repetition_leaves_no_checkpoint_of_any_number_of_ranks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    own, other = ("01-thaw-1.safetensors", "01-thaw-1.rank0of2a.safetensors"), "01-thaw-11.rank1of2b.safetensors"
    for name in (*own, other):
        (tmp_path / "checkpoints" / name).touch()
    blank = Reconstruction(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.bool), 0.0)
    folder.save_result("01-thaw", 1, blank, {})
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"01-thaw-1.done.safetensors", other}
