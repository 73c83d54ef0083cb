"""Unmixing of InstaHide encodings without a network: SSIM, seconds, and the ceiling with the true assignment.

Private images are CIFAR-10 training images (JPEG re-encodings), public ones other images of the same file. Encodings
come from the library's encoder with an insecure seed. The attacker is given encodings, label rows, the number of images
and of images a class: no pool, no pairing. SSIM on [0, 1], 7x7, after matching one to one and one sign for the set.
Cells that are in the JSON are not run again.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostglass.auditing.metrics.ssim import ssim_values
from frostglass.core.files import write_json
from frostglass.core.randomness import Rng
from frostglass.defenses.instahide import InstaHide
from frostglass.numerics.assign import assign, pairwise_mse
from frostglass.numerics.phase_retrieval import fold_em
from frostglass.numerics.unmixing import UnmixProblem, problem, unmix_read, unmix_round, unmix_start
from frostglass.vision import datasets
from harness import RESULTS, cifar, environment, parser, save, spread

CLASSES, PUBLIC = 10, 2000


@dataclass(frozen=True)
class Setting:
    """One row of the table: k = private + public slots, and what the labels tell."""

    images: int
    rounds: int
    k: int
    labels: str = "exact"
    augmented: bool = False
    law: str = "folded_normal"

    @property
    def name(self) -> str:
        where = "inside" if self.k == 2 else "cross"
        extra = ("" if self.labels == "exact" else f", {self.labels} labels") + (
            ", augmented" if self.augmented else ""
        )
        return f"{where} k={self.k}, {self.images}x{self.rounds}{extra}"


TABLE = (
    Setting(20, 30, 2),
    Setting(10, 100, 4),
    Setting(20, 100, 4),
    Setting(10, 100, 6),
    Setting(20, 30, 4),
    *(Setting(10, 100, 4, labels) for labels in ("quantised", "renormalised", "one_hot", "none")),
    *(Setting(20, 30, 2, labels) for labels in ("quantised", "one_hot", "none")),
    Setting(10, 100, 4, augmented=True),
    Setting(20, 30, 2, augmented=True),
)
CHALLENGE = Setting(100, 50, 6)


def crop_and_flip(rng: Rng) -> Any:
    """RandomCrop(32, padding 4) and a flip, as the released training does; new at each call, repeatable."""
    calls = iter(range(1 << 30))

    def apply(images: Tensor) -> Tensor:
        at = rng.at(next(calls))
        places, mirrored = at.at("place").integers(9, (len(images), 2)), at.at("flip").integers(2, (len(images),))
        wide = torch.nn.functional.pad(images, (4, 4, 4, 4), value=128 if images.dtype == torch.uint8 else 0.5)
        h, w = images.shape[-2:]
        cut = [p[:, i : i + h, j : j + w] for p, (i, j) in zip(wide, places.tolist(), strict=True)]
        return torch.stack([c.flip(-1) if m else c for c, m in zip(cut, mirrored.tolist(), strict=True)])

    return apply


@dataclass(frozen=True)
class Encoded:
    """A set of encodings in random order, with the truth beside it."""

    y: Tensor
    mass: Tensor
    design: Tensor
    truth: Tensor
    per_class: Tensor


def encode(setting: Setting, seed: int) -> Encoded:
    rng = Rng.from_seed(seed, "unmix bench")
    source = f"parquet:{cifar() / 'train-00000-of-00001.parquet'}"
    rows = rng.at("rows").permutation(datasets.count(source))[: setting.images + PUBLIC].tolist()
    held = datasets.load(source, size=32, rows=rows)
    pixels, n = (held.images * 255).round().to(torch.uint8), setting.images
    public = pixels[n:] if setting.k > 2 else None
    options: dict[str, Any] = {"k": setting.k, "private": 2, "partners": "permutation", "insecure_seed": seed}
    told = setting.labels if setting.labels in ("quantised", "renormalised") else "exact"
    change = crop_and_flip(rng.at("augment")) if setting.augmented else None
    # unit vectors under the same keys: their encodings are the coefficients
    unit = torch.eye(n).view(n, 1, 1, n)
    blank = None if public is None else torch.zeros(PUBLIC, 1, 1, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = InstaHide(public=public, labels=told, augmentation=change, **options)
        keys = InstaHide(public=blank, mask="none", **options)
    parts = [
        (encoder.encode_rows(pixels[:n], held.labels[:n], np.arange(n), epoch, CLASSES), epoch)
        for epoch in range(setting.rounds)
    ]
    mixed = [
        keys.encode_rows(unit, held.labels[:n], np.arange(n), epoch, CLASSES).images for epoch in range(setting.rounds)
    ]
    order = rng.at("order").permutation(n * setting.rounds)
    mass = torch.cat([p.targets for p, _ in parts])[order]
    return Encoded(
        torch.cat([p.images for p, _ in parts])[order],
        torch.nn.functional.one_hot(mass.argmax(1), CLASSES).float() if setting.labels == "one_hot" else mass,
        (torch.cat(mixed)[order].flatten(1) + 1) / 2,
        pixels[:n].float() / 255,
        torch.bincount(held.labels[:n], minlength=CLASSES),
    )


def scored(images: Tensor, truth: Tensor) -> list[float]:
    """SSIM of each true image with what is matched to it, under the better of the two signs."""
    best: tuple[float, list[float]] = (float("inf"), [])
    for sign in (1, -1):
        found = (sign * images.clamp(-1, 1) + 1) / 2
        match = assign(found, truth)
        cost = float(pairwise_mse(found, truth)[match, torch.arange(len(truth))].mean())
        if cost < best[0]:
            best = cost, ssim_values(found[match], truth).tolist()
    return best[1]


def slot_accuracy(pairs: Tensor, images: Tensor, encoded: Encoded) -> float:
    """Share of private slots whose image is right, images matched by what they are found in."""
    from scipy.optimize import linear_sum_assignment

    held = (encoded.design > 1e-6).float()
    count = torch.stack([held[(pairs == p).any(1)].sum(0) for p in range(len(images))])
    names = torch.as_tensor(linear_sum_assignment(-count.numpy())[1])[pairs.clamp_min(0)]
    return float((held.gather(1, names) * (pairs >= 0)).sum() / held.sum())


def given(setting: Setting, encoded: Encoded) -> UnmixProblem:
    unlabelled = setting.labels == "none"
    return problem(
        encoded.y,
        None if unlabelled else encoded.mass,
        None if unlabelled else encoded.per_class,
        private=2,
        images=setting.images,
        kind=setting.labels,  # type: ignore[arg-type]
    )


def cell(setting: Setting, seed: int, rounds: int) -> dict[str, Any]:
    encoded = encode(setting, seed)
    seen = given(setting, encoded)
    started = time.process_time()
    state = unmix_start(seen, Rng.from_seed(seed, "unmix bench", "attack"))
    accuracy = [round(slot_accuracy(state.pairs, state.images, encoded), 4)]
    while state.round < rounds and not state.settled:
        state = unmix_round(seen, state)
    seconds = time.process_time() - started
    found = unmix_read(state)
    accuracy.append(round(slot_accuracy(found.pairs, found.images, encoded), 4))
    values = scored(found.images, encoded.truth)
    ceiling = statistics.fmean(scored(fold_em(seen.y, encoded.design)[0], encoded.truth))
    return {
        "setting": setting.name,
        **asdict(setting),
        "seed": seed,
        "ssim": round(statistics.fmean(values), 4),
        "ssim_worst": round(min(values), 4),
        "ceiling": round(ceiling, 4),
        "slots_first_last": accuracy,
        "rounds_used": state.round,
        "log_likelihood": round(found.log_likelihood, 4),
        "cpu_seconds": round(seconds, 1),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a setting."""
    made = []
    for name in dict.fromkeys(r["setting"] for r in rows):
        mine = [r for r in rows if r["setting"] == name]
        line = {key: spread([r[key] for r in mine]) for key in ("ssim", "ceiling", "cpu_seconds")}
        made.append({"setting": name, "sets": len(mine), **line})
    return made


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--sets", type=int, default=5)
    made.add_argument("--rounds", type=int, default=6)
    made.add_argument("--challenge", type=int, default=0, metavar="SETS", help="sets of the public challenge's size")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    path: Path = (options.out or RESULTS) / "unmix.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() and not options.quick else []
    plan = [(s, seed) for part in (TABLE[:5], TABLE[5:]) for seed in range(1, options.sets + 1) for s in part]
    plan = plan[:2] if options.quick else plan + [(CHALLENGE, seed) for seed in range(1, options.challenge + 1)]
    about = {
        "private": "CIFAR-10 train images",
        "public": "2000 other CIFAR-10 train images",
        "granted": "encodings, label rows, number of images, images per class (not where labels are 'none')",
        "ssim_is": "mean over the images of a set",
    }
    for setting, seed in plan:
        if any(r["setting"] == setting.name and r["seed"] == seed for r in rows):
            continue
        rows.append(cell(setting, seed, options.rounds))
        told = ("setting", "seed", "ssim", "ceiling", "slots_first_last", "rounds_used", "cpu_seconds")
        print(*(rows[-1][key] for key in told), file=sys.stderr, flush=True)
        if not options.quick:
            value = {"bench": "unmix", "environment": environment(options.threads), **about}
            write_json(path, {**value, "summary": summary(rows), "rows": rows})
    save("unmix", options.threads, rows, options.out, **about, summary=summary(rows))


if __name__ == "__main__":
    main()
