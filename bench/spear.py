"""Exact recovery: photographs of 64 to 224 px, CIFAR-size batches of 4 to 16, random and trained MLPs.

Every row goes through the real pipeline; an image counts as found only if it is proved.
"""

from __future__ import annotations

from typing import Any

import torch

from harness import audit_cells, cifar, parser, save, spread, trained_file


def scenario(source: str, size: int, batch: int, batches: int, weights: str = "", steps: int = 60) -> dict[str, Any]:
    model: dict[str, Any] = {"name": "mlp"}
    if weights:
        model["weights"] = weights
    return {
        "name": f"mlp batch {batch} {size} px",
        "data": {"source": source, "size": size},
        "model": model,
        "client": {"batch": batch, "batches": batches},
        "attack": [{"name": "spear", "steps": steps}],
        "grants": ["examples"],
    }


def row(cell: Any, **about: Any) -> dict[str, Any]:
    per = cell.batch
    batches = [cell.images[i : i + per] for i in range(0, len(cell.images), per)]
    exact = [all(image.proved for image in group) for group in batches]
    psnr = [image.psnr for image in cell.images if image.proved and image.psnr is not None]
    wrong = [i for i in cell.images if i.proved and (i.psnr is None or i.psnr < 40)]
    return {
        **about,
        "batch": per,
        "batches": len(batches),
        "batches_fully_proved": sum(exact),
        "images_proved": sum(i.proved for i in cell.images),
        "images": len(cell.images),
        "proved_but_wrong": len(wrong),
        "psnr_of_proved": spread(psnr),
        "seconds_per_batch": round(cell.seconds / max(1, len(batches)), 3),
        "status": cell.status,
    }


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    test = f"parquet:{cifar() / 'test-00000-of-00001.parquet'}"
    imagenet = f"folder:{cifar().parent / 'imagenet-sample'}"
    rows = []
    many = 2 if options.quick else 20
    for size in (128,) if options.quick else (64, 128, 224):
        cells = audit_cells([scenario("photos", size, 8, 1)])
        rows.append(row(cells[0], victim="random MLP", images_from=f"bundled photographs, {size} px"))
    if not options.quick:
        data = scenario(imagenet, 128, 8, 10)
        data["model"]["classes"] = 1000
        rows.append(row(audit_cells([data])[0], victim="random MLP", images_from="ImageNet photographs, 128 px"))
    for batch in (4, 8, 12, 16):
        count = many if batch <= 12 else min(many, 10)
        rows.append(
            row(audit_cells([scenario(test, 32, batch, count)])[0], victim="random MLP", images_from="CIFAR-10 test")
        )
    for seed in range(1 if options.quick else 3):
        for train_steps in (200, 500):
            file = trained_file("mlp", train_steps, seed)
            for batch in (4, 8, 12):
                cell = audit_cells([scenario(test, 32, batch, 1 if options.quick else 3, file)], seed=seed)[0]
                rows.append(
                    row(cell, victim=f"MLP after {train_steps} steps, seed {seed}", images_from="CIFAR-10 test")
                )
    note = "CIFAR-10 images are JPEG re-encodings. At most 60 search chunks a batch; granted: the number of images."
    save("spear", options.threads, rows, options.out, note=note)


if __name__ == "__main__":
    main()
