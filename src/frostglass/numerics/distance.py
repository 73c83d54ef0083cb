"""Distances between gradients, given as tensors in one common order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def flatten(gradients: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """All tensors one after another as one vector."""
    return torch.cat([g.reshape(-1) for g in gradients])


def norm_of(tensors: Sequence[Tensor]) -> Float[Tensor, ""]:
    """L2 norm of all of them together, off the graph."""
    return torch.stack(torch._foreach_norm([t.detach() for t in tensors])).norm()


def cosine_distance(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """1 - <a, b> / (||a|| ||b||) of two vectors. In [0, 2]; 1 where one of them is 0."""
    return cosine([a], [b])


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """1 - <a, b> / (||a|| ||b||), over all layers together (Geiping et al. 2020, Eq. 4). In [0, 2]; 1 where one is 0.

    Its derivative is written by hand: with respect to a it is a combination of a and b, so that no copy of all layers
    as one vector and no graph through the sums is kept. Differentiable twice.

    Args:
        a: gradients, one tensor a layer.
        b: those they are compared with; shapes as in `a`.
    """
    products = [torch.stack(_Products.apply(x, y)) for x, y in zip(a, b, strict=True)]  # type: ignore[no-untyped-call]
    aa, bb, ab = torch.stack(products).sum(0).unbind()
    least = torch.finfo(aa.dtype).tiny
    # not of the product, which leaves the range of float32 where a confident network's gradients have norms below 1e-9
    return 1 - ab / (aa.clamp_min(least).sqrt() * bb.clamp_min(least).sqrt())


class _Products(torch.autograd.Function):
    """(a, b) of one layer -> <a, a>, <b, b>, <a, b>.

    A node for each layer: autograd lets a layer's gradients go as soon as their slopes are there, so that those of all
    layers are not in memory twice.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        x, y = a.reshape(-1), b.reshape(-1)
        return x.dot(x), y.dot(y), x.dot(y)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_aa, of_bb, of_ab = slopes
        wanted = ctx.needs_input_grad
        return (
            (a * (2 * of_aa)).addcmul_(b, of_ab) if wanted[0] else None,
            (b * (2 * of_bb)).addcmul_(a, of_ab) if wanted[1] else None,
        )


def layer_norms(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_l ||a_l - b_l||_2, norms not squared (Yin et al. 2021, Eq. 3). The slope where a_l = b_l is 0."""
    return torch.stack([_Norm.apply(x, y) for x, y in zip(a, b, strict=True)]).sum()  # type: ignore[no-untyped-call]


class _Norm(torch.autograd.Function):
    """(a, b) of one layer -> ||a - b||_2, with a slope in two passes over the layer where PyTorch's takes four.

    The difference is taken again for the slope, as it is as much memory as the weights; but where a is on no graph, and
    the slope is what is wanted next, it becomes the slope. Differentiable twice.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        difference = a - b
        norm: Tensor = torch.linalg.vector_norm(difference)
        ctx.norm = norm.detach()  # not the result itself, which holds this node
        ctx.difference = difference if a.requires_grad and a.is_leaf else None
        return norm

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        held, ctx.difference = ctx.difference, None
        of_a = a - b if held is None or torch.is_grad_enabled() else held
        norm = torch.linalg.vector_norm(of_a) if torch.is_grad_enabled() else ctx.norm
        none = norm == 0
        share = (slopes[0] / norm.masked_fill(none, 1)).masked_fill(none, 0)  # never 0/0, not even in its own slope
        of_a = of_a * share if torch.is_grad_enabled() else of_a.mul_(share)
        wanted = ctx.needs_input_grad
        return of_a if wanted[0] else None, -of_a if wanted[1] else None


def squared_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_l ||a_l - b_l||_2^2 (Zhu et al. 2019, Eq. 4)."""
    return torch.stack([(x - y).square().sum() for x, y in zip(a, b, strict=True)]).sum()


def relative_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """||a - b|| / ||b|| over all layers together, in float64; 0 if both are zero."""
    top = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    bottom = sum(float(y.double().square().sum()) for y in b)
    return 0.0 if top == 0 else float("inf") if bottom == 0 else (top / bottom) ** 0.5
