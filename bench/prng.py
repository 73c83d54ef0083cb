"""Seed searches on one core: how fast, and whether they open what they should and nothing else.

    python bench/prng.py [--quick]

The target: seeds below 2^20 in at most five minutes on two cores. Both searches read the labels of a set alone.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import harness
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sets.writing import SetWriter
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.mixing import coarse_targets
from frostglass.numerics.prng_search import clues_of, search_released
from frostglass.numerics.prng_search_own import search_own
from frostglass.numerics.prng_search_released import released_keys

LAW = MixLaw(6, 2)


def released_targets(seed: int, mode: str) -> np.ndarray:
    """Labels of 100 images in two rounds, as the released code would publish them."""
    keys = released_keys(seed, 100, 200, 2, LAW, 0)
    out = np.zeros((200, 10), np.float32)
    np.add.at(out, (np.arange(200)[:, None], keys.indices[:, :2] % 10), keys.coefficients[:, :2])
    return coarse_targets(torch.from_numpy(out), mode).numpy()  # type: ignore[arg-type]


def own_targets(seed: int | None, mode: str) -> np.ndarray:
    """Labels of a set that our own encoder wrote, with an insecure seed or a key of the system."""
    images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    encoder = InstaHide(k=6, private=2, public=images, labels=mode, insecure_seed=seed)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        SetWriter(encoder, images, torch.arange(100) % 10, 10, Path(folder) / "set", rounds=2).write()
        from frostglass.auditing.unmixing_inputs import read_encoded

        targets = read_encoded(Path(folder) / "set").targets
    assert targets is not None
    return targets.numpy()


def measured(kind: str, mode: str, planted: int | None, last: int) -> dict[str, Any]:
    """One search over [0, last)."""
    seed = last if planted is None else planted
    targets = released_targets(seed, mode) if kind == "released" else own_targets(planted, mode)
    clues = clues_of(targets, LAW)
    if kind == "released":
        search_released(clues, LAW, 100, last + 1, last + 2)  # compiled before the clock starts
    start = time.perf_counter()
    found = search_released(clues, LAW, 100, 0, last) if kind == "released" else search_own(clues, LAW, [200], 0, last)
    seconds = time.perf_counter() - start
    looked, right = last if found < 0 else found + 1, found == (-1 if planted is None else planted)
    return {
        "generator": kind, "labels": mode, "planted": planted, "found": found, "right": right,
        "seeds": looked, "seconds": round(seconds, 2), "seeds_per_second": round(looked / seconds),
    }  # fmt: skip


def main() -> None:
    options = harness.parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    last = 1 << (14 if options.quick else 20)
    rows = [
        measured(kind, mode, planted, last)
        for kind in ("released", "frostglass")
        for mode in ("exact", "quantised", "renormalised")
        for planted in (last - 3, None)
    ]
    harness.save("prng", 1, rows, options.out, range=last)


if __name__ == "__main__":
    main()
