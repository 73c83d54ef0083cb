"""Differentiation that remembers only the ends of a long computation, and computes its pieces twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """function(*tensors), whose graph is not kept: a backward pass calls `function` again to have it.

    The function may take derivatives itself (`torch.utils.checkpoint` does not allow that). Random layers repeat their
    draws. Second derivatives of the result are not available.

    Args:
        function: of the tensors alone, for as far as derivatives go; called with gradients enabled.
        tensors: floating point.
    """
    return _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.random = torch.get_rng_state(), _cuda_state(tensors)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            found = function(*(t.detach().requires_grad_(True) for t in tensors))
        return tuple(t.detach() for t in found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [t.detach().requires_grad_(True) for t in ctx.saved_tensors]
        cpu, cuda = ctx.random
        devices = [inputs[0].device] if cuda is not None else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, devices[0])
            outputs = ctx.function(*inputs)
        live = [(o, s) for o, s in zip(outputs, slopes, strict=True) if o.requires_grad]
        outs, ups = [o for o, _ in live], [s for _, s in live]
        needed = [i for i, wanted in enumerate(ctx.needs_input_grad[1:]) if wanted]
        found = torch.autograd.grad(outs, [inputs[i] for i in needed], ups, allow_unused=True)
        by_place = dict(zip(needed, found, strict=True))
        return (None, *(by_place.get(i) for i in range(len(inputs))))


def _cuda_state(tensors: Sequence[Tensor]) -> Tensor | None:
    device = tensors[0].device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None
