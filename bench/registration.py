"""Registration methods on real attack outputs: do they bring the average of several seeds nearer to the truth?

Part one: seeds of thaw, inverting_gradients and grad_inversion (uncoupled), averaged after each method has warped them
onto their pixel mean. Part two: grad_inversion end to end, coupled by the anchor that each method makes.

A warp interpolates, and that alone smooths noise away. The control, `half_pixel`, therefore moves every image by a
random fraction of a pixel that has nothing to do with its target: a method aligns something only as far as it beats it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.metrics.registry import METRICS
from frostglass.core.batch import one_hot
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Facts, Knows, Observation, ThreatModel
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics import registration
from frostglass.numerics.assign import assign
from frostglass.numerics.bn import running_statistics
from frostglass.numerics.local_update import local_update
from frostglass.vision import datasets, networks
from harness import cifar, parser, save, spread

SEEDS = 4
KNOWN = frozenset({Knows.EXAMPLES, Knows.LABELS, Knows.BN_BATCH})


@dataclass(frozen=True)
class Case:
    """One victim and one batch."""

    name: str
    seen: Observation
    truth: Tensor
    steps: int


def half_pixel(moving: Tensor, fixed: Tensor) -> Tensor:
    """The control: a shift by up to half a pixel each way, drawn from the image itself, by the same interpolation."""
    out = moving.clone()
    for i, x in enumerate(moving):
        digest = hashlib.sha256(x.cpu().numpy().tobytes()).digest()
        right, down = np.random.default_rng(int.from_bytes(digest[:8], "big")).uniform(-0.5, 0.5, 2)
        image = x.permute(1, 2, 0).contiguous().cpu().numpy()
        matrix = np.asarray([[1, 0, right], [0, 1, down]], np.float32)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        warped = cv2.warpAffine(image, matrix, image.shape[1::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
        out[i] = torch.from_numpy(warped).permute(2, 0, 1)
    return out if not torch.equal(moving, fixed) else moving


METHODS = {**registration.METHODS, "half_pixel": half_pixel}


def victim(model: str, size: int, source: str, rows: range, **options: Any) -> tuple[Observation, Tensor]:
    held = datasets.load(source, size=size, rows=rows)
    net = networks.build(model, classes=10, channels=3, size=size, options=options, rng=Rng.from_seed(1)).train()
    targets, plan = one_hot([i % 10 for i in range(len(rows))], 10), LocalPlan(mode="train")
    trace = local_update(net, held.images, targets, plan)
    facts = Facts(
        domain=networks.domain_of(net),
        mode="train",
        image_shape=(3, size, size),
        classes=10,
        labels=targets,
        local_plan=plan,
        bn_running=running_statistics(net),
    )
    update = Update(trace.gradients, trace.bn, len(rows), plan)
    return ThreatModel("bench", KNOWN).observe(net, [update], facts), held.images


def cases(quick: bool) -> Iterator[Case]:
    tiny = f"parquet:{cifar() / 'train-00000-of-00001.parquet'}"
    photos = f"folder:{Path(cifar()).parent / 'imagenet-sample'}"
    for batch in range(1 if quick else 2):
        made = victim("small_bn_cnn", 32, tiny, range(2 * batch, 2 * batch + 2), width=16)
        yield Case(f"small_bn_cnn 32 px K=2 batch {batch}", *made, 20 if quick else 150)
    for batch in range(0 if quick else 1):
        made = victim("small_bn_cnn", 64, photos, range(40 * batch, 40 * batch + 1), width=16)
        yield Case(f"small_bn_cnn 64 px K=1 photograph {batch}", *made, 150)
    for batch in range(0 if quick else 1):  # averages over the plane before its head, so that seeds may be shifted
        yield Case(
            f"resnet20 32 px K=1 batch {batch}", *victim("resnet20", 32, tiny, range(10 + batch, 11 + batch)), 100
        )


def all_seeds(attack: Inversion, case: Case, run: Runtime) -> tuple[Tensor, int]:
    """(what every seed ends with, [s, b, c, h, w] in [0, 1]; the seed that the attack would choose)."""
    state = attack.init(case.seen, run)
    for t in range(attack.steps):
        state, _ = attack.step(case.seen, state, run, t)
    images = torch.stack([case.seen.domain.clamp(case.seen.domain.denormalise(z)) for z in state.best])
    return images, int(state.best_loss.argmin())


def paired(images: Tensor, truth: Tensor) -> Tensor:
    return images[assign(images, truth)]


def quality(images: Tensor, truth: Tensor) -> dict[str, float]:
    found = paired(images.clamp(0, 1), truth)
    scores = {name: METRICS[name].make().values(found, truth) for name in ("psnr", "ssim")}
    return {name: sum(float(v) for v in values) / len(values) for name, values in scores.items()}


def consensus_of(images: Tensor, method: registration.Register) -> tuple[Tensor, float, float]:
    """(average of the warps, milliseconds, images that could not be registered)."""
    mean = images.mean(0)
    begun = time.perf_counter()
    warped = torch.stack([method(x, mean) for x in images])
    spent = 1e3 * (time.perf_counter() - begun)
    failed = sum(float(registration.unmoved(x, w, mean)) for x, w in zip(images, warped, strict=True))
    return warped.mean(0), spent, failed


def offline(case: Case, attack: str, images: Tensor) -> list[dict[str, Any]]:
    alone = [quality(x, case.truth) for x in images]
    ordered = images  # the rows of all seeds answer to the same targets, so that they need no pairing
    rows = []
    for name, method in METHODS.items():
        mean, spent, failed = consensus_of(ordered, method)
        rows.append(
            {
                "part": "average of finished seeds",
                "case": case.name,
                "iterations": case.steps,
                "attack": attack,
                "method": name,
                **quality(mean, case.truth),
                "psnr_of_a_seed": sum(q["psnr"] for q in alone) / len(alone),
                "psnr_of_the_best_seed": max(q["psnr"] for q in alone),
                "milliseconds": spent,
                "unregistered": failed if name != "none" else None,
                "images": images.shape[0] * images.shape[1],
            }
        )
    return rows


def coupled(case: Case, run: Runtime, uncoupled: Tensor) -> Iterator[dict[str, Any]]:
    """grad_inversion with each way to agree; every other setting as published."""
    about = {"part": "grad_inversion, coupled", "case": case.name, "iterations": case.steps}
    yield {**about, "method": "uncoupled", **quality(uncoupled, case.truth)}
    for name in ("none", "ecc_euclidean", "half_pixel"):
        attack = ATTACKS["grad_inversion"].make(steps=case.steps, seeds=SEEDS, consensus_every=20)
        attack = replace(attack, consensus=replace(attack.consensus, register=METHODS[name]))
        found = drive(attack, case.seen, run)
        scores = quality(found.images, case.truth)
        yield {**about, "method": name, **scores, "objective": found.objective, "info": dict(found.info)}


def summary(rows: list[dict[str, Any]], part: str, baseline: str) -> dict[str, Any]:
    """Gain of every method over `baseline`, case by case."""
    chosen = [r for r in rows if r["part"] == part]

    def key(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["case"], r.get("attack")

    base = {key(r): r for r in chosen if r["method"] == baseline}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(r["method"] for r in chosen):
        own = [r for r in chosen if r["method"] == name]
        gain: Callable[[str], list[float]] = lambda what, own=own: [r[what] - base[key(r)][what] for r in own]  # type: ignore[misc]  # noqa: E731
        found[name] = {"psnr_gain": spread(gain("psnr")), "ssim_gain": spread(gain("ssim"))}
        if "milliseconds" in own[0]:
            found[name]["ms_per_image"] = spread([r["milliseconds"] / r["images"] for r in own])
    return found


def verdict(gains: dict[str, Any]) -> str:
    real = [n for n in gains if n in registration.METHODS and n != "none"]
    best = max(real, key=lambda n: gains[n]["psnr_gain"]["mean"])
    gain, control = gains[best]["psnr_gain"], gains["half_pixel"]["psnr_gain"]["mean"]
    words = "helps" if gain["mean"] > control + 0.1 else "does not help beyond the smoothing of a warp"
    return (
        f"registration {words} here: {best} is the best method, {gain['mean']:+.2f} dB over the pixel mean; the "
        f"control that aligns nothing, {control:+.2f} dB (n = {gain['n']})"
    )


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for case in cases(options.quick):
        run = Runtime(Rng.from_seed(0, "bench registration", case.name))
        for name in ("thaw", "inverting_gradients", "grad_inversion"):
            settings = {"consensus": "none"} if name == "grad_inversion" else {}
            images, chosen = all_seeds(ATTACKS[name].make(steps=case.steps, seeds=SEEDS, **settings), case, run)
            rows += offline(case, name, images)
            print(case.name, name, {r["method"]: round(r["psnr"], 2) for r in rows[-len(METHODS) :]}, flush=True)
        for row in coupled(case, run, images[chosen]):
            rows.append(row)
            print(row["case"], row["method"], round(row["psnr"], 2), row.get("info"), flush=True)
    averaged = summary(rows, "average of finished seeds", "none")
    joined = summary(rows, "grad_inversion, coupled", "none")
    save(
        "registration",
        options.threads,
        rows,
        options.out,
        note=f"{SEEDS} seeds, iterations as given; train-mode clients; labels and batch statistics granted; images are "
        "CIFAR-10 train images (JPEG re-encodings) and imagenet-sample photographs. 'none' is the pixel mean.",
        averaged=averaged,
        coupled=joined,
        verdict={"averaged": verdict(averaged), "coupled": verdict(joined)},
    )


if __name__ == "__main__":
    main()
