"""What only a GPU can tell: inversion at 224 px, seeds and CUDA graphs, and the encoder beside a copy on the device.

    python bench/gpu.py                         all parts; goes on with the first row that is not there yet
    python bench/gpu.py --part table --limit 540  one part; no new row is begun after 540 seconds
    python bench/gpu.py --device cpu --quick    a smoke run on any machine, not for quoting

table   GradInversion and its rivals on torchvision's ResNet-18 and ResNet-50, random: speed and memory, not the
        paper's Table 4, whose networks were trained
seeds   eight seeds one by one and in one pass, eager and as a CUDA graph, and whether all four end alike
encode  complete encodings, mixing, and the kernel alone, as fractions of a copy of as many bytes on the device

Rows are written as they end. `vs_breaching.py --device cuda --seeds 8` sets the peer beside us.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import frostglass
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.registry import ATTACKS
from frostglass.core.files import write_json
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime, pick_device
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide
from frostglass.numerics import device_mixing, mixing
from frostglass.numerics.key_rows import KeyRows, MixLaw, draw_coefficients, draw_distinct, draw_mask
from frostglass.numerics.keystream import Secret
from harness import RESULTS, cifar, environment, parser
from seeds import observation

SHARED = {"steps": 1000, "seeds": 2, "every": 1000}
ATTACKED: dict[str, dict[str, Any]] = {
    "grad_inversion": {"name": "grad_inversion", "matching": "cosine", "tv": 3e-4, "bn_relative": True, **SHARED},
    "thaw": {"name": "thaw", **SHARED},
    "inverting_gradients": {"name": "inverting_gradients", **SHARED},
    "deep_inversion": {"name": "deep_inversion", **SHARED},
}
METRICS = ["psnr", "ssim", "fft2d", "iip_pixels", "iip_features"]
Rows = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
"""Names of rows, and what measures each."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, reset: bool = False) -> float | None:
    """GiB allocated on the device at the most, since the last reset."""
    if device.type != "cuda":
        return None
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)


# ---- inversion at 224 px


def table(device: torch.device, quick: bool) -> Rows:
    """GradInversion for every number of images, its rivals for one and eight."""
    sizes = (1, 2) if quick else (1, 8, 16, 32, 48)
    for network in ("resnet18",) if quick else ("resnet18", "resnet50"):
        for batch in sizes:
            for attack in ATTACKED if batch <= 8 else ("grad_inversion",):
                name = f"torchvision {network}, {batch} images, {attack}"
                yield name, partial(cell, network, batch, attack, device, quick)


