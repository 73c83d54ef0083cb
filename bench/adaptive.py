"""Attacks that know the defence, on images that nobody learned from: learned_inverter, thaw, and a guess beside them.

    python bench/adaptive.py [--quick]

One image a message. The auxiliary images are other ones: the audit takes every private image out of them (by content),
and the CIFAR-10 cells take them from another file. The guess is the mean auxiliary image, for every message the same.
Medians over messages, 95 % bootstrap intervals over messages; one seed of the network a setting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from frostglass.attacks.learned.inverter import learned_inverter
from frostglass.attacks.recipes.thaw import thaw
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import prepare
from frostglass.auditing.score import score
from frostglass.auditing.simulate import play
from frostglass.core.drive import Attack, drive
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from harness import cifar, parser, save

DEFENCES: tuple[dict[str, Any], ...] = (
    {"name": "none"},
    {"name": "pruning", "fraction": 0.99},
    {"name": "sign"},
    {"name": "quantisation", "bits": 2},
    {"name": "clip_and_noise", "clipping_norm": 1.0, "noise_multiplier": 0.1},
    {"name": "dp_sgd", "clipping_norm": 1.0, "noise_multiplier": 1.0},
)
KNOWN = ["examples", "local_plan", "auxiliary"]
AUXILIARY = 2000


def train_images(folder: Path) -> str:
    """Some of the training file, as a file of its own."""
    import pyarrow.parquet as pq

    table = pq.read_table(cifar() / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, AUXILIARY), folder / "auxiliary.parquet")
    return f"parquet:{folder / 'auxiliary.parquet'}"


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Median with its bootstrap interval."""
    if len(values) < 3:
        return {"n": len(values), "median": round(float(np.median(values)), 3)}
    found = bootstrap((values,), np.median, rng=np.random.default_rng(0), method="percentile").confidence_interval
    return {
        "n": len(values), "median": round(float(np.median(values)), 3),
        "interval": [round(float(found.low), 3), round(float(found.high), 3)],
    }  # fmt: skip


def cell(data: dict[str, Any], auxiliary: str, defense: dict[str, Any], messages: int) -> list[dict[str, Any]]:
    """All attacks on the same messages of one defence."""
    attacks: dict[str, tuple[Attack[Any] | None, bool]] = {
        "guess: mean auxiliary image": (None, False),
        "thaw, defence not known": (thaw(), False),
        "thaw, defence known": (thaw(), True),
        "learned_inverter, defence known": (learned_inverter(), True),
    }
    rows = []
    for title, (attack, known) in attacks.items():
        if known and defense["name"] == "none" and attack is not None and attack.name == "thaw":
            continue
        scenario = {
            "data": data, "model": {"name": "lenet"}, "client": {"batch": 1, "batches": messages},
            "defense": [defense], "attack": [{"name": "thaw"}],
        }  # fmt: skip
        threat = {"grants": [*KNOWN, *(["defence"] if known else [])], "auxiliary": auxiliary}
        plan = parse_plan({"scenario": [scenario], "threat": threat})
        prepared = prepare(plan, 0, torch.device("cpu"))
        made = make_defense(plan.scenario[0].defense[0])
        psnr, ssim = [], []
        for unit in range(messages):
            played = play(prepared, made, unit)
            if attack is None:
                assert prepared.auxiliary is not None
                mean = prepared.auxiliary.mean(0, keepdim=True)
                found = Reconstruction(mean, torch.zeros(1, dtype=torch.bool), float("nan"))
            else:
                found = drive(attack, played.seen, Runtime(Rng.from_seed(0, "adaptive bench").at(title, unit)))
            values = score(found, played, ["psnr", "ssim"], null=False).private[0]
            psnr.append(values.psnr)
            ssim.append(values.ssim)
        told = ", ".join(f"{k} = {v}" for k, v in defense.items() if k != "name")
        rows.append({
            "data": data["source"].partition(":")[0],
            "defence": f"{defense['name']} ({told})" if told else defense["name"],
            "attack": title, "auxiliary_images": 0 if prepared.auxiliary is None else len(prepared.auxiliary),
            "psnr": interval(psnr), "ssim": interval(ssim),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    made = parser(__doc__ or "").parse_args()
    torch.set_num_threads(made.threads)
    few = 2 if made.quick else 10
    rows = []
    for defense in DEFENCES[1:2] if made.quick else DEFENCES:
        rows += cell({"source": "digits"}, "digits", defense, few)
    with tempfile.TemporaryDirectory() as folder:
        other = train_images(Path(folder))
        source = {"source": f"parquet:{cifar() / 'test-00000-of-00001.parquet'}", "size": 32}
        for defense in () if made.quick else DEFENCES[1:3]:
            rows += cell(source, other, defense, few // 2)
    save("adaptive", made.threads, rows, made.out, network="lenet, random weights", seed=0)


if __name__ == "__main__":
    main()
