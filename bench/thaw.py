"""thaw on the small BatchNorm CNN in train mode, random and briefly trained, batches of 1, 4 and 8."""

from __future__ import annotations

from typing import Any

import torch

from harness import audit_cells, cifar, parser, save, spread, trained_file


def scenario(batch: int, batches: int, weights: str, attack: dict[str, Any], **model: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": "small_bn_cnn", "mode": "train", **model}
    if weights:
        spec["weights"] = weights
    return {
        "name": f"small BN CNN batch {batch}",
        "data": {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32},
        "model": spec,
        "client": {"batch": batch, "batches": batches},
        "attack": [attack],
        "grants": ["examples", "labels", "bn_batch"] if not model else ["examples", "labels"],
    }


def row(cell: Any, **about: Any) -> dict[str, Any]:
    psnr = [i.psnr for i in cell.images if i.psnr is not None]
    ssim = [i.ssim for i in cell.images if i.ssim is not None]
    return {
        **about,
        "batch": cell.batch,
        "batches": cell.batches,
        "granted": [g for g in cell.grants if g not in ("model", "messages", "domain", "mode")],
        "psnr": spread(psnr),
        "psnr_of_batch_means": spread(cell.summary.psnr_batch_means) if cell.summary else None,
        "ssim": spread(ssim),
        "iterations": cell.iterations,
        "seconds_per_batch": round(cell.seconds / cell.batches, 2),
        "objective": cell.objective,
        "objective_at_truth": cell.objective_at_truth,
        "status": cell.status,
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    batches = 1 if options.quick else 5
    files = {"random": "", **{f"150 steps, seed {s}": trained_file("small_bn_cnn", 150, s, batch=64) for s in range(2)}}
    for state, file in files.items():
        for batch in (1, 4, 8):
            for seed in range(1 if options.quick or file else 2):  # other images and, for random victims, other weights
                cell = audit_cells([scenario(batch, batches, file, {"name": "thaw"})], seed=seed)[0]
                rows.append(row(cell, victim=f"small_bn_cnn, {state}", plan_seed=seed, attack="thaw"))
    for seed in range(1 if options.quick else 2):
        cell = audit_cells([scenario(4, batches, "", {"name": "thaw"}, options={"norm": "group"})], seed=seed)[0]
        rows.append(row(cell, victim="small_bn_cnn with GroupNorm, random", plan_seed=seed, attack="thaw"))
    note = "CIFAR-10 test images (JPEG re-encodings), other ones in every batch. The client trains in train mode."
    save("thaw", options.threads, rows, options.out, note=note)


if __name__ == "__main__":
    main()
