"""Accelerate: records gradients after `accelerator.backward`. Needs `pip install 'frostglass[hf]'`.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    tap = record_accelerate(accelerator, model, "record", every=100)
    ... tap.backward(loss) instead of accelerator.backward(loss) ...
    tap.close()

After `backward` in several processes `p.grad` is the average already. Under DDP a communication hook is installed that
sees the own gradient; elsewhere the record says that it holds an average or a shard of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from frostglass.core.errors import BadInput
from frostglass.federated.ddp import has_hook, record_ddp, shard_note
from frostglass.federated.gradient_tap import ACCUMULATED, OWN, GradientTap, gradients_of, sharded


class AccelerateTap:
    """Made by `record_accelerate`.

    Args:
        accelerator: of the training.
        module: the network as it was built.
        tap: where gradients go.
        by_hook: whether a communication hook feeds the tap.
    """

    def __init__(self, accelerator: Any, module: nn.Module, tap: GradientTap, *, by_hook: bool) -> None:
        self.accelerator, self.module, self.tap, self.by_hook = accelerator, module, tap, by_hook

    def backward(self, loss: Any, **options: Any) -> None:
        """`accelerator.backward`, then a look at the gradient."""
        self.accelerator.backward(loss, **options)
        self.after_backward()

    def after_backward(self) -> None:
        """Where `accelerator.backward` is called elsewhere: call this after it, before clipping and the step."""
        if self.by_hook or not self.accelerator.sync_gradients:
            return
        self.tap.take(self.module, gradients_of(self.module) if self.tap.due else {})

    def close(self) -> None:
        """Waits until everything is on disk."""
        self.tap.close()

    def __enter__(self) -> AccelerateTap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def record_accelerate(accelerator: Any, model: nn.Module, folder: str | Path, **settings: Any) -> AccelerateTap:
    """Records every n-th gradient of a training with Accelerate.

    Args:
        accelerator: accelerate.Accelerator.
        model: as `accelerator.prepare` returned it.
        folder: new or empty; each process writes to `folder/rank-N`.
        settings: of `frostglass.federated.gradient_tap.GradientTap`.

    Raises:
        BadInput: a backend that keeps gradients to itself (DeepSpeed, Megatron-LM) or whose gradients fit no parameter
            (FSDP1), or a folder that holds something.
    """
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1].upper()
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise BadInput(f"record_accelerate: {kind} keeps gradients to itself; train with DDP to record them.")
    scale = None if accelerator.scaler is None else accelerator.scaler.get_scale
    if isinstance(model, DistributedDataParallel) and not has_hook(model):
        tap = record_ddp(model, folder, engine="accelerate", loss_scale=scale, **settings)
        return AccelerateTap(accelerator, model.module, tap, by_hook=True)
    module = model.module if isinstance(model, DistributedDataParallel) else accelerator.unwrap_model(model)
    world, rank = int(accelerator.num_processes), int(accelerator.process_index)
    if sharded(model):
        note = shard_note(world)
    elif world > 1:
        note = f"the average over all {world} processes (after the all-reduce), no process's own gradient"
    else:
        note = f"{OWN} (after accelerator.backward); {ACCUMULATED}"
    tap = GradientTap(
        Path(folder) / f"rank-{rank}", engine="accelerate", note=note, client=f"rank {rank}", clients=world,
        loss_scale=scale, **settings,
    )  # fmt: skip
    tap.watch(model)
    return AccelerateTap(accelerator, module, tap, by_hook=False)
