"""One process of tests/federated/test_trainer_taps.py, started by torchrun: Lightning and Accelerate under DDP.

Run as: torchrun --standalone --nproc-per-node 2 trainer_worker.py FOLDER
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from frostglass.vision.borrowed import import_torchvision

IMAGES = 16


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def images() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(7)
    return torch.rand(IMAGES, 1, 4, 4, generator=made), torch.randint(0, 3, (IMAGES,), generator=made)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images()), batch_size=2, shuffle=False)


def lightning_module(watch: list[dict[str, Tensor]]) -> Any:
    """A module that computes, beside its loss, the own gradient of its batch at the current weights."""
    from lightning import LightningModule

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            alone = copy.deepcopy(self.net)
            alone.zero_grad()
            with torch.enable_grad():
                nn.functional.cross_entropy(alone(x), y).backward()
            watch.append({f"net.{n}": p.grad for n, p in alone.named_parameters() if p.grad is not None})
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def fit(folder: Path, *, distributed: bool, tap: bool = True, **options: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    """(the trained module, own gradients of each micro-batch)."""
    from lightning import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from frostglass.federated.lightning_tap import RecordGradients

    watch: list[dict[str, Tensor]] = []
    module = lightning_module(watch)
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if distributed else {"devices": 1}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(folder),
        callbacks=[RecordGradients(folder / "record")] if tap else [], **strategy, **options,
    )  # fmt: skip
    trainer.fit(module, loader())
    return module, watch


def accelerated(
    folder: Path, *, tap: bool = True, accumulate: int = 1, hooked: bool = False
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The same with Accelerate."""
    from accelerate import Accelerator

    from frostglass.federated.accelerate_tap import record_accelerate

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    net = network()
    model, optimizer, data = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1), loader())
    if hooked:  # a hook of the user's own
        model.register_comm_hook(None, allreduce_hook)
    watcher = record_accelerate(accelerator, model, folder / "record") if tap else None
    watch = []
    for x, y in data:
        with accelerator.accumulate(model):
            alone = copy.deepcopy(accelerator.unwrap_model(model))
            alone.zero_grad()
            nn.functional.cross_entropy(alone(x), y).backward()
            watch.append({n: p.grad for n, p in alone.named_parameters() if p.grad is not None})
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss) if watcher is None else watcher.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    if watcher is not None:
        watcher.close()
    return accelerator.unwrap_model(model), watch


def main(folder: Path) -> None:
    import os

    import_torchvision()  # a CUDA build of it beside a CPU build of torch needs a hand
    rank = os.environ["RANK"]
    for name, run in (
        ("lightning", lambda f, t: fit(f, distributed=True, tap=t)),
        ("accelerate", lambda f, t: accelerated(f, tap=t)),
    ):
        made, watch = run(folder / name, True)
        for step, own in enumerate(watch):
            save_file(own, folder / f"{name}-own-{rank}-{step + 1}.safetensors")
        plain, _ = run(folder / f"{name}-plain", False)
        for how, module in (("tapped", made), ("plain", plain)):
            save_file(
                {n: t.contiguous() for n, t in module.state_dict().items()}, folder / f"{name}-{how}-{rank}.safetensors"
            )
    accelerated(folder / "hooked", hooked=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
