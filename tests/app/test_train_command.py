"""`frostglass train`: what it writes, what it refuses, and what a killed run goes on with."""

from __future__ import annotations

import csv
import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import call
from documented import misfits
from frostglass.app.cli import main
from frostglass.app.commands.train import load_train_plan
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.federated import training
from frostglass.federated.checkpoint_check import check_checkpoint
from frostglass.federated.feeds import augmented, takes_encodings
from frostglass.federated.train_plan import MethodPlan, TrainingPlan
from frostglass.vision.networks import build

pytestmark = [
    pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard's imports
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plan(tmp_path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text("""
name = "small"
[data]
source = "digits"
limit = 500
[model]
options = { width = 8 }
[[method]]
kind = "plain"
[[method]]
kind = "mixup"
k = 2
[[method]]
kind = "instahide"
[training]
epochs = 2
batch = 50
[evaluation]
encodings = [2, 3]
""")
    return path


def test_every_method_leaves_log_weights_and_result(plan, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    code, text, err = call(capsys, "train", plan, "--out", out, "--device", "cpu")
    assert code == 0, err
    assert "no (epsilon, delta)" in text
    labels = ["plain-0", "mixup-inside-k2-0", "instahide-inside-k4-0"]
    assert all(label in err for label in labels)
    written = json.loads((out / "results.json").read_text())
    assert misfits("results.json", written) == []
    results = written["results"]
    page = " ".join((ROOT / "docs" / "files.md").read_text(encoding="utf-8").split())
    assert [f"{r['method']}-{r['seed']}" for r in results] == labels
    for label, result in zip(labels, results, strict=True):
        rows = list(csv.DictReader((out / label / "log.csv").open()))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert ", ".join(f"`{name}`" for name in rows[0]) + "." in page, "a column that the page does not name"
        assert float(rows[-1]["test_plain"]) == result["plain"]
        assert json.loads((out / label / "result.json").read_text()) == result
        assert set(result["encoded"]) == (set() if label == "plain-0" else {"2", "3"})
        assert (out / label / "model.safetensors").exists()
        assert not (out / label / "checkpoint.safetensors").exists()
        assert not [f for f in check_checkpoint(out / label) if f.state]
    assert [r["encodings_per_image"] for r in results] == [0, 4, 8]
    for result in results:  # encodings of all images, k images in each; which images they are of is not said
        held = result.get("exposure_histogram", {})
        summed = sum(int(count) * images for count, images in held.items())
        assert summed == result["images"] * result["encodings_per_image"]
        assert sum(held.values()) == (result["images"] if held else 0)
    held = out / "instahide-inside-k4-0"
    assert stat.S_IMODE((held / "ledger.safetensors").stat().st_mode) == 0o600
    assert "broken" in (held / "privacy.txt").read_text()
    assert call(capsys, "train", plan, "--out", out)[0] == 2
    code, text, _ = call(capsys, "train", plan, "--out", out, "--resume", "--json")
    assert code == 0
    assert json.loads(text) == results


class Killed(BaseException):
    pass


def test_a_killed_plain_run_ends_as_the_straight_one(plan, tmp_path, capsys, monkeypatch) -> None:
    plan.write_text(
        plan.read_text().split("[[method]]")[0] + "[[method]]\nkind='plain'\n[training]\nepochs=3\nbatch=50\n"
    )
    call(capsys, "train", plan, "--out", tmp_path / "straight")
    kill_after(2, monkeypatch)
    with pytest.raises(Killed):
        main(["train", str(plan), "--out", str(tmp_path / "cut")])
    monkeypatch.undo()
    checkpoint = tmp_path / "cut" / "plain-0" / "checkpoint.safetensors"
    assert check_checkpoint(checkpoint) == []
    assert call(capsys, "train", plan, "--out", tmp_path / "cut")[0] == 2
    assert call(capsys, "train", plan, "--out", tmp_path / "cut", "--resume")[0] == 0
    left, right = (
        list(csv.DictReader((tmp_path / name / "plain-0" / "log.csv").open())) for name in ("straight", "cut")
    )
    assert [r["loss"] for r in left] == [r["loss"] for r in right]
    assert len(right) == 3


def test_what_tensorboard_shows_is_on_disk_after_every_epoch(plan, tmp_path, capsys, monkeypatch) -> None:
    """A run that is killed cannot write it later, and a resumed one begins behind it."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen: list[list[int]] = []
    real = training.Run._epoch

    def epoch(self: training.Run, number: int) -> dict[str, float]:
        if number:
            held = events.EventAccumulator(str(self.folder))
            held.Reload()
            seen.append([scalar.step for scalar in held.Scalars("loss")])
        return real(self, number)

    monkeypatch.setattr(training.Run, "_epoch", epoch)
    plan.write_text(
        plan.read_text().split("[[method]]")[0] + "[[method]]\nkind='plain'\n[training]\nepochs=4\nbatch=50\n"
    )
    assert call(capsys, "train", plan, "--out", tmp_path / "run")[0] == 0
    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_dropout_follows_the_seed_and_leaves_the_generator_of_torch(plan, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "drops.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan.write_text(
        '[data]\nsource="digits"\nlimit=300\n[model]\nname="drops:make"\n'
        '[[method]]\nkind="plain"\n[training]\nepochs=3\nbatch=50\n'
    )
    before = torch.get_rng_state()
    assert call(capsys, "train", plan, "--out", tmp_path / "straight")[0] == 0
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)  # another state of torch's own generator, as in another process
    with monkeypatch.context() as cut:
        kill_after(2, cut)
        with pytest.raises(Killed):
            main(["train", str(plan), "--out", str(tmp_path / "cut")])
    assert call(capsys, "train", plan, "--out", tmp_path / "cut", "--resume")[0] == 0
    weights = [(tmp_path / name / "plain-0" / "model.safetensors").read_bytes() for name in ("straight", "cut")]
    assert weights[0] == weights[1]


def kill_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.Run._epoch

    def epoch(self: training.Run, number: int) -> dict[str, float]:
        if number == epochs:
            raise Killed
        return real(self, number)

    monkeypatch.setattr(training.Run, "_epoch", epoch)


def test_a_killed_encoded_run_goes_on_with_its_exposures_and_new_keys(plan, tmp_path, capsys, monkeypatch) -> None:
    plan.write_text(
        plan.read_text().split("[[method]]")[0] + "[[method]]\nkind='instahide'\n[training]\nepochs=3\nbatch=50\n"
    )
    kill_after(1, monkeypatch)
    with pytest.raises(Killed):
        main(["train", str(plan), "--out", str(tmp_path / "cut")])
    monkeypatch.undo()
    held = tmp_path / "cut" / "instahide-inside-k4-0"
    assert not [f for f in check_checkpoint(held) if f.state]
    assert call(capsys, "train", plan, "--out", tmp_path / "cut", "--resume")[0] == 0
    (result,) = json.loads((tmp_path / "cut" / "results.json").read_text())["results"]
    assert result["encodings_per_image"] == 12, "exposures before the kill were forgotten"
    assert result["epochs"] == 3
    (held / "result.json").unlink()
    (held / "checkpoint.safetensors").write_bytes(b"broken")
    code, _, err = call(capsys, "train", plan, "--out", tmp_path / "cut", "--resume")
    assert code == 2
    assert "delete it" in err


def short(plan: Path, method: str = "kind='plain'", epochs: int = 2) -> None:
    """The plan with one method."""
    plan.write_text(plan.read_text().split("[[method]]")[0] + f"[[method]]\n{method}\n[training]\nbatch=50\n")
    plan.write_text(plan.read_text() + f"epochs={epochs}\n[evaluation]\nencodings=[2]\n")


@pytest.mark.parametrize("method", ["kind='plain'", "kind='instahide'\nk=2"])
def test_a_run_does_not_go_on_with_other_images(method, plan, tmp_path, capsys, monkeypatch) -> None:
    """Weights of some and exposures of others would be told as one run's; of an interrupted run and of a whole one."""
    source, out = coloured(tmp_path / "photos", "abc"), tmp_path / "cut"
    short(plan, method)
    plan.write_text(plan.read_text().replace('"digits"', f'"{source}"').replace("batch=50", "batch=9"))
    kill_after(1, monkeypatch)
    with pytest.raises(Killed):
        main(["train", str(plan), "--out", str(out)])
    monkeypatch.undo()
    changed = tmp_path / "photos" / "a" / "0.png"
    own = changed.read_bytes()
    for _ in range(2):
        Image.new("RGB", (8, 8)).save(changed)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        code, _, err = call(capsys, "train", plan, "--out", out, "--resume")
        assert (code, err.count("error:")) == (2, 1), err
        assert f"the images, labels or weights are not those that {out} began with" in err
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        changed.write_bytes(own)
        assert call(capsys, "train", plan, "--out", out, "--resume")[0] == 0
    (out / "data.json").write_text("{")
    code, _, err = call(capsys, "train", plan, "--out", out, "--resume")
    assert code == 2
    assert "data.json cannot be used" in err


def test_what_kills_leave_goes_and_blocks_nothing(plan, tmp_path, capsys) -> None:
    """Before the plan was whole, in the middle of a checkpoint, and between the result and the last checkpoint."""
    out = tmp_path / "run"
    short(plan)
    out.mkdir()
    (out / ".plan.toml.abc.part").write_text("na")
    assert call(capsys, "train", plan, "--out", out, "--resume")[0] == 0
    names = {p.relative_to(out) for p in out.rglob("*")}
    assert not any(p.suffix == ".part" for p in names)
    for name in ("checkpoint.safetensors", ".checkpoint.safetensors.abc.part", ".log.csv.abc.part"):
        (out / "plain-0" / name).write_bytes(b"half")
    assert call(capsys, "train", plan, "--out", out, "--resume")[0] == 0
    assert {p.relative_to(out) for p in out.rglob("*")} == names


@pytest.mark.parametrize("method", ["kind='plain'", "kind='instahide'\ninsecure_seed=3"])
def test_a_run_without_its_log_ends_with_the_same_result(method, plan, tmp_path, capsys, monkeypatch) -> None:
    """Killed behind its last epoch: nothing is left to train, and the log is not what the result follows from."""
    out = tmp_path / "run"
    short(plan, method)
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_weights", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main(["train", str(plan), "--out", str(out)])
    (log,) = out.rglob("log.csv")
    row = list(csv.DictReader(log.open()))[-1]
    log.unlink()
    assert call(capsys, "train", plan, "--out", out, "--resume")[0] == 0
    (result,) = json.loads((out / "results.json").read_text())["results"]
    assert (result["epochs"], result["plain"]) == (2, float(row["test_plain"]))
    assert result["encodings_per_image"] == float(row["encodings_per_image"])


def coloured(folder: Path, classes: str) -> str:
    """One subfolder a class, whose images a network tells apart by their colour."""
    draw = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = draw.integers(0, 60, (8, 8, 3), dtype=np.uint8)
            pixels[..., "abc".index(name)] += 150
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def test_classes_for_testing_go_by_their_names(plan, tmp_path, capsys) -> None:
    """Without class a among them, b would be taken for a by its place."""
    train = coloured(tmp_path / "train", "abc")
    test, strange = coloured(tmp_path / "test", "bc"), coloured(tmp_path / "strange", "b")
    (tmp_path / "strange" / "b").rename(tmp_path / "strange" / "zebra")
    (tmp_path / "flat").mkdir()
    (tmp_path / "test" / "b" / "0.png").rename(tmp_path / "flat" / "0.png")
    plan.write_text(
        f'name = "c"\n[data]\nsource = "{train}"\ntest = "{test}"\n[model]\noptions = {{ width = 8 }}\n'
        "[[method]]\nkind = 'plain'\n[training]\nepochs = 12\nbatch = 12\n"
    )
    code, _, err = call(capsys, "train", plan, "--out", tmp_path / "run")
    assert code == 0, err
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert result["plain"] > 0.9
    for override, sentence in ((f"data.test={strange}", "'zebra' is none of"),
                               (f"data.source=folder:{tmp_path / 'flat'}", "without classes")):  # fmt: skip
        code, _, err = call(capsys, "train", plan, "--out", tmp_path / "other", "--set", override)
        assert code == 2
        assert sentence in err


def test_a_resumed_run_with_reuse_says_what_it_makes_anew(plan, tmp_path, capsys, monkeypatch) -> None:
    plan.write_text(
        plan.read_text().split("[[method]]")[0]
        + "[[method]]\nkind='instahide'\nrounds=1\nreuse=true\n[training]\nepochs=3\nbatch=50\n"
    )
    out = tmp_path / "cut"
    kill_after(1, monkeypatch)
    with pytest.raises(Killed):
        main(["train", str(plan), "--out", str(out)])
    monkeypatch.undo()
    (held,) = (p for p in out.iterdir() if p.is_dir())
    ledger = (held / training.LEDGER).read_bytes()
    (held / training.LEDGER).unlink()
    code, _, err = call(capsys, "train", plan, "--out", out, "--resume")
    assert code == 2
    assert "counts the exposure so far" in err
    (held / training.LEDGER).write_bytes(ledger)
    with pytest.warns(PrivacyCaution, match="resuming makes new ones"):
        assert call(capsys, "train", plan, "--out", out, "--resume")[0] == 0
    assert "rounds of fresh encodings: 1 asked for in a run; 2 were made" in (held / "privacy.txt").read_text()


@pytest.mark.parametrize(
    ("name", "text"), [("result.json", '{"method"'), ("result.json", "[]"), ("log.csv", "a,b\n1,2\n")]
)
def test_damaged_files_of_a_run_are_named(plan, tmp_path, capsys, monkeypatch, name: str, text: str) -> None:
    plan.write_text(plan.read_text().split('[[method]]\nkind = "mixup"')[0] + "[training]\nepochs=3\nbatch=50\n")
    kill_after(1, monkeypatch)
    with pytest.raises(Killed):
        main(["train", str(plan), "--out", str(tmp_path / "cut")])
    monkeypatch.undo()
    (tmp_path / "cut" / "plain-0" / name).write_text(text)
    code, _, err = call(capsys, "train", plan, "--out", tmp_path / "cut", "--resume")
    assert code == 2
    assert name in err
    assert "delete" in err


def test_cross_dataset_and_reuse(plan, tmp_path, capsys) -> None:
    pool = tmp_path / "pool"
    code, _, err = call(
        capsys,
        "public-pool",
        "digits",
        pool,
        "--size",
        8,
        "--cut",
        8,
        "--channels",
        1,
        "--key-points",
        -1,
        "--crops",
        50,
    )
    assert code == 0, err
    text = plan.read_text().split("[[method]]")[0]
    text += "[[method]]\nkind='instahide'\nk=4\npublic='pool'\nrounds=1\nreuse=true\n[training]\nepochs=2\nbatch=50\n"
    plan.write_text(text)
    code, _, err = call(capsys, "train", plan, "--out", tmp_path / "run", "--set", "evaluation.encodings=[2]")
    assert code == 0, err
    (result,) = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert result["method"] == "instahide-cross-k4"
    assert result["encodings_per_image"] == 2, "the second epoch was encoded anew"
    assert "2" in result["encoded"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.epochs=0", "training.epochs"),
        ("training.speed=1", "unknown key"),
        ("method.kind=other", "method"),
        ("method.2.rounds=1", "reuse"),
        ("method.2.c1=0.1", "c1"),
        ("method.2.c1=0.4", "evaluation, method instahide"),
        ("data.limit=3", "4 distinct"),
        ("data.source=folder:nothere", "does not exist"),
        ("method.1.k=100000", "k"),
        ("method.2.public=nowhere", "holds no pool"),
        ("method.1.kind=plain", "two are called"),
        ("evaluation.encodings=[0]", "encodings"),
        ("seeds=[1,1]", "seeds"),
        ("seeds=[-1]", "seeds.0: -1 is not valid"),
        ("data.source=parquet:$NOWHERE_AT_ALL/x", "NOWHERE_AT_ALL"),
        ("data.test=photos", "give a size"),
        ("training.lr=1e30", "lower it"),
        ("model.name=nothing", "not known"),
    ],
)
def test_bad_plans_are_refused_in_words(plan, tmp_path, capsys, override, sentence) -> None:
    code, _, err = call(capsys, "train", plan, "--out", tmp_path / "run", "--set", override)
    assert code == 2, err
    assert sentence in err
    assert "Traceback" not in err
    if override == "training.lr=1e30":  # which shows in the first epoch
        assert not list((tmp_path / "run").rglob("*.*"))
    else:
        assert not (tmp_path / "run").exists(), "a refused run keeps its folder from the corrected command"


@pytest.mark.parametrize(
    ("network", "batch", "sentence"),
    [
        ("nn.Linear(64, 10).requires_grad_(False)", 50, "no parameter that is trained"),
        ("nn.Linear(64, 10).bfloat16()", 50, "cannot be trained on float32 images"),
        ("nn.Linear(64, 10), nn.BatchNorm1d(10)", 50, "training.batch: 50 leaves one of 201 images"),
        ("nn.Linear(64, 10), nn.BatchNorm1d(10)", 1, "training.batch: 1 leaves one of 201 images"),
    ],
)
def test_a_network_that_cannot_make_a_step_is_refused(
    plan, tmp_path, capsys, monkeypatch, network: str, batch: int, sentence: str
) -> None:
    (tmp_path / "odd.py").write_text(
        f"from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), {network})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd", raising=False)
    plan.write_text(
        f'[data]\nsource="digits"\nlimit=251\n[model]\nname="odd:make"\n'
        f'[[method]]\nkind="plain"\n[training]\nepochs=1\nbatch={batch}\n'
    )
    code, _, said = call(capsys, "train", plan, "--out", tmp_path / "run")
    assert (code, sentence in said) == (2, True), said
    assert not (tmp_path / "run").exists()


def test_resume_belongs_to_its_plan(plan, tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.toml").write_text("name = 'other'\n")
    code, _, err = call(capsys, "train", plan, "--out", tmp_path / "run", "--resume")
    assert code == 2
    assert "another plan" in err


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "plans").glob("train-*.toml")))
def test_packaged_plans_are_valid(name, monkeypatch) -> None:
    monkeypatch.setenv("FROSTGLASS_DATA", "/data")
    assert load_train_plan(ROOT / "plans" / name).method
    monkeypatch.delenv("FROSTGLASS_DATA")
    if "$FROSTGLASS_DATA" in (ROOT / "plans" / name).read_text():
        with pytest.raises(BadInput, match="FROSTGLASS_DATA"):
            load_train_plan(ROOT / "plans" / name)


