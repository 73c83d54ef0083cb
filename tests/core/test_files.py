"""Files are whole or absent; the journal survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frostglass.core.errors import BadInput
from frostglass.core.events import Event, broadcast, silent
from frostglass.core.files import (
    alone_in,
    check_writable,
    claimed,
    clear_left_over,
    is_free,
    placed,
    source_placed,
    write_json,
    write_text,
    written_beside,
)
from frostglass.core.journal import Journal, json_ready, read_journal

KILLED = """
import sys, os, signal
from pathlib import Path
from frostglass.core.files import written_beside
with written_beside(Path(sys.argv[1])) as beside:
    beside.write_text("half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_place_is_tried_before_the_work_and_left_as_it_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deeper" / "file", "work")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file", "work")
    with pytest.raises(BadInput, match=r"work: .* is a folder; name a file"):
        check_writable(tmp_path, "work")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match=r"work: .* cannot be written"):
            check_writable(path, "work")


def test_paths_of_a_plan_start_at_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTGLASS_TEST", "far")
    assert placed("a/../b", tmp_path) == (tmp_path / "b").as_posix()
    assert placed("/elsewhere", tmp_path) == "/elsewhere"
    assert placed("~/b", tmp_path) == (Path.home() / "b").resolve().as_posix()
    assert placed("$FROSTGLASS_TEST/b", tmp_path) == (tmp_path / "far" / "b").as_posix()
    assert source_placed("parquet:${FROSTGLASS_TEST}/b", tmp_path) == f"parquet:{(tmp_path / 'far' / 'b').as_posix()}"
    assert source_placed("folder:b", tmp_path) == f"folder:{(tmp_path / 'b').as_posix()}"
    assert [source_placed(name, tmp_path) for name in ("digits", "python:x", "folder:")] == [
        "digits", "python:x", "folder:",
    ]  # fmt: skip
    with pytest.raises(BadInput, match="names \\$FROSTGLASS_NONE, which is not set"):
        placed("$FROSTGLASS_NONE/b", tmp_path)
    (tmp_path / "$FROSTGLASS_NONE").mkdir()
    assert placed("$FROSTGLASS_NONE", tmp_path).endswith("$FROSTGLASS_NONE")


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=os.environ | {"PYTHONPATH": source()})
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    left = [p.name for p in tmp_path.iterdir() if p != path]
    assert all(name.startswith(".a.txt.") and name.endswith(".part") for name in left)


HOLDS = """
import sys, time
from pathlib import Path
from frostglass.core.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_until_that_ends_however_it_does(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": source()})  # fmt: skip
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="--out: another process is at work in"), alone_in(tmp_path):
            pass
        with pytest.raises(BadInput, match="another process"), claimed(tmp_path, "plan.toml", "mine"):
            pass
    finally:
        other.kill()
        other.wait()
    assert list(tmp_path.iterdir()) == []
    with alone_in(tmp_path):
        pass


FORKS = """
import os, signal, sys
from pathlib import Path
from frostglass.core.files import alone_in
with alone_in(Path(sys.argv[1])):
    if os.fork() == 0:
        print("forked", flush=True)
        signal.pause()
    if sys.argv[2] == "killed":
        signal.pause()
