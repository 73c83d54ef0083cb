"""Hugging Face Trainer: a callback that records gradients. Needs `pip install 'frostglass[hf]'`.

    Trainer(..., callbacks=[RecordGradients("record", every=100)])

`on_pre_optimizer_step` comes after clipping (`max_grad_norm`, 1.0 by default) and, in several processes, after the
average: the record says so. For own gradients under DDP use `frostglass.federated.ddp.record_ddp` in a training loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frostglass.core.errors import BadInput
from frostglass.federated.ddp import shard_note
from frostglass.federated.gradient_tap import ACCUMULATED, OWN, GradientTap, gradients_of, rank_and_world, sharded

try:
    from transformers import TrainerCallback
except ImportError:
    raise BadInput("transformers: it is not installed; run pip install 'frostglass[hf]'.") from None

_Base: Any = TrainerCallback


class RecordGradients(_Base):  # type: ignore[misc]
    """Records every n-th gradient of a Trainer.

    Args:
        folder: new or empty; each process writes to `folder/rank-N`.
        settings: of `frostglass.federated.gradient_tap.GradientTap`.
    """

    def __init__(self, folder: str | Path, **settings: Any) -> None:
        self.folder, self.settings = Path(folder), settings
        self.tap: GradientTap | None = None
        self._watch: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Opens the record.

        Raises:
            BadInput: the folder holds something, wrong settings, DeepSpeed or FSDP1.
        """
        if args.deepspeed_plugin is not None:
            raise BadInput("RecordGradients: DeepSpeed keeps gradients to itself; train with DDP to record them.")
        model, (rank, world) = given["model"], rank_and_world()
        if sharded(model):
            note = shard_note(world)
        elif world > 1:
            note = f"the average over all {world} processes (after the all-reduce), no process's own gradient"
        else:
            note = f"{OWN} (on_pre_optimizer_step); {ACCUMULATED}"
        if args.max_grad_norm:
            note += f"; clipped to a norm of {args.max_grad_norm:g}"
        self.tap = GradientTap(
            self.folder / f"rank-{rank}", engine="transformers", note=note, client=f"rank {rank}", clients=world,
            **self.settings,
        )  # fmt: skip
        self._watch = self.tap.watch(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before the optimiser's step, after clipping."""
        if self.tap is not None:
            self.tap.take(given["model"], gradients_of(given["model"]) if self.tap.due else {})

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Waits until everything is on disk."""
        if self.tap is not None:
            self._watch.remove()
            self.tap.close()
            self.tap = None
