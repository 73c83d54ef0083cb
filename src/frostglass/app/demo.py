"""The demonstration: eight photographs, four client set-ups, one report. Real runs of the real pipeline."""

from __future__ import annotations

from typing import Any

from frostglass.auditing.plan import Plan, parse_plan

STEPS = 800


def demo_plan(*, show_images: bool = True) -> Plan:
    """The plan that `frostglass demo` runs; `frostglass demo --print-plan` writes it as TOML."""
    return parse_plan(
        {
            "name": "First light: what a gradient gives away",
            "seed": 0,
            "scenario": [_mlp(), _batchnorm_cnn(), _mlp_instahide(), _groupnorm_cnn()],
            "report": {"metrics": ["psnr", "ssim"], "show_images": show_images},
        }
    )


def _photos(size: int) -> dict[str, Any]:
    return {"source": "photos", "size": size}


def _mlp() -> dict[str, Any]:
    return {
        "name": "Ordinary ReLU MLP, 8 photos",
        "data": _photos(128),
        "model": {"name": "mlp", "mode": "train"},
        "client": {"batch": 8},
        "attack": [{"name": "spear"}],
        "threat": {"grants": ["examples"]},
    }


def _batchnorm_cnn() -> dict[str, Any]:
    return {
        "name": "Small BatchNorm CNN, 4 photos",
        "data": _photos(32),
        "model": {"name": "small_bn_cnn", "mode": "train"},
        "client": {"batch": 4},
        "attack": [{"name": "thaw", "steps": STEPS}],
        "threat": {"grants": ["examples", "labels", "bn_batch"]},
    }


def _mlp_instahide() -> dict[str, Any]:
    return {
        "name": "The MLP client with InstaHide, 8 photos",
        "data": _photos(128),
        "model": {"name": "mlp", "mode": "train"},
        "client": {"batch": 8},
        "defense": [{"name": "instahide", "k": 4}],
        "attack": [{"name": "spear"}],
        "threat": {"grants": ["examples"]},
    }


def _groupnorm_cnn() -> dict[str, Any]:
    return {
        "name": "The CNN with GroupNorm, 4 photos",
        "data": _photos(32),
        "model": {"name": "small_bn_cnn", "mode": "train", "fix": "opacus"},
        "client": {"batch": 4},
        "defense": [{"name": "none"}, {"name": "dp_sgd", "clipping_norm": 1.0, "noise_multiplier": 1.0}],
        "attack": [{"name": "thaw", "steps": STEPS}],
        "threat": {"grants": ["examples", "labels"]},
    }