def cell(network: str, batch: int, attack: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """One audit of one message."""
    asked = {**ATTACKED[attack], **({"steps": 3, "every": 3} if quick else {})}
    images = cifar().parent / "imagenet-sample"
    scenario = {
        "name": "224 px",
        "data": {"source": f"folder:{images}", "size": 64 if quick else 224},
        "model": {"name": f"torchvision:{network}", "mode": "train", "classes": 1000},
        "client": {"batch": batch, "batches": 1},
        "attack": [asked],
    }
    plan = {
        "name": "bench",
        "seed": 0,
        "scenario": [scenario],
        "threat": {"grants": ["examples", "labels", "bn_batch", "bn_running"]},
        "report": {"metrics": METRICS, "null": False},
    }
    peak(device, reset=True)
    found = frostglass.audit(plan, device=str(device)).cells[0]
    summary = found.summary
    scores = {} if summary is None else {"psnr": summary.psnr_mean, "ssim": summary.ssim_mean, **summary.extra_means}
    return {
        "status": found.status,
        "error": found.error,
        "iterations": asked["steps"],
        "seeds": asked["seeds"],
        "seconds": found.seconds,
        "ms_per_iteration": round(1e3 * found.seconds / asked["steps"], 2),
        "peak_gib": peak(device),
        **scores,
        "objective": found.objective,
        "objective_at_truth": found.objective_at_truth,
    }


# ---- seeds and graphs


def seeds(device: torch.device, quick: bool) -> Rows:
    """Eight seeds of `thaw`."""
    for network, batch in (
        (("lenet", 1),) if quick else (("lenet", 1), ("resnet20", 1), ("resnet18", 1), ("resnet18", 8))
    ):
        yield f"{network} at 32 px, {batch} images, 8 seeds", partial(four_ways, network, batch, device, quick)


def four_ways(network: str, batch: int, device: torch.device, quick: bool) -> dict[str, Any]:
    """One by one and in one pass, eager and recorded."""
    steps, count = (8, 2) if quick else (100, 8)
    row: dict[str, Any] = {"iterations": steps, "seeds": count}
    ends: dict[str, torch.Tensor] = {}
    for at_once in (1, count):
        for graph in (False, True):
            name = ("together" if at_once > 1 else "apart") + (", graph" if graph else "")
            attack = ATTACKS["thaw"].make(steps=steps, seeds=count, every=steps, mean=False, graph=graph)
            assert isinstance(attack, Inversion)
            attack, seen = replace(attack, at_once=at_once), observation(network, batch)
            run = Runtime(Rng.from_seed(0), device)
            peak(device, reset=True)
            state, taken = attack.init(seen, run), []
            for t in range(steps):
                wait(device)
                start = time.perf_counter()
                state, _ = attack.step(seen, state, run, t)
                wait(device)
                taken.append(time.perf_counter() - start)
            found = attack.read(seen, state)
            ends[name] = found.images
            row[name] = {
                "ms_per_iteration": round(1e3 * statistics.median(taken[5:]), 3),
                "first_iteration_s": round(taken[0], 2),
                "peak_gib": peak(device),
                "graph_used": found.info.get("cuda_graph"),
                "seeds_in_one_pass": attack._laid_out[seen].at_once,
            }
    row["mean_difference"] = {
        name: round(float((end - ends["apart"]).abs().mean()), 6) for name, end in ends.items() if name != "apart"
    }
    return row


# ---- encoding


def encode(device: torch.device, quick: bool) -> Rows:
    for size, batch, n in ((32, 128, 256),) if quick else ((32, 128, 5000), (32, 5000, 5000), (224, 128, 1024)):
        for kind, (source, out) in {
            "float32 -> float32": (torch.float32, torch.float32),
            "uint8 -> bfloat16": (torch.uint8, torch.bfloat16),
        }.items():
            for k in (4, 6):
                name = f"{size} px, {batch} of {n}, k = {k}, {kind}"
                yield name, partial(encodings, size, batch, n, k, source, out, device, quick)


def encodings(
    size: int, batch: int, n: int, k: int, source: torch.dtype, made: torch.dtype, device: torch.device, quick: bool
) -> dict[str, Any]:
    """Seconds of each way, and what share of a copy's speed it has."""
    d = 3 * size * size
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=device)
    images = images if source == torch.uint8 else images.float().div_(255)
    labels, out = torch.arange(n) % 10, torch.empty(batch, 3, size, size, dtype=made, device=device)
    stream = Secret.draw().stream("bench")
    keys = KeyRows(
        draw_distinct(stream, n, k, batch), draw_coefficients(stream, MixLaw(k, k), batch), draw_mask(stream, batch, d)
    )
    assert keys.bits is not None
    there = [torch.from_numpy(part).to(device) for part in (keys.indices, keys.coefficients, keys.bits)]
    flat, written = images.flatten(1), out.flatten(1)
    half = batch * d * (k * images.element_size() + out.element_size()) // 2  # a copy reads and writes
    one, other = (torch.zeros(half, dtype=torch.uint8, device=device) for _ in range(2))
    rows = torch.randint(0, n, (batch,)).tolist()
    encoders = {b: InstaHide(k=k, dtype=made, backend=b) for b in ("auto", "torch")}
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: other.copy_(one),
        "complete": lambda: encoders["auto"].encode_rows(images, labels, rows, num_classes=10, out=out),
        "complete, torch's operations": lambda: encoders["torch"].encode_rows(
            images, labels, rows, num_classes=10, out=out
        ),
        "mixing, keys from the CPU": lambda: mixing.mix(flat, None, k, keys, "sign", written),
    }
    if mixing.device_kernel(device):
        ways["kernel alone"] = lambda: device_mixing.launch(
            flat, flat, k, (there[0], there[1], there[2]), mixing.affine(source), "sign", written
        )
    taken = {name: timed(way, device, 3 if quick else 50) for name, way in ways.items()}
    return {
        "seconds": taken,
        "share_of_a_copy": {name: round(taken["copy"] / s, 3) for name, s in taken.items()},
        "copy_gb_per_s": round(2 * half / taken["copy"] / 1e9, 1),
        "triton": mixing.device_kernel(device),
    }


def timed(way: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, the device waited for."""
    for _ in range(3):
        way()
    taken = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        way()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


PARTS: dict[str, Callable[[torch.device, bool], Rows]] = {"encode": encode, "seeds": seeds, "table": table}


def main() -> None:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--part", choices=PARTS, action="append", help="left out: all")
    made.add_argument("--device", default="cuda")
    made.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no row is begun")
    options = made.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        return print("gpu: torch sees no CUDA device; there is nothing to measure.")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", PrivacyCaution)
    device, began = pick_device(options.device), time.monotonic()
    path: Path = (options.out or RESULTS) / ("gpu_quick.json" if options.quick else "gpu.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for part in options.part or PARTS:
        for name, measure in PARTS[part](device, options.quick):
            if any((r["part"], r["row"]) == (part, name) for r in rows) or time.monotonic() - began > options.limit:
                continue
            try:
                row = measure()
            except torch.cuda.OutOfMemoryError as wrong:
                row = {"error": str(wrong).splitlines()[0]}
            rows.append({"part": part, "row": name, **row})
            write_json(path, {"bench": "gpu", "environment": environment(options.threads), "rows": rows})
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
