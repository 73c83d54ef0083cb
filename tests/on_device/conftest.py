"""Runs in the process that `tests/test_on_device.py` starts, and nowhere else; "auto" is the pretend device there."""

from __future__ import annotations

import os

if not os.environ.get("FROSTGLASS_PRETEND"):
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    import pretend_device
    from frostglass.core import runtime

    _pick = runtime.pick_device

    def _pick_device(name: str) -> torch.device:
        return pretend_device.DEVICE if name == "auto" else _pick(name)

    runtime.pick_device = _pick_device  # before any module has taken it by name
