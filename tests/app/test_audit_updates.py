"""`frostglass audit-updates` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from frostglass.app.cli import main
from recorded_scenes import Federation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    held = Federation(tmp_path_factory.mktemp("cli"), "mlp", {"hidden": [200]}, clients=2)
    held.run()
    held.truth()
    return held


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0)


def test_a_record_on_the_terminal(made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    code = run("audit-updates", made.record, "--truth", made.folder / "TRUTH", "--out", out, "--gate")
    said = capsys.readouterr()
    assert code == 10  # VIOLATED
    assert "round 1, client c0: 4 images, the gradient of one SGD step (lr 0.1), train mode" in said.out
    assert "4 of 4 are" in said.out
    assert "2 of 2 recorded updates examined" in said.out
    assert "labels 100 % right" in said.err
    assert (out / "report.html").exists()
    assert run("audit-updates", made.record, "--truth", made.folder / "TRUTH", "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run("report", out) == 0


def test_json_is_json_alone(made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit-updates", made.record, "--client", "c1", "--out", tmp_path / "run", "--json") == 0
    card = json.loads(capsys.readouterr().out)
    assert [u["client"] for u in card["recorded"]["updates"] if u["status"] == "attacked"] == ["c1"]


def test_two_states_with_the_local_plan_as_options(
    made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made.model.state_dict()
    after, _ = made.message(0, before, 1)
    save_file(before, tmp_path / "before.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    code = run(
        "audit-updates", tmp_path / "before.safetensors", tmp_path / "after.safetensors", "--model", "mlp", "--option",
        "hidden=[200]", "--channels", 1, "--size", 8, "--examples", 4, "--lr", 0.1, "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0
    assert "4 of 4 images of this message are proved" in " ".join(capsys.readouterr().out.split())


def test_what_is_missing_for_an_attack_is_the_headline(
    made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made.model.state_dict()
    save_file(before, tmp_path / "before.safetensors")
    save_file(made.message(0, before, 1)[0], tmp_path / "after.safetensors")
    save_file({n: p.detach().clone() for n, p in made.model.named_parameters()}, tmp_path / "gradients.safetensors")
    states = (tmp_path / "before.safetensors", tmp_path / "after.safetensors", "--examples", 4)
    gradients = ("--gradients", tmp_path / "gradients.safetensors", "--weights", tmp_path / "before.safetensors")
    for name, given, flag in (("states", states, "give --lr"), ("raw", gradients, "give --examples")):
        out = tmp_path / name
        network = ("--model", "mlp", "--option", "hidden=[200]", "--channels", 1, "--size", 8)
        assert run("audit-updates", *given, *network, "--out", out, "--json") == 0
        headline = json.loads(capsys.readouterr().out)["headline"]
        assert flag in headline
        assert "budget" not in headline
        assert "INCONCLUSIVE</span> over 0 tests" in (out / "report.html").read_text(encoding="utf-8")


def test_a_plan(made: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "plans" / "audit-updates.toml").read_text(encoding="utf-8")
    plan = tmp_path / "plan.toml"
    plan.write_text(text.replace('"RECORDED"', f'"{made.record}"'), encoding="utf-8")
    assert run("audit-updates", plan, "--out", tmp_path / "run", "--set", "updates.rounds=[1]") == 0
    assert "recorded updates examined" in capsys.readouterr().out
    assert run("audit-updates", plan, "--truth", "digits", "--out", tmp_path / "other") == 2
    assert "--truth goes with updates, not with a plan" in capsys.readouterr().err
    for option in (("--seed", 5), ("--show-images",)):
        assert run("audit-updates", plan, *option, "--out", tmp_path / "other") == 2
        assert f"{option[0]} goes with updates, not with a plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "none was given; give one of record"),
        (["nowhere"], "no record of updates"),
        (["a.pt", "b.pt", "c.pt"], "3 sources"),
        (["RECORD", "--lr", "0.1"], "a record says what the clients did"),
        (["RECORD", "--attack", "pel"], "not a known attack; did you mean 'peel'"),
        (["RECORD", "--round", "7"], "7 is not kept"),
        (["RECORD", "--client", "9"], "'9' is not in the record; there are c0, c1."),
        (["RECORD", "--set", "a=1"], "--set overrides a plan"),
        (["a.pt", "b.pt", "--model", "mlp", "--size", "8", "--channels", "1"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    made: Federation, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(made.record) if a == "RECORD" else a for a in arguments]
    assert run("audit-updates", *given, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
