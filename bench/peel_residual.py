"""peel_residual on trained residual networks, beside the attacks that match gradients.

    python bench/peel_residual.py --threads 1                all rows, the ResNet-18 trained anew (ten minutes of it)
    python bench/peel_residual.py --only "resnet18 eval"     rows whose name holds these words; the others are kept

A row is written as soon as it ends.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS, audit_cells, cifar, parser, save, spread, trained_file

NOTE = (
    "CIFAR-10 test images (JPEG re-encodings), others for every plan seed. resnet20: a public one, trained on the "
    "original CIFAR-10 train images. resnet18: 3 x 3 first convolution, 200 steps of Adam with 64 images. "
    "activations_exact: messages in which the recovered top activations and errors give the head's gradient to 1e-4, a "
    "check that no solve used. In eval mode peel_residual is granted nothing but the number of images."
)
STEPS, BATCH = 200, 64
PEEL: dict[str, Any] = {"name": "peel_residual"}
EVAL, TRAIN, RIVALS = ["examples"], ["examples", "bn_batch"], ["examples", "labels", "bn_running"]
ROWS: tuple[tuple[str, str, int, dict[str, Any], list[str], int, int], ...] = (
    # model, mode, images, attack, grants, messages, iterations
    ("resnet20", "eval", 1, PEEL, EVAL, 10, 2000),
    ("resnet20", "train", 1, PEEL, TRAIN, 10, 2000),
    ("resnet20", "eval", 1, {"name": "thaw"}, RIVALS, 3, 1000),
    ("resnet20", "eval", 1, {"name": "inverting_gradients"}, RIVALS, 3, 1000),
    ("resnet18", "eval", 4, PEEL, EVAL, 3, 1000),
    ("resnet18", "eval", 8, PEEL, EVAL, 2, 1000),
    ("resnet18", "train", 4, PEEL, TRAIN, 1, 1000),
    ("resnet18", "eval", 4, {"name": "inverting_gradients"}, RIVALS, 1, 300),
    ("resnet18", "eval", 16, PEEL, EVAL, 1, 1000),
    ("resnet18", "eval", 1, PEEL, EVAL, 3, 1000),
)


@cache
def weights_of(model: str) -> str:
    if model == "resnet18":
        return trained_file(model, STEPS, 0, batch=BATCH)
    return str(cifar().parents[1] / "models" / "cifar10" / f"{model}.safetensors")


def scenario(model: str, mode: str, batch: int, attack: dict[str, Any], grants: list[str]) -> dict[str, Any]:
    return {
        "name": f"trained {model}, {mode} mode, {batch} images",
        "data": {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32},
        "model": {"name": model, "mode": mode, "weights": weights_of(model)},
        "client": {"batch": batch, "batches": 1},
        "attack": [attack],
        "grants": list(grants),
    }


def measure(
    model: str, mode: str, batch: int, attack: dict[str, Any], grants: list[str], messages: int, iterations: int
) -> dict[str, Any]:
    settings = {**attack, "steps": iterations}
    made = (scenario(model, mode, batch, dict(settings), grants) for _ in range(messages))
    cells = [audit_cells([one], seed=seed)[0] for seed, one in enumerate(made)]
    images = [image for cell in cells for image in cell.images]
    return {
        "model": model,
        "attack": attack["name"],
        "mode": mode,
        "images": batch,
        "granted": [g for g in cells[0].grants if g not in ("model", "messages", "domain", "mode")],
        "messages": len(cells),
        "psnr": spread([i.psnr for i in images if i.psnr is not None]),
        "ssim": spread([i.ssim for i in images if i.ssim is not None]),
        "recognisable": sum(1 for i in images if i.ssim is not None and i.ssim >= 0.5),
        "activations_exact": sum(1 for cell in cells if cell.info.get("certificate") is True),
        "lowest_solved": [cell.info.get("lowest_solved") for cell in cells if "lowest_solved" in cell.info],
        "labels_right": spread([c.labels.count_accuracy for c in cells if c.labels.count_accuracy is not None]),
        "iterations": cells[0].iterations,
        "objective": spread([cell.objective for cell in cells if cell.objective is not None]),
        "objective_at_truth": spread([c.objective_at_truth for c in cells if c.objective_at_truth is not None]),
        "seconds": spread([cell.seconds for cell in cells]),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["mode"], row["images"], row["attack"]


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--only", default="", help="rows whose name (model mode images attack) holds these words")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    path: Path = (options.out or RESULTS) / "peel_residual.json"
    for model, mode, batch, attack, grants, messages, iterations in ROWS:
        name = f"{model} {mode} {batch} {attack['name']}"
        if not all(word in name.split() for word in options.only.split()):
            continue
        few = (1, 30) if options.quick else (messages, iterations)
        row = measure(model, mode, batch, attack, grants, *few)
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        order = [(m, d, b, a["name"]) for m, d, b, a, *_ in ROWS]
        rows = [r for r in kept if "model" in r and key(r) in order and key(r) != key(row)]
        rows = sorted([*rows, row], key=lambda r: order.index(key(r)))
        save("peel_residual", options.threads, rows, options.out, note=NOTE)


if __name__ == "__main__":
    main()
