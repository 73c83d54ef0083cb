"""Training, sweeps, the demonstration and audits of a user's own network, on a device."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import frostglass
import pretend_device
from frostglass.app import demo
from frostglass.app.cli import cli, main
from frostglass.core.randomness import Rng
from frostglass.federated import training
from frostglass.federated.feeds import augmented
from frostglass.vision.networks import build

pytestmark = [
    pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TensorBoard's imports
]

THERE = pretend_device.DEVICE
PLAN = """
[data]
limit = 96
test_limit = 40
[model]
options = { width = 4 }
[training]
epochs = 2
batch = 32
augmentation = "crop_flip"
[evaluation]
encodings = [2, 3]
"""
METHODS = """
[[method]]
kind = "plain"
[[method]]
kind = "mixup"
k = 2
insecure_seed = 1
[[method]]
kind = "instahide"
augment = "per_use"
sees = "magnitudes"
insecure_seed = 1
[[method]]
name = "cross"
kind = "instahide"
public = "pool"
rounds = 1
reuse = true
insecure_seed = 1
"""


def called(*arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert not ended.value.code
    return ""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    sizes = ("--size", 8, "--cut", 8, "--channels", 1, "--key-points", -1, "--crops", 20)
    called("public-pool", "digits", tmp_path / "pool", *sizes)
    path = tmp_path / "plan.toml"
    path.write_text(PLAN + METHODS)
    return path


def losses(run: Path) -> dict[str, list[float]]:
    """{run of the plan: losses by epoch}."""
    found = {}
    for log in sorted(run.glob("*/log.csv")):
        with log.open(newline="") as held:
            found[log.parent.name] = [float(row["loss"]) for row in csv.DictReader(held)]
    return found


def test_every_method_is_trained_there_as_here(plan: Path, tmp_path: Path) -> None:
    for name, device in (("here", "cpu"), ("there", "auto")):
        torch.manual_seed(0)  # of augmentations
        called("train", plan, "--out", tmp_path / name, "--device", device)
    here, there = losses(tmp_path / "here"), losses(tmp_path / "there")
    assert len(there) == 4
    for name, values in here.items():
        assert there[name] == pytest.approx(values, rel=1e-3), name
    held = json.loads((tmp_path / "there" / "results.json").read_text())
    assert held["device"].startswith("pretend")
    assert all(len(r["encoded"]) == (0 if r["method"] == "plain" else 2) for r in held["results"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["plain", "instahide"])
def test_a_killed_run_goes_on_there(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(f'{PLAN}[[method]]\nkind = "{method}"\n')
    called("train", plan, "--out", tmp_path / "straight")
    real = training.Run._epoch

    def epoch(self: training.Run, number: int) -> dict[str, float]:
        if number == 1:
            raise Killed
        return real(self, number)

    monkeypatch.setattr(training.Run, "_epoch", epoch)
    with pytest.raises(Killed):
        main(["train", str(plan), "--out", str(tmp_path / "cut")])
    monkeypatch.undo()
    called("train", plan, "--out", tmp_path / "cut", "--resume")
    (straight,), (cut,) = (losses(tmp_path / name).values() for name in ("straight", "cut"))
    assert len(cut) == len(straight) == 2
    if method == "plain":  # encodings have keys of their own
        assert cut == straight


def test_an_epoch_waits_for_the_device_once_and_not_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: dict[int, int] = {}
    real = training.Run._epoch

    def epoch(self: training.Run, number: int) -> dict[str, float]:
        pretend_device.waits.clear()
        found = real(self, number)
        counted[self.plan.training.batch] = len(pretend_device.waits)
        return found

    monkeypatch.setattr(training.Run, "_epoch", epoch)
    for batch in (8, 48):
        plan = tmp_path / f"{batch}.toml"
        plan.write_text(f'{PLAN}[[method]]\nkind = "plain"\n')
        sets = ("--set", f"training.batch={batch}", "--set", "training.epochs=1")
        called("train", plan, "--out", tmp_path / str(batch), *sets)
    assert counted[8] == counted[48]


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_images_are_augmented_where_they_lie(kind: str) -> None:
    images = Rng.from_seed(0).uniform((30, 1, 8, 8))
    got, want = (augmented(x, kind, torch.Generator().manual_seed(2)) for x in (images.to(THERE), images))
    assert got.device == THERE
    assert torch.equal(got.cpu(), want)


def test_a_sweep_there(tmp_path: Path) -> None:
    plan = tmp_path / "sweep.toml"
    plan.write_text("""
