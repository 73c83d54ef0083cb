"""Activation patterns, recorded in one pass and repeated in others: what makes a ReLU network smooth in its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_BITS = 8


def packed(mask: Tensor) -> Tensor:
    """A boolean tensor at one bit an element, flattened and padded with zeros."""
    flat = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % _BITS)).view(-1, _BITS)
    places = 2 ** torch.arange(_BITS, dtype=torch.uint8, device=mask.device)
    return (flat * places).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `packed`."""
    places = 2 ** torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    return (bits[:, None].bitwise_and(places) != 0).flatten()[: shape.numel()].view(shape)


@dataclass
class Choices:
    """What every ReLU and max-pooling chose, in the order of their calls.

    Known: relu, relu6, leaky_relu, hardtanh, max_pool1d and max_pool2d, as functions or modules. Smooth activations
    need no record. Other functions with kinks (abs, clamp, max) are not frozen.
    """

    kept: list[Any] = field(default_factory=list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The block's network runs as usual, and its choices are kept."""
        self.kept.clear()
        with _Intercept(self._record):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The block's network repeats the choices, whatever its activations are now.

        Raises:
            RuntimeError: it makes more or fewer calls than the recorded one.
        """
        waiting = iter(self.kept)

        def replay(kind: str, func: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
            try:
                choice = next(waiting)
            except StopIteration:
                raise RuntimeError("the network made more activations than in the recorded pass") from None
            return _REPLAY[kind](x, choice, args, kw)

        with _Intercept(replay):
            yield
        if next(waiting, None) is not None:
            raise RuntimeError("the network made fewer activations than in the recorded pass")

    def _record(self, kind: str, func: Callable[..., Any], x: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
        if kind.startswith("max_pool"):
            pool = F.max_pool1d_with_indices if kind == "max_pool1d" else F.max_pool2d_with_indices
            keep = {k: v for k, v in kw.items() if k != "return_indices"}
            result, index = pool(x, *args[:5], **keep)
            self.kept.append(index.to(torch.int32))
            return result
        low, high = _bounds(kind, args, kw)
        inside = x > low if high is None else (x > low) & (x < high)
        masks = [(packed(inside), x.shape)]
        if high is not None:
            masks.append((packed(x >= high), x.shape))
        self.kept.append(masks)
        return func(x, *args, **kw)


def _bounds(kind: str, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[float, float | None]:
    if kind in ("relu", "leaky_relu"):
        return 0.0, None
    if kind == "relu6":
        return 0.0, 6.0
    given = dict(zip(("min_val", "max_val"), args, strict=False)) | kw
    return given.get("min_val", -1.0), given.get("max_val", 1.0)


def _relu(x: Tensor, masks: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
    return x * unpacked(*masks[0])


def _leaky(x: Tensor, masks: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
    slope = args[0] if args else kw.get("negative_slope", 0.01)
    return torch.where(unpacked(*masks[0]), x, slope * x)


def _clipped(kind: str) -> Callable[[Tensor, Any, tuple[Any, ...], dict[str, Any]], Tensor]:
    def replay(x: Tensor, masks: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
        low, high = _bounds(kind, args, kw)
        inside, above = (unpacked(*m) for m in masks)
        fixed = torch.full_like(x, low).masked_fill(above, float(high or 0.0))
        return torch.where(inside, x, fixed)

    return replay


def _pool(x: Tensor, index: Tensor, args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
    picked = index.long()
    spatial = index.ndim - 2
    return x.flatten(-spatial).gather(-1, picked.flatten(-spatial)).view(index.shape)


_REPLAY: dict[str, Callable[..., Tensor]] = {
    "relu": _relu,
    "leaky_relu": _leaky,
    "relu6": _clipped("relu6"),
    "hardtanh": _clipped("hardtanh"),
    "max_pool1d": _pool,
    "max_pool2d": _pool,
}


class _Intercept(TorchFunctionMode):
    """Hands calls of the known functions to `handle`."""

    def __init__(self, handle: Callable[..., Any]) -> None:
        super().__init__()
        self.handle = handle

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kw = dict(kwargs or {})
        kind = getattr(func, "__name__", "").rstrip("_")
        if kind in _REPLAY and (args or "input" in kw):
            x, rest = (args[0], args[1:]) if args else (kw.pop("input"), ())
            kw.pop("inplace", None)
            return self.handle(kind, _plain(kind), x, rest, kw)
        return func(*args, **kw)


def _plain(kind: str) -> Callable[..., Any]:
    """The function itself, never in place: the record must not be overwritten."""
    plain: Callable[..., Any] = getattr(F, kind)
    return plain
