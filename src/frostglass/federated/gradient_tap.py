"""What recorders in training loops share: which steps are taken down, what they were made of, and that nothing breaks.

A step is one gradient that an optimiser is about to use. It is written down as one update of kind "gradient" in the
one record format (`frostglass.federated.recording`), with the weights that it was computed at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan
from frostglass.federated.recording import DEFAULT_BYTES, Received, Recorder

log = logging.getLogger(__name__)

PATIENCE = 120.0
"""Seconds that training waits, once, for a disk that does not answer."""

OWN = "this process's own gradient, before anything is averaged"
ACCUMULATED = "with gradient accumulation, that of all micro-batches of the step together"


class Watching:
    """A forward pre-hook that stays behind where its module is pickled or copied: there it becomes one of Python's own
    that does nothing, so that whoever reads the module needs no Frostglass.

    Args:
        look: what it does.
    """

    def __init__(self, look: Callable[..., None]) -> None:
        self.look = look

    def __call__(self, *given: Any) -> None:
        """As torch calls it."""
        self.look(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class GradientTap:
    """Writes down every n-th gradient of a training loop, up to a limit; never raises into it.

    Gradient and weights are copied where they are taken, and written by the recorder's thread. Where that is behind by
    some steps, training waits for the disk, and nothing is left out: `every` and `most` bound that.

    Args:
        folder: of the record: new or empty.
        engine: as the record names it.
        note: what is seen: an own gradient, an average, a shard.
        client: whose gradient.
        clients: processes averaged in it; each is taken to have had as many images as this one.
        every: steps from one that is recorded to the next, of each optimiser (`of`); the first step is one.
        most: recorded steps at the most.
        max_bytes: of all tensors together.
        model: name and options of the network, as `frostglass audit-updates` builds it.
        image_shape: (channels, height, width).
        defence: as the record names it.
        loss_scale: what the loss was multiplied by (`GradScaler.get_scale`); gradients are divided by it.

    Raises:
        BadInput: `every` or `most` below 1, or a folder that holds something.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        engine: str,
        note: str,
        client: str = "rank 0",
        clients: int = 1,
        every: int = 1,
        most: int = 100,
        max_bytes: int = DEFAULT_BYTES,
        model: Mapping[str, Any] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        defence: str | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        if every < 1 or most < 1:
            raise BadInput(f"record: every = {every} and most = {most} must be at least 1.")
        self.recorder = Recorder(
            folder, engine=engine, model=model, image_shape=image_shape, max_bytes=max_bytes, note=note,
            patience=PATIENCE,
        )  # fmt: skip
        self.client, self.clients, self.every, self.most = client, clients, every, most
        self.defence, self.loss_scale = defence, loss_scale
        self.steps = self.recorded = 0
        self.handles: list[RemovableHandle] = []  # of hooks that end with the tap
        self.of: Any = None  # whose step the next one is, where several optimisers take turns
        self._taken: dict[Any, int] = {}
        self._examples: int | None = 0
        self._batches = 0
        self._all_batches = 0
        self._last: int | None = None  # images of the last batch
        self._marks: dict[Any, int] = {}  # all batches at the last step of each
        self._warned = False

    @property
    def due(self) -> bool:
        """Whether the step that is being computed is to be recorded."""
        return self._taken.get(self.of, 0) % self.every == 0 and self.recorded < self.most

    def saw(self, batch: Any) -> None:
        """A batch (or micro-batch) of this step: its images are counted."""
        found = batch_size(batch)
        self._examples = None if found is None or self._examples is None else self._examples + found
        self._batches += 1
        self._all_batches, self._last = self._all_batches + 1, found

    def watch(self, module: nn.Module) -> RemovableHandle:
        """Counts what goes through `module` while gradients are on, until the tap is closed."""

        def look(called: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if called is module and torch.is_grad_enabled():
                self.saw([*args, named])

        handle = module.register_forward_pre_hook(Watching(look), with_kwargs=True)
        self.handles.append(handle)
        return handle

    def take(self, module: nn.Module, gradients: Mapping[str, Tensor], problems: tuple[str, ...] = ()) -> None:
        """Ends a step: records it if it is due.

        Args:
            module: whose parameters still are those that the gradient was computed at.
            gradients: by parameter name; copied here unless they lie on the CPU in memory of their own.
            problems: what is wrong with them, a clause each.
        """
        try:
            if self.due:
                self._record(module, gradients, problems)
        except Exception as wrong:
            self.failed(wrong)
        finally:
            self.skip()

    def skip(self) -> None:
        """Ends a step without a record."""
        self.steps += 1
        self._taken[self.of] = self._taken.get(self.of, 0) + 1
        self._marks[self.of] = self._all_batches
        self._examples, self._batches = 0, 0

    def _made_of(self) -> tuple[int | None, int]:
        """(images, batches) of this step; where optimisers take turns nobody knows which batches one passed over."""
        if self.of is None or not self._all_batches:
            return (self._examples if self._batches else None), self._batches
        since = self._all_batches - self._marks.get(self.of, 0)
        return (self._last, 1) if since <= 1 else (None, 0)

    def failed(self, wrong: BaseException) -> None:
        """Says once that something could not be recorded."""
        self.recorder.problems.append(f"step {self.steps + 1}: {type(wrong).__name__}: {wrong}")
        if not self._warned:
            log.warning("frostglass: step %d is not recorded (%s: %s)", self.steps + 1, type(wrong).__name__, wrong)
            self._warned = True

    def close(self) -> None:
        """Takes hooks off, and waits until everything is on disk."""
        while self.handles:
            self.handles.pop().remove()
        self.recorder.close()

    def __enter__(self) -> GradientTap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, module: nn.Module, gradients: Mapping[str, Tensor], problems: tuple[str, ...]) -> None:
        number = self.steps + 1
        scale = 1.0 if self.loss_scale is None else float(self.loss_scale())
        examples, batches = self._made_of()
        kept = {n: unscaled(own_copy(g), scale) for n, g in gradients.items()}
        self.recorded += 1
        self.recorder.sent(number, {n: own_copy(local(t)) for n, t in module.state_dict().items()})
        self.recorder.received(
            Received(
                round=number, client=self.client, gradients=kept, kind="gradient", clients=self.clients,
                examples=None if examples is None else examples * self.clients,
                plan=LocalPlan(mode="train" if module.training else "eval"), defence=self.defence, problems=problems,
                metrics={"micro_batches": float(batches)} if batches else {},
            )
        )  # fmt: skip