trials = 2
model = { name = "mlp", options = { hidden = [16] } }
client = { batch = 4 }
threat = { grants = ["examples", "gallery", "defence"], gallery = 4 }
training = { rounds = 2, clients = 2, seeds = [0] }
[[vary]]
name = "nothing"
[[vary]]
defense = { name = "pruning" }
knob = "fraction"
values = [0.5]
[[vary]]
defense = { name = "instahide", k = 2 }
""")
    rows = []
    for device in ("cpu", "auto"):
        out = tmp_path / device
        done = CliRunner().invoke(cli, ["sweep", str(plan), "--out", str(out), "--device", device])
        assert done.exit_code == 0, done.output
        rows.append(json.loads((out / "sweep.json").read_text())["points"])
    for here, there in zip(*rows, strict=True):
        assert there["successes"] == here["successes"]
        assert there["accuracy"] == pytest.approx(here["accuracy"], abs=0.01)


def test_the_demonstration_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STEPS", 2)
    called("demo", "--out", tmp_path / "demo")
    assert (tmp_path / "demo" / "scorecard.json").is_file()


# ---- a user's own network and images


class MakesItsOwn(nn.Module):
    """Makes tensors in `forward`, beside its input or its weights, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)
        self.register_buffer("scale", torch.full((64,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(64, device=x.device, dtype=x.dtype) / 64
        drawn = torch.linspace(0, 1, 64).to(self.layer.weight)
        return self.head(torch.relu(self.layer(x.flatten(1) * self.scale + place + drawn)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return MakesItsOwn()


def photos() -> Tensor:
    return Rng.from_seed(5).uniform((3, 1, 8, 8))


HERE = torch.device("cpu")
SPEAR, THAW = {"name": "spear"}, {"name": "thaw", "steps": 3}


@pytest.mark.parametrize(
    ("model", "images", "device", "attack"),
    [
        (THERE, THERE, "auto", SPEAR),
        (THERE, THERE, "auto", THAW),
        (THERE, HERE, "auto", SPEAR),
        (HERE, THERE, "auto", THAW),
        (HERE, HERE, "auto", SPEAR),
        (THERE, THERE, "cpu", SPEAR),
        (THERE, HERE, "cpu", THAW),
    ],
)
def test_a_users_network_and_images_wherever_they_lie(
    model: torch.device, images: torch.device, device: str, attack: dict[str, Any]
) -> None:
    own, held, labels = network().to(model), photos().to(images), torch.arange(3).to(images)
    found = frostglass.audit(model=own, images=held, labels=labels, attacks=attack, device=device).cells[0]
    assert found.error is None
    want = frostglass.audit(
        model=network(), images=photos(), labels=torch.arange(3), attacks=attack, device="cpu"
    ).cells[0]
    assert found.summary.psnr_median == pytest.approx(want.summary.psnr_median, abs=0.5)
    assert next(own.parameters()).device == model, "the user's network was moved"
    assert held.device == images


def test_a_users_network_with_batch_norm_there() -> None:
    own = build("small_bn_cnn", classes=4, channels=1, size=8, options={"width": 4}, rng=Rng.from_seed(0)).to(THERE)
    held = Rng.from_seed(5).uniform((3, 1, 8, 8)).to(THERE)
    grants = ["examples", "labels", "bn_batch", "bn_running"]
    cell = frostglass.audit(
        model=own, images=held, labels=[0, 1, 2], attacks={"name": "thaw", "steps": 3}, grants=grants,
        defenses=["none", {"name": "pruning", "fraction": 0.5}],
    ).cells  # fmt: skip
    assert [c.error for c in cell] == [None, None]
