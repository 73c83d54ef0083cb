"""Latent projection (fitted generator, untrained network) against thaw at equal iterations, small BatchNorm CNN."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from frostglass.core.randomness import Rng
from frostglass.vision import datasets
from frostglass.vision.generator_fitting import FitSettings, fit
from frostglass.vision.generators import load_generator, save_generator
from harness import audit_cells, cifar, parser, save, spread

ITERATIONS, BATCHES, FITTED_ON = 300, 3, 8000


def fitted(given: Path | None, quick: bool) -> Path:
    """A generator of CIFAR-10 train images; audited are test images."""
    if given is not None:
        return given
    rng, source = Rng.from_seed(0), f"parquet:{cifar() / 'train-00000-of-00001.parquet'}"
    rows = Rng.from_seed(0, "rows").permutation(50_000)[:FITTED_ON].sort().values.tolist()
    images = datasets.load(source, size=32, rows=rows).images
    settings = FitSettings(steps=100) if quick else FitSettings()
    found = fit(images, settings, rng, progress=lambda step, psnr: step % 500 == 0 and print(step, round(psnr, 1)))
    path = Path(tempfile.mkdtemp(prefix="frostglass-bench-")) / "cifar.safetensors"
    about = {"steps": str(settings.steps), "held_out_psnr": f"{found.psnr:.2f}"}
    return save_generator(found.decoder, path, **about)


def ceiling(path: Path, count: int = 12) -> dict[str, float | int]:
    """PSNR of the best latents for test images when the images themselves are known: no attack can do better."""
    decoder = load_generator(path)
    source = f"parquet:{cifar() / 'test-00000-of-00001.parquet'}"
    images = datasets.load(source, size=32, limit=count).images
    z = torch.zeros(count, *decoder.latent_shape, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for step in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / ITERATIONS)
        error = (decoder(z) - images).square().flatten(1).mean(1)
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
        z.data.clamp_(-3, 3)
    return spread((-10 * error.detach().log10()).tolist())


def scenario(batch: int, batches: int, attack: dict[str, Any], iterations: int) -> dict[str, Any]:
    return {
        "name": f"small BN CNN batch {batch}",
        "data": {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32},
        "model": {"name": "small_bn_cnn", "mode": "train", "options": {"width": 16}},
        "client": {"batch": batch, "batches": batches},
        "attack": [{**attack, "steps": iterations, "every": iterations}],
        "grants": ["examples", "labels"],
    }


def row(cell: Any, label: str) -> dict[str, Any]:
    return {
        "attack": label,
        "batch": cell.batch,
        "batches": cell.batches,
        "iterations": cell.iterations,
        "psnr": spread([i.psnr for i in cell.images if i.psnr is not None]),
        "ssim": spread([i.ssim for i in cell.images if i.ssim is not None]),
        "psnr_of_batch_means": spread(cell.summary.psnr_batch_means) if cell.summary else None,
        "objective": cell.objective,
        "objective_at_truth": cell.objective_at_truth,
        "wall_seconds_per_batch": round(cell.seconds / cell.batches, 2),
        "status": cell.status,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--generator", type=Path, default=None, help="a fitted one, instead of fitting one first")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    path = fitted(options.generator, options.quick)
    attacks: dict[str, dict[str, Any]] = {
        "thaw": {"name": "thaw"},
        "latent_projection, untrained": {"name": "latent_projection"},
        "latent_projection, fitted": {"name": "latent_projection", "generator": str(path)},
        "latent_projection, fitted, no tv": {"name": "latent_projection", "generator": str(path), "tv": 0.0},
    }
    batches, iterations = (1, 20) if options.quick else (BATCHES, ITERATIONS)
    rows = [
        row(audit_cells([scenario(batch, batches, dict(attack), iterations)])[0], label)
        for batch in (1, 4)
        for label, attack in attacks.items()
    ]
    with safe_open(path, framework="pt") as held:
        about = held.metadata()
    note = (
        "CIFAR-10 test images (JPEG re-encodings) from a random network of width 16 in train mode; no batch statistics "
        f"granted. The generator was fitted to {FITTED_ON} train images. ceiling_psnr: its best latents for test "
        "images that are known. Seconds are of a machine that was shared."
    )
    save("latent", options.threads, rows, options.out, note=note, generator=about, ceiling_psnr=ceiling(path))


if __name__ == "__main__":
    main()
