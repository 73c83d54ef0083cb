"""A deployment of real processes: TLS, registered keys, what is refused, what breaks, and that nothing is left behind.

The app is three numbers and does not import torch; the last test runs the example with Frostglass's own apps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'frostglass[flower]' brings it")
pytest.importorskip("psutil", reason="psutil is not installed; pip install 'frostglass[flower]' brings it")

import psutil

from frostglass.core.errors import BadInput
from frostglass.federated.flower.deployment import Deployment, submit
from frostglass.federated.flower.deployment_certificates import issue, node_key
from frostglass.federated.flower.deployment_processes import MARK, DeploymentFailed, WaitClock, last_line
from frostglass.federated.recorded import read_record

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower_deployment"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("flower_deployment")]

DESCRIPTION = """
[project]
name = "tinyfed"
version = "0.1.0"
description = "three numbers"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42"]
[tool.flwr.app]
publisher = "local"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "tinyfed.apps:server"
clientapp = "tinyfed.apps:client"
[tool.flwr.app.config]
plan = ""
"""

APPS = """
import json, os, pathlib, time
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    plan, part = json.loads(context.run_config["plan"]), int(context.node_config["partition-id"])
    pathlib.Path(plan["out"] + f".task-{part}").write_text(str(os.getpid()))
    time.sleep(plan.get("seconds", 0))
    (x,) = message.content["arrays"].to_numpy_ndarrays()
    record = RecordDict({"arrays": ArrayRecord([x + part + 1]), "metrics": MetricRecord({"num-examples": 1})})
    return Message(record, reply_to=message)

@server.main()
def main(grid, context):
    plan = json.loads(context.run_config["plan"])
    least = plan.get("least", 3)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=least, min_available_nodes=least)
    found = strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=plan["rounds"])
    pathlib.Path(plan["out"]).write_text(json.dumps(found.arrays.to_numpy_ndarrays()[0].tolist()))
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    (folder / "tinyfed").mkdir()
    (folder / "pyproject.toml").write_text(DESCRIPTION)
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (folder / "tinyfed" / "__init__.py").touch()
    (folder / "tinyfed" / "apps.py").write_text(APPS)
    return folder


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Three nodes, with certificates that were made elsewhere; afterwards not one process is left."""
    made = tmp_path_factory.mktemp("deployment")
    with Deployment(made / "work", nodes=3, certificates=issue(made / "given")) as running:
        yield running
    assert running.processes.alive() == []


def ended(running: Deployment, *names: str) -> list[int | None]:
    clock = WaitClock(90, 0.3)
    while clock.tick():
        found = [running.processes.ended(name) for name in names]
        if None not in found:
            return found
    raise AssertionError(f"{names} are still running")


def test_processes_work_in_the_private_folder_without_telemetry(deployment: Deployment) -> None:
    assert deployment.folder.stat().st_mode & 0o077 == 0
    processes = deployment.processes.alive()
    assert len(processes) >= 8, "a SuperLink, three SuperNodes, and a SuperExec of each"
    for process in processes:
        environment = process.environ()
        assert environment["FLWR_TELEMETRY_ENABLED"] == environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert Path(environment["FLWR_HOME"]).parent == deployment.folder
        assert "--insecure" not in process.cmdline()


def test_intruders_are_refused(deployment: Deployment, tmp_path: Path) -> None:
    """A node whose key nobody registered, and one that trusts another authority."""
    node_key(tmp_path / "intruder.key")
    other = issue(tmp_path / "other")
    deployment.start_node(0, key=tmp_path / "intruder.key", name="intruder")
    deployment.start_node(0, root=other.root, name="stranger")
    assert all(ended(deployment, "intruder", "stranger")), "both end with an error"
    assert "Failed to activate SuperNode" in last_line(deployment.processes.log("intruder"))
    assert "certificate verify failed" in last_line(deployment.processes.log("stranger")).lower()
    assert deployment.online() == 3


def test_submitting_trusts_no_other_authority(deployment: Deployment, tmp_path: Path) -> None:
    other = issue(tmp_path / "other")
    with pytest.raises(BadInput) as wrong:
        submit("", address=deployment.address, root_certificates=other.root)
    (problem,) = wrong.value.problems
    assert "is not certified by" in problem
    assert str(other.root) in problem


def test_federate_hands_its_plan_to_the_superlink(deployment: Deployment, tmp_path: Path) -> None:
    """The command, with Frostglass's own apps: two rounds under TLS with three registered nodes."""
    assert deployment.online() == 3
    out = tmp_path / "run"
    words = ["--engine", "deployment", "--superlink", deployment.address, "--set", "server.rounds=2", "--out", str(out)]
    root = str(deployment.certificates.root)
    told = called(
        "-m", "frostglass", "federate", str(EXAMPLE / "few-images.toml"), *words, "--root-certificates", root, limit=200
    )
    assert "2 rounds on deployment" in told
    assert recorded(out) == [(r, c) for r in (1, 2) for c in ("0", "1", "2")]