def test_learning_rates() -> None:
    cycle = [training.learning_rate(TrainingPlan(lr=0.1), s, 100) for s in range(100)]
    assert max(cycle) == pytest.approx(0.1)
    assert int(np.argmax(cycle)) == 30
    assert cycle[0] == pytest.approx(0.004)
    assert cycle[-1] < 1e-3
    steps = TrainingPlan(lr=0.1, schedule="steps", epochs=4, milestones=[1, 3])
    assert [round(training.learning_rate(steps, s, 8), 6) for s in range(8)] == [0.1] * 2 + [0.01] * 4 + [0.001] * 2


def test_augmentation_moves_whole_images() -> None:
    images = torch.arange(1, 1 + 200 * 8 * 8, dtype=torch.int32).view(200, 1, 8, 8)
    draws = torch.Generator().manual_seed(0)
    moved = augmented(images, "crop", draws)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, whole in zip(moved, padded, strict=True):
        places = [(whole[:, t : t + 8, s : s + 8] == image).all() for t in range(9) for s in range(9)]
        assert any(places)
    flipped = augmented(images, "crop_flip", torch.Generator().manual_seed(1))
    turned = ((flipped[..., :-1] > flipped[..., 1:]) & (flipped[..., 1:] > 0)).any(-1).any(-1)[:, 0]
    assert 60 < int(turned.sum()) < 140, "about half are flipped, the others run upwards"
    assert augmented(images, "none", None) is images


