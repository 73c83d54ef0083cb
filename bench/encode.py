"""How fast a complete InstaHide encoding is: fresh key, coefficients, gather, mix, mask, labels and ledger, one thread.

    python bench/encode.py [--seconds 2] [--memories 5] [--out bench/results/encode.json]

An encoding of d pixels reads k images and writes one: (k + 1) 4 d bytes in float32, (k + 2) d from uint8 to bfloat16.
It is compared, turn by turn, with memcpy of the same bytes (half of them copied: a copy reads and writes), three times:

    memcpy, rows    rows of images from random places of the same table into one fixed buffer, so that its sources are
                    in the caches exactly as far as those of an encoding are: like with like
    memcpy, table   one long piece from a random place of memory as large as that table
    memcpy, cached  between two fixed buffers, which at 32 pixels and batch 128 hardly leave the second-level cache

How fast a copy is depends on where its memory lies, by a fifth from one allocation to the next. So each case is
measured several times over, in new memory each time; what is said is the median of those, and their range.

Further with mixing alone under fixed keys (its sources stay cached, as those of memcpy, cached); a plain torch path
(embedding_bag, mask by table, the same kind of keys); the torch path of this library; and the released algorithm's
step, written anew from its description (python row loop for the coefficients, per-slot permuted gather, randint mask).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import argparse
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide
from frostglass.numerics.key_rows import KeyRows, MixLaw, draw_coefficients, draw_distinct, draw_mask
from frostglass.numerics.keystream import Keystream, Secret
from frostglass.numerics.mixing import mix

SEED = 0
DRAWS = 64  # sets of rows, and places to copy from, made beforehand: together they cover each table many times
TURN = 0.06  # seconds that a contestant runs before the next has its turn
KINDS = {
    "float32 -> float32": (4, 4),  # any numbers in [0, 1]
    "float32 of bytes -> float32": (4, 4),  # bytes over 255, as images read from files are; bytes are what is mixed
    "uint8 -> float32": (1, 4),
    "uint8 -> bfloat16": (1, 2),
}
SIZES = ((32, 128, 5000), (32, 5000, 5000), (224, 128, 256))


def released_step(x: torch.Tensor, k: int, rows: torch.Tensor) -> torch.Tensor:
    """The released algorithm, from its description."""
    weights = np.abs(np.random.normal(size=(len(rows), k)))
    for i in range(len(rows)):
        weights[i] /= weights[i].sum()
        while weights[i].max() > 0.65:
            weights[i] = np.abs(np.random.normal(size=k))
            weights[i] /= weights[i].sum()
    lam = torch.from_numpy(weights).float().view(-1, k, 1)
    mixed = lam[:, 0] * x[rows]
    for j in range(1, k):
        order = torch.randperm(len(x))
        mixed += lam[:, j] * x[order[rows]]
    return mixed * (torch.randint(0, 2, mixed.shape, dtype=torch.float32) * 2 - 1)


class PlainTorch:
    """embedding_bag on a float32 table and a mask by table look-up, with keys of the same quality."""

    def __init__(self, x: torch.Tensor, k: int) -> None:
        self.x, self.law = x, MixLaw(k, k)
        self.stream: Keystream = Secret.draw().stream("bench")
        flips = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.int32)
        self.table = flips << 31

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        b, d = len(rows), self.x.shape[1]
        ranks = draw_distinct(self.stream, len(self.x) - 1, self.law.k - 1, b)
        index = torch.from_numpy(np.concatenate([rows[:, None], ranks + (ranks >= rows[:, None])], 1))
        weights = torch.from_numpy(draw_coefficients(self.stream, self.law, b))
        mixed = torch.nn.functional.embedding_bag(index, self.x, mode="sum", per_sample_weights=weights)
        bits = torch.from_numpy(draw_mask(self.stream, b, d))
        flips = self.table[bits.int()].view(b, d)
        return mixed.mul_(2).sub_(1).view(torch.int32).bitwise_xor_(flips).view(torch.float32)


def contestants(size: int, batch: int, n: int, k: int, kind: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; each call makes `batch` encodings or moves as many bytes."""
    d, (width_in, width_out) = 3 * size * size, KINDS[kind]
    made = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
    floats = torch.rand(n, 3, size, size) if kind == "float32 -> float32" else made.float().div_(255)
    x, flat = (made if width_in == 1 else floats), floats.flatten(1)
    y = torch.arange(n) % 10
    dtype = torch.bfloat16 if width_out == 2 else torch.float32
    out = torch.empty(batch, 3, size, size, dtype=dtype)
    orders = np.random.default_rng(SEED)
    encoders = {b: InstaHide(k=k, dtype=dtype, backend=b) for b in ("fused", "torch")}
    plain = PlainTorch(flat, k)
    s = Secret.draw().stream("bench")
    keys = KeyRows(draw_distinct(s, n, k, batch), draw_coefficients(s, MixLaw(k, k), batch), draw_mask(s, batch, d))
    half = batch * d * (k * width_in + width_out) // 2
    source, target = np.ones(half, np.uint8), np.empty(half, np.uint8)
    table = np.ones(half + n * d * width_in, np.uint8)
    places = itertools.cycle(orders.integers(0, n * d * width_in, DRAWS).tolist())
    images, stacked = x.numpy().reshape(n, -1), target.view(x.numpy().dtype).reshape(-1, d)
    chosen = itertools.cycle([orders.integers(0, n, len(stacked)) for _ in range(DRAWS)])
    asked = itertools.cycle([orders.permutation(n)[:batch] for _ in range(DRAWS)])

    def memcpy_table() -> None:
        start = next(places)
        np.copyto(target, table[start : start + half])

    return {
        "complete": lambda: encoders["fused"].encode_rows(x, y, next(asked), num_classes=10, out=out),
        "complete, new memory": lambda: encoders["fused"].encode_rows(x, y, next(asked), num_classes=10),
        "mixing, fixed keys": lambda: mix(x.flatten(1), None, k, keys, "sign", out.flatten(1), "fused"),
        "memcpy, rows": lambda: np.take(images, next(chosen), axis=0, out=stacked, mode="clip"),
        "memcpy, table": memcpy_table,
        "memcpy, cached": lambda: np.copyto(target, source),
        "plain torch": lambda: plain(next(asked)),
        "torch backend": lambda: encoders["torch"].encode_rows(x, y, next(asked), num_classes=10, out=out),
        "released step": lambda: released_step(flat, k, torch.from_numpy(next(asked))),
    }


