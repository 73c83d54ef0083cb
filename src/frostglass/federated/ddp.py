"""torch.distributed: records each process's own gradient, before DistributedDataParallel averages.

    tap = record_ddp(ddp, "record")              # in every process, before the first backward pass; record/rank-0, ...
    ... train ...
    tap.close()

FSDP (`fully_shard`) reduces and scatters in one operation: there is no point at which an own gradient could be seen.
`record_shards` says so in its record, and takes down what there is: this process's part of the average.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from frostglass.core.errors import BadInput
from frostglass.federated.gradient_tap import (
    ACCUMULATED,
    OWN,
    GradientTap,
    Watching,
    gradients_of,
    own_copy,
    rank_and_world,
    sharded,
)

CommHook: TypeAlias = Callable[[Any, dist.GradBucket], "torch.futures.Future[Tensor]"]


class LocalGradients:
    """The communication hook: copies each bucket's gradients, then reduces as DDP would have, or as another hook does.

    Buckets hold parameters in an order of their own, which DDP changes after the first pass: gradients are named by
    the identity of the parameter. Under `no_sync` no hook is called; the next synchronised pass holds the sum. Where
    two passes are synchronised and gradients not zeroed between them, the second sends the average of the first with
    its own gradient: no own gradient can be seen then, and the record says so. Under `join` a process without further
    batches sends zeros; these are not recorded.

    Args:
        ddp: the wrapped network.
        tap: where gradients go.
        hook, state: of the user's own reduction (`fp16_compress_hook`, PowerSGD, ...); None for DDP's average.
    """

    def __init__(self, ddp: DistributedDataParallel, tap: GradientTap, hook: CommHook | None, state: Any) -> None:
        self.ddp, self.tap, self.hook, self.state = ddp, tap, hook, state
        self._names = {id(p): n for n, p in ddp.module.named_parameters()}
        self._held: dict[str, Tensor] = {}
        self._strange = 0
        self._between, self._carried = True, 0  # nothing was computed since the last synchronised pass; what it left

        def look(called: nn.Module, _: Any) -> None:
            # tracing it would cost a compiled network its one graph
            if not torch.compiler.is_compiling() and called is self.ddp and torch.is_grad_enabled():
                self._begin()

        tap.handles.append(ddp.register_forward_pre_hook(Watching(look)))

    def _begin(self) -> None:
        try:
            if self._between and self.tap.due:
                left = [p.grad for p in self.ddp.module.parameters() if p.grad is not None]
                self._carried = sum(bool(g.any()) for g in left)
            self._between = False
        except Exception as wrong:  # nor the forward pass
            self.tap.failed(wrong)

    def __call__(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls for each bucket, in each process."""
        # under `ddp.join` a process that has no more batches answers the others with zeros, in no backward pass
        joined = torch._C._current_graph_task_id() == -1
        try:
            if not joined:
                if self.tap.due:
                    self._copy(bucket)
                if bucket.is_last():
                    self._end()
        except Exception as wrong:  # whatever breaks here must not break the backward pass
            self._held = {}
            self.tap.failed(wrong)
        return self._averaged(bucket, joined) if self.hook is None else self.hook(self.state, bucket)

    def _copy(self, bucket: dist.GradBucket) -> None:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._names.get(id(parameter))
            if name is None:
                self._strange += 1
            else:
                self._held[name] = own_copy(gradient)

    def _end(self) -> None:
        held, self._held = self._held, {}
        strange, self._strange = self._strange, 0
        problems = [f"{strange} gradients belong to no named parameter"] if strange else []
        if self._carried:
            problems.append(
                f"{self._carried} parameters had a gradient before this pass: where an earlier synchronised one left "
                "it, it is an average over all processes, and what is recorded is no own gradient; accumulate under "
                "no_sync"
            )
        self._between, self._carried = True, 0
        self.tap.take(self.ddp.module, held, tuple(problems))

    def _averaged(self, bucket: dist.GradBucket, joined: bool) -> torch.futures.Future[Tensor]:
        """As DDP does it without a hook, to the last bit: it multiplies by 1 / n (divides where it works in place)."""
        group, buffer = self.ddp.process_group, bucket.buffer()
        among = group.size()
        config = self.ddp._join_config
        if config.enable and config.is_first_joinable and not self.ddp._divide_by_initial_world_size:
            left = torch.tensor([0.0 if joined else 1.0], device=buffer.device)
            dist.all_reduce(left, group=group)
            among = int(left)
        if self.ddp.gradient_as_bucket_view:
            buffer.div_(among)
        else:
            buffer.mul_(1.0 / among)
        return dist.all_reduce(buffer, group=group, async_op=True).get_future().then(lambda done: done.value()[0])


