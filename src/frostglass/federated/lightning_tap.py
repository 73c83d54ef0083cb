"""Lightning: a callback that records gradients. Needs `pip install 'frostglass[lightning]'`.

    trainer = Trainer(callbacks=[RecordGradients("record", every=100)])

What Lightning's own hook points show depends on the strategy, and the record says which it was. On one device
`on_before_optimizer_step` sees the client's own gradient. Under DDP every hook point comes after the average, so the
callback installs a communication hook instead, which sees the own gradient; where one is installed already, the average
is recorded. Under FSDP2 only shards of the average are visible; DeepSpeed and FSDP1 are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from frostglass.core.errors import BadInput
from frostglass.federated.ddp import has_hook, record_ddp, shard_note
from frostglass.federated.gradient_tap import ACCUMULATED, OWN, GradientTap, gradients_of, rank_and_world, sharded

try:
    from lightning import Callback
    from lightning.pytorch.strategies import DeepSpeedStrategy
except ImportError:
    raise BadInput("lightning: it is not installed; run pip install 'frostglass[lightning]'.") from None

_Base: Any = Callback


class RecordGradients(_Base):  # type: ignore[misc]
    """Records every n-th gradient of a Lightning training, before clipping.

    Args:
        folder: new or empty; each process writes to `folder/rank-N`.
        settings: of `frostglass.federated.gradient_tap.GradientTap`: every, most, max_bytes, model,
            image_shape, defence.
    """

    def __init__(self, folder: str | Path, **settings: Any) -> None:
        super().__init__()
        self.folder, self.settings = Path(folder), settings
        self.tap: GradientTap | None = None
        self._by_hook = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The strategy has wrapped the network by now, and no gradient was computed yet.

        Raises:
            BadInput: the folder holds something, wrong settings, DeepSpeed or FSDP1.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise BadInput("RecordGradients: DeepSpeed keeps gradients to itself; train with DDP to record them.")
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel) and not has_hook(wrapped):
            self._by_hook = True
            self.tap = record_ddp(
                wrapped, self.folder, engine="lightning", loss_scale=_scale_of(trainer), **self.settings
            )
            return
        rank, world = rank_and_world()
        if sharded(wrapped):
            note = shard_note(world)
        elif world > 1:
            note = f"the average over all {world} processes (after the all-reduce), no process's own gradient"
        else:
            note = f"{OWN} (on_before_optimizer_step); {ACCUMULATED}"
        self._by_hook = False
        self.tap = GradientTap(
            self.folder / f"rank-{rank}", engine="lightning", note=note, client=f"rank {rank}", clients=world,
            **self.settings,
        )  # fmt: skip

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Counts images; a communication hook counts its own."""
        if self.tap is not None and not self._by_hook:
            self.tap.saw(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are whole here and not clipped yet; unscaled, unless the optimiser does that in its own step."""
        if self.tap is None or self._by_hook:
            return
        unscales = getattr(optimizer, "_step_supports_amp_scaling", False)  # fused ones; Lightning asks for the same
        self.tap.loss_scale = _scale_of(trainer) if unscales else None
        if len(trainer.optimizers) > 1:  # each has gradients of its own loss, often on the same batch
            self.tap.of = id(optimizer)
        among = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.tap.take(pl_module, gradients_of(pl_module, among) if self.tap.due else {})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Waits until everything is on disk."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """What was recorded until then stays."""
        self._close()

    def _close(self) -> None:
        if self.tap is not None:
            self.tap.close()
            self.tap = None


def _scale_of(trainer: Any) -> Callable[[], float] | None:
    """What mixed precision multiplies the loss by; None if it does not."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale if isinstance(scaler, torch.amp.GradScaler) else None
