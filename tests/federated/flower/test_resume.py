"""A federation that was interrupted goes on behind its last whole round, to the result of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from safetensors import safe_open

from command_line import call
from federations import plan, weights
from frostglass.app.cli import main
from frostglass.core.files import alone_in
from frostglass.federated.flower import unfinished
from frostglass.federated.flower.engines import on_local
from frostglass.federated.local_client import LocalClient
from frostglass.federated.recorded import read_record
from frostglass.federated.recording import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

THREE = "rounds = 3\n"
PLAIN = plan().replace("rounds = 2\n", THREE + "clients = 2\n")
ENCODED = plan('[[defense]]\nname = "instahide"\nk = 2\npartners = "permutation"\n').replace("rounds = 2\n", THREE)
REUSED = "insecure_seed = 7\n" + ENCODED + "rounds = 2\nreuse = true\n"
PRIVATE = plan('[[defense]]\nname = "dp_sgd"\ndelta = 1e-3\n').replace("[model]", '[model]\nfix = "opacus"')
NOISED = 'insecure_seed = 7\nbuffers = "keep"\n' + plan(
    '[[defense]]\nname = "clip_and_noise"\n[gate]\naction = "warn"\n'
)
FILES = {"plan.toml", "history.json", "model.safetensors", "recorded"}


class Killed(BaseException):
    """As of Ctrl-C: nothing on its way takes it for a client that failed."""


def cut(text: str, out: Path, trainings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the plan until so many clients have been trained."""
    out.mkdir(exist_ok=True)
    broken_off(lambda: on_local(placed(text, out), out, lambda _: None), trainings, monkeypatch)


