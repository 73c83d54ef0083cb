"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import frostglass
from frostglass.app import cli
from frostglass.app.commands.list import lines, listing
from frostglass.app.terminal import listener
from frostglass.auditing.plan import load_plan, parse_plan
from frostglass.auditing.scorecard import load_scorecard
from frostglass.core.events import Event
from scenes import outcome_of, same_outcome, small

SOURCE = str(Path(frostglass.__file__).parents[1])
QUICK = {"name": "thaw", "steps": 4, "every": 2}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def command(*arguments: object, **more: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, without a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "frostglass", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip


def finished(*arguments: object, **more: Any) -> tuple[int, str, str]:
    process = command(*arguments, **more)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def plan_file(folder: Path, values: dict[str, Any] | None = None, name: str = "plan.toml") -> Path:
    path = folder / name
    path.write_text(parse_plan(values or small(QUICK)).to_toml(), encoding="utf-8")
    return path


def test_an_audit_ends_with_a_table_and_the_path_of_the_report(tmp_path: Path, run: Run) -> None:
    code, out, err = run("audit", plan_file(tmp_path), "--out", tmp_path / "run")
    assert code == 0
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in out
    assert "thaw" in out
    assert "Traceback" not in err
    assert (tmp_path / "run" / "report.html").exists()


def test_piped_it_prints_one_line_a_stage(tmp_path: Path) -> None:
    plan = plan_file(tmp_path, small([QUICK, {**QUICK, "steps": 6}]))
    code, _, err = finished("audit", plan, "--out", tmp_path / "run")
    lines = err.splitlines()
    assert code == 0
    assert lines[0] == "audit: 2 cells"
    assert len(lines) == 5, "a start and an end for each of two cells"
    assert "\r" not in err
    assert "\x1b" not in err


def test_verbose_prints_the_progress_too(tmp_path: Path, run: Run) -> None:
    _, _, err = run("audit", plan_file(tmp_path), "--out", tmp_path / "run", "-v")
    assert sum("/4" in line for line in err.splitlines()) == 4, "two reports in each of two batches"


def test_json_is_all_that_stdout_holds(tmp_path: Path) -> None:
    code, out, err = finished("audit", plan_file(tmp_path), "--out", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert "thaw" in err
    code, out, err = finished("audit", plan_file(tmp_path), "--out", tmp_path / "run", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: --out:")


def test_overrides_and_devices(tmp_path: Path, run: Run) -> None:
    plan = plan_file(tmp_path)
    code, _, _ = run("audit", plan, "--out", tmp_path / "run", "--set", "scenario.client.batches=1", "--set", "seed=4",
                     "--device", "cpu")  # fmt: skip
    assert code == 0
    card = load_scorecard(tmp_path / "run" / "scorecard.json")
    assert (card.seed, card.cells[0].batches) == (4, 1)
    assert run("audit", plan, "--out", tmp_path / "x", "--device", "tpu")[0] == 2
    assert run("audit", plan, "--out", tmp_path / "x", "--set", "sede=4")[0] == 2
    assert not (tmp_path / "x").exists()


def test_a_failed_cell_is_exit_1_and_the_others_are_there(tmp_path: Path, run: Run) -> None:
    scenario = small(QUICK)["scenario"][0]
    client = {"batch": 2, "update": "delta", "local_steps": 30, "lr": 1e30, "momentum": 0.9}
    plan = {
        "scenario": [scenario | {"name": "hot", "client": client}, scenario],
        "threat": {"grants": ["examples", "labels"]},
    }
    code, out, err = run("audit", plan_file(tmp_path, plan), "--out", tmp_path / "run")
    assert code == 1
    assert "FAILED: update:" in err
    assert "Traceback" not in err
    assert "small" in out
    assert [c.status for c in load_scorecard(tmp_path / "run" / "scorecard.json").cells] == ["failed", "done"]


def test_an_internal_error_is_exit_1_in_one_line_and_a_traceback_on_request(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostglass.auditing import run as running

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(running, "run_plan", broken)
    arguments = ["audit", plan_file(tmp_path), "--out", tmp_path / "run"]
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err == "internal error: RuntimeError: first; run with --debug for the traceback.\n"
    for debugging in (["--debug", *arguments], [*arguments, "--debug"]):
        code, _, err = run(*debugging)
        assert code == 1
        assert "Traceback" in err
        assert 'raise RuntimeError("first' in err


@pytest.mark.parametrize("wrong", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("614400 requested and 89056 written"),  # numpy
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_no_fault_of_the_program(run: Run, monkeypatch: pytest.MonkeyPatch, wrong: Exception) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise wrong

    monkeypatch.setattr(cli.cli, "main", full)
    code, out, err = run("audit", "plan.toml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: the disk is full, so a file cannot be written ({wrong}); make room.")
    assert err.endswith(" `frostglass audit` with the same arguments and --resume goes on.\n")


@pytest.mark.parametrize(
    ("file", "named"), [("a/plan.toml", "a/plan.toml"), ("a/.report.html.x1_y.part", "a/report.html")]
)
def test_a_locked_place_is_no_fault_of_the_program(
    run: Run, monkeypatch: pytest.MonkeyPatch, file: str, named: str
) -> None:
    def locked(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", file)

    monkeypatch.setattr(cli.cli, "main", locked)
    told = f"{named} cannot be read or written (Permission denied); change its permissions, or name another place."
    assert run("report", "a") == (2, "", f"error: {told}\n")


def test_an_exception_of_the_program_stays_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli.cli, "main", wrong)
    code, _, err = run("report", "a")
    assert code == 1
    assert err.startswith("internal error: OSError")


def test_names_that_are_not_in_utf8_are_refused_before_anything_is_written(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("init")[0] == 0
    os.mkdir("photos\udcff")
    before = sorted(os.listdir())
    code, _, err = run("audit", "plan.toml", "--out", "run", "--set", "scenario.data.source=folder:photos\udcff")
    assert code == 2
    assert "'photos\\udcff' is no name in UTF-8" in err
    code, _, err = run("audit", "plan.toml", "--out", "run\udcff")
    assert (code, err) == (2, "error: --out: 'run\\udcff' is no name in UTF-8; choose another folder.\n")
    assert sorted(os.listdir()) == before


def test_names_that_a_locale_has_no_letters_for_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = small(QUICK, data={"source": "folder:photos\u00fc"})
    plan_file(tmp_path, values)
    for name, value in {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = finished("audit", tmp_path / "plan.toml", "--out", tmp_path / "run")
    assert code == 2
    told = "'photos\\xfc' cannot be a file's name in this locale (ascii); set LC_ALL=C.UTF-8, or rename it."
    assert err == f"error: {told}\n"
    assert not (tmp_path / "run").exists()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"defence": []}, "did you mean 'defense'"),
    ({"attack": [{"name": "thwa"}]}, "did you mean 'thaw'"),
    ({"defense": [{"name": "dpsgd"}]}, "did you mean 'dp_sgd'"),
    ({"model": {"name": "small_cnn"}}, "did you mean 'small_bn_cnn'"),
    ({"model": {"name": "no_such_package.models:net"}}, "does not import"),
    ({"model": {"name": "mlp", "weights": "none.safetensors"}}, "does not exist"),
    ({"attack": [{"name": "inverting_gradients"}], "threat": {"grants": ["examples"]}}, "needs the grant 'labels'"),
    ({"client": {"batch": 99}}, "client.batch = 99"),
    ({"data": {"source": "folder:empty"}}, "holds no image"),
    ({"model": {"name": "small_bn_cnn"}, "attack": [{"name": "spear"}]}, "no Linear layer"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=[s for _, s in BAD])
def test_bad_input_is_exit_2_a_sentence_each_and_nothing_written(
    tmp_path: Path, run: Run, change: dict[str, Any], sentence: str
) -> None:
    import tomli_w

    (tmp_path / "empty").mkdir()
    values = small(QUICK)
    values["scenario"][0] |= change
    path = tmp_path / "plan.toml"
    path.write_text(tomli_w.dumps(values))
    code, out, err = run("audit", path, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert sentence in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "plan.toml"]


def test_a_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('nmae = "x"\n[[scenario]]\n[[scenario.attack]]\nname = "thwa"\n')
    code, out, err = finished("audit", path, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: nmae: unknown key; did you mean 'name'.",
        "error: scenario.0.attack.0.name: 'thwa' is not a known attack; did you mean 'thaw'.",
    ]


@pytest.mark.parametrize(
    "arguments",
    [["audit"], ["audit", "plan.toml"], ["aduit"], ["list", "atacks"], ["audit", "x", "--out", "y", "--no"]],
)
def test_a_command_that_is_misspelled_is_exit_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_init_writes_a_plan_that_is_valid_and_never_overwrites(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("init")
    assert code == 0
    assert "frostglass audit plan.toml --out run" in out
    plan = load_plan(tmp_path / "plan.toml")
    assert plan.name == "my-audit"
    assert (tmp_path / "plan.toml").read_text().count("#") > 10
    code, out, err = run("init")
    assert (code, out) == (2, "")
    assert "exists; give another name" in err
    assert run("init", "deep/other.toml")[0] == 0
    assert run("init", "plan.toml/x.toml")[0] == 2


def test_the_starter_plan_names_only_keys_of_the_schema_in_its_comments(tmp_path: Path) -> None:
    from frostglass.app.starter import STARTER

    bare = STARTER.replace("# weights", "weights").replace('"file.safetensors"', f'"{tmp_path}/w.safetensors"')
    parse_plan(tomllib.loads(bare))


@pytest.mark.parametrize("what", ["attacks", "defenses", "metrics", "models", "datasets", "grants"])
def test_lists(run: Run, what: str) -> None:
    code, out, _ = run("list", what)
    assert code == 0
    code, as_json, _ = run("list", what, "--json")
    rows = json.loads(as_json)
    assert code == 0
    assert all(row["name"] in out and row["summary"] for row in rows)
    assert {"name", "summary", "paper", "parameters"} == set(rows[0])


def test_a_list_is_broken_to_a_terminal_and_to_nothing_else() -> None:
    rows = listing("attacks")
    for whole in (False, True):
        broken, plain = (list(lines(rows, whole, width)) for width in (80, None))
        assert max(map(len, broken)) <= 80
        assert " ".join(broken).split() == " ".join(plain).split()
        assert all(line.startswith(" " * 24) or line[2] != " " for line in broken)
        assert whole or len(plain) == len(rows), "no line of its own for each, as grep wants it"
    long = [{"name": "n" * 30, "summary": "words", "parameters": {}, "paper": ""}]
    assert list(lines(long, False, None)) == [f"  {'n' * 30} words"]
    silent = [{"name": "silent", "summary": "", "parameters": {}, "paper": ""}]
    assert [[line.strip() for line in lines(silent, False, width)] for width in (80, None)] == [["silent"]] * 2


def test_everything_is_listed_together(run: Run) -> None:
    names = {row["name"] for rows in json.loads(run("list", "--json")[1]).values() for row in rows}
    assert {"thaw", "spear", "none", "psnr", "mlp", "photos", "bn_batch"} <= names
    text = run("list")[1]
    assert all(name in text for name in names)


def test_a_report_is_drawn_anew(tmp_path: Path, run: Run) -> None:
    run("audit", plan_file(tmp_path), "--out", tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    before = page.read_text()
    page.unlink()
    code, out, _ = run("report", tmp_path / "run")
    assert (code, out.strip()) == (0, str(page))
    assert page.read_text() == before


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_folder_without_a_scorecard_has_no_report(tmp_path: Path, run: Run, content: str | None) -> None:
    if content is not None:
        (tmp_path / "scorecard.json").write_text(content)
    code, out, err = run("report", tmp_path)
    assert (code, out) == (2, "")
    assert "scorecard" in err
    assert not (tmp_path / "report.html").exists()


def test_version_and_help(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert frostglass.__version__ in out
    code, out, _ = run("audit", "-h")
    assert code == 0
    assert "--resume" in out


def test_a_reader_that_leaves_is_no_error() -> None:
    process = command("list")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) in (0, 1)
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_a_terminal_without_a_letter_is_no_error(tmp_path: Path) -> None:
    values = small(QUICK)
    values["scenario"][0]["name"] = "Füße 日本"
    plan = plan_file(tmp_path, values)
    env = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    arguments = [sys.executable, "-m", "frostglass", "audit", str(plan), "--out", str(tmp_path / "run")]
    done = subprocess.run(arguments, env=env, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


LONG = {"name": "thaw", "steps": 900, "every": 50}


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_attack_then_resume_is_the_uninterrupted_run(tmp_path: Path) -> None:
    values = small([LONG, {"name": "spear"}], client={"batches": 1}, report={"show_images": True})
    plan = plan_file(tmp_path, values)
    assert finished("audit", plan, "--out", tmp_path / "whole")[0] == 0
    out = tmp_path / "killed"
    process = command("audit", plan, "--out", out)
    until(lambda: len(list(out.glob("checkpoints/01-*-0.safetensors"))) > 0, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "scorecard.json").exists()
    code, _, err = finished("audit", plan, "--out", out)
    assert code == 2, "without --resume nothing is touched"
    assert "add --resume" in err
    code, _, err = finished("audit", plan, "--out", out, "--resume")
    assert code == 0, err
    same_outcome(tmp_path / "whole", out)
    parts = [(f / "reconstruction.safetensors").read_bytes() for f in (tmp_path / "whole", out)]
    assert parts[0] == parts[1]
    starts = [json.loads(row) for row in (out / "events.jsonl").read_text().splitlines() if "attack_started" in row]
    assert starts[1]["step"] >= 90, "it began again from the start"
    assert len(outcome_of(out)[2]) == len(outcome_of(tmp_path / "whole")[2])


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    plan = plan_file(tmp_path, small(LONG, client={"batches": 1}))
    out = tmp_path / "run"
    # a shell that runs the tests in the background hands down an ignored SIGINT, which no terminal would
    process = command("audit", plan, "--out", out, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    until(lambda: len(list(out.glob("checkpoints/01-*-0.safetensors"))) > 0, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_are_bars_that_go_away() -> None:
    screen = Terminal()
    tell = listener(stream=screen)
    tell(Event("run_started", "audit", values={"cells": 1}))
    tell(Event("cell_started", "c", values={"title": "the cell"}))
    tell(Event("attack_started", "c/0", 0, 10))
    tell(Event("progress", "c/0", 5, 10, {"objective": 0.5, "best": float("nan")}))
    tell(Event("attack_finished", "c/0", 10, 10))
    tell(Event("cell_failed", "c", values={"error": "broke"}))
    text = screen.getvalue()
    assert "5/10" in text
    assert "\r" in text
    assert text.rstrip().endswith("FAILED: broke")


def test_the_demo_never_overwrites(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert cli._fresh(out) == out
    out.mkdir()
    assert cli._fresh(out) == out
    (out / "x").write_text("")
    assert cli._fresh(out) == tmp_path / "demo-2"


def test_the_demos_plan_is_valid_and_can_be_printed(run: Run) -> None:
    code, out, _ = run("demo", "--print-plan")
    assert code == 0
    plan = parse_plan(tomllib.loads(out))
    assert len(plan.scenario) == 4
    assert plan.report.show_images
    assert not parse_plan(tomllib.loads(run("demo", "--print-plan", "--hide-images")[1])).report.show_images


def test_a_pool_of_no_folder_or_a_negative_seed_leaves_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, sentence in (
        (("nothere", "pool"), "no folder 'nothere'"),
        (("photos", "pool", "--seed", "-1"), "-1"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["public-pool", *arguments])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "pool").exists()


def test_check_checkpoint_names_the_folder_that_it_stands_in(tmp_path, capsys, monkeypatch) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "ck.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check-checkpoint", "."])
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(".: no generator state")
