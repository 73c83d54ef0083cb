"""Names and parameters: what is wrong is said with the word that was probably meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from frostglass.core import registry
from frostglass.core.drive import Attack
from frostglass.core.errors import AttackFailed, BadInput, close_match
from frostglass.core.registry import Registry

THINGS: Registry[dict[str, Any]] = Registry("thing")


@THINGS.register(paper="A. Author 2020", family="x")
def widget(
    *,
    steps: int = 3,
    lr: float = 0.1,
    kind: Literal["a", "b", 1] = "a",
    sizes: Sequence[int] = (1,),
    limit: int | None = None,
    fast: bool = False,
    needed: str,
) -> dict[str, Any]:
    """Makes a widget.

    More of it.
    """
    return {"steps": steps, "needed": needed}


def problems(**settings: Any) -> list[str]:
    return THINGS["widget"].problems({"needed": "x"} | settings, "here")


def test_an_entry_knows_its_summary_source_and_parameters() -> None:
    entry = THINGS["widget"]
    assert (entry.summary, entry.paper, entry.about) == ("Makes a widget", "A. Author 2020", {"family": "x"})
    assert next(iter(entry.parameters)) == "steps"
    assert THINGS.names() == ["widget"]
    assert "widget" in THINGS
    assert "other" not in THINGS


def test_a_maker_checks_what_it_is_given_as_a_plan_does() -> None:
    assert THINGS["widget"].make(needed="x", steps=5) == {"steps": 5, "needed": "x"}
    with pytest.raises(BadInput, match=r"thing 'widget'\.steps: '5' is not a whole number"):
        THINGS["widget"].make(needed="x", steps="5")
    with pytest.raises(BadInput, match="did you mean 'steps'"):
        THINGS["widget"].make(needed="x", stepps=5)
    with pytest.raises(BadInput, match="needed: missing"):
        THINGS["widget"].make()


def test_a_maker_that_returns_something_else_is_told_what_it_must_return() -> None:
    attacks: Registry[Any] = Registry("attack", makes=Attack)
    attacks.register("silent")(lambda: None)
    attacks.register("bare")(lambda: SimpleNamespace(name="bare"))
    with pytest.raises(BadInput, match=r"attack 'silent': its function returned NoneType; it must return Attack\.$"):
        attacks["silent"].make()
    with pytest.raises(BadInput, match="must return Attack, and that has no 'needs'"):
        attacks["bare"].make()


@pytest.mark.parametrize(
    "good",
    [
        {"steps": 1, "lr": 1, "kind": "b", "sizes": [1, 2], "limit": 4, "fast": True},
        {"lr": 1e-9, "kind": 1, "sizes": (), "limit": None},
    ],
)
def test_what_fits_is_taken(good: dict[str, Any]) -> None:
    assert problems(**good) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 1.0},
        {"steps": True},
        {"steps": "1"},
        {"lr": "0.1"},
        {"lr": True},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"kind": "c"},
        {"kind": True},
        {"kind": []},
        {"sizes": 3},
        {"sizes": ["a"]},
        {"limit": 1.5},
        {"fast": 1},
    ],
)
def test_a_wrong_type_is_one_sentence(wrong: dict[str, Any]) -> None:
    (found,) = problems(**wrong)
    (key,) = wrong
    assert found.startswith(f"here.{key}: {wrong[key]!r} is not ")
    assert found.endswith("which 'widget' takes there.")


def test_all_problems_of_an_entry_come_together() -> None:
    found = THINGS["widget"].problems({"step": 1, "lr": "x"}, "attack")
    assert found == [
        "attack.step: unknown parameter of 'widget'; did you mean 'steps'.",
        "attack.lr: 'x' is not a number, which 'widget' takes there.",
        "attack.needed: missing; 'widget' needs it.",
    ]


def test_an_unknown_name_is_told_the_close_one() -> None:
    with pytest.raises(BadInput, match="thing: 'wigdet' is not known; did you mean 'widget'"):
        THINGS["wigdet"]
    assert close_match("zzz", ["a", "b"]) == "known: a, b"
    assert close_match("zzz", []) == "known: none"


def test_two_makers_of_one_name_are_refused() -> None:
    def other() -> int:
        return 1

    other.__module__ = "elsewhere"
    with pytest.raises(ValueError, match="two things are called 'widget'"):
        THINGS.register("widget")(other)


def test_bad_input_holds_all_its_sentences() -> None:
    assert BadInput("one").problems == ("one",)
    assert str(BadInput(["one", "two"])) == "one\ntwo"
    assert not issubclass(AttackFailed, BadInput)


SLOW: Registry[int] = Registry("slow thing", "slow_home")
BROKEN: Registry[int] = Registry("broken thing", "broken_home")
INSIDE, GO_ON = threading.Event(), threading.Event()


def home(folder: Path, name: str, modules: dict[str, str]) -> None:
    (folder / name).mkdir()
    for module, text in ({"__init__": ""} | modules).items():
        (folder / name / f"{module}.py").write_text(text)


def test_a_thread_that_asks_during_the_scan_of_another_gets_all_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = f"from {__name__} import GO_ON, INSIDE, SLOW\n"
    waits = "INSIDE.set()\nassert GO_ON.wait(60)\n"
    entry = "@SLOW.register()\ndef {}() -> int:\n    return 1\n"
    home(tmp_path, "slow_home", {"a": head + entry.format("one") + waits, "b": head + entry.format("two")})
    monkeypatch.syspath_prepend(tmp_path)
    found: list[list[str]] = []
    first, second = (threading.Thread(target=lambda: found.append(SLOW.names())) for _ in range(2))
    first.start()
    assert INSIDE.wait(60)
    second.start()
    second.join(0.2)  # time enough for a wrong answer; the right one comes only once the first may go on
    GO_ON.set()
    first.join()
    second.join()
    assert found == [["one", "two"]] * 2


def test_a_file_that_cannot_be_imported_is_an_error_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home(tmp_path, "broken_home", {"a": "raise ImportError('no such library')\n"})
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(ImportError, match="no such library"):
            BROKEN.names()


@pytest.fixture
def installed(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Installs a package that names a module as a plug-in; returns the surroundings in which it is seen."""

    def install(source: str, value: str = "others_attacks") -> dict[str, str]:
        about = tmp_path / "others_attacks-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: others-attacks\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[frostglass.plugins]\nmine = {value}\n")
        (tmp_path / "others_attacks.py").write_text(source)
        paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
        return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    return install


