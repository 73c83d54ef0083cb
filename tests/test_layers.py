"""The layers hold, the wall holds: imports go downwards, and one module alone opens the sealed truth."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import frostglass

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(frostglass.__file__).parent
SCORING = "auditing/score.py"

LIGHT = ("frostglass.core", "frostglass.numerics", "frostglass.attacks")

IMPORT_LIGHT = """
import importlib, pkgutil, re, sys
from importlib import metadata
from importlib.machinery import PathFinder

# Distributions that may be imported: those three and what they themselves require.
allowed, waiting = set(), ["torch", "numpy", "jaxtyping"]
while waiting:
    name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
    if name in allowed:
        continue
    try:
        requires = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    allowed.add(name)
    waiting += [re.match(r"[\\w.-]+", r)[0] for r in requires if "extra ==" not in r]
provided = {
    top
    for top, makers in metadata.packages_distributions().items()
    if any(re.sub(r"[-_.]+", "-", m).lower() in allowed for m in makers)
}
visible = provided | set(sys.stdlib_module_names) | {"frostglass"}


class OnlyVisible:
    "Finds what the path finder finds, as if nothing else were installed."

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name.split(".")[0] in visible else None

    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches


sys.meta_path[:] = [OnlyVisible if finder is PathFinder else finder for finder in sys.meta_path]
for blocked in ("scipy", "pydantic", "sklearn", "PIL"):
    assert blocked not in sys.modules, blocked
    try:
        importlib.import_module(blocked)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{blocked} can be imported: this test proves nothing")

count = 0
for home in sys.argv[1:]:
    package = importlib.import_module(home)
    for module in pkgutil.walk_packages(package.__path__, home + "."):
        importlib.import_module(module.name)
        count += 1
print(count)
"""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_imports_go_downwards() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if command is None:
        pytest.skip("lint-imports is not installed; `make setup` brings it")
    done = subprocess.run([command, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_scoring_opens_the_truth() -> None:
    openers = {
        where
        for where, tree in modules()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "open_for_scoring")
        or (isinstance(node, ast.Constant) and node.value == "open_for_scoring")
    }
    assert openers <= {SCORING}, f"the sealed truth is opened outside {SCORING}"
    assert openers == {SCORING}, f"{SCORING} does not open it, so this test proves nothing: was it renamed?"


def test_attacks_need_torch_numpy_and_jaxtyping_alone() -> None:
    source = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_LIGHT, *LIGHT], env=os.environ | source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 10, "hardly any module was found"


def test_protocols_can_be_checked() -> None:
    """Shape checks leave out every function that takes a protocol which isinstance refuses."""
    bare = [
        f"{where}: {node.name}"
        for where, tree in modules()
        if where.split("/")[0] in ("core", "numerics", "attacks", "defenses")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any("Protocol" in ast.unparse(base) for base in node.bases)
        and "runtime_checkable" not in map(ast.unparse, node.decorator_list)
    ]
    assert not bare, f"decorate with @runtime_checkable: {bare}"


def test_shapes_are_checked() -> None:
    """The import hook of conftest.py works: a batch whose targets are too few is refused."""
    import torch

    from frostglass.core.batch import Batch, Domain

    with pytest.raises(Exception, match="targets"):
        Batch(images=torch.zeros(2, 3, 4, 4), targets=torch.zeros(3, 5), domain=Domain(), ids=("a", "b"))
