"""`frostglass federate`: what it writes and says, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from command_line import call
from documented import misfits
from federations import SMALL
from frostglass.app.commands.federate import load_federate_plan
from frostglass.core.errors import BadInput
from frostglass.federated import global_accuracy
from frostglass.federated.federate_plan import FederatePlan, plan_of
from frostglass.federated.federation import federation_of
from frostglass.federated.lone_images import caution_of
from frostglass.federated.recorded import read_record

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan(tmp_path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(SMALL)
    return path


def test_a_folder_that_is_not_named_in_utf8_is_refused_and_not_made(plan, tmp_path, capsys) -> None:
    code, text, err = call(capsys, "federate", plan, "--out", tmp_path / "run\udcff")
    assert (code, text) == (2, "")
    assert "is no name in UTF-8; choose another folder." in err
    assert list(tmp_path.iterdir()) == [plan]


def test_a_run_and_its_folder(plan, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    code, text, err = call(capsys, "federate", plan, "--out", out)
    assert code == 0, err
    assert {p.name for p in out.iterdir()} == {"plan.toml", "history.json", "model.safetensors", "recorded"}
    assert [line.split(":")[0] for line in err.splitlines()] == ["start", "round 1/2", "round 2/2"]
    assert text.startswith("small: 3 clients, 2 rounds on local, defence none\naccuracy on 50 test images: ")
    assert f"Next: frostglass audit-updates {out / 'recorded'} --out {out}-audit" in text
    assert len(read_record(out / "recorded").updates) == 6
    history = json.loads((out / "history.json").read_text())
    row = history["rounds"][2]
    assert row["loss"] < history["rounds"][1]["loss"]
    assert {"client", "examples", "loss"} <= row["clients"][0].keys()
    again = plan_of((out / "plan.toml").read_text())
    assert (again.name, again.server.folder) == ("small", out.as_posix())
    code, text, err = call(capsys, "federate", plan, "--out", out)
    assert (code, text) == (2, "")
    assert "is not empty" in err


def test_json_and_only_json(plan, tmp_path, capsys) -> None:
    code, text, _ = call(
        capsys, "federate", plan, "--out", tmp_path / "run", "--json", "--set", "server.rounds=1", "--set", "seed=3"
    )
    assert code == 0
    value = json.loads(text)
    assert value == json.loads((tmp_path / "run" / "history.json").read_text())
    assert misfits("history.json", value) == []
    assert value["seed"] == 3


def test_what_encodings_and_privacy_cost_is_said(plan, tmp_path, capsys) -> None:
    plan.write_text(SMALL + '[[defense]]\nname = "instahide"\nk = 2\n[evaluation]\nencodings = 3\n')
    code, text, err = call(capsys, "federate", plan, "--out", tmp_path / "encoded")
    assert code == 0, err
    assert "over encodings" in text
    assert "encodings give no (epsilon, delta)" in text
    assert "encoded" in err
    plan.write_text(SMALL.replace("[model]", '[model]\nfix = "opacus"') + '[[defense]]\nname = "dp_sgd"\n')
    code, text, err = call(capsys, "federate", plan, "--out", tmp_path / "private", "--set", "insecure_seed=1")
    assert code == 0, err
    assert "privacy spent: epsilon up to" in text
    assert "per image at delta 1e-05" in text
    assert "INSECURE" in text
    plan.write_text(SMALL + '[[defense]]\nname = "dp_instahide"\nk = 2\nstd = 0.5\n')
    code, text, err = call(capsys, "federate", plan, "--out", tmp_path / "noisy")
    assert code == 0, err
    assert "for the pixels of an image at delta 1e-05" in text
    assert "labels are not private" in text
    assert "for the pixels of an image" in err


def test_a_step_on_one_image_is_told_where_batchnorm_sees_it(plan, tmp_path, capsys) -> None:
    """67, 67 and 66 images: one image is left over by 33, at the first two clients."""
    alone = "leaves one image to a step of its own at clients 0 (67 images), 1 (67 images); BatchNorm"
    for line, told in (("minibatch = 33", True), ("minibatch = 16", False), ('minibatch = 33\nmode = "eval"', False)):
        plan.write_text(SMALL.replace("minibatch = 16", line))
        out = tmp_path / line
        code, text, err = call(capsys, "federate", plan, "--out", out, "--set", "server.rounds=1")
        assert code == 0, err
        assert (alone in text, alone in err) == (told, told)
        assert any(alone in note for note in json.loads((out / "history.json").read_text())["notes"]) == told
    plain = SMALL.replace("minibatch = 16", "minibatch = 33")
    assert caution_of(*federation_of(plain).steps)
    assert not caution_of(*federation_of(plain.replace("[model]", '[model]\nfix = "opacus"')).steps)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["federate-digits", "federate-digits-instahide"])
def test_no_client_of_a_bundled_plan_has_a_step_on_one_image(name, seed) -> None:
    made = federation_of(load_federate_plan(ROOT / "plans" / f"{name}.toml", [f"seed={seed}"]).to_toml())
    assert not caution_of(*made.steps)


def test_a_federation_in_which_nothing_worked_fails_and_says_why(plan, tmp_path, capsys) -> None:
    code, _, err = call(capsys, "federate", plan, "--out", tmp_path / "run", "--set", "client.lr=1e30")
    assert code == 1
    assert "Traceback" not in err
    assert "no update of any round could be used (client 0: training diverged" in err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("server.rounds=0", "server.rounds"),
        ("server.speed=1", "unknown key"),
        ("seed=-1", "seed: -1 is not valid"),
        ("gate={settings={label_leak=1}}", "gate.settings.label_leak: unknown setting; did you mean 'label_leakage'"),
        ('gate={settings={label_leakage="a"}}', "label_leakage: 'a' must be a share between 0 and 1"),
        ('gate={checks="posixpath:join",settings={a=1}}', "gate.settings: a = 1 is not what posixpath:join takes"),
        ('gate={checks="os:getcwd"}', "gate.checks: os:getcwd returned str; name a function that returns the checks"),
        ("server.clients=4", "more than split.clients = 3"),
        ("split.clients=300", "lower it"),
        ("split.alpha=0", "split.alpha"),
        ("client.local_steps=3", "client.whole_batch = true"),
        ('client={optimizer="adam",momentum=0.5}', "belongs to optimizer"),
        ("model.name=nothing", "not known"),
        ("data.source=parquet:$NOWHERE_AT_ALL/x", "NOWHERE_AT_ALL"),
        ("buffers=lose", "buffers"),
        ("record.folder=../elsewhere", "record.folder"),
        ("record.folder=..", "record.folder"),
        ("record.folder=history.json", "belongs to the run folder itself"),
        ('defense=[{name="secure_sum"}]', "SecAgg+"),
        ('defense=[{name="prunning"}]', "did you mean 'pruning'"),
        ('defense=[{name="pruning",fraction=2.0}]', "fraction"),
        ('defense=[{name="pruning",share=0.5}]', "unknown parameter"),
        ('defense=[{name="instahide",k="two"}]', "defense.0.k"),
        ('defense=[{name="instahide",speed=2}]', "defense.0.speed: unknown key"),
        ('defense=[{name="instahide",kind="mixup"}]', "defense.0.kind: unknown key; name = 'instahide' says which"),
        ('defense=[{name="instahide",c1=0.3}]', "evaluation.min_private: 0.5 cannot be reached"),
        ('defense=[{name="instahide",c1=0.2}]', "c1: 0.2 is outside"),
        ('defense=[{name="instahide",k=100}]', "k: 100 distinct private images"),
        ('defense=[{name="instahide",rounds=1}]', "reuse = true"),
        ('defense=[{name="instahide"},{name="mixup"}]', "two encoders"),
        ('defense=[{name="instahide"},{name="dp_sgd"}]', "would be false"),
        ('defense=[{name="instahide",public="nowhere"}]', "nowhere"),
        ('defense=[{name="dp_sgd"}]', 'model.fix = "opacus"'),
        ('defense=[{name="clip_and_noise"}]', 'buffers = "keep"'),
        ('defense=[{name="dp_sgd"},{name="soteria"}]', "both replace the client step"),
    ],
)
def test_bad_plans_are_refused_in_words(plan, tmp_path, capsys, override, sentence) -> None:
    code, _, err = call(capsys, "federate", plan, "--out", tmp_path / "run", "--set", override)
    assert code == 2, err
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


DEEP = """
[data]
source = "digits"
limit = 42
[split]
clients = 1
[model]
name = "resnet18"
options = { width = 4 }
[client]
minibatch = 33
[server]
rounds = 1
"""


def test_a_step_of_one_image_that_batchnorm_cannot_bear_is_refused_before_the_training() -> None:
    with pytest.raises(BadInput, match=r"client\.minibatch: 34 images of client 0 leave one"):
        federation_of(DEEP)
    with pytest.raises(BadInput, match=r"client\.minibatch"):
        federation_of(DEEP.replace("33", "1"))
    for bearable in ("minibatch = 32", 'minibatch = 33\nmode = "eval"', "whole_batch = true"):
        federation_of(DEEP.replace("minibatch = 33", bearable))
    federation_of(DEEP.replace("[model]", '[model]\nfix = "opacus"'))


def test_kept_statistics_are_never_those_of_one_test_image(monkeypatch) -> None:
    kept = 'buffers = "keep"\n' + DEEP.replace("33", "32")
    with pytest.raises(BadInput, match=r"data\.test_limit"):
        federation_of(kept.replace("limit = 42", "limit = 42\ntest_limit = 1"))
    made = federation_of(kept)  # 8 test images
    monkeypatch.setattr(global_accuracy, "_TEST_BATCH", 7)
    assert 0 <= global_accuracy.accuracy_of(made, made.model.state_dict()).plain <= 1


def test_all_problems_are_told_together(plan, tmp_path, capsys) -> None:
    code, _, err = call(
        capsys, "federate", plan, "--out", tmp_path / "run", "--set", "server.rounds=0", "--set", "server.clients=9",
        "--set", 'defense=[{name="secure_sum"},{name="nothing"}]',
    )  # fmt: skip
    assert code == 2
    assert err.count("error:") == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engine", "deployment"], "needs --superlink HOST:PORT and --root-certificates"),
        (["--superlink", "127.0.0.1:1"], "belongs to --engine deployment"),
        (["--engine", "deployment", "--superlink", "a:1", "--root-certificates", "none.pem"], "does not exist"),
    ],
)
def test_where_to_run_is_checked_first(plan, tmp_path, capsys, arguments, sentence) -> None:
    code, _, err = call(capsys, "federate", plan, "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_used_leaves_no_folder(plan, tmp_path, capsys) -> None:
    place = ["--engine", "deployment", "--superlink", "127.0.0.1:1", "--root-certificates", plan]
    (tmp_path / "empty").mkdir()
    for out, left in (("run", False), ("empty", True)):
        code, _, err = call(capsys, "federate", plan, "--out", tmp_path / out, *place)
        assert code == 2
        assert err.startswith("error: --root-certificates: ")
        assert (tmp_path / out).exists() == left
    assert not list((tmp_path / "empty").iterdir())


def test_sigterm_reaches_whoever_waits_for_a_superlink(plan, tmp_path, capsys, monkeypatch) -> None:
    """So that the run is stopped there, as by Ctrl-C; a process that just ends would leave it to go on."""
    ended = []

    def waiting(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except SystemExit as wrong:
            ended.append(wrong.code)
            raise

    monkeypatch.setattr("frostglass.federated.flower.engines.on_deployment", waiting)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        place = ["--engine", "deployment", "--superlink", "127.0.0.1:1", "--root-certificates", plan]
        assert call(capsys, "federate", plan, "--out", tmp_path / "run", *place)[0] == 143
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == [143]


def test_ctrl_c_promises_a_resume_only_where_there_is_one(plan, tmp_path, capsys, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for engine in ("local", "deployment"):
        monkeypatch.setattr(f"frostglass.federated.flower.engines.on_{engine}", interrupted)
    place = ["--engine", "deployment", "--superlink", "127.0.0.1:1", "--root-certificates", plan]
    code, _, err = call(capsys, "federate", plan, "--out", tmp_path / "far", *place)
    assert (code, err) == (130, "Interrupted. The run was stopped at the SuperLink, and cannot be resumed.\n")
    code, _, err = call(capsys, "federate", plan, "--out", tmp_path / "near")
    assert (code, "--resume goes on" in err) == (130, True)


def test_encodings_of_more_images_than_a_client_has_are_refused_first(plan, tmp_path, capsys) -> None:
    plan.write_text(SMALL + '[[defense]]\nname = "dp_instahide"\nk = 67\n')
    code, _, err = call(capsys, "federate", plan, "--out", tmp_path / "run")
    assert code == 2
    assert "k = 67 is above the 66 images" in err
    assert not (tmp_path / "run").exists()


def test_missing_and_broken_files(tmp_path, capsys) -> None:
    assert call(capsys, "federate", tmp_path / "none.toml", "--out", tmp_path / "run")[0] == 2
    (tmp_path / "bad.toml").write_text("name = ")
    code, _, err = call(capsys, "federate", tmp_path / "bad.toml", "--out", tmp_path / "run")
    assert code == 2
    assert "not valid TOML" in err
    (tmp_path / "file").write_text("")
    (tmp_path / "good.toml").write_text(SMALL)
    code, _, err = call(capsys, "federate", tmp_path / "good.toml", "--out", tmp_path / "file")
    assert code == 2
    assert "--out" in err


def test_a_plan_reaches_other_processes_as_it_is() -> None:
    plan = plan_of(SMALL + '[[defense]]\nname = "instahide"\nk = 3\n[[defense]]\nname = "pruning"\nfraction = 0.5\n')
    assert plan_of(plan.to_toml()) == plan
    assert (plan.encoding.k, [p.settings for p in plan.others], plan.called) == (
        3, [{"fraction": 0.5}], "instahide+pruning",
    )  # fmt: skip
    with pytest.raises(BadInput, match="not valid TOML"):
        plan_of("name = ")
    with pytest.raises(BadInput, match=r"server\.rounds: 0 is not valid"):
        plan_of("[server]\nrounds = 0\n")
    assert FederatePlan().called == "none"


def test_steps_over_all_images_take_one_encoding_a_round() -> None:
    rounds, epochs = "[server]\nrounds = 2\n[client]\nepochs = 5\n", '[[defense]]\nname = "instahide"\nrounds = 2\n'
    assert plan_of(f"{rounds}whole_batch = true\n{epochs}").encoding.rounds == 2
    with pytest.raises(BadInput, match="do not last 2 rounds of 5 epochs"):
        plan_of(rounds + epochs)


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "plans").glob("federate-*.toml")))
def test_packaged_plans_are_valid(name, monkeypatch) -> None:
    monkeypatch.setenv("FROSTGLASS_DATA", "/data")
    assert load_federate_plan(ROOT / "plans" / name).server.rounds


@pytest.mark.slow
def test_four_clients_learn_the_digits(tmp_path, capsys) -> None:
    code, _, err = call(capsys, "federate", ROOT / "plans" / "federate-digits.toml", "--out", tmp_path / "run")
    assert code == 0, err
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["rounds"][-1]["accuracy"] >= 0.97
    assert max(history["examples"]) > 1.2 * min(history["examples"]), "the split is not non-IID"


@pytest.mark.slow
def test_instahide_learns_the_digits_if_tests_are_encoded(tmp_path, capsys) -> None:
    code, _, err = call(
        capsys, "federate", ROOT / "plans" / "federate-digits-instahide.toml", "--out", tmp_path / "run",
        "--set", "server.rounds=8",
    )  # fmt: skip
    assert code == 0, err
    row = json.loads((tmp_path / "run" / "history.json").read_text())["rounds"][-1]
    assert row["accuracy_encoded"] >= 0.8
    assert row["accuracy_encoded"] > row["accuracy"], "encoding at test time no longer helps"
