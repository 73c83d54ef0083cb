"""Flower missing, of another version, or with its telemetry on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from frostglass.app.cli import main
from frostglass.core.errors import BadInput

pytest.importorskip("flwr")

from frostglass.federated.flower import availability

PLAN = "name = 'x'\n[data]\nlimit = 60\n[model]\noptions = { width = 4 }\n"


def test_a_missing_flower_is_one_sentence(tmp_path, monkeypatch, capsys) -> None:
    for name in [m for m in sys.modules if m == "flwr" or m.startswith(("flwr.", "frostglass.federated.flower"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    (tmp_path / "plan.toml").write_text(PLAN)
    with pytest.raises(SystemExit) as ended:
        main(["federate", str(tmp_path / "plan.toml"), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "pip install 'frostglass[flower]'" in err
    assert not (tmp_path / "run").exists()


def test_another_version_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(availability.metadata, "version", lambda name: "1.42.0")
    with pytest.raises(BadInput, match=r"flwr 1\.42\.0 is installed and this works with 1\.41"):
        availability.require_flower()


def test_a_missing_ray_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match="use --engine local"):
        availability.require_ray()


@pytest.mark.parametrize("first", ["import flwr.app", "import flwr.supercore.telemetry", "pass"])
def test_telemetry_is_off_whoever_imports_first(first) -> None:
    code = (
        f"{first}\nimport frostglass.federated.flower\nfrom flwr.supercore import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED)"
    )
    env = os.environ | {"FLWR_TELEMETRY_ENABLED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