def recorded(run: Path) -> list[tuple[int, str]]:
    """Round and client of every update, all of them whole."""
    record = read_record(run / "recorded")
    assert not record.problems
    for update in record.updates:
        changes, _ = update.payload()
        assert changes.keys() <= update.sent().keys()
        assert any(bool(change.abs().max() > 0) for change in changes.values())
    return sorted((u.header.round, u.header.client) for u in record.updates)


def test_a_run_that_fails_says_why(deployment: Deployment, app: Path) -> None:
    with pytest.raises(DeploymentFailed, match=r"ended as failed: .*Expecting value") as wrong:
        deployment.run("no JSON", app=app, limit=120)
    assert "\n" not in str(wrong.value)


def test_a_run_that_takes_too_long_is_stopped(deployment: Deployment, app: Path, tmp_path: Path) -> None:
    plan = json.dumps({"rounds": 1, "least": 4, "out": str(tmp_path / "out.json")})
    with pytest.raises(DeploymentFailed, match=r"stopped after \d+ s, its limit; "):
        deployment.run(plan, app=app, limit=9)


def test_the_run_goes_on_without_a_node_that_dies_in_mid_round(
    deployment: Deployment, app: Path, tmp_path: Path
) -> None:
    """The SuperLink gives the node up after two missed heartbeats, a minute; then the round ends with the others."""
    out = tmp_path / "out.json"
    task = Path(f"{out}.task-2")
    killed = threading.Event()

    def kill() -> None:
        clock = WaitClock(90, 0.1)
        while clock.tick() and not killed.is_set():
            if task.exists():
                deployment.processes.kill("node-2")
                killed.set()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    plan = {"rounds": 1, "least": 2, "seconds": 4, "out": str(out), "text": 'quotes " and\nlines'}
    heard: list[str] = []
    done = deployment.run(json.dumps(plan), app=app, limit=240, on_log=heard.append)
    killer.join(10)
    assert killed.is_set()
    assert "Received 2 results and 1 failures" in done.log
    assert "".join(heard) == done.log
    assert min(done.inbound, done.outbound) > 0
    assert json.loads(out.read_text()) == pytest.approx([1.5] * 3), "the mean of what the other two added"
    assert deployment.online() == 2


def test_a_superlink_that_dies_ends_the_run_with_its_reason(deployment: Deployment, app: Path, tmp_path: Path) -> None:
    """The last test with this deployment."""
    task = Path(f"{tmp_path / 'out.json'}.task-0")

    def kill() -> None:
        clock = WaitClock(90, 0.1)
        while clock.tick():
            if task.exists():
                deployment.processes.kill("superlink")
                return

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    plan = {"rounds": 1, "least": 2, "seconds": 20, "out": str(tmp_path / "out.json")}
    with pytest.raises(DeploymentFailed, match=r"superlink (ended|has ended)"):
        deployment.run(json.dumps(plan), app=app, limit=120)
    killer.join(10)


ORPHAN = """
import sys, time
from frostglass.federated.flower.deployment import Deployment
with Deployment(sys.argv[1], nodes=1) as running:
    print(running.processes.alive()[0].environ()[sys.argv[2]], flush=True)
    time.sleep(300)
"""


def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "work"), MARK], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        token = parent.stdout.readline().strip()  # ends at the latest with the deployment's own limit
        assert token
        assert marked(token)
    finally:
        parent.kill()
        parent.wait(30)
    clock = WaitClock(60, 0.5)
    while clock.tick():
        if not marked(token):
            return
    raise AssertionError(f"left behind: {[p.cmdline() for p in marked(token)]}")


def marked(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == token:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def test_the_example_trains_records_stops_and_can_be_audited(tmp_path: Path) -> None:
    """Frostglass's own apps under TLS with the audit tap; the record holds enough to recover images exactly."""
    trial = tmp_path / "trial"
    words = ["--plan", str(EXAMPLE / "few-images.toml"), "--out", str(trial), "--rounds", "1", "--no-audit"]
    done = called(str(EXAMPLE / "run.py"), *words, "--limit", "300", limit=380)
    assert "3 SuperNodes online" in done
    assert "all processes of the deployment have ended" in done
    history = json.loads((trial / "run" / "history.json").read_text())
    assert history["engine"] == "deployment"
    assert [row["round"] for row in history["rounds"]] == [0, 1]
    assert recorded(trial / "run") == [(1, "0"), (1, "1"), (1, "2")]
    words = ["--out", str(tmp_path / "audit"), "--round", "1", "--client", "0", "--attack", "peel", "--json"]
    card = json.loads(called("-m", "frostglass", "audit-updates", str(trial / "run" / "recorded"), *words, limit=200))
    assert [image["proved"] for cell in card["cells"] for image in cell["images"]] == [True] * 8


def called(*words: str, limit: float) -> str:
    """Standard output of Python with these words, which must succeed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=limit, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