def broken_off(run: Callable[[], object], trainings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until so many clients have been trained."""
    train, done = LocalClient.train, [0]

    def counted(*args: Any) -> Any:
        if done[0] == trainings:
            raise Killed
        done[0] += 1
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LocalClient, "train", counted)
        with pytest.raises(Killed):
            run()


def whole(text: str, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """To the end; its history without what the clock says."""
    out.mkdir(exist_ok=True)
    on_local(placed(text, out), out, lambda _: None, resume=resume)
    return history(out)


def placed(text: str, out: Path) -> str:
    """With its run folder, as the command writes it."""
    return text.replace("[server]", f'[server]\nfolder = "{out.as_posix()}"')


def history(out: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((out / "history.json").read_text())
    for row in held["rounds"]:
        row["seconds"] = None
    return held


def same_record(left: Path, right: Path) -> None:
    """Header by header, file by file."""
    one, other = (read_record(folder / "recorded") for folder in (left, right))
    assert one.info == other.info
    assert one.problems == other.problems == ()
    assert [u.header for u in one.updates] == [u.header for u in other.updates]
    for a, b in zip(one.updates, other.updates, strict=True):
        assert all(torch.equal(x, b.payload()[0][n]) for n, x in a.payload()[0].items())
        assert all(torch.equal(x, b.sent()[n]) for n, x in a.sent().items())
    names = [sorted(p.relative_to(f).as_posix() for p in (f / "recorded").rglob("*")) for f in (left, right)]
    assert names[0] == names[1]


@pytest.mark.parametrize("trainings", [0, 1, 2, 3, 5])
def test_the_result_is_that_of_a_run_that_was_never_interrupted(trainings, tmp_path, monkeypatch) -> None:
    """Two clients a round: cut before the first round is whole, between two rounds and within one."""
    due = whole(PLAIN, tmp_path / "whole")
    cut(PLAIN, tmp_path / "cut", trainings, monkeypatch)
    assert whole(PLAIN, tmp_path / "cut", resume=True) == due
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(left[n], right[n]) for n in left)
    same_record(tmp_path / "whole", tmp_path / "cut")
    assert {p.name for p in (tmp_path / "cut").iterdir()} == FILES - {"plan.toml"}


@pytest.mark.parametrize("text", [REUSED, NOISED], ids=["reused encodings", "noise"])
def test_what_clients_remember_lasts(text, tmp_path, monkeypatch) -> None:
    """Encodings that are used again, exposures, releases and rulings are those of one run."""
    due = whole(text, tmp_path / "whole")
    cut(text, tmp_path / "cut", 4, monkeypatch)
    assert whole(text, tmp_path / "cut", resume=True) == due
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(left[n], right[n]) for n in left)
    same_record(tmp_path / "whole", tmp_path / "cut")
    rulings = [[(r["round"], r["client"]) for r in map(json.loads, lines)] for f in ("whole", "cut")
               if (p := tmp_path / f / "gate.jsonl").exists() and (lines := p.read_text().splitlines())]  # fmt: skip
    assert len(rulings) == (2 if text == NOISED else 0)
    assert not rulings or rulings[0] == rulings[1]


@pytest.mark.parametrize(("text", "key"), [(ENCODED, "exposure-max"), (PRIVATE, "epsilon")])
def test_accounts_are_the_same_under_keys_that_are_fresh(text, key, tmp_path, monkeypatch) -> None:
    due = whole(text, tmp_path / "whole")
    cut(text, tmp_path / "cut", 4, monkeypatch)
    got = whole(text, tmp_path / "cut", resume=True)
    spent = [[[c[key] for c in row["clients"]] for row in h["rounds"]] for h in (due, got)]
    assert spent[0] == spent[1]
    assert spent[0][-1]
    left, right = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert not torch.equal(left["head.weight"], right["head.weight"]), "keys repeat"


def test_what_is_kept_meanwhile_holds_no_key_and_is_the_owners(tmp_path, monkeypatch) -> None:
    cut(ENCODED + "rounds = 2\nreuse = true\n", tmp_path / "cut", 7, monkeypatch)
    folder = tmp_path / "cut" / unfinished.UNFINISHED
    assert folder.stat().st_mode & 0o777 == 0o700
    files = sorted(folder.iterdir())
    rounds = {f"client-{i}.{r:06d}.safetensors" for i in range(3) for r in (2, 3) if r == 2 or i < 2}
    assert {p.name for p in files} == rounds | {"server.safetensors"}
    for path in files[:-1]:
        assert path.stat().st_mode & 0o777 == 0o600
        with safe_open(path, framework="pt") as held:
            assert held.metadata() == {"numbers": "{}"}
            kinds = {name.rsplit(".", 1)[0] if "kept" in name else name for name in held.keys()}  # noqa: SIM118
        assert kinds == {
            *(f"frostglass.ledger/{n}" for n in ("first", "partner", "epochs")),
            *(f"frostglass.kept/{n}" for n in ("images", "targets")),
        }


def test_a_note_of_the_record_outlasts_the_kill(tmp_path, monkeypatch) -> None:
    text = PLAIN + "[record]\nmax_bytes = 100000\n"
    due = whole(text, tmp_path / "whole")
    assert any("the record is full" in note for note in due["notes"])
    cut(text, tmp_path / "cut", 5, monkeypatch)
    got = whole(text, tmp_path / "cut", resume=True)
    assert got == due
    one, other = (read_record(tmp_path / f / "recorded") for f in ("whole", "cut"))
    assert [u.header for u in one.updates] == [u.header for u in other.updates]


def test_a_ruling_that_still_waited_is_named(tmp_path, monkeypatch) -> None:
    text = PLAIN + '[gate]\naction = "record"\n'
    cut(text, tmp_path, 5, monkeypatch)
    (tmp_path / "gate.jsonl").write_text('{"round": 1, "client": "9"}\n{"round": 3, "client": "0"}\n{"round": 2, "cli')
    got = whole(text, tmp_path, resume=True)
    (note,) = (n for n in got["notes"] if "Rulings of the gate are missing" in n)
    assert note.count("client") == 4
    first, *later = (json.loads(line) for line in (tmp_path / "gate.jsonl").read_text().splitlines())
    assert first == {"round": 1, "client": "9"}
    assert {row["round"] for row in later} == {3}


# ---- the command


@pytest.fixture
def interrupted(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """(plan, run folder) of a run with two clients a round that was cut in its second round."""
    path, out = tmp_path / "plan.toml", tmp_path / "run"
    path.write_text(PLAIN)
    words = ["federate", str(path), "--out", str(out)]
    broken_off(lambda: main(words), 3, monkeypatch)
    return path, out


def test_the_command_goes_on_and_says_where(interrupted, capsys) -> None:
    path, out = interrupted
    capsys.readouterr()
    code, text, err = call(capsys, "federate", path, "--out", out, "--resume")
    assert code == 0, err
    said = [line.split(":")[0] for line in err.splitlines()]
    assert said == ["goes on after round 1/3", "round 2/3", "round 3/3"]
    assert "3 rounds on local" in text
    assert {p.name for p in out.iterdir()} == FILES
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != "plan.toml" and p.is_file()}
    code, again, err = call(capsys, "federate", path, "--out", out, "--resume")
    assert (code, again, err) == (0, text, "the run is done already\n")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p in before} == before
    code, _, err = call(capsys, "federate", path, "--out", out)
    assert code == 2
    assert "is not empty; choose another folder, or --resume its run" in err


def test_a_run_folder_may_be_moved(interrupted, tmp_path, capsys) -> None:
    path, out = interrupted
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    assert call(capsys, "federate", path, "--out", moved, "--resume")[0] == 0
    assert moved.as_posix() in (moved / "plan.toml").read_text()
    assert not out.exists()


def test_there_may_be_nothing_yet(interrupted, tmp_path, capsys) -> None:
    path, _ = interrupted
    assert call(capsys, "federate", path, "--out", tmp_path / "new", "--resume", "--set", "server.rounds=1")[0] == 0
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".plan.toml.abc.part").write_text("na")
    assert call(capsys, "federate", path, "--out", begun, "--resume", "--set", "server.rounds=1")[0] == 0
    assert {p.name for p in begun.iterdir()} == FILES


def lost(name: str) -> Any:
    def act(out: Path) -> None:
        (out / name).unlink()

    return act


def cut_short(name: str) -> Any:
    def act(out: Path) -> None:
        (out / name).write_bytes((out / name).read_bytes()[:45])

    return act


@pytest.mark.parametrize(
    ("words", "harm", "sentence"),
    [
        (["--set", "client.lr=0.1"], None, "belongs to another plan; choose an empty folder"),
        (["--engine", "ray"], None, "began with --engine local; use that, or choose an empty folder"),
        (["--engine", "deployment", "--superlink", "a:1"], None, "--resume: not with --engine deployment"),
        ([], lost("unfinished/server.safetensors"), "is missing, from which round 2 could be begun"),
        ([], cut_short("unfinished/server.safetensors"), "server.safetensors cannot be used"),
        ([], lost("recorded/updates.jsonl"), "cannot be read (No such file or directory); bring it back"),
        ([], cut_short("recorded/updates.jsonl"), "does not hold the 2 updates of the rounds so far"),
        ([], lost("plan.toml"), "holds no run; choose an empty folder"),
        ([], cut_short("plan.toml"), "the plan in"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_and_left_alone(interrupted, capsys, words, harm, sentence) -> None:
    path, out = interrupted
    if "ray" in words:
        pytest.importorskip("ray")
    if harm is not None:
        harm(out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    code, _, err = call(capsys, "federate", path, "--out", out, "--resume", *words)
    assert code == 2, err
    assert err.count("error: ") == 1
    assert sentence in err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_rulings_that_a_kill_kept_back_after_the_last_round_are_named(tmp_path, capsys) -> None:
    """The run is done by then, and its last checks were waited for."""
    path, out = tmp_path / "plan.toml", tmp_path / "run"
    path.write_text(plan('[gate]\naction = "record"\n'))
    code, _, err = call(capsys, "federate", path, "--out", out)
    assert code == 0, err
    first, *others = (out / "gate.jsonl").read_text().splitlines()
    assert history(out)["notes"] == []
    (out / "gate.jsonl").write_text(f"{first}\n{others[0][:20]}")
    code, _, err = call(capsys, "federate", path, "--out", out, "--resume")
    assert (code, err) == (0, "the run is done already\n")
    (note,) = history(out)["notes"]
    for place in ((r["round"], r["client"]) for r in map(json.loads, (first, *others))):
        named = "round {} client {}".format(*place) in note
        assert named == (place != (json.loads(first)["round"], json.loads(first)["client"]))


def test_other_images_are_refused(interrupted, capsys, monkeypatch) -> None:
    path, out = interrupted
    monkeypatch.setattr("frostglass.federated.federation.Federation.digest", lambda made: "other")
    code, _, err = call(capsys, "federate", path, "--out", out, "--resume")
    assert code == 2
    assert "the images are not those that" in err


def test_a_folder_that_another_process_holds_is_refused(interrupted, capsys) -> None:
    path, out = interrupted
    with alone_in(out):
        code, _, err = call(capsys, "federate", path, "--out", out, "--resume")
    assert code == 2
    assert "another process is at work in" in err


def test_rounds_without_a_history_are_not_thrown_away(interrupted, capsys) -> None:
    """Neither an interrupted run's nor a whole one's: the record would be deleted, and accounts begin at nothing."""
    path, out = interrupted
    shutil.rmtree(out / "unfinished")
    (out / "history.json").unlink()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    code, _, err = call(capsys, "federate", path, "--out", out, "--resume")
    assert code == 2
    assert "history.json is missing, and" in err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_lost_account_of_a_client_is_refused(tmp_path, monkeypatch, capsys) -> None:
    """Else it would begin at nothing, and what is told of its privacy be false."""
    from frostglass.core.errors import BadInput

    cut(PRIVATE, tmp_path, 4, monkeypatch)
    kept = tmp_path / "unfinished" / "client-2.000001.safetensors"
    shutil.move(kept, tmp_path / "kept")
    with pytest.raises(BadInput, match="is missing, which counts what client 2 has spent; bring it back"):
        whole(PRIVATE, tmp_path, resume=True)
    shutil.move(tmp_path / "kept", kept)
    assert len(whole(PRIVATE, tmp_path, resume=True)["rounds"]) == 3


# ---- the record


def test_a_record_goes_on_behind_a_round(tmp_path) -> None:
    from frostglass.federated.recording import Received

    def record(folder: Path, rounds: range, **more: Any) -> Recorder:
        with Recorder(folder, engine="own", max_bytes=100, **more) as made:
            for r in rounds:
                made.sent(r, {"w": torch.zeros(3)})
                for client in "ab":
                    made.received(Received(r, client, {"w": torch.full((3,), float(r))}))
                assert made.flush(60)
        return made

    record(tmp_path / "whole", range(1, 6))
    record(tmp_path / "cut", range(1, 4))
    with (tmp_path / "cut" / "updates.jsonl").open("a") as out:
        out.write('{"number": 7, "round"')
    (tmp_path / "cut" / "updates" / ".000007.safetensors.x.part").touch()
    made = record(tmp_path / "cut", range(3, 6), goes_on_after=2)
    one, other = (read_record(tmp_path / f) for f in ("whole", "cut"))
    assert [u.header for u in one.updates] == [u.header for u in other.updates]
    assert [u.header.file is None for u in other.updates].count(True) == 3, "bytes of the first rounds are forgotten"
    assert made.lines == 10
    assert not list((tmp_path / "cut").rglob("*.part"))


# ---- processes


SLOW = plan('[[defense]]\nname = "pruning"\nfraction = 0.5\n', rounds="4").replace("[client]", "[client]\nepochs = 12")


def killed(path: Path, out: Path, engine: str, sent: Path, number: int) -> int:
    """Its exit status after this signal, once the weights of a round have been sent out."""
    words = [sys.executable, "-m", "frostglass", "federate", str(path), "--out", str(out), "--engine", engine]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (out.parent / f"{out.name}.log").open("w") as log:
        # a shell that runs the tests in the background hands down an ignored SIGINT, which no terminal would
        process = subprocess.Popen(
            words,
            stdout=log,
            stderr=log,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and not sent.exists():
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(120)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("engine", "number"),
    [("local", signal.SIGKILL), ("local", signal.SIGTERM), ("local", signal.SIGINT), ("ray", signal.SIGKILL)],
)
def test_a_process_that_was_killed_in_the_middle_of_a_round(engine, number, tmp_path, capsys) -> None:
    if engine == "ray":
        pytest.importorskip("ray")
    path, out = tmp_path / "plan.toml", tmp_path / "run"
    path.write_text(SLOW)
    status = killed(path, out, engine, out / "recorded" / "sent" / "00002.safetensors", number)
    assert status != 0, "it was done before"
    assert (out / "unfinished" / "server.safetensors").exists()
    code, _, err = call(capsys, "federate", path, "--out", out, "--engine", engine, "--resume")
    assert code == 0, err
    assert "goes on after round " in err
    code, _, err = call(capsys, "federate", path, "--out", tmp_path / "whole", "--engine", engine)
    assert code == 0, err
    assert history(out) == history(tmp_path / "whole")
    left, right = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert hashes(out) == hashes(tmp_path / "whole")
    if engine == "local":  # on Ray replies arrive in any order
        same_record(tmp_path / "whole", out)
    assert {p.name for p in out.iterdir()} == FILES


def hashes(out: Path) -> dict[tuple[int, str], tuple[str | None, str | None]]:
    """Of every update, and of what was sent before it."""
    headers = [u.header for u in read_record(out / "recorded").updates]
    assert len(headers) == 12
    return {(h.round, h.client): (h.sha256, h.sent_sha256) for h in headers}
