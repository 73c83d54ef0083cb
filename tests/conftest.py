"""What every test stands on: one thread, checked shapes, repeatable examples, and where the optional images are."""

from __future__ import annotations

import os

# Before torch is imported: on a busy machine spinning OpenMP threads are 20 to 60 times slower.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import sys
import tempfile
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

CHECKED = ("frostglass.core", "frostglass.numerics", "frostglass.attacks", "frostglass.defenses")

already = sorted(name for name in sys.modules if name.startswith(CHECKED))
assert not already, f"imported before the shape checks were installed: {already}"
# Every annotated function and dataclass below these packages checks shapes and types in every test; an int may stand
# for a float. A name imported under `if TYPE_CHECKING:` is not checked, and a function whose annotations cannot be
# checked at all is left alone with a warning: tests/test_layers.py names the usual cause.
SETTINGS = "is_pep484_tower=True, warning_cls_on_decorator_exception=UserWarning"
jaxtyping.install_import_hook(list(CHECKED), f"beartype.beartype(conf=beartype.BeartypeConf({SETTINGS}))")

import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """torch's own generator starts each test alike, whatever ran before and on whichever worker."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory) -> None:
    """Reports of calls without `out` are kept in temporary folders: here in pytest's, which it clears away later."""
    tempfile.tempdir = str(tmp_path_factory.mktemp("temporary"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of optional test images; a test that asks for it skips where there is none."""
    named = os.environ.get("FROSTGLASS_DATA")
    if not named:
        pytest.skip("FROSTGLASS_DATA is not set: point it at a folder with cifar10/, imagenet-sample/ and mnist/")
    root = Path(named)
    if not root.is_dir():
        pytest.skip(f"FROSTGLASS_DATA = {named} is not a folder")
    return root