def gradients_of(module: nn.Module, among: set[int] | None = None) -> dict[str, Tensor]:
    """`p.grad` of every parameter that has one, by name; of a sharded one, the local shard.

    Args:
        module: as it was built, without wrappers.
        among: `id`s of the parameters of one optimiser; None for all.
    """
    found = {n: p for n, p in module.named_parameters() if p.grad is not None and (among is None or id(p) in among)}
    return {n: local(p.grad) for n, p in found.items() if p.grad is not None}


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def sharded(module: nn.Module) -> list[str]:
    """Names of parameters that are DTensors: each process holds a part.

    Raises:
        BadInput: FSDP1, whose shards are pieces of parameters that were strung together: they fit none of them.
    """
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
            raise BadInput(
                "record: FullyShardedDataParallel (FSDP1) leaves no gradient in its parameter's shape; use "
                "fully_shard (FSDP2: Accelerate's fsdp_version=2, Lightning's ModelParallelStrategy) or train with DDP."
            )
    return [n for n, p in module.named_parameters() if hasattr(p, "to_local")]


def own_copy(tensor: Tensor) -> Tensor:
    """On the CPU in memory of its own; waits for the device, so that another thread may read it."""
    return tensor.detach().to("cpu", copy=True)


def unscaled(gradient: Tensor, scale: float) -> Tensor:
    """Of a loss that was multiplied by `scale`, divided by it: in single precision at the least.

    In half precision small entries would become the zeros that the scale is there to avoid.
    """
    if scale == 1.0:
        return gradient
    return (gradient.float() if gradient.element_size() < 4 else gradient) / scale


def batch_size(batch: Any) -> int | None:
    """Rows of the first tensor in a batch, however it is nested; None if there is none."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((n for n in map(batch_size, parts) if n is not None), None)


def rank_and_world() -> tuple[int, int]:
    """Of this process; (0, 1) where nothing is distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
