"""Activation patterns, recorded in one pass and repeated in others: what makes a ReLU network smooth in its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from frostglass.core.errors import AttackFailed

_Replay: TypeAlias = Callable[[Tensor], Tensor]
"""Input of a layer -> its output under the choice that was recorded."""


class _Gate(torch.autograd.Function):
    """The input where a recorded ReLU let something through, 0 elsewhere; one kernel each way."""

    @staticmethod
    def forward(ctx: Any, now: Tensor, recorded: Tensor) -> Tensor:
        ctx.save_for_backward(recorded)
        return _gated(now, recorded)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return _gated(slopes[0], ctx.saved_tensors[0]), None


def _gated(x: Tensor, recorded: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.threshold_backward(x, recorded, 0)
    return found


@dataclass
class Choices:
    """What every ReLU and max-pooling chose, in the order of their calls.

    Known: relu, relu6, leaky_relu, hardtanh, max_pool1d and max_pool2d, as functions or modules. Smooth activations
    need no record. A network with other kinks (`UNKNOWN`) is refused.
    """

    kept: list[_Replay] = field(default_factory=list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The block's network runs as usual, and its choices are kept."""
        self.kept.clear()

        def record(kind: str, x: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
            result, replay = _RECORD[kind](x, *args, **kw)
            self.kept.append(replay)
            return result

        with _Intercept(record):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The block's network repeats the choices, whatever its activations are now.

        Raises:
            RuntimeError: it makes more or fewer calls than the recorded one.
        """
        waiting = iter(self.kept)

        def repeat(kind: str, x: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
            replay = next(waiting, None)
            if replay is None:
                raise RuntimeError(f"the network made another {kind} than in the recorded pass ({args}, {kw})")
            return replay(x)

        with _Intercept(repeat):
            yield
        if next(waiting, None) is not None:
            raise RuntimeError("the network made fewer activations than in the recorded pass")


def _leaky_relu(x: Tensor, negative_slope: float = 0.01) -> tuple[Tensor, _Replay]:
    positive = x > 0
    return F.leaky_relu(x, negative_slope), lambda now: torch.where(positive, now, negative_slope * now)


def _relu(x: Tensor) -> tuple[Tensor, _Replay]:
    result = F.relu(x)
    recorded = result.detach()  # kept by autograd too, so that it costs no memory
    return result, lambda now: _Gate.apply(now, recorded)  # type: ignore[no-untyped-call]


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> tuple[Tensor, _Replay]:
    inside, flat = (x > min_val) & (x < max_val), x.detach().clamp(min_val, max_val)

    def replay(now: Tensor) -> Tensor:
        return torch.where(inside, now, flat)

    return F.hardtanh(x, min_val, max_val), replay


def _relu6(x: Tensor) -> tuple[Tensor, _Replay]:
    return _hardtanh(x, 0.0, 6.0)


def _pooled(pool: Callable[..., tuple[Tensor, Tensor]], dims: int) -> Callable[..., tuple[Tensor, _Replay]]:
    def record(x: Tensor, *args: Any, return_indices: bool = False, **kw: Any) -> tuple[Tensor, _Replay]:
        if return_indices or len(args) > 5:
            raise RuntimeError("the network uses the indices of its pooling; only double_backward can do that")
        result, index = pool(x, *args, **kw)
        small = index.to(torch.int32)

        def replay(now: Tensor) -> Tensor:
            return now.flatten(-dims).gather(-1, small.long().flatten(-dims)).view(small.shape)

        return result, replay

    return record


_RECORD: dict[str, Callable[..., tuple[Tensor, _Replay]]] = {
    "relu": _relu,
    "relu6": _relu6,
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "max_pool1d": _pooled(F.max_pool1d_with_indices, 1),
    "max_pool2d": _pooled(F.max_pool2d_with_indices, 2),
}


# fmt: off
UNKNOWN = frozenset({
    "abs", "absolute", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "amin",
    "clamp", "clamp_max", "clamp_min", "clip", "fmax", "fmin", "fractional_max_pool2d", "fractional_max_pool3d",
    "hardshrink", "hardsigmoid", "hardswish", "kthvalue", "max", "max_pool3d", "maximum", "median", "min",
    "minimum", "prelu", "rrelu", "selu", "softshrink", "sort", "threshold", "topk",
})
# fmt: on
"""Functions with kinks, or that choose, which are not recorded."""


class _Intercept(TorchFunctionMode):
    """Hands calls of the known functions to `handle`; never in place, as the record must not be overwritten.

    Raises:
        AttackFailed: a function of `UNKNOWN` was called.
    """

    def __init__(self, handle: Callable[[str, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kw = dict(kwargs or {})
        kind = getattr(func, "__name__", "").rstrip("_")
        if kind in UNKNOWN:
            raise AttackFailed(f"engine: 'frozen_fd' does not hold the choices of {kind!r} fixed; use double_backward.")
        if kind not in _RECORD or not (args or "input" in kw):
            return func(*args, **kw)
        x, rest = (args[0], args[1:]) if args else (kw.pop("input"), ())
        kw.pop("inplace", None)
        return self.handle(kind, x, rest, kw)
