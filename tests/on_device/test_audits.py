"""Whole audits with every attack on updates on a device that is not the CPU: same results as there."""

from __future__ import annotations

from typing import Any

import pytest

import frostglass
import pretend_device
from frostglass.attacks.registry import ATTACKS
from frostglass.core.errors import BadInput

VICTIMS: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"hidden": [64, 32]}),
    ("small_bn_cnn", {"width": 8}),
    ("lenet", {}),
    ("imprinted", {"bins": 64, "inner_options": {"width": 8}}),
    ("resnet20", {}),
]
ON_UPDATES = [entry.name for entry in ATTACKS if entry.about.get("reads", "an update") == "an update"]
FEW = {"steps": 6, "every": 3, "rehearsals": 60, "training": 10}


def plan_of(attack: str, model: str, options: dict[str, Any], batch: int) -> dict[str, Any]:
    entry = ATTACKS[attack]
    few = {k: v for k, v in FEW.items() if k in entry.parameters}
    grants = {k.value for k in entry.make(**few).needs} | {"examples", "labels"}
    grants |= {"bn_batch"} if model in ("small_bn_cnn", "resnet20") else set()
    return {
        "seed": 0,
        "threat": {"grants": sorted(grants)} | ({"auxiliary": "digits"} if "auxiliary" in grants else {}),
        "report": {"metrics": ["psnr", "ssim", "registered_psnr", "fft2d"]},
        "scenario": [
            {
                "name": "s",
                "data": {"source": "digits"},
                "model": {"name": model, "mode": "train", "options": options},
                "client": {"batch": batch},
                "attack": [{"name": attack, **few}],
                "defense": [{"name": "none"}],
            }
        ],
    }


def cell_of(plan: dict[str, Any], device: str) -> Any:
    cell = frostglass.audit(plan, device=device).cells[0]
    assert cell.error is None, cell.error
    return cell


def fitting(attack: str) -> tuple[dict[str, Any], Any]:
    """(a plan with the first network that this attack accepts, its cell on the CPU)."""
    refused = []
    for model, options in VICTIMS:
        for batch in (2, 1):
            plan = plan_of(attack, model, options, batch)
            try:
                return plan, cell_of(plan, "cpu")
            except (BadInput, AssertionError) as wrong:
                refused.append(f"{model}, {batch} images: {wrong}")
    raise AssertionError(f"{attack}: {refused}")


@pytest.mark.parametrize("attack", ON_UPDATES)
def test_an_attack_finds_there_what_it_finds_here(attack: str) -> None:
    plan, here = fitting(attack)
    pretend_device.waits.clear()
    there = cell_of(plan, "auto")
    assert pretend_device.waits, "nothing was on the device"
    assert there.summary.images == here.summary.images
    assert there.summary.psnr_median == pytest.approx(here.summary.psnr_median, abs=0.5)
