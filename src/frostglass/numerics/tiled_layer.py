"""`tiled_convolution` as a layer: autograd finds its first and second derivatives."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics import tiled_convolution as tiles
from frostglass.numerics.tile_weights import Kept, Weights


def tiled_convolution(
    x: Float[Tensor, "b i h w"],
    w: Float[Tensor, "o i 3 3"],
    kept: Kept | None,
    how: tiles.Tiling,
    *,
    once: bool = False,
) -> Float[Tensor, "b o p q"]:
    """conv2d(x, w) of stride 1.

    Args:
        x: images.
        w: what stays the same for as long as `kept` is used.
        kept: where it is kept as products use it; None for weights of this pass alone.
        how: as `tiles.tiling` says.
        once: for one ordinary backward pass. Otherwise weights get a gradient where a graph is kept and none in the
            pass after it, as `second_order_layers` has it.
    """
    weights = Weights(w, how.edge) if kept is None else kept.of(w, how.edge)
    y: Tensor = _Tiled.apply(x, w, weights, how, once)  # type: ignore[no-untyped-call]
    return y


def wanted(w: Tensor) -> bool:
    """Whether a weight of `second_order_layers` gets a gradient in the pass that runs now."""
    return w.requires_grad and (torch.is_grad_enabled() or not w.is_leaf)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, weights: Weights, how: tiles.Tiling, once: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.weights, ctx.how, ctx.once = weights, how, once
        return tiles.convolved(x, weights, how)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        of_x, of_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1] if ctx.once else wanted(w)
        if torch.is_grad_enabled():
            found = _Slopes.apply(above[0], x, w, ctx.weights, ctx.how, of_x, of_w)  # type: ignore[no-untyped-call]
        else:
            found = tiles.slopes(above[0], x, ctx.weights if of_x else None, ctx.how, of_w)
        return *found, None, None, None


class _Slopes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, weights: Weights, how: tiles.Tiling, of_x: bool, of_w: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.weights, ctx.how = weights, how
        ctx.set_materialize_grads(False)
        return tiles.slopes(g, x, weights if of_x else None, how, of_w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, _ = ctx.saved_tensors
        return *tiles.second_slopes(g, x, ctx.weights, a, b, ctx.how), None, None, None, None, None
