"""peel_residual on a trained ResNet-20, one image a message, beside the attacks that match gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harness import audit_cells, cifar, parser, save, spread

NOTE = (
    "CIFAR-10 test images (JPEG re-encodings), another one for every plan seed; a public ResNet-20 that was "
    "trained on the original CIFAR-10 train images. activations_exact: messages in which the mean of the "
    "recovered top activations equals what the head read to 1e-4, a check that no solve used. In eval mode "
    "nothing is granted but the number of images."
)


def scenario(mode: str, attack: dict[str, Any], grants: Sequence[str]) -> dict[str, Any]:
    weights = cifar().parents[1] / "models" / "cifar10" / "resnet20.safetensors"
    return {
        "name": f"trained ResNet-20, {mode} mode",
        "data": {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32},
        "model": {"name": "resnet20", "mode": mode, "weights": str(weights)},
        "client": {"batch": 1, "batches": 1},
        "attack": [attack],
        "grants": list(grants),
    }


def measure(seeds: range, mode: str, attack: dict[str, Any], grants: Sequence[str]) -> dict[str, Any]:
    cells = [audit_cells([scenario(mode, dict(attack), grants)], seed=s)[0] for s in seeds]
    images = [image for cell in cells for image in cell.images]
    return {
        "attack": attack["name"],
        "mode": mode,
        "granted": [g for g in cells[0].grants if g not in ("model", "messages", "domain", "mode")],
        "messages": len(cells),
        "psnr": spread([i.psnr for i in images if i.psnr is not None]),
        "ssim": spread([i.ssim for i in images if i.ssim is not None]),
        "recognisable": sum(1 for i in images if i.ssim is not None and i.ssim >= 0.5),
        "activations_exact": sum(1 for cell in cells if cell.info.get("certificate") is True),
        "lowest_solved": [cell.info.get("lowest_solved") for cell in cells if "lowest_solved" in cell.info],
        "label_right": sum(1 for cell in cells if (cell.labels.count_accuracy or 0.0) == 1.0),
        "iterations": cells[0].iterations,
        "objective": spread([cell.objective for cell in cells if cell.objective is not None]),
        "objective_at_truth": spread([c.objective_at_truth for c in cells if c.objective_at_truth is not None]),
        "seconds": spread([cell.seconds for cell in cells]),
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    many, few = (1, 1) if options.quick else (10, 3)
    more = {"steps": 50} if options.quick else {}
    equal = {"steps": 50 if options.quick else 1000}
    rows: list[dict[str, Any]] = []

    def keep(count: int, mode: str, attack: dict[str, Any], grants: Sequence[str]) -> None:
        rows.append(measure(range(count), mode, attack, grants))
        save("peel_residual", options.threads, rows, options.out, note=NOTE)

    keep(many, "eval", {"name": "peel_residual", **more}, ["examples"])
    for rival in ("thaw", "inverting_gradients"):
        keep(few, "eval", {"name": rival, **equal}, ["examples", "labels", "bn_running"])
    # in train mode the algebra ends above the middle stage: exact activations there, pixels by gradient matching
    keep(few, "train", {"name": "peel_residual", "steps": 50 if options.quick else 300}, ["examples", "bn_batch"])


if __name__ == "__main__":
    main()