def record_ddp(
    ddp: DistributedDataParallel,
    folder: str | Path,
    *,
    hook: CommHook | None = None,
    state: Any = None,
    engine: str = "ddp",
    **settings: Any,
) -> GradientTap:
    """Records this process's own gradients; training gives the same weights as without it.

    Args:
        ddp: before its first backward pass.
        folder: each process writes to its own part, `folder/rank-N`.
        hook, state: a communication hook that you would have registered; it is called with the same buckets.
        engine: as the record names it.
        settings: of `GradientTap`: every, most, max_bytes, model, image_shape, defence, loss_scale.

    Returns:
        the tap; close it after training.

    Raises:
        BadInput: no DDP, one that has a hook already, or a folder that holds something.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise BadInput(f"record_ddp: {type(ddp).__name__} is no DistributedDataParallel; wrap the network first.")
    if has_hook(ddp):
        raise BadInput(
            "record_ddp: this DistributedDataParallel has a communication hook, and it takes only one; give that one "
            "as `hook` and `state` instead of registering it."
        )
    rank, _ = rank_and_world()
    note = f"{OWN} (a DDP communication hook); {ACCUMULATED}"
    tap = GradientTap(Path(folder) / f"rank-{rank}", engine=engine, note=note, client=f"rank {rank}", **settings)
    tap.watch(ddp)
    watcher = LocalGradients(ddp, tap, hook, state)
    # a lambda: DDP refuses hooks whose annotations are names instead of classes
    ddp.register_comm_hook(None, lambda given, bucket: watcher(given, bucket))
    return tap


def has_hook(ddp: DistributedDataParallel) -> bool:
    """Whether a communication hook is registered already."""
    return bool(getattr(ddp, "_comm_hooks", ()))


def shard_note(world: int) -> str:
    """What a process sees of a sharded network."""
    return (
        f"only reduced shards are visible: the average over all {world} processes, and of it this process's part; no "
        "process's own gradient exists outside its own memory at any point that a hook sees"
    )


def record_shards(
    module: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path, **settings: Any
) -> GradientTap:
    """Records, before each step of `optimizer`, what FSDP2 (`fully_shard`) leaves visible: a shard of the average.

    The record says so, and counts all processes as summed in every update. It cannot be attacked as a gradient of one
    process; it shows what a participant holds.

    Args:
        module: after `fully_shard`.
        optimizer: of its parameters.
        folder: each process writes to `folder/rank-N`.
        settings: of `GradientTap`; no `loss_scale`, as a GradScaler has divided by it before a step begins.

    Raises:
        BadInput: no parameter is sharded, a folder that holds something, or `loss_scale`.
    """
    if settings.get("loss_scale") is not None:
        raise BadInput("loss_scale: gradients are unscaled before the step that record_shards looks at; leave it out.")
    names = sharded(module)
    if not names:
        raise BadInput("record_shards: no parameter is a DTensor; call fully_shard first, or use record_ddp.")
    rank, world = rank_and_world()
    note = f"{shard_note(world)}; after clipping, if there is any"
    tap = GradientTap(
        Path(folder) / f"rank-{rank}", engine="fsdp2", note=note, client=f"rank {rank}", clients=world, **settings
    )
    problems = (f"shard {rank} of {world} of {len(names)} parameters, averaged over all processes",)
    tap.handles.append(
        optimizer.register_step_pre_hook(lambda *_: tap.take(module, gradients_of(module) if tap.due else {}, problems))
    )
    tap.watch(module)
    return tap
