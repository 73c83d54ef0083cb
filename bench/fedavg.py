"""What a weight difference of several local steps gives away, against the plain gradient: `thaw` at one number of
iterations, the client's step simulated by the attacker; other optimisers, minibatches in unknown order."""

from __future__ import annotations

from typing import Any

import torch

from harness import audit_cells, cifar, parser, save, spread

CLIENTS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "1 step": {"update": "delta"},
    "4 steps": {"update": "delta", "local_steps": 4},
    "4 steps, momentum 0.9": {"update": "delta", "local_steps": 4, "momentum": 0.9, "lr": 0.01},
    "4 steps of Adam": {"update": "delta", "local_steps": 4, "optimizer": "adam", "lr": 1e-3},
    "1 epoch of 2 minibatches, small lr": {"update": "delta", "minibatch": 2, "lr": 0.001},
    "2 epochs of 2 minibatches, small lr": {"update": "delta", "minibatch": 2, "epochs": 2, "lr": 0.001},
    "1 epoch of 2 minibatches": {"update": "delta", "minibatch": 2},
    "2 epochs of 2 minibatches": {"update": "delta", "minibatch": 2, "epochs": 2},
}
BATCH, BATCHES, ITERATIONS = 4, 4, 300


def scenario(client: dict[str, Any], batches: int, steps: int) -> dict[str, Any]:
    return {
        "name": "weight differences",
        "data": {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32},
        "model": {"name": "small_bn_cnn", "mode": "train", "options": {"norm": "group"}},
        "client": {"batch": BATCH, "batches": batches, "lr": 0.05, **client},
        "attack": [{"name": "thaw", "steps": steps, "every": steps}],
        "grants": ["examples", "labels", "local_plan"],
    }


def main() -> None:
    options = parser(" ".join(__doc__.split())).parse_args()
    torch.set_num_threads(options.threads)
    batches, steps = (1, 10) if options.quick else (BATCHES, ITERATIONS)
    rows = []
    for name, client in CLIENTS.items():
        cell = audit_cells([scenario(client, batches, steps)], seed=0)[0]
        means = list(cell.summary.psnr_batch_means) if cell.summary else []
        row = {
            "client": name,
            "settings": client,
            "batch": BATCH,
            "batches": batches,
            "iterations": steps,
            "psnr": spread([i.psnr for i in cell.images if i.psnr is not None]),
            "psnr_of_batch_means": spread(means),
            "ssim": spread([i.ssim for i in cell.images if i.ssim is not None]),
            "objective": cell.objective,
            "objective_at_truth": cell.objective_at_truth,
            "seconds_per_batch": round(cell.seconds / cell.batches, 1),
            "status": cell.status,
        }
        rows.append(row)
        print(name, row["psnr_of_batch_means"], row["ssim"], row["seconds_per_batch"], flush=True)
    note = (
        "CIFAR-10 test images (JPEG re-encodings), small CNN with GroupNorm, random; every client has the same images. "
        "One plan seed; spread over batches. Seconds are of a machine that was shared."
    )
    save("fedavg", options.threads, rows, options.out, note=note)


if __name__ == "__main__":
    main()
