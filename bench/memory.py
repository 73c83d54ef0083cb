"""Memory of an inversion at 224 px: one iteration of GradInversion, two seeds, up to 48 images.

    python bench/memory.py  # about twenty minutes on one thread

Every row runs in a process of its own. Peak resident size on a CPU, so kernels' own workspace is oneDNN's; what is
saved for the two backward passes is the same on any device. Networks are torchvision's, random, in train mode.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch

from frostglass.attacks.registry import ATTACKS
from frostglass.core.batch import one_hot
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Facts, Knows, ThreatModel
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.local_update import local_update
from frostglass.vision import networks
from harness import parser, peak_mib, save

CASES = [(network, images) for network in ("resnet18", "resnet50") for images in (1, 8, 16, 48)]
SEEDS, SIDE, CLASSES = 2, 224, 1000


def one(network: str, images: int) -> dict[str, Any]:
    """One row, in this process."""
    rng = Rng.from_seed(0)
    model = networks.build(
        f"torchvision:{network}", classes=CLASSES, channels=3, size=SIDE, options={}, rng=rng
    ).train()
    x, plan = rng.uniform((images, 3, SIDE, SIDE)), LocalPlan(mode="train")
    targets = one_hot(torch.arange(images), CLASSES)
    trace = local_update(model, x, targets, plan)
    facts = Facts(networks.domain_of(model), "train", (3, SIDE, SIDE), CLASSES, labels=targets, local_plan=plan)
    grants = frozenset({Knows.EXAMPLES, Knows.LABELS, Knows.BN_BATCH})
    update = Update(trace.gradients, trace.bn, images, plan)
    seen = ThreatModel("bench", grants).observe(model, [update], facts)
    del trace, update
    attack = ATTACKS["grad_inversion"].make(steps=1000, seeds=SEEDS, every=1000, matching="cosine", consensus="none")
    before, began = peak_mib(), time.process_time()
    run = Runtime(rng)
    attack.step(seen, attack.init(seen, run), run, 0)
    return {
        "peak_gib": round(peak_mib() / 1024, 2),
        "peak_gib_before": round(before / 1024, 2),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    made = parser(" ".join(__doc__.split()))
    made.set_defaults(threads=1)
    made.add_argument("--one", nargs=2, help="network, images: one row")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(one(options.one[0], int(options.one[1]))))
        return
    rows = []
    for network, images in CASES[:1] if options.quick else CASES:
        asked = [sys.executable, __file__, "--one", network, str(images), "--threads", str(options.threads)]
        told = subprocess.run(asked, check=True, capture_output=True, text=True)
        rows.append({"network": network, "images": images, **json.loads(told.stdout.splitlines()[-1])})
        print(rows[-1], file=sys.stderr, flush=True)
    save("memory", options.threads, rows, options.out, seeds=SEEDS, size=SIDE, iterations=1)


if __name__ == "__main__":
    main()
