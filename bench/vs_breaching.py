"""Inverting Gradients and see-through gradients: Frostglass and breaching on one network, batch and iteration count.

The peer lives in an environment of its own, which this bench never installs:

    python3 -m venv peer && peer/bin/pip install breaching==0.1.2 kornia torch==2.13.0 torchvision==0.28.0
    python bench/vs_breaching.py --peer peer/bin/python  # eight minutes on one thread
    python bench/vs_breaching.py --peer peer/bin/python --device cuda --seeds 8 --steps 200

An iteration is one of all seeds: the peer runs them one after another, and its time is multiplied. On CUDA we have a
third side, which replays iterations as a graph, and peak memory is that of the device.

Both sides run in processes of their own, taking turns, on the same saved problem (a ResNet-18 with CIFAR stem, its
gradient of bundled photographs). The peer is only ever run: parts of it carry a non-commercial licence.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NOTE = (
    "Eval-mode gradient, labels granted, the attacks' own settings at one number of iterations, TV alike. PSNR is "
    "after these few iterations, not what either attack reaches. double_backward takes second derivatives as the "
    "peer does, seven times a forward pass in convolutions; frozen_fd needs five. Ours takes 3 x 3 convolutions of "
    "stride 1 by tiles (numerics.tiled_convolution) and leaves others to oneDNN as the peer does; it keeps freed "
    "memory (core.memory), and saves the slow forms of convolution and batch normalisation (numerics.second_order), "
    "the matching loss on one long vector (numerics.distance) and unread statistics. numba is 120 MiB of the peak. "
    "On a CPU neither side loads Triton, which is for GPUs (65 MiB where it is installed)."
)
ENGINES = ("double_backward", "frozen_fd", "graph")
"""Our sides; the last on CUDA alone."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def allow_cpu_torchvision() -> None:
    """Declares the two operators without which a CUDA torchvision does not import beside a CPU torch."""
    import torch

    if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def victim() -> Any:
    """ResNet-18 with CIFAR stem, random, with running statistics that are not 0 and 1; takes normalised images."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def make_problem(path: Path, batch: int) -> None:
    """Weights, normalised images, labels and gradient, by one side for both."""
    import torch

    from frostglass.vision import datasets

    allow_cpu_torchvision()
    model = victim()
    held = datasets.load("photos", size=32, rows=range(batch))
    constants = [torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD)]
    x = (held.images - constants[0]) / constants[1]
    loss = torch.nn.functional.cross_entropy(model(x), held.labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    torch.save({"state": model.state_dict(), "x": x, "y": held.labels, "g": [g.detach() for g in grads]}, path)


def load_problem(path: Path) -> tuple[Any, dict[str, Any]]:
    import torch

    allow_cpu_torchvision()
    held = torch.load(path, weights_only=True)
    model = victim()
    model.load_state_dict(held["state"])
    return model, held


class Clock:
    """Wall and CPU time of every iteration, from calls that both sides make once an iteration."""

    def __init__(self, device: str) -> None:
        self.cuda, self.marks = device == "cuda", list[tuple[float, float]]()

    def tick(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def row(self, times: int = 1) -> dict[str, float]:
        gaps = list(zip(self.marks[1:-1], self.marks[2:], strict=False))  # the first gap holds warm-up
        wall, cpu = ([b[i] - a[i] for a, b in gaps] for i in (0, 1))
        return {
            "wall_s_per_iteration": round(times * statistics.median(wall), 5),
            "cpu_s_per_iteration": round(times * statistics.median(cpu), 5),
        }


def psnr(found: Any, truth: Any) -> float:
    """Mean PSNR after one-to-one matching, pixels in [0, 1]; the same code scores both sides."""
    import torch

    constants = [torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD)]
    a, b = ((t.detach() * constants[1] + constants[0]).clamp(0, 1).flatten(1) for t in (found, truth))
    cost = torch.cdist(a.double(), b.double()).square() / a.shape[1]
    from scipy.optimize import linear_sum_assignment

    r, c = linear_sum_assignment(cost.numpy())
    return float((-10 * cost[torch.as_tensor(r), torch.as_tensor(c)].log10()).mean())


def run_ours(path: Path, attack: str, steps: int, seed: int, seeds: int, device: str, engine: str) -> dict[str, Any]:
    import torch

    from frostglass.attacks.registry import ATTACKS
    from frostglass.core.drive import drive
    from frostglass.core.randomness import Rng
    from frostglass.core.runtime import Runtime
    from frostglass.core.threat import GradientMessage, Observation
    from frostglass.numerics.bn import running_statistics
    from frostglass.vision.networks import Normalised, domain_of

    inner, held = load_problem(path)
    model = Normalised(inner, MEAN, STD).eval()
    names = [n for n, _ in model.named_parameters()]
    sent = dict(zip(names, held["g"], strict=True))
    seen = Observation(
        model=model,
        messages=(GradientMessage(sent, "gradient"),),
        domain=domain_of(model),
        mode="eval",
        image_shape=tuple(held["x"].shape[1:]),
        classes=10,
        examples=len(held["x"]),
        labels=torch.nn.functional.one_hot(held["y"], 10).float(),
        bn_running=running_statistics(model),
    )
    name = {"invertinggradients": "inverting_gradients", "seethroughgradients": "grad_inversion"}[attack]
    settings: dict[str, Any] = {"steps": steps, "every": steps, "seeds": seeds}
    settings |= {"graph": True} if engine == "graph" else {"engine": engine}
    if name == "inverting_gradients":
        settings |= {"tv": 0.2}  # the peer's
    if name == "grad_inversion":
        settings |= {"consensus": "none"}  # the peer has no group term
    made = ATTACKS[name].make(**settings)
    clock = Clock(device)
    step = type(made).step

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.tick()
        return step(self, *args, **kwargs)

    type(made).step = timed  # type: ignore[method-assign]
    found = drive(made, seen, Runtime(Rng.from_seed(seed, "bench"), torch.device(device)))
    clock.tick()
    constants = [torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD)]
    return {**clock.row(), "psnr": round(psnr((found.images - constants[0]) / constants[1], held["x"]), 2)}


def run_peer(path: Path, attack: str, steps: int, seed: int, seeds: int, device: str) -> dict[str, Any]:
    import torch

    model, held = load_problem(path)
    import breaching

    torch.manual_seed(seed)
    config = breaching.get_attack_config(attack)
    config.optim.max_iterations, config.optim.callback = steps, 100_000
    config.restarts.num_trials = seeds
    loss = torch.nn.CrossEntropyLoss()
    shape = tuple(held["x"].shape[1:])
    about = SimpleNamespace(
        modality="vision", size=(50_000,), classes=10, shape=shape, normalize=True, mean=MEAN, std=STD
    )
    attacker = breaching.attacks.prepare_attack(
        model, loss, config, {"device": torch.device(device), "dtype": torch.float}
    )
    model = model.to(device)
    held = {name: value.to(device) if hasattr(value, "to") else value for name, value in held.items()}
    held["g"] = [g.to(device) for g in held["g"]]
    sent = [{"parameters": list(model.parameters()), "buffers": list(model.buffers()), "metadata": about}]
    about_user = {"num_data_points": len(held["x"]), "labels": held["y"], "local_hyperparams": None}
    seen = [{"gradients": held["g"], "buffers": None, "metadata": about_user}]
    clock, inner = Clock(device), attacker._compute_objective

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock.tick()
        return inner(*args, **kwargs)

    attacker._compute_objective = timed
    found, _ = attacker.reconstruct(sent, seen, {}, dryrun=False)
    clock.tick()
    return {**clock.row(seeds), "psnr": round(psnr(found["data"].cpu(), held["x"].cpu()), 2)}


def child(options: argparse.Namespace) -> None:
    if options.device == "cpu":
        sys.modules["triton"] = None  # type: ignore[assignment]  # for GPUs; where it is installed torch loads 65 MiB of it
    import torch

    torch.set_num_threads(options.threads)
    given = Path(options.problem), options.attack, options.steps, options.seed, options.seeds, options.device
    row = run_peer(*given) if options.side == "breaching" else run_ours(*given, options.side)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated() // 2**20
    row |= {"peak_mib": peak, "torch": torch.__version__}
    print("ROW " + json.dumps(row))


def ask(python: str, problem: str, side: str, attack: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [python, __file__, "--side", side, "--problem", problem, "--attack", attack, "--seed", str(seed)]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    command += ["--seeds", str(options.seeds), "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("ROW ")), None)
    if line is None:
        sys.exit(f"{side} failed on {attack}:\n{done.stderr[-2000:]}")
    return dict(json.loads(line[4:]))


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for batch in options.batches:
        with tempfile.TemporaryDirectory() as folder:
            problem = str(Path(folder) / "problem.pt")
            make_problem(Path(problem), batch)
            for attack in ("invertinggradients", "seethroughgradients"):
                ours = ENGINES if options.device == "cuda" else ENGINES[:2]
                sides: dict[str, list[dict[str, Any]]] = {side: [] for side in (*ours, "breaching")}
                for seed in range(options.repeats):  # taking turns, so that a busy machine hurts all alike
                    for side, held in sides.items():
                        python = options.peer if side == "breaching" else sys.executable
                        held.append(ask(python, problem, side, attack, seed, options))
                rows.append(summary(attack, batch, options, sides))
                print(json.dumps(rows[-1], indent=1), file=sys.stderr)
    return rows


def summary(
    attack: str, batch: int, options: argparse.Namespace, sides: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    from harness import spread

    def middle(side: str, key: str) -> float:
        return statistics.median(r[key] for r in sides[side])

    keys = ("cpu_s_per_iteration", "wall_s_per_iteration", "peak_mib")
    ratios = {e: {k: round(middle("breaching", k) / middle(e, k), 3) for k in keys} for e in sides if e != "breaching"}
    psnr = {side: spread([r["psnr"] for r in held]) for side, held in sides.items()}
    return {
        "attack": attack, "network": "ResNet-18, CIFAR stem, random, eval mode", "batch": batch, "steps": options.steps,
        "seeds": options.seeds, "device": options.device,
        "breaching_over_frostglass": ratios, "psnr": psnr, **sides,
    }  # fmt: skip


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--peer", help="python of the environment that holds breaching")
    made.add_argument("--batches", type=int, nargs="+", default=[8])
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--repeats", type=int, default=3, help="seeds, one process of each side for each")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seeds", type=int, default=1, help="starts (restarts of the peer), all of them in an iteration")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--out", type=Path, default=None)
    made.add_argument("--quick", action="store_true")
    made.add_argument("--side", choices=[*ENGINES, "breaching"], help=argparse.SUPPRESS)
    made.add_argument("--problem", help=argparse.SUPPRESS)
    made.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    made.add_argument("--attack", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.side:
        return child(options)
    if not options.peer:
        print("vs_breaching: no --peer environment given; nothing to compare with.")
        return None
    from harness import save

    name = "vs_breaching" if options.device == "cpu" else "vs_breaching_cuda"
    save(name, options.threads, compare(options), options.out, note=NOTE)
    return None


if __name__ == "__main__":
    main()
