"""One process of tests/federated/test_ddp_tap.py: trains with and without taps, and saves what came of it.

Run as: python ddp_worker.py RANK WORLD FOLDER
"""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from frostglass.core.errors import BadInput
from frostglass.federated.ddp import record_ddp, record_shards

STEPS = 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4 + rank, 1, 8, 8, generator=made), torch.randint(0, 10, (4 + rank,), generator=made)


def own_gradient(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """By plain autograd on a copy: what the tap must have seen."""
    alone = copy.deepcopy(model)
    for p in alone.parameters():
        p.grad = None
    for x, y in batches:
        nn.functional.cross_entropy(alone(x), y).backward()
    return {n: p.grad.clone() for n, p in alone.named_parameters() if p.grad is not None}


def train(
    rank: int, folder: Path, name: str, *, tapped: bool, accumulate: int = 1, own_hook: bool = False,
    broken: bool = False, synchronised: bool = False, taps: dict[str, Any] | None = None, **settings: Any,
) -> None:  # fmt: skip
    """Trains and saves weights; with a tap also the gradients that it should have seen."""
    ddp = DistributedDataParallel(network(), **settings)
    tap = None
    if tapped:
        how = {"hook": fp16_compress_hook} if own_hook else {}
        tap = record_ddp(ddp, folder / f"{name}-record", **how, **(taps or {}))
        if broken:
            tap.take = None  # type: ignore[assignment]
    elif own_hook:
        ddp.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    for step in range(STEPS):
        batches = [batch(rank, 10 * step + i) for i in range(accumulate)]
        if tapped:
            save_file(own_gradient(ddp.module, batches), folder / f"{name}-own-{rank}-{step + 1}.safetensors")
        optimizer.zero_grad()
        for i, (x, y) in enumerate(batches):
            with ddp.no_sync() if i < accumulate - 1 and not synchronised else nullcontext():
                nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
    ended(ddp, tap, folder / f"{name}-{'tapped' if tapped else 'plain'}-{rank}.safetensors")


def ended(ddp: DistributedDataParallel, tap: Any, weights: Path) -> None:
    if tap is not None:
        tap.close()
    save_file({n: t.contiguous() for n, t in ddp.module.state_dict().items()}, weights)


def train_unevenly(rank: int, folder: Path, name: str, *, tapped: bool, by_initial: bool) -> None:
    """Under `ddp.join`: rank 0 has the fewest batches, and answers the others with zeros when it has no more."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=0.01)
    tap = record_ddp(ddp, folder / f"{name}-record") if tapped else None
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    with ddp.join(divide_by_initial_world_size=by_initial):
        for step in range(STEPS + rank):
            x, y = batch(rank, step)
            if tapped:
                save_file(own_gradient(ddp.module, [(x, y)]), folder / f"{name}-own-{rank}-{step + 1}.safetensors")
            optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            optimizer.step()
    ended(ddp, tap, folder / f"{name}-{'tapped' if tapped else 'plain'}-{rank}.safetensors")


def shards(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 9))
    whole = copy.deepcopy(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tap = record_shards(model, optimizer, folder / "shards")
    total: dict[str, Tensor] = {}
    for r in range(world):
        x, y = batch(r, 0)
        for n, g in own_gradient(whole, [(x, y % 9)]).items():
            total[n] = total.get(n, 0) + g / world
    save_file(total, folder / f"average-{rank}.safetensors")
    x, y = batch(rank, 0)
    nn.functional.cross_entropy(model(x), y % 9).backward()
    optimizer.step()
    tap.close()


def refused(folder: Path) -> list[str]:
    said = []
    flat = FullyShardedDataParallel(nn.Linear(5, 3), device_id=torch.device("cpu"))
    ddp = DistributedDataParallel(network())
    ddp.register_comm_hook(None, fp16_compress_hook)
    for call in (
        lambda: record_ddp(ddp, folder / "refused"),
        lambda: record_ddp(network(), folder / "refused"),  # type: ignore[arg-type]
        lambda: record_shards(network(), torch.optim.SGD(ddp.parameters(), 0.1), folder / "refused"),
        lambda: record_shards(
            network(), torch.optim.SGD(ddp.parameters(), 0.1), folder / "refused", loss_scale=lambda: 2.0
        ),
        lambda: record_shards(flat, torch.optim.SGD(flat.parameters(), 0.1), folder / "refused"),
    ):
        try:
            call()
        except BadInput as wrong:
            said.append(str(wrong))
    return said


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for tapped in (False, True):
        train(rank, folder, "one_bucket", tapped=tapped)
        train(rank, folder, "buckets", tapped=tapped, bucket_cap_mb=0.01)
        train(rank, folder, "accumulated", tapped=tapped, accumulate=2, bucket_cap_mb=0.01)
        train(rank, folder, "carried", tapped=tapped, accumulate=2, synchronised=True, bucket_cap_mb=0.01)
        train(rank, folder, "fp16", tapped=tapped, own_hook=True)
        train(rank, folder, "broken", tapped=tapped, broken=tapped)
        train(rank, folder, "chosen", tapped=tapped, taps={"every": 2, "most": 1, "loss_scale": lambda: 4.0})
        train_unevenly(rank, folder, "joined", tapped=tapped, by_initial=True)
        train_unevenly(rank, folder, "joined_few", tapped=tapped, by_initial=False)
    shards(rank, world, folder)
    (folder / f"refused-{rank}.json").write_text(json.dumps(refused(folder)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
