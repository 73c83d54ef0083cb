"""What every bench shares: where it ran, how results are saved, and networks trained for a few steps."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import frostglass
from frostglass.core.files import write_json
from frostglass.core.randomness import Rng
from frostglass.numerics.local_update import soft_cross_entropy
from frostglass.vision import datasets, networks, weights

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every bench takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, default=None, help="where the JSON goes (default: bench/results)")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--quick", action="store_true", help="a smoke run: few cases, not for quoting")
    return made


def cifar() -> Path:
    """Folder with train-00000-of-00001.parquet and test-00000-of-00001.parquet (JPEG re-encodings of CIFAR-10)."""
    root = os.environ.get("FROSTGLASS_DATA")
    if not root or not (Path(root) / "cifar10").is_dir():
        sys.exit("this bench needs CIFAR-10 images: set FROSTGLASS_DATA to a folder that holds cifar10/")
    return Path(root) / "cifar10"


def environment(threads: int) -> dict[str, Any]:
    """Versions and hardware; no names of machines."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu
        )
    return {
        "frostglass": frostglass.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """n, median, mean, least and greatest."""
    if not values:
        return {"n": 0}
    return {
        "n": len(values),
        "median": round(statistics.median(values), 4),
        "mean": round(statistics.fmean(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def save(name: str, threads: int, rows: Any, out: Path | None = None, **about: Any) -> Path:
    """Prints and saves {environment, about, rows} as JSON."""
    value = {"bench": name, "environment": environment(threads), **about, "rows": rows}
    path = (out or RESULTS) / f"{name}.json"
    write_json(path, value)
    print(json.dumps(value, indent=1))
    print(f"saved {path.name}", file=sys.stderr)
    return path


def peak_mib() -> int:
    """Greatest resident size of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def trained_file(model: str, steps: int, seed: int, *, batch: int = 128, lr: float = 1e-3, **options: Any) -> str:
    """Path of weights of `model` after `steps` of Adam on CIFAR-10 train images ("" for 0 steps)."""
    if steps == 0:
        return ""
    rng = Rng.from_seed(seed, "bench training")
    net = networks.build(model, classes=10, channels=3, size=32, options=options, rng=rng.at("model")).train()
    source = f"parquet:{cifar() / 'train-00000-of-00001.parquet'}"
    rows = rng.at("rows").permutation(datasets.count(source))[: min(20_000, steps * batch)].sort().values.tolist()
    held = datasets.load(source, size=32, rows=rows)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for step in range(steps):
        pick = rng.at("batch", step).integers(len(held.images), (batch,))
        targets = torch.nn.functional.one_hot(held.labels[pick], 10).float()
        optimizer.zero_grad()
        soft_cross_entropy(net(held.images[pick]), targets).backward()
        optimizer.step()
    path = Path(tempfile.mkdtemp(prefix="frostglass-bench-")) / f"{model}-{steps}-{seed}.safetensors"
    weights.save_weights(net, path)
    return str(path)


def audit_cells(
    scenarios: Sequence[dict[str, Any]], *, seed: int = 0, on_cell: Callable[[Any], None] | None = None
) -> list[Any]:
    """Runs scenarios through the real pipeline, one by one, and returns their cells."""
    cells = []
    for scenario in scenarios:
        grants = scenario.pop("grants")
        plan = {"name": "bench", "seed": seed, "scenario": [scenario], "threat": {"grants": grants}}
        report = frostglass.audit(plan, device="cpu")
        for cell in report.cells:
            cells.append(cell)
            if on_cell:
                on_cell(cell)
            print(f"  {cell.title}: {cell.summary}", file=sys.stderr)
    return cells
