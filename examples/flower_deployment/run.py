"""Starts a SuperLink and SuperNodes with TLS, trains on them, audits what they sent, and stops them all.

    python examples/flower_deployment/run.py --out trial

Leaves trial/run (history.json, model.safetensors, recorded/), trial/audit (the report) and trial/deployment (keys,
certificates, logs).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from frostglass.core.errors import FrostglassError
from frostglass.federated.federate_plan import FederatePlan, plan_of
from frostglass.federated.flower.deployment import Deployment

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """The exit status; errors are one sentence on stderr."""
    asked = _asked(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the deployment ends with this process
    try:
        plan = plan_of(asked.plan.read_text(encoding="utf-8"))
        plan.server.folder = str((asked.out / "run").resolve())
        if asked.rounds is not None:
            plan.server.rounds = asked.rounds
        train(plan, asked.out, asked.port, asked.limit)
    except FrostglassError as wrong:
        print(wrong, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; all processes of the deployment have ended", file=sys.stderr)
        return 130
    return 0 if asked.no_audit else audit(asked.out / "run" / plan.record.folder, asked.out / "audit")


def train(plan: FederatePlan, out: Path, port: int | None, limit: float) -> None:
    """Starts the deployment, runs the plan on it and stops it."""
    began = time.monotonic()
    with Deployment(out / "deployment", nodes=plan.split.clients, port=port) as deployment:
        ready = time.monotonic() - began
        print(f"SuperLink at {deployment.address}, {deployment.online()} SuperNodes online after {ready:.0f} s")
        done = deployment.run(plan.to_toml(), app=HERE, limit=limit, on_log=_told)
    print(f"run {done.run_id}: {done.seconds:.0f} s, {done.inbound / 1e6:.1f} MB received by the SuperLink")
    history = json.loads((out / "run" / "history.json").read_text(encoding="utf-8"))
    last = history["rounds"][-1]
    print(
        f"accuracy {100 * last['accuracy']:.1f} % on {history['test_images']} test images after {last['round']} rounds"
    )
    for lost in (one for row in history["rounds"] for one in row["left_out"]):
        print(f"left out: client {lost['client']}: {lost['reason']}")
    print("all processes of the deployment have ended")


def audit(recorded: Path, out: Path) -> int:
    """`frostglass audit-updates` on what was recorded; its exit status."""
    words = ["audit-updates", str(recorded), "--out", str(out)]
    print("$ frostglass", *words, flush=True)
    return subprocess.run([sys.executable, "-m", "frostglass", *words], check=False).returncode


def _told(text: str) -> None:
    """The lines that say how a round went, and what went wrong."""
    for line in text.splitlines():
        words = " ".join(line.split())
        if re.search(r"^INFO : (start:|round \d)|WARNING|ERROR", words):
            print(words.removeprefix("INFO : "), flush=True)


def _asked(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for everything")
    parser.add_argument("--plan", type=Path, default=HERE / "plan.toml", help="a federate plan")
    parser.add_argument("--rounds", type=int, help="instead of the plan's")
    parser.add_argument("--port", type=int, help="of the SuperLink; a free one if absent")
    parser.add_argument("--limit", type=float, default=1800, help="seconds until the run is stopped")
    parser.add_argument("--no-audit", action="store_true", help="train only")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
