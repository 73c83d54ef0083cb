"""The shape of GradInversion's Table 2 (what each ingredient adds) and Table 4 (its rivals) on CIFAR-size images.

    python bench/gradinversion_table.py --threads 1                 goes on with the next cell that is not there yet
    python bench/gradinversion_table.py --only "resnet20 trained"   cells whose name holds these words
    python bench/gradinversion_table.py --show                      the tables so far

Budgets are the same for all rows and far below the paper's (20,000 iterations, 8 seeds, 224 px, ResNet-50): 1,000
iterations, or evaluations for L-BFGS, and 2 seeds. Labels are granted to every row (the paper restores them; the labels
bench measures that). A cell is one victim, batch size and row; it is written as soon as it ends.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import frostglass
from frostglass.core.files import write_json
from harness import RESULTS, cifar, environment, parser, spread, trained_file

ITERATIONS, SEEDS = 1000, 2
SHARED = {"steps": ITERATIONS, "seeds": SEEDS, "every": ITERATIONS}

_COSINE = {"name": "grad_inversion", "matching": "cosine", "tv": 3e-4, "bn_relative": True, **SHARED}
_PAPER = {"name": "grad_inversion", **SHARED}
_BARE = {"tv": 0.0, "l2": 0.0, "bn": "none", "bn_weight": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    # Table 2 with the cosine loss of the paper's appendix, weights that suit small images
    "cosine: matching only": {**_COSINE, **_BARE, "consensus": "none"},
    "cosine: + fidelity": {**_COSINE, "consensus": "none"},
    "cosine: + lazy group": {**_COSINE, "consensus": "lazy"},
    "cosine: + registered group": {**_COSINE, "consensus": "registered"},
    # Table 4
    "thaw": {"name": "thaw", **SHARED},
    "inverting_gradients": {"name": "inverting_gradients", **SHARED},
    "deep_inversion": {"name": "deep_inversion", **SHARED},
    "dlg": {"name": "dlg", **SHARED, "steps": ITERATIONS // 20, "inner": 20, "every": ITERATIONS // 20},
    "latent_projection": {"name": "latent_projection", **SHARED},
    # Table 2 with the published loss and constants
    "published: matching only": {**_PAPER, **_BARE, "consensus": "none"},
    "published: + fidelity": {**_PAPER, "consensus": "none"},
    "published: + lazy group": {**_PAPER, "consensus": "lazy"},
    "published: + registered group": {**_PAPER, "consensus": "registered"},
}
READS_STATISTICS = tuple(ROWS)[1:5]
"""Rows that batch and running statistics are compared by."""

STATISTICS = {
    "batch": ("train", ["examples", "labels", "bn_batch", "bn_running"]),  # running ones for DeepInversion alone
    "running": ("eval", ["examples", "labels", "bn_running"]),
}
METRICS = ["psnr", "ssim", "fft2d", "iip_pixels"]


@dataclass(frozen=True)
class Case:
    """One victim, statistics and batch size, with all its rows."""

    model: str
    state: str
    statistics: str
    batch: int
    batches: int
    rows: tuple[str, ...] = tuple(ROWS)

    @property
    def victim(self) -> str:
        return f"{self.model} {self.state}"


def cases() -> Iterator[Case]:
    """In the order in which a growing table is most useful."""
    few = tuple(ROWS)[:9]
    sizes = ((4, 5), (1, 5), (8, 3))
    for batch, batches in sizes:
        yield Case("small_bn_cnn", "random", "batch", batch, batches)
    for batch in (1, 4):
        for kind in ("trained", "random"):
            yield Case("resnet20", kind, "batch", batch, 3, few)
    for kind in STATISTICS:
        for batch, batches in sizes:
            yield Case("small_bn_cnn", "150 steps", kind, batch, batches, READS_STATISTICS)
    for kind in ("trained", "random"):
        for batch in (1, 4):
            yield Case("resnet20", kind, "running", batch, 3, READS_STATISTICS)


@cache
def weights_of(model: str, state: str) -> str:
    if state == "trained":
        return str(cifar().parents[1] / "models" / "cifar10" / f"{model}.safetensors")
    return trained_file(model, 150, 0, batch=64) if state == "150 steps" else ""


def plan(case: Case, row: str, iterations: int, batches: int) -> dict[str, Any]:
    mode, grants = STATISTICS[case.statistics]
    attack = dict(ROWS[row])
    scale = iterations / ITERATIONS
    attack["steps"] = attack["every"] = max(2, round(attack["steps"] * scale))
    file = weights_of(case.model, case.state)
    return {
        "name": "bench",
        "seed": 0,
        "scenario": [
            {
                "name": f"{case.victim} {case.statistics} K={case.batch}",
                "data": {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32},
                "model": {"name": case.model, "mode": mode, **({"weights": file} if file else {})},
                "client": {"batch": case.batch, "batches": batches},
                "attack": [attack],
            }
        ],
        "threat": {"grants": grants},
        "report": {"metrics": METRICS, "null": False},
    }


def measured(case: Case, row: str, quick: bool) -> dict[str, Any]:
    iterations, batches = (20, 1) if quick else (ITERATIONS, case.batches)
    cpu = time.process_time()
    cell = frostglass.audit(plan(case, row, iterations, batches), device="cpu").cells[0]
    means = list(cell.summary.psnr_batch_means) if cell.summary else []
    extra = cell.summary.extra_means if cell.summary else {}
    return {
        "victim": case.victim,
        "statistics": case.statistics,
        "mode": cell.mode,
        "K": case.batch,
        "row": row,
        "batches": batches,
        "iterations": iterations,
        "seeds": SEEDS,
        "status": cell.status,
        "error": cell.error,
        "psnr": spread([i.psnr for i in cell.images if i.psnr is not None]),
        "psnr_of_batch_means": {**spread(means), "sd": round(statistics.stdev(means), 3) if len(means) > 1 else None},
        "ssim": spread([i.ssim for i in cell.images if i.ssim is not None]),
        **{name: round(value, 4) for name, value in extra.items()},
        "objective": cell.objective,
        "objective_at_truth": cell.objective_at_truth,
        "cpu_seconds_per_batch": round((time.process_time() - cpu) / batches, 1),
    }


def key(row: dict[str, Any]) -> tuple[str, str, int, str]:
    return row["victim"], row["statistics"], row["K"], row["row"]


def show(rows: list[dict[str, Any]]) -> None:
    """A line a cell: mean PSNR over batches with its spread, SSIM, the objective's gap."""
    for row in rows:
        of = row["psnr_of_batch_means"]
        if not of["n"]:
            print(f"{row['victim']:24} {row['statistics']:8} K={row['K']} {row['row']:30} {row['status']}")
            continue
        print(
            f"{row['victim']:24} {row['statistics']:8} K={row['K']} {row['row']:30} PSNR {of['mean']:5.2f} "
            f"(sd {of['sd'] or 0:.2f}, {of['min']:.1f}-{of['max']:.1f}, n={of['n']}) SSIM {row['ssim']['mean']:.3f} "
            f"objective {row['objective'] or 0:.4g}, at the truth {row['objective_at_truth'] or 0:.4g}"
        )


