"""What exposure costs: success of `unmix_statistical` against images, rounds, k, and inside or across data sets.

    python bench/exposure.py [--quick] [--seconds 600]

Resumable: rows that are in bench/results/exposure.json are not measured again; `--seconds` bounds one call. At the end
the table in frostglass/defenses/measured_attacks.json, which `frostglass cost` reads, is written from all rows.
The attacker is given encodings, exact labels, the number of images and images per class; no pool, no pairing.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import frostglass
import harness
from frostglass.core.files import write_json
from frostglass.core.randomness import Rng
from frostglass.defenses.instahide import InstaHide
from frostglass.vision import datasets

TABLE = Path(frostglass.__file__).parent / "defenses" / "measured_attacks.json"
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Setting:
    """One point of the study."""

    k: int
    private: int
    images: int
    rounds: int

    @property
    def key(self) -> str:
        """A name for the results file."""
        return f"k{self.k}-{self.private}-{self.images}x{self.rounds}"


GRID = [
    *(Setting(2, 2, 20, r) for r in (2, 5, 10, 30)),
    *(Setting(4, 4, 20, r) for r in (10, 30)),
    *(Setting(4, 2, 10, r) for r in (5, 10, 30, 100)),
    *(Setting(4, 2, 20, r) for r in (10, 30, 100)),
    *(Setting(6, 2, 10, r) for r in (10, 30, 100)),
]


def measured(setting: Setting, seed: int) -> dict[str, Any]:
    """One set, drawn and attacked from `seed`."""
    rng = Rng.from_seed(seed, "exposure study")
    source = f"parquet:{harness.cifar() / 'train-00000-of-00001.parquet'}"
    rows = rng.at("rows").permutation(datasets.count(source))[: setting.images + 1000].tolist()
    held = datasets.load(source, size=32, rows=rows)
    x, y, pool = held.images[: setting.images], held.labels[: setting.images], held.images[setting.images :]
    encoder = InstaHide(
        k=setting.k, private=setting.private, public=pool if setting.private < setting.k else None, labels="exact",
        insecure_seed=seed,
    )  # fmt: skip
    index = np.tile(np.arange(setting.images), setting.rounds)
    made = encoder.encode_rows(x, y, index, 0, 10)
    start = time.perf_counter()
    report = frostglass.unmix(
        made.images, targets=made.targets, truth=x, seed=seed, attacks="unmix_statistical", show_images=False,
        device="cpu",
        known={"images": setting.images, "per_class": torch.bincount(y, minlength=10).tolist(), "k": setting.k,
               "private": setting.private},
    )  # fmt: skip
    summary = report.scorecard.cells[0].summary
    assert summary is not None
    return {
        **asdict(setting), "seed": seed, "seconds": round(time.perf_counter() - start, 2),
        "ssim_median": summary.ssim_median, "ssim_mean": summary.ssim_mean, "psnr_mean": summary.psnr_mean,
        "recognisable": summary.over_threshold.count,
    }  # fmt: skip


def entries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table for `frostglass cost`: one entry for each setting that has all its seeds."""
    made = []
    for setting in GRID:
        mine = [r for r in rows if all(r[k] == v for k, v in asdict(setting).items())]
        if len(mine) < len(SEEDS):
            continue
        ssim = sorted(r["ssim_mean"] for r in mine)
        share = sum(r["recognisable"] for r in mine)
        seconds = statistics.median(r["seconds"] for r in mine)
        made.append({
            "attack": "unmix_statistical", **asdict(setting),
            "result": f"{share} of {setting.images * len(mine)} images recognisable (SSIM 0.5), mean SSIM "
                      f"{statistics.median(ssim):.2f} [{ssim[0]:.2f} to {ssim[-1]:.2f}] over {len(mine)} sets of CIFAR "
                      f"images, about {max(1, round(seconds))} s on one core",
        })  # fmt: skip
    return made


def main() -> None:
    options = harness.parser(__doc__ or "")
    options.add_argument("--seconds", type=float, default=600.0, help="stop beginning new rows after this long")
    asked = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    path = (asked.out or harness.RESULTS) / "exposure.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    grid = GRID[:2] if asked.quick else GRID
    begun = time.perf_counter()
    for seed in SEEDS:
        for setting in grid:
            known = any(r["seed"] == seed and all(r[k] == v for k, v in asdict(setting).items()) for r in rows)
            if known or time.perf_counter() - begun > asked.seconds:
                continue
            rows.append(measured(setting, seed))
            print(rows[-1], flush=True)
            write_json(path, {"bench": "exposure", "environment": harness.environment(1), "rows": rows})
    if asked.out is None and not asked.quick:
        held = json.loads(TABLE.read_text(encoding="utf-8"))
        others = [e for e in held["entries"] if e["attack"] != "unmix_statistical"]
        write_json(
            TABLE, {"about": held["about"].replace(" Empty: not measured yet.", ""), "entries": others + entries(rows)}
        )


if __name__ == "__main__":
    main()
