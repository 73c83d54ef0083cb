"""InstaHide under DistributedDataParallel: two gloo processes on one machine.

    python examples/ddp.py

Each rank loads its own part of the images, mixes within it, and draws keys that never leave it; only gradients are
exchanged. `shared=True` shows the other way: all ranks hold all images, and a DistributedSampler names the rows that
each encodes.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from frostglass.core.randomness import Rng
from frostglass.defenses.encoded_dataset import EncodedDataset, encoded_loader, own_part
from frostglass.defenses.instahide import InstaHide
from frostglass.vision.byte_images import load_bytes
from frostglass.vision.networks import build


def work(rank: int, world: int, address: str, out: str, shared: bool, epochs: int, limit: int | None) -> None:
    """What one rank does; leaves weights, rows and exposures in `out`."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=address, RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    digits = load_bytes("digits", size=8, limit=limit)
    mine = torch.arange(len(digits)) if shared else own_part(len(digits), rank, world)
    data = EncodedDataset((digits.images[mine], digits.labels[mine]), InstaHide(k=4), num_classes=10, workers=0)
    sampler = DistributedSampler(data, world, rank) if shared else None  # type: ignore[var-annotated]
    loader = encoded_loader(data, 32, drop_last=not shared, **({"sampler": sampler} if sampler else {}))
    model = DistributedDataParallel(build("small_bn_cnn", classes=10, channels=1, size=8, rng=Rng.from_seed(0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        if sampler:
            sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            seen.append(x)
    assert data.encoder.ledger is not None
    held = {"mine": mine, "first": data.encoder.ledger.first, "seen": torch.cat(seen),
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()])}  # fmt: skip
    torch.save(held, Path(out) / f"rank{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


def main(shared: bool = False, epochs: int = 2, limit: int | None = 400) -> list[dict[str, torch.Tensor]]:
    """Trains on two processes; what each rank left."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as out:
        free.bind(("127.0.0.1", 0))
        address = str(free.getsockname()[1])
        free.close()
        torch.multiprocessing.spawn(work, (2, address, out, shared, epochs, limit), nprocs=2)  # type: ignore
        return [torch.load(Path(out) / f"rank{r}.pt") for r in range(2)]


if __name__ == "__main__":
    for rank, held in enumerate(main()):
        print(f"rank {rank}: {len(held['mine'])} images of its own, {len(held['seen'])} encodings")
