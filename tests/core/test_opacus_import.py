"""Opacus sets up the root logger when it is imported; a program that uses Frostglass sets up its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import logging
from frostglass.{module} import {name}
{name}({arguments})
import opacus
root = logging.getLogger()
assert root.handlers == [], root.handlers
logging.basicConfig(filename="own.log")
assert len(root.handlers) == 1
"""


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("guarantees.accounting", "accounted_epsilon", "1.0, steps=1"),
        ("defenses.accounting", "epsilon_of", "1.0, 1e-5, 1"),
        ("vision.networks", "fix_for_opacus", "__import__('torch').nn.Linear(2, 2)"),
    ],
)
def test_a_program_sets_up_its_own_logging_afterwards(tmp_path: Path, module: str, name: str, arguments: str) -> None:
    script = SCRIPT.format(module=module, name=name, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
