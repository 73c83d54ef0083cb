"""Generators on a device that is not the CPU: fitted, searched through, brought by a user."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import frostglass
import pretend_device
from frostglass.app.cli import main
from frostglass.core.randomness import Rng
from frostglass.vision import datasets
from frostglass.vision.generator_fitting import FitSettings, fit
from frostglass.vision.generators import load_generator, save_generator

FEW = FitSettings(latent=6, width=4, steps=4, batch=8)


class Grey(nn.Module):
    """A generator of a user's, with a buffer and without parameters."""

    latent_shape = (1, 4, 4)
    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.tensor(0.5))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z - self.level)


def grey() -> nn.Module:
    return Grey()


def test_a_generator_is_fitted_alike(tmp_path: Path) -> None:
    photos = datasets.load("photos", size=16).images
    here, there = (fit(photos, FEW, Rng.from_seed(0), device=d) for d in (torch.device("cpu"), pretend_device.DEVICE))
    assert there.psnr == pytest.approx(here.psnr, abs=1e-3)
    assert there.rate == pytest.approx(here.rate, rel=1e-3)
    kept, latents = load_generator(save_generator(there.decoder, tmp_path / "g.safetensors")), torch.randn(3, 6)
    assert torch.allclose(kept(latents), here.decoder(latents), atol=0.02)


def test_the_command_fits_and_the_audit_reads_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, image in enumerate(datasets.load("photos", size=16).images[:24]):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
    file = tmp_path / "g.safetensors"
    given = [tmp_path / "images", "--out", file, "--size", 16, "--steps", 4, "--batch", 8, "--width", 4, "--latent", 6]
    pretend_device.waits.clear()
    with pytest.raises(SystemExit) as ended:
        main(["fit-generator", *map(str, given)])
    assert not ended.value.code, capsys.readouterr().err
    assert pretend_device.waits, "nothing was on the device"
    same_on_both({"generator": str(file), "seeds": 2})  # of another size and colour than the audited images


def same_on_both(settings: dict[str, Any]) -> None:
    """`latent_projection` ends alike on both devices."""
    plan = {
        "seed": 0,
        "threat": {"grants": ["examples"]},
        "report": {"null": False},
        "scenario": [
            {
                "name": "s",
                "data": {"source": "digits"},
                "model": {"name": "mlp", "options": {"hidden": [16]}},
                "client": {"batch": 2},
                "attack": [{"name": "latent_projection", "steps": 4, "every": 2, "width": 4, **settings}],
                "defense": [{"name": "none"}],
            }
        ],
    }
    found = []
    for device in ("cpu", "auto"):
        cell = frostglass.audit(plan, device=device).cells[0]
        assert cell.error is None, cell.error
        found.append((cell.objective, cell.summary.psnr_median))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_an_untrained_network_draws_alike() -> None:
    same_on_both({})


def test_a_generator_of_the_users_own_draws_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brought_generator", sys.modules[__name__])
    same_on_both({"generator": "brought_generator:grey"})
