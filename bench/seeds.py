"""Seeds in one pass against seeds one by one: CPU time of an iteration of `thaw`, and peak memory.

    python bench/seeds.py  # ten minutes on one thread

Every side runs in a process of its own, taking turns, on one observation (bundled photographs, train mode, labels and
the batch's statistics granted). "chosen" is what a run takes by itself (`inversion.together`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.target import lay_out
from frostglass.attacks.inversion.together import seeds_at_once
from frostglass.attacks.registry import ATTACKS
from frostglass.core.batch import one_hot
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Facts, Knows, Observation, ThreatModel
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.local_update import local_update
from frostglass.vision import datasets, networks
from harness import parser, peak_mib, save

CASES = [
    *((name, 1, seeds) for name in ("lenet", "small_bn_cnn", "resnet20", "resnet18") for seeds in (2, 4, 8)),
    *((name, rows, 4) for name in ("lenet", "small_bn_cnn", "resnet20") for rows in (2, 4, 8)),
]
STEPS, TURNS = 12, 3


def observation(name: str, rows: int) -> Observation:
    model = networks.build(name, classes=10, channels=3, size=32, options={}, rng=Rng.from_seed(0)).train()
    held, plan = datasets.load("photos", size=32, rows=range(rows)), LocalPlan(mode="train")
    targets = one_hot(held.labels, 10)
    trace = local_update(model, held.images, targets, plan)
    shape = (3, 32, 32)
    facts = Facts(networks.domain_of(model), "train", shape, classes=10, labels=targets, local_plan=plan)
    grants = frozenset({Knows.EXAMPLES, Knows.LABELS, Knows.BN_BATCH})
    return ThreatModel("bench", grants).observe(model, [Update(trace.gradients, trace.bn, rows, plan)], facts)


def one(name: str, rows: int, seeds: int, at_once: int, steps: int) -> dict[str, Any]:
    """One side, in this process."""
    seen, run = observation(name, rows), Runtime(Rng.from_seed(0))
    attack = ATTACKS["thaw"].make(steps=1000, seeds=seeds, every=1000)
    assert isinstance(attack, Inversion)
    attack = replace(attack, at_once=at_once)
    state, taken = attack.init(seen, run), []
    for t in range(steps):
        start = time.process_time()
        state, _ = attack.step(seen, state, run, t)
        taken.append(time.process_time() - start)
    chosen = min(seeds, seeds_at_once(lay_out(seen, run), rows))
    return {"seconds": statistics.median(taken[2:]), "peak_mib": peak_mib(), "chosen": chosen}


def turn(case: tuple[str, int, int], at_once: int, steps: int, threads: int) -> dict[str, Any]:
    asked = [*map(str, case), str(at_once), str(steps), str(threads)]
    told = subprocess.run([sys.executable, __file__, "--one", *asked], check=True, capture_output=True, text=True)
    return dict(json.loads(told.stdout.splitlines()[-1]))


def main() -> None:
    made = parser(" ".join(__doc__.split()))
    made.set_defaults(threads=1)
    made.add_argument("--one", nargs=6, help="network, images, seeds, seeds at once, iterations, threads: one side")
    options = made.parse_args()
    if options.one:
        torch.set_num_threads(int(options.one[5]))
        print(json.dumps(one(options.one[0], *map(int, options.one[1:5]))))
        return
    rows = []
    for case in CASES[:2] if options.quick else CASES:
        sides: dict[str, list[dict[str, Any]]] = {"apart": [], "together": []}
        for _ in range(1 if options.quick else TURNS):
            for side, at_once in (("apart", 1), ("together", case[2])):
                sides[side].append(turn(case, at_once, STEPS, options.threads))
        seconds = {side: statistics.median(t["seconds"] for t in told) for side, told in sides.items()}
        row = {
            "network": case[0],
            "images": case[1],
            "seeds": case[2],
            "chosen": sides["together"][0]["chosen"],
            "turns": len(sides["apart"]),
            "cpu_seconds_per_iteration": seconds,
            "all_turns": {side: [round(t["seconds"], 4) for t in told] for side, told in sides.items()},
            "times_less_cpu": round(seconds["apart"] / seconds["together"], 2),
            "peak_mib": {side: max(t["peak_mib"] for t in told) for side, told in sides.items()},
        }
        rows.append(row)
        print(Path(__file__).stem, *case, row["times_less_cpu"], row["peak_mib"], file=sys.stderr, flush=True)
    note = "at_once forced to all seeds for `together`, also where a run would choose fewer"
    save("seeds", options.threads, rows, options.out, iterations=STEPS, seed=0, note=note)


if __name__ == "__main__":
    main()
