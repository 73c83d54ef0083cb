"""Files that cannot be read or written during a run: which one is blamed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from frostglass.app import cli
from frostglass.app.surroundings import run_folder
from frostglass.core.errors import BadInput


def fails(out: Path, number: int, *file: object) -> None:
    with run_folder(out):
        raise OSError(number, os.strerror(number), *file)


def test_a_file_of_the_run_is_told_as_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("runs") / "a"
    for file in (out, out / "x" / "log.csv", tmp_path / "runs" / "a" / "log.csv", "runs", "runs/b/../a/log.csv"):
        with pytest.raises(BadInput, match=r"--out: runs/a cannot be written \(Permission denied\)"):
            fails(out, errno.EACCES, str(file))
    with pytest.raises(BadInput, match=r"--out: runs/a cannot be written \(File too large\)"):
        fails(out, errno.EFBIG)


def test_a_file_elsewhere_is_told_by_its_name(tmp_path: Path) -> None:
    for file in (tmp_path / "images" / "a.png", tmp_path / "run2"):
        with pytest.raises(BadInput, match=rf"^{file} cannot be read or written \(No such file or directory\)"):
            fails(tmp_path / "run", errno.ENOENT, str(file))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.ECONNREFUSED])
def test_what_is_no_matter_of_a_place_stays_what_it_is(tmp_path: Path, number: int) -> None:
    """A full disk has a sentence of its own, and other exceptions are the program's."""
    with pytest.raises(OSError, match=os.strerror(number)):
        fails(tmp_path, number)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from frostglass.app import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
writes = {
    "tensors": lambda: save_file({"a": torch.zeros(9999)}, sys.argv[2]),
    "bytes": lambda: Path(sys.argv[2]).write_bytes(bytes(9999)),
}
sys.exit(cli._guarded(writes[sys.argv[1]], False))
"""


@pytest.mark.parametrize("what", ["tensors", "bytes"])
def test_a_limit_on_the_size_of_files_is_no_internal_error(what: str, tmp_path: Path) -> None:
    """As of ulimit -f, or of the file system; safetensors tells the operating system's number in its text."""
    import frostglass

    env = os.environ | {"PYTHONPATH": str(Path(frostglass.__file__).parents[1])}
    call = [sys.executable, "-c", LIMITED, what, str(tmp_path / "file")]
    done = subprocess.run(call, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "error: a file cannot be written (File too large); raise the limit (ulimit -f), or name another place.\n"
    )


BEGUN: dict[str, Callable[[Path], list[str]]] = {
    "train": lambda plans: ["train", str(plans / "train-digits.toml")],
    "sweep": lambda plans: ["sweep", str(plans / "sweep-digits.toml")],
    "collaborate": lambda plans: ["collaborate"],
}
WORKS = {
    "train": "frostglass.app.commands.train._runs",
    "sweep": "frostglass.auditing.sweep.Sweep.__call__",
    "collaborate": "frostglass.auditing.collaboration.run_collaboration",
}


@pytest.mark.parametrize("name", BEGUN)
def test_commands_do_not_blame_out_for_other_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def locked(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/images")

    monkeypatch.setattr(WORKS[name], locked)
    with pytest.raises(SystemExit) as ended:
        cli.main([*BEGUN[name](Path(__file__).parents[2] / "plans"), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: /elsewhere/images cannot be read or written (Permission denied)")


@pytest.mark.parametrize("name", BEGUN)
def test_commands_blame_out_for_its_own(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    with pytest.raises(SystemExit) as ended:
        cli.main([*BEGUN[name](Path(__file__).parents[2] / "plans"), "--out", str(out)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: --out: {out} cannot be written (Not a directory).\n"
