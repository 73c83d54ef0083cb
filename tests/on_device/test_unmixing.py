"""Attacks on encodings on a device that is not the CPU: same results as there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import frostglass
import pretend_device
from encoded_scenes import crops, observed, scene
from frostglass.app.cli import main
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.store import CheckpointStore
from frostglass.auditing.unmixing_rounds import simulate_rounds
from frostglass.core.drive import Attack, drive
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import EncodingMessage, Observation
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.similarity_network import save_network
from frostglass.numerics.similarity_network_fit import FitSettings, Fitted, fit
from frostglass.vision import networks

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

KEY = Rng.from_seed(3, "on device")
HERE, THERE = Runtime(KEY), Runtime(KEY, pretend_device.DEVICE)
NAMES = [e.name for e in ATTACKS if e.about.get("reads", "an update") != "an update"]
COMPUTES_THERE = {"mixup_attack", "unmix_statistical", "unmix_learned", "gradient_then_unmix"}
"""The others search on processors, or have next to nothing to compute."""


def fitted(device: torch.device) -> Fitted:
    settings = FitSettings(steps=3, batch=8, width=4, features=8)
    return fit(crops(8) * 2 - 1, MixLaw(2, 2), settings, Rng.from_seed(0), device=device)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "similarity.safetensors"
    save_network(fitted(torch.device("cpu")).network, path)
    return str(path)


def made(name: str, network: str) -> Attack[Any]:
    entry = ATTACKS[name]
    few = {"rounds": 2, "starts": 2, "last": 1 << 9, "network": network, "batch": 2, "messages": 6}
    return entry.make(**{k: v for k, v in few.items() if k in entry.parameters})


def watched(name: str, mask: str = "none") -> Observation:
    """Encodings that this attack takes."""
    if ATTACKS[name].about["reads"] == "rounds":
        model = networks.build("mlp", classes=3, channels=3, size=8, options={"hidden": (96, 32)}, rng=Rng.from_seed(1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrivacyCaution)
            encoder = InstaHide(k=2, labels="exact", insecure_seed=2)
        labels = torch.tensor([0, 1, 2, 0])
        return simulate_rounds(
            encoder, model, crops(8, 4), labels, classes=3, rounds=3, batch=2, rng=Rng.from_seed(4)
        ).seen
    if name == "mixup_attack":
        return scene(k=3, private=2, mask=mask, rounds=4, grant_pool=True).seen
    if name == "averaging":
        message = scene(k=3, private=1, rounds=5).seen.messages[0]
        assert isinstance(message, EncodingMessage)
        groups = [torch.arange(i, 30, 6) for i in range(6)]
        return observed(message.images, message.targets, 6, None, None, groups, crops()[20:])
    return scene(images=4, rounds=12, side=8).seen


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_finds_there_what_it_finds_here(name: str, network: str) -> None:
    seen = watched(name)
    here = drive(made(name, network), seen, HERE)
    pretend_device.waits.clear()
    there = drive(made(name, network), seen, THERE)
    assert bool(pretend_device.waits) == (name in COMPUTES_THERE)
    assert there.info == here.info
    assert torch.allclose(there.images, here.images, atol=1e-4)
    assert len(here.images) > 0


def test_partners_under_a_mask_are_named_alike() -> None:
    seen = watched("mixup_attack", mask="sign")
    one, other = (drive(ATTACKS["mixup_attack"].make(), seen, run).info for run in (HERE, THERE))
    assert one == other


@pytest.mark.parametrize("name", ["unmix_statistical", "gradient_then_unmix"])
def test_killed_at_every_checkpoint_it_ends_as_if_it_had_not_been(name: str, network: str, tmp_path: Path) -> None:
    seen = watched(name)
    whole = drive(made(name, network), seen, THERE)
    store = CheckpointStore(tmp_path / "c.safetensors", pretend_device.DEVICE)

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if event.kind == "checkpoint":
            raise Killed

    killed = 0
    while True:
        try:
            resumed = drive(made(name, network), seen, THERE, emit=kill, store=store, save_every=1)
            break
        except Killed:
            killed += 1
            assert killed < 50
    assert killed > 1
    assert torch.equal(resumed.images, whole.images)


def test_a_set_is_scored_alike(tmp_path: Path) -> None:
    shown = scene(images=4, rounds=12, classes=2, side=16)
    (message,) = shown.seen.messages
    assert isinstance(message, EncodingMessage)
    cards = {}
    for device in ("cpu", "auto"):
        report = frostglass.unmix(
            message.images, targets=message.targets, truth=shown.images, known={"images": 4, "k": 2, "private": 2},
            attacks=[{"name": "unmix_statistical", "rounds": 3}, "demask", {"name": "prng_attack", "last": 512}],
            out=tmp_path / device, device=device,
        )  # fmt: skip
        assert not report.scorecard.failed
        cards[device] = [(c.attack, c.info, [i.model_dump() for i in c.images]) for c in report.scorecard.cells]
        assert (tmp_path / device / "decryption.npy").exists()
    assert cards["auto"] == cards["cpu"]


def test_a_similarity_network_is_fitted_alike() -> None:
    here, there = (fitted(run.device) for run in (HERE, THERE))
    assert there.loss == pytest.approx(here.loss, abs=1e-4)
    assert there.auc == pytest.approx(here.auc, abs=0.02)
    for one, other in zip(here.network.state_dict().values(), there.network.state_dict().values(), strict=True):
        assert other.device.type == "cpu"
        assert torch.allclose(one.float(), other.float(), atol=1e-4)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    return out


def test_a_challenge_is_made_attacked_with_a_fitted_network_and_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, challenge, network = tmp_path / "images", tmp_path / "challenge", tmp_path / "n.safetensors"
    for i, image in enumerate((crops(16) * 255).round().to(torch.uint8)):
        place = images / str(i % 3)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:02d}.png")
    call(capsys, "challenge", "make", images, challenge, "--private-images", 6, "--rounds", 20, "--k", 2, "--private",
         2, "--size", 16, "--insecure-seed", 2)  # fmt: skip
    told = call(capsys, "fit-similarity", images, "--out", network, "--k", 2, "--private", 2, "--size", 16, "--steps",
                3, "--batch", 8, "--width", 4)  # fmt: skip
    assert "AUC" in told
    assert all(bool(t.isfinite().all()) for t in load_file(network).values())
    attack = f"unmix_learned:network={network},statistical=1.0,rounds=6"
    call(capsys, "unmix", challenge, "--out", tmp_path / "out", "--attack", attack)
    scores = json.loads(call(capsys, "challenge", "score", challenge, tmp_path / "out", "--either-sign", "--json"))
    assert scores["Max_SSIM"] > 0.9
