"""Everything runs on a device that is not the CPU: the tests of tests/on_device, in processes of their own.

The pretend device (`pretend_device`) is torch's for the whole process, so it must not be where other tests run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "on_device"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("test_*.py")))
def test_on_the_pretend_device(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER / name)],
        env={**os.environ, "FROSTGLASS_PRETEND": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