def test_an_interruption_names_the_command_that_ran(plan, tmp_path, capsys, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "_epoch", interrupted)
    code, _, err = call(capsys, "train", plan, "--out", tmp_path / "cut")
    assert code == 130
    assert "`frostglass train` with the same arguments and --resume goes on" in err
    monkeypatch.setattr("frostglass.defenses.cost.cost_of", interrupted)
    code, _, err = call(capsys, "cost", "--private-images", "10")
    assert (code, err.strip()) == (130, "Interrupted."), "cost has nothing to resume"


def test_a_network_that_sees_magnitudes_sees_no_signs() -> None:
    rng, x = Rng.from_seed(0, "test"), torch.rand(4, 1, 8, 8) * 2 - 1
    plain, blind = (
        takes_encodings(build("small_bn_cnn", classes=3, channels=1, size=8, rng=rng).eval(), sees)
        for sees in ("pixels", "magnitudes")
    )
    assert plain.state_dict().keys() == blind.state_dict().keys()
    assert torch.equal(blind(x), blind(-x))
    assert torch.allclose(blind(x), plain(x.abs() * 2 - 1))
    assert not torch.allclose(plain(x), plain(-x))
    assert MethodPlan(kind="instahide", sees="magnitudes").takes != MethodPlan(kind="instahide").takes
