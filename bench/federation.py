"""What federation costs: the audit tap beside a round of ResNet-18, and a hundred simulated clients.

    python bench/federation.py --threads 1          (about twenty minutes; --quick for a smoke run)

The tap: three clients of torchvision's ResNet-18 at 32 pixels train two rounds on the local engine, in one process
with a record and in another without. On a busy machine two such runs differ by more than recording costs, so its cost
is taken down where it arises: the CPU time of the calls and threads that record, beside that of the whole process.
Images are noise: what a round costs does not depend on what is in them. A client has 500 images and goes through them
five times in batches of 50, as in McMahan et al. 2017 (sec. 3, CIFAR).

A hundred clients: the digits, 14 or 15 each, ten clients a round, five rounds of a small convolutional network, on the
local engine and in Flower's simulation on Ray, by `frostglass federate`; memory is the greatest sum of proportional
set sizes over the tree of processes, looked at twice a second (the sum of resident sizes, which counts shared pages
once for each process, stands beside it).
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import parser, peak_mib, save, spread

TARGETS = {"tap_share_of_round": 0.05, "hundred_clients_minutes": 10, "hundred_clients_gib": 6}

TAP = """
name = "tap"
[data]
source = "folder:{folder}"
size = 32
[split]
clients = 3
[model]
name = "torchvision:resnet18"
[client]
epochs = {epochs}
minibatch = 50
lr = 0.01
[server]
rounds = {rounds}
[record]
on = {record}
"""

HUNDRED = """
name = "a hundred clients"
[split]
clients = 100
[client]
epochs = 1
minibatch = 8
lr = 0.05
[server]
rounds = {rounds}
clients = 10
"""


def images(folder: Path, each: int) -> None:
    """Ten classes of noise."""
    from PIL import Image

    draws = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{label}/{i}.png")


def one_tap(text: str, out: Path) -> dict[str, Any]:
    """In a process of its own: seconds on the clock and of the CPU, a round, and the greatest resident size."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[3]); import federation; "
        "federation.in_process(sys.argv[1], sys.argv[2])"
    )
    plan = out / "plan.toml"
    plan.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", code, str(plan), str(out), str(Path(__file__).parent)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def in_process(plan: str, out: str) -> None:
    """Trains, and prints the times between one round's end and the next's."""
    from frostglass.federated.flower.engines import on_local
    from frostglass.federated.flower.tap import AuditTap
    from frostglass.federated.recording import Recorder

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    marks: list[tuple[float, float]] = []
    spent: list[float] = []
    for where, name in ((AuditTap, "_record"), (AuditTap, "_keep_sent"), (Recorder, "_write_all")):
        setattr(where, name, timed(getattr(where, name), spent))
    on_local(Path(plan).read_text(), Path(out), lambda line: marks.append((time.perf_counter(), time.process_time())))
    pairs = list(itertools.pairwise(marks))
    print(json.dumps({
        "clock": [b[0] - a[0] for a, b in pairs], "cpu": [b[1] - a[1] for a, b in pairs], "peak_mib": peak_mib(),
        "recording": sum(spent) / len(pairs),
    }))  # fmt: skip


def timed(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The same, noting the CPU seconds of its own thread."""

    def measured(*given: Any, **named: Any) -> Any:
        begun = time.thread_time()
        try:
            return call(*given, **named)
        finally:
            spent.append(time.thread_time() - begun)

    return measured


def tap(quick: bool) -> dict[str, Any]:
    rounds, each, epochs = (1, 6, 1) if quick else (2, 188, 5)
    with tempfile.TemporaryDirectory() as root:
        images(Path(root) / "images", each)
        got = {}
        for record in ("false", "true"):
            out = Path(root) / record
            out.mkdir()
            got[record] = one_tap(
                TAP.format(folder=Path(root) / "images", rounds=rounds, epochs=epochs, record=record), out
            )
            print(f"  record = {record}: {got[record]}", file=sys.stderr)
        size = sum(f.stat().st_size for f in (Path(root) / "true" / "recorded").rglob("*.safetensors"))
    recording = got["true"]["recording"]
    training = statistics.median(got["true"]["cpu"]) - recording
    return {
        "case": "audit tap, ResNet-18 at 32 pixels, 3 clients a round", "images per client": 8 * each // 3,
        "passes": epochs,
        "seconds a round without": spread(got["false"]["clock"]), "seconds a round with": spread(got["true"]["clock"]),
        "cpu seconds without": spread(got["false"]["cpu"]), "cpu seconds with": spread(got["true"]["cpu"]),
        "cpu seconds of recording": round(recording, 3), "share of a round": round(recording / training, 4),
        "share of a round of one pass": round(recording / training * epochs, 4),
        "peak MiB without": got["false"]["peak_mib"], "peak MiB with": got["true"]["peak_mib"],
        "recorded MiB": size // 2**20,
    }  # fmt: skip


def hundred(engine: str, quick: bool) -> dict[str, Any]:
    """The command itself, watched from outside."""
    with tempfile.TemporaryDirectory() as root:
        plan, out = Path(root) / "plan.toml", Path(root) / "run"
        plan.write_text(HUNDRED.format(rounds=1 if quick else 5))
        begun = time.perf_counter()
        command = [sys.executable, "-m", "frostglass", "federate", str(plan), "--out", str(out), "--engine", engine]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        most, resident = 0.0, 0.0
        while running.poll() is None:
            time.sleep(0.5)
            shared, whole = tree_mib(running.pid)
            most, resident = max(most, shared), max(resident, whole)
        seconds = time.perf_counter() - begun
        if running.returncode:
            sys.exit(f"engine {engine} failed")
        history = json.loads((out / "history.json").read_text())
    return {
        "case": f"100 clients, 10 a round, {len(history['rounds']) - 1} rounds, {engine}",
        "minutes": round(seconds / 60, 2), "peak GiB": round(most / 1024, 2), "resident GiB": round(resident / 1024, 2),
        "seconds a round": spread([row["seconds"] for row in history["rounds"][1:]]),
        "accuracy": round(history["rounds"][-1]["accuracy"], 4),
        "updates": sum(len(row["clients"]) for row in history["rounds"]),
    }  # fmt: skip


def tree_mib(root: int) -> tuple[float, float]:
    """(proportional, resident) set sizes of a process and all below it, MiB."""
    import psutil

    shared = whole = 0
    try:
        everybody = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0, 0.0
    for process in everybody:
        try:
            held = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        shared, whole = shared + held.pss, whole + held.rss
    return shared / 2**20, whole / 2**20


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    rows = [tap(options.quick), hundred("local", options.quick), hundred("ray", options.quick)]
    save("federation", options.threads, rows, options.out, targets=TARGETS)


if __name__ == "__main__":
    main()