def frostglass(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "frostglass", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


PLUGIN = """
from frostglass.attacks.recipes.dlg import dlg
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.metrics.registry import METRICS, Metric

@ATTACKS.register(family="inversion")
def others_attack(*, steps: int = 3):
    \"\"\"An attack of another package.\"\"\"
    return dlg(steps=steps)

@METRICS.register()
def others_metric():
    \"\"\"A score of another package.\"\"\"
    return Metric("others_metric", lambda found, truth: (found - truth).abs().amax((1, 2, 3)), higher_is_closer=False)
"""


@pytest.mark.slow
def test_a_package_of_somebody_else_brings_an_attack_and_a_metric_to_the_command_line(installed, tmp_path) -> None:
    env = installed(PLUGIN)
    listed = frostglass("list", "attacks", env=env)
    assert "An attack of another package" in listed.stdout, listed.stderr
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(
        'name = "theirs"\n[[scenario]]\nname = "digits"\ndata = { source = "digits", size = 8 }\n'
        'model = { name = "mlp" }\nclient = { batch = 1 }\ndefense = [{ name = "none" }]\n'
        'attack = [{ name = "others_attack", steps = 2 }]\n[threat]\ngrants = ["examples"]\n'
        '[report]\nmetrics = ["others_metric"]\n'
    )
    done = frostglass("audit", str(plan), "--out", str(out), env=env)
    assert done.returncode == 0, done.stderr
    card = json.loads((out / "scorecard.json").read_text())
    assert {cell["attack"] for cell in card["cells"]} == {"others_attack"}
    assert "others_metric" in json.dumps(card)


def test_a_package_of_somebody_else_that_cannot_be_imported_is_named(installed) -> None:
    done = frostglass("list", "attacks", env=installed("raise ImportError('no such thing')"))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "plug-in 'mine' of others-attacks" in line
    assert "no such thing" in line


@pytest.fixture
def seen(installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs it for this process, as if no registry had been scanned."""

    def install(*words: str) -> None:
        installed(*words)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "_PLUGINS", registry._Plugins())
        monkeypatch.delitem(sys.modules, "others_attacks", raising=False)

    return install


def test_an_entry_point_that_names_no_module_is_told(seen) -> None:
    seen("", "others-attacks")
    with pytest.raises(BadInput, match="plug-in 'mine' of others-attacks: 'others-attacks' names no module"):
        Registry("thing").names()


def test_a_plugin_that_ends_the_program_is_told(seen) -> None:
    seen("raise SystemExit(0)")
    with pytest.raises(BadInput, match=r"others_attacks cannot be imported \(SystemExit: 0\)"):
        Registry("thing").names()


ASKED: Registry[int] = Registry("asked thing")


def test_a_plugin_that_asks_another_registry_and_then_fails_is_told_each_time(seen) -> None:
    seen(f"from {__name__} import ASKED\nASKED.names()\nraise ImportError('no such thing')")
    for asked in (Registry("thing"), ASKED, ASKED):
        with pytest.raises(BadInput, match="no such thing"):
            asked.names()


SHARED: Registry[int] = Registry("shared thing")
WITHIN, ASK = threading.Event(), threading.Event()


def test_a_plugin_that_asks_a_registry_that_another_thread_scans_goes_on(seen) -> None:
    seen(f"from {__name__} import ASK, SHARED, WITHIN\nWITHIN.set()\nassert ASK.wait(60)\nSHARED.names()\n")
    first, second = (threading.Thread(target=r.names, daemon=True) for r in (Registry("thing"), SHARED))
    first.start()
    assert WITHIN.wait(60)
    second.start()
    second.join(0.2)  # time enough to wait for the plug-in's import, where it does
    ASK.set()
    first.join(60)
    second.join(60)
    assert not first.is_alive()
    assert not second.is_alive()