NOTE = (
    "CIFAR-10 test images (JPEG re-encodings). 'trained': a public ResNet-20 trained on the original CIFAR-10; '150 "
    "steps': Adam on CIFAR-10 train images. 'batch': train mode, statistics of the batch granted; 'running': eval "
    "mode, running statistics granted. A row whose objective is far above its value at the truth is an optimiser "
    "that failed, not privacy. Spread: sd and range of batch means. K=4 and K=1 of the small network: 5 batches, "
    "elsewhere 3."
)


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--only", default="", help="cells whose name holds these words")
    made.add_argument("--show", action="store_true", help="print what is there and stop")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    path: Path = (options.out or RESULTS) / (
        "gradinversion_table_quick.json" if options.quick else "gradinversion_table.json"
    )

    def held() -> list[dict[str, Any]]:
        return json.loads(path.read_text())["rows"] if path.exists() else []

    if options.show:
        show(held())
        return
    order = [(case, row) for case in cases() for row in case.rows]
    for case, row in order:
        name = f"{case.victim} {case.statistics} K={case.batch} {row}"
        if not all(word in name for word in options.only.split()):
            continue
        if (case.victim, case.statistics, case.batch, row) in {key(r) for r in held()}:
            continue
        found = measured(case, row, options.quick)
        rows = [r for r in held() if key(r) != key(found)]  # read again: another process may have added cells
        rank = {(c.victim, c.statistics, c.batch, r): i for i, (c, r) in enumerate(order)}
        rows = sorted([*rows, found], key=lambda r: rank.get(key(r), len(rank)))
        budget = {"iterations": ITERATIONS, "seeds": SEEDS, "paper": "20,000 iterations, 8 seeds, 224 px"}
        write_json(path, {"bench": "gradinversion_table", "environment": environment(options.threads), "note": NOTE,
                          "budget": budget, "cells_planned": len(order), "rows": rows})  # fmt: skip
        show([found])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
