"""What a user gets: the wheel outside the checkout, README's snippets as printed, and nothing of our own machines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import frostglass

ROOT = Path(__file__).resolve().parents[1]

SNIPPET = re.compile(
    r"^<!-- test(?:: (?P<write>\S+))? -->\n+```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
INSIDE = re.compile(rb"(?<![\w.~-])/(?:work|root|home)/")
ADDRESS = re.compile(r"\b(?:https?|file)://[^\s\"'`<>)\]]*", re.IGNORECASE)
PUBLIC_REGISTRIES = {"pypi.org", "files.pythonhosted.org", "download.pytorch.org"}

pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path, limit: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FROSTGLASS_DATA")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling is not installed; `make setup` brings it")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents alone; its dependencies come from the running environment."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "frostglass/py.typed" in names
    assert {n.split("/")[0] for n in names} == {"frostglass", f"frostglass-{frostglass.__version__}.dist-info"}
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(n.endswith("licenses/NOTICE") for n in names)
    assert not [n for n in names if "test" in Path(n).name or n.endswith((".pyc", ".orig"))]
    source = ROOT / "src"
    ours = {
        path.relative_to(source).as_posix()
        for path in (source / "frostglass").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert ours <= names, f"left out of the wheel: {sorted(ours - names)}"
    assert any(n.startswith("frostglass/auditing/templates/") for n in names), "the report's template is missing"


def test_installed_wheel_is_used_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    says = "import frostglass, pathlib; print(pathlib.Path(frostglass.__file__).parent.parent)"
    done = run(sys.executable, "-c", says, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(done.stdout.strip()).resolve() == installed.resolve()
    done = run(sys.executable, "-m", "frostglass", "--version", cwd=tmp_path, PYTHONPATH=str(installed))
    assert frostglass.__version__ in done.stdout


@pytest.mark.slow
def test_installed_wheel_runs_the_demo(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run(sys.executable, "-m", "frostglass", "demo", "--out", out, cwd=tmp_path, PYTHONPATH=str(installed))
    assert (out / "report.html").stat().st_size > 10_000
    assert str(out / "report.html") in done.stdout.replace("\n", "")
    card = json.loads((out / "scorecard.json").read_text(encoding="utf-8"))
    assert card["cells"]
    assert all(cell["status"] == "done" for cell in card["cells"])


def files_of_the_repository() -> Iterator[tuple[Path, bytes]]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip(f"no git checkout here: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            yield Path(name), path.read_bytes()


def test_no_file_names_a_place_on_our_machines() -> None:
    found = [f"{name}: {INSIDE.findall(text)}" for name, text in files_of_the_repository() if INSIDE.search(text)]
    assert not found, "\n".join(found)


def test_no_file_names_a_private_registry() -> None:
    """Any address that a package installer could be pointed at is a public one."""
    found = []
    for name, content in files_of_the_repository():
        if b"\0" in content:
            continue
        for line in content.decode("utf-8", errors="replace").splitlines():
            installs = re.search(r"index[-_]url|find[-_]links|trusted[-_]host|registry|/simple\b", line)
            for address in ADDRESS.findall(line):
                parts = urlsplit(address)
                host = (parts.hostname or "").lower()
                private = host.endswith((".internal", ".local", ".lan", ".corp")) or "@" in parts.netloc
                if private or (installs and host not in PUBLIC_REGISTRIES):
                    found.append(f"{name}: {line.strip()[:200]}")
    assert not found, "\n".join(found)


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in pins), "a pin is a name and a public version"
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    own = {"frostglass", "triton"}  # CUDA builds of torch pin a Triton of their own: a second pin would be in the way
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ;]", r)[0]).lower() for r in wanted} - own
    assert names <= pinned, f"not pinned: {sorted(names - pinned)}"


def snippets() -> list[re.Match[str]]:
    readme = ROOT / "README.md"
    return list(SNIPPET.finditer(readme.read_text(encoding="utf-8"))) if readme.exists() else []


def photographs(folder: Path) -> None:
    """A few small pictures for the snippets that speak of the reader's own."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(8):
        coarse = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("bash") is None, reason="README's console snippets are for a shell, and bash is missing"
)
def test_readme_snippets_run_as_printed(tmp_path: Path) -> None:
    """In the order of the page, in one folder: `<!-- test: NAME -->` writes a file, `<!-- test -->` runs."""
    assert len(snippets()) >= 3, "README's snippets have lost their marks"
    photographs(tmp_path / "photos")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for snippet in snippets():
        text, kind = snippet["text"], snippet["kind"]
        if snippet["write"]:
            file = tmp_path / snippet["write"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        elif kind == "python":
            run(sys.executable, "-c", text, cwd=tmp_path, PATH=path)
        elif kind == "console":
            for line in text.splitlines():
                if line.startswith("$ "):
                    run("bash", "-c", line.removeprefix("$ ").split("  #")[0], cwd=tmp_path, PATH=path)
        else:
            pytest.fail(f"README marks a {kind!r} snippet as tested: only console and python can be run")
