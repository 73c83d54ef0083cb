"""TF32 is off inside, and torch's settings are afterwards what they were, by whichever names they were set."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import frostglass

SETTINGS = {
    "nothing": "",
    "older names": "b.cudnn.allow_tf32 = b.cuda.matmul.allow_tf32 = True",
    "older names, off": "b.cudnn.allow_tf32 = False",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "newer names": "b.fp32_precision = 'tf32'",
    "newer names, one": "b.cudnn.conv.fp32_precision = 'ieee'",
}
SCRIPT = """
import torch
from frostglass.core.precision import full_float32

b = torch.backends
{setting}

def told():
    found = []
    for read in (lambda: b.cudnn.allow_tf32, lambda: b.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:  # names were mixed: torch refuses, before as after
            found.append(None)
    return found, b.cudnn.conv.fp32_precision, b.cudnn.rnn.fp32_precision, b.cuda.matmul.fp32_precision == "tf32"

before = told()
for _ in range(2):
    with full_float32():
        assert "tf32" not in [p.fp32_precision for p in (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul)]
    assert told() == before, (before, told())
try:
    with full_float32():
        raise KeyError
except KeyError:
    assert told() == before
"""


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings_come_back(setting: str) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT.format(setting=setting)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_audits_multiply_float32_as_it_is() -> None:
    class Watched(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            return super().forward(x)

    seen: set[tuple[bool, str]] = set()
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    model = Watched(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    frostglass.audit(model=model, images=torch.rand(2, 3, 4, 4), attacks=[{"name": "thaw", "steps": 2}], device="cpu")
    assert seen == {(False, "highest")}
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before
