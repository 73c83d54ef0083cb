"""peel on the small CNN: random and briefly trained, BatchNorm in train and eval mode, GroupNorm, none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harness import audit_cells, cifar, parser, save, spread, trained_file

NOTE = (
    "CIFAR-10 test images (JPEG re-encodings), drawn anew for every plan seed. certified: batches that the attack "
    "itself certifies, without the private images; fell_back: batches with a warning, shown by gradient matching or "
    "uncertified."
)
GRANTS = {"train": ["examples", "labels", "bn_batch"], "eval": ["examples", "labels"]}


def scenario(batch: int, weights: str = "", *, grants: Sequence[str] | None = None, **model: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": "small_bn_cnn", "mode": "train", **model}
    if weights:
        spec["weights"] = weights
    return {
        "name": f"small CNN batch {batch}",
        "data": {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32},
        "model": spec,
        "client": {"batch": batch, "batches": 1},
        "attack": [{"name": "peel"}],
        "grants": list(GRANTS[spec["mode"]] if grants is None else grants),
    }


def measure(seeds: range, batch: int, weights: str = "", **options: Any) -> dict[str, Any]:
    """One audit a plan seed, as a cell keeps the attack's own account of its first batch: certificates are counted."""
    cells = [audit_cells([scenario(batch, weights, **options)], seed=s)[0] for s in seeds]
    images = [image for cell in cells for image in cell.images]
    certified = [cell for cell in cells if cell.info.get("certificate") is True]
    fell_back = [cell for cell in cells if "warning" in cell.info]
    means = [sum(i.psnr for i in cell.images) / batch for cell in cells]
    return {
        "batch": batch,
        "batches": len(cells),
        "granted": [g for g in cells[0].grants if g not in ("model", "messages", "domain", "mode")],
        "psnr": spread([i.psnr for i in images]),
        "psnr_of_batch_means": spread(means),
        "psnr_of_certified": spread([i.psnr for cell in certified for i in cell.images]),
        "ssim": spread([i.ssim for i in images]),
        "certified": len(certified),
        "fell_back": len(fell_back),
        "seconds_per_batch": spread([cell.seconds for cell in cells]),
        "objective": spread([cell.objective for cell in cells]),
        "status": sorted({cell.status for cell in cells}),
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    seeds = range(1 if options.quick else 5)
    rows: list[dict[str, Any]] = []

    def keep(victim: str, batch: int, weights: str = "", **more: Any) -> None:
        rows.append({"victim": victim, **measure(seeds, batch, weights, **more)})
        save("peel", options.threads, rows, options.out, note=NOTE)  # a long bench that is stopped keeps what it has

    for batch in (1, 4, 8):
        keep("BatchNorm, train mode, random (another network a batch)", batch)
        keep("the same, neither labels nor statistics granted", batch, grants=["examples"])
    keep("GroupNorm, random", 4, options={"norm": "group"})
    keep("no norm, random", 4, options={"norm": "none"})
    keep("BatchNorm, eval mode, random", 4, mode="eval")
    for steps in (150,) if options.quick else (150, 1000):
        for seed in range(1 if options.quick else 2):
            file = trained_file("small_bn_cnn", steps, seed, batch=64)
            for batch in (1, 4, 8):
                keep(f"BatchNorm, train mode, trained for {steps} steps, seed {seed}", batch, file)
            keep("the same, neither labels nor statistics granted", 4, file, grants=["examples"])
    keep(f"BatchNorm, eval mode, trained for {steps} steps, seed {seed}", 4, file, mode="eval")


if __name__ == "__main__":
    main()
