"""Streams that nobody reads: a run goes on without them, and a command whose result is printed ends quietly."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import frostglass
from frostglass.app.streams import _Lasting
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.scorecard import load_scorecard
from scenes import small

ENV = os.environ | {"PYTHONPATH": str(Path(frostglass.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
FROSTGLASS = [sys.executable, "-m", "frostglass"]


@pytest.fixture
def unread() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads any more."""
    left, held = os.pipe()
    os.close(left)
    yield held
    os.close(held)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "plan.toml"
    file.write_text(parse_plan(small([{"name": "linear_exact"}])).to_toml(), encoding="utf-8")
    return file


def test_a_run_whose_progress_nobody_reads_goes_on(plan: Path, tmp_path: Path, unread: int) -> None:
    arguments = [*FROSTGLASS, "audit", str(plan), "--out", str(tmp_path / "run")]
    done = subprocess.run(arguments, env=ENV, stdout=subprocess.PIPE, stderr=unread, timeout=240)
    assert done.returncode == 0
    assert b"Report: " in done.stdout
    assert not load_scorecard(tmp_path / "run" / "scorecard.json").failed


def test_a_run_without_streams_goes_on(plan: Path, tmp_path: Path) -> None:
    arguments = [*FROSTGLASS, "audit", str(plan), "--out", str(tmp_path / "run")]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *arguments], env=ENV, timeout=240)
    assert done.returncode == 0
    assert not load_scorecard(tmp_path / "run" / "scorecard.json").failed


@pytest.mark.parametrize("python", [[], ["-u"]])
@pytest.mark.parametrize("arguments", [["list"], ["list", "attacks", "--json"], ["--version"]])
def test_a_result_that_nobody_reads_ends_quietly(python: list[str], arguments: list[str], unread: int) -> None:
    command = [sys.executable, *python, "-m", "frostglass", *arguments]
    done = subprocess.run(command, env=ENV, stdout=unread, stderr=subprocess.PIPE, timeout=240)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_exit_code_is_told_where_its_sentence_is_not_read(unread: int) -> None:
    done = subprocess.run([*FROSTGLASS, "audit", "none.toml", "--out", "run"], env=ENV, stderr=unread, timeout=240)
    assert done.returncode == 2


def test_what_nobody_reads_goes_nowhere(unread: int) -> None:
    stream = _Lasting(unread)
    assert [stream.write(b"twelve bytes"), stream.write(b"more")] == [12, 4]
    with pytest.raises(OSError, match="space"), open("/dev/full", "wb") as full:  # a full disk is told
        _Lasting(full.fileno()).write(b"twelve bytes")


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    terminal, line = os.openpty()
    stream = _Lasting(line)
    os.close(terminal)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):  # what a write to it gives
        os.write(line, b"twelve bytes")
    assert stream.write(b"twelve bytes") == 12
    os.close(line)