"""


@pytest.mark.parametrize("how", ["killed", "leaves"])
def test_a_forked_worker_that_lives_on_holds_no_folder(tmp_path: Path, how: str) -> None:
    """It would hold up a resume; and while its parent lives, the parent's hold is not touched by it."""
    other = subprocess.Popen([sys.executable, "-c", FORKS, str(tmp_path), how], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": source()}, start_new_session=True)  # fmt: skip
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "forked\n"
        if how == "killed":
            with pytest.raises(BadInput, match="another process is at work"), alone_in(tmp_path):
                pass
            other.kill()
        other.wait()
        with alone_in(tmp_path):
            pass
    finally:
        os.killpg(other.pid, signal.SIGKILL)  # the worker


def refused(out: Path, leaves: str) -> None:
    with claimed(out, "plan.toml", "mine"):
        (out / "empty").mkdir()
        if leaves:
            (out / leaves).touch()
        raise BadInput("wrong.")


def test_what_a_refused_run_wrote_is_taken_back_and_what_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="wrong"):
        refused(tmp_path / "new" / "run", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run" / "pool").mkdir(parents=True)
    (tmp_path / "run" / "pool" / "pixels").touch()
    with pytest.raises(BadInput, match="wrong"):
        refused(tmp_path / "run", "")
    assert [p.name for p in (tmp_path / "run").rglob("*")] == ["pool", "pixels"]
    with pytest.raises(BadInput, match="wrong"):
        refused(tmp_path / "run", "result")
    assert (tmp_path / "run" / "plan.toml").read_text() == "mine", "what was begun can be resumed"


def test_what_a_kill_left_of_the_first_file_is_no_obstacle_and_goes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert is_free(out, "plan.toml")
    (out / "below").mkdir(parents=True)
    strays = out / ".plan.toml.abc.part", out / "below" / ".log.csv.abc.part"
    for stray in strays:
        stray.write_text("half")
    assert not is_free(out, "plan.toml"), "there is another file"
    with claimed(out, "plan.toml", "mine"):
        assert not strays[0].exists()
        clear_left_over(out)
    assert sorted(p.name for p in out.rglob("*")) == ["below", "plan.toml"]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / strays[0].name).write_text("half")
    assert is_free(tmp_path / "begun", "plan.toml")
    assert not is_free(tmp_path / "begun" / strays[0].name, "plan.toml"), "it is a file"


def source() -> str:
    import frostglass

    return str(Path(frostglass.__file__).parents[1])


def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError), written_beside(path) as beside:
        beside.write_text("new \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with written_beside(path) as beside:
        beside.write_text("new")
        assert beside.parent == path.parent, "a rename between file systems is no rename"
        assert not path.exists()
    assert path.read_text() == "new"
    inode = path.stat().st_ino
    write_text(path, "newer")
    assert path.stat().st_ino != inode
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "a.json", {"ä": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1}


def test_a_cut_last_line_is_passed_over_and_the_next_one_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tell = Journal(path)
    for step in (1, 2):
        tell(Event("progress", "a", step, 9, {"loss": 0.5}))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        before = read_journal(path)
        assert before == read_journal(path)[: len(before)]
        Journal(path)(Event("note", "after"))
        after = read_journal(path)
        assert after[-1] == {"kind": "note", "where": "after"}
        assert after[:-1] == before


def test_a_cut_inside_a_letter_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Journal(path)(Event("note", "ü"))
    path.write_bytes(path.read_bytes() + '{"kind": "note", "where": "ü'.encode()[:-1])
    assert [r["where"] for r in read_journal(path)] == ["ü"]


def test_odd_line_ends_in_names_do_not_cut_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    name = "a\u2028b\x85c\x0bd\ne"
    Journal(path)(Event("note", name))
    assert [r["where"] for r in read_journal(path)] == [name]


def test_what_json_has_no_word_for_is_spelled(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    values = {"loss": float("nan"), "n": [float("inf"), 1], "d": {1: Path("x")}, "kind": "no", "step": "no"}
    Journal(path)(Event("progress", "a", 3, 9, values))
    assert read_journal(path) == [
        {"kind": "progress", "where": "a", "step": 3, "steps": 9, "loss": "nan", "n": ["inf", 1], "d": {"1": "x"}}
    ]
    assert json_ready((1, None, True)) == [1, None, True]


def test_pictures_stay_out_of_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Journal(path)(Event("candidate", "a", tensors={"images": torch.zeros(1)}))
    assert read_journal(path) == []
    assert read_journal(tmp_path / "none") == []


def test_all_listeners_are_told_in_order() -> None:
    heard: list[str] = []
    broadcast(silent, lambda e: heard.append(f"1{e.kind}"), lambda e: heard.append(f"2{e.kind}"))(Event("note"))
    assert heard == ["1note", "2note"]