def measure(turns: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Seconds per call, the median over turns: all contestants take turns, so that other load meets all alike.

    Each turn counts with the mean of its calls: keys are drawn ahead for 4096 encodings, which one call in 32 pays for.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    for run in turns.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["complete"]) < 3:
        for name, run in turns.items():
            run()  # brings its own data back to the caches
            calls, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < TURN or calls == 0:
                run()
                calls += 1
            times[name].append(spent / calls)
    return {name: statistics.median(t) for name, t in times.items()}


def ratios(times: dict[str, float]) -> dict[str, float]:
    own = times["complete"]
    return {
        **{f"fraction of memcpy, {what}": times[f"memcpy, {what}"] / own for what in ("rows", "table", "cached")},
        "mixing under fixed keys, fraction of memcpy, cached": times["memcpy, cached"] / times["mixing, fixed keys"],
        "times plain torch": times["plain torch"] / own,
        "times released step": times["released step"] / own,
    }


def over_memories(found: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Median, least and greatest of each number, and all of them in the order of the memories."""
    return {
        name: {"median": statistics.median(v), "least": min(v), "greatest": max(v), "all": v}
        for name in found[0]
        for v in [[one[name] for one in found]]
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per case and memory")
    parser.add_argument("--memories", type=int, default=5, help="how often each case is set up anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "encode.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PrivacyCaution)
    torch.manual_seed(SEED), np.random.seed(SEED)
    cases = []
    load = os.getloadavg()[0]
    for size, batch, n in SIZES:
        for k in (4, 6):
            for kind in KINDS:
                found = [measure(contestants(size, batch, n, k, kind), asked.seconds) for _ in range(asked.memories)]
                times, compared = over_memories(found), over_memories([ratios(one) for one in found])
                case = {"size": size, "batch": batch, "images": n, "k": k, "kind": kind, "seconds per call": times}
                case["images per second"] = {name: batch / t["median"] for name, t in times.items()}
                case["ratios"] = compared
                cases.append(case)
                short = ", ".join(
                    f"{v['median']:.2f} ({v['least']:.2f} to {v['greatest']:.2f}) {what}"
                    for what, v in compared.items()
                )
                rate = case["images per second"]["complete"]
                print(f"{size} px, {batch} of {n}, k = {k}, {kind}: {rate:,.0f}/s; {short}", flush=True)
    result = {
        "what": "complete InstaHide encoding, one thread: key, coefficients, gather, mix, mask, labels, ledger",
        "memcpy": "copies (bytes read + written) / 2 of an encoding. rows: random rows of the same image table, in the "
        "same cache state as the sources of an encoding; table: one long piece of a memory as large; cached: a fixed "
        "buffer onto another",
        "seed": SEED,
        "keys": "operating system",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": 1,
        "memories": asked.memories,
        "load average": [load, os.getloadavg()[0]],
        "versions": {p: version(p) for p in ("torch", "numpy", "numba", "cryptography")}
        | {"python": platform.python_version()},
        "cases": cases,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
