"""Unmixing at full size, through the command line: the public challenge's format and parameters, and 50,000 encodings.

    python bench/challenge.py [--sets 3] [--network similarity.safetensors] [--memory 50000]

A challenge is made as in 2020 (100 private images, 50 rounds, k = 6 with two private ones, 5,000 encodings, exact
labels; a pool of 10,000 patches with more than 40 SIFT key points), attacked with `frostglass unmix`, which is told
the number of images, k and private slots, and scored with `frostglass challenge score --either-sign`. Private images
are CIFAR-10 training images; keys come from an insecure seed, so that the sets repeat. `--network` adds `unmix_learned`
with a network from `frostglass fit-similarity` on the CIFAR-10 test file. Sets that are in the JSON are not run again.

`--memory N` attacks N encodings of 100 images once (N / 100 rounds) and reports the greatest resident size.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from frostglass.core.files import write_json
from harness import RESULTS, cifar, environment, parser

KNOWN = "images={n},k=6,private=2"


def frostglass(*arguments: str | Path) -> tuple[str, resource.struct_rusage]:
    """(stdout, what it used) of the command line, in a process of its own."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        started = subprocess.Popen([sys.executable, "-m", "frostglass", *map(str, arguments)], stdout=out, stderr=told)
        _, status, used = os.wait4(started.pid, 0)
        out.seek(0)
        told.seek(0)
        if status:
            sys.exit(f"frostglass {arguments[0]}: {told.read().strip()[-400:]}")
        return out.read(), used


def pool(folder: Path, photos: str | None) -> Path:
    """Public patches: of photographs if there are any, else of other CIFAR-10 images."""
    out = folder / "pool"
    if photos:
        frostglass("public-pool", photos, out, "--seed", "1")
    else:
        source = f"parquet:{cifar() / 'test-00000-of-00001.parquet'}"
        frostglass("public-pool", source, out, "--cut", "32", "--key-points", "-1", "--seed", "1")
    return out


def one_set(folder: Path, public: Path, seed: int, images: int, rounds: int, attack: str) -> dict[str, Any]:
    """A challenge, attacked and scored."""
    name = f"{images}-{rounds}-{seed}"
    made, run = folder / f"challenge-{name}", folder / f"run-{name}-{attack.partition(':')[0]}"
    source = f"parquet:{cifar() / 'train-00000-of-00001.parquet'}"
    if not made.exists():
        frostglass(
            "challenge", "make", source, made, "--public", public, "--insecure-seed", str(seed), "--private-images",
            str(images), "--rounds", str(rounds),
        )  # fmt: skip
    begun = time.perf_counter()
    known = KNOWN.format(n=images)
    text, used = frostglass(
        "unmix", made, "--out", run, "--known", known, "--attack", attack, "--json", "--device", "cpu"
    )
    (cell,) = json.loads(text)["cells"]
    row = {
        "attack": cell["attack"],
        "settings": cell["settings"]["attack"],
        "images": images,
        "encodings": images * rounds,
        "seed": seed, "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": used.ru_maxrss // 1024,
    }  # fmt: skip
    row["settings"].pop("network", None)
    scores = json.loads(frostglass("challenge", "score", made, run / "decryption.npy", "--either-sign", "--json")[0])
    return row | {k: v for k, v in scores.items() if k not in ("commitment", "encodings")}


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--sets", type=int, default=3)
    made.add_argument("--network", type=Path)
    made.add_argument("--memory", type=int, default=0, metavar="ENCODINGS")
    made.add_argument("--photos", help="source of photographs for the pool: folder:PATH or parquet:FILE")
    options = made.parse_args()
    path: Path = (options.out or RESULTS) / "challenge.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() and not options.quick else []
    attacks = ["unmix_statistical"]
    if options.network:
        attacks.append(f"unmix_learned:network={options.network.resolve()}")
    size, sets = (10, 1) if options.quick else (100, options.sets)
    plan = [(size, seed, 50, a) for seed in range(1, sets + 1) for a in attacks]
    if options.memory:
        plan.append((size, 1, options.memory // size, "unmix_statistical:rounds=2"))
    about = {
        "private": "CIFAR-10 train images",
        "pool": "patches of photographs" if options.photos else "CIFAR-10 test images",
        "granted": "encodings, exact labels, number of private images, k, private slots",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        public = pool(Path(folder), options.photos)
        for images, seed, rounds, attack in plan:
            known = images * rounds, seed, attack.partition(":")[0]
            if any((r["encodings"], r["seed"], r["attack"]) == known for r in rows):
                continue
            rows.append(one_set(Path(folder), public, seed, images, rounds, attack))
            print(rows[-1], file=sys.stderr, flush=True)
            if not options.quick:
                value = {"bench": "challenge", "environment": environment(options.threads), **about}
                write_json(path, {**value, "rows": rows})


if __name__ == "__main__":
    main()
