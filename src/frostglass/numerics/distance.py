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
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (*a, *b))):
        return _distance_of(_inner_products(a, b))
    distance: Tensor = _Cosine.apply(len(a), *a, *b)  # type: ignore[no-untyped-call]
    return distance


def _inner_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(<a, a>, <b, b>, <a, b>)."""

    def inner(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        return torch.stack([u.reshape(-1).dot(v.reshape(-1)) for u, v in zip(x, y, strict=True)]).sum()

    return inner(a, a), inner(b, b), inner(a, b)


def _distance_of(products: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    aa, bb, ab = products
    return 1 - ab / (aa * bb).clamp_min(torch.finfo(aa.dtype).tiny).sqrt()


class _Cosine(torch.autograd.Function):
    """(number of layers, *a, *b) -> distance."""

    @staticmethod
    def forward(ctx: Any, layers: int, *tensors: Tensor) -> Tensor:
        products = _inner_products(tensors[:layers], tensors[layers:])
        ctx.layers, ctx.products = layers, products
        ctx.save_for_backward(*tensors)
        return _distance_of(products)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        layers, tensors = ctx.layers, ctx.saved_tensors
        a, b = tensors[:layers], tensors[layers:]
        # a second derivative is asked for: the products have to be on the graph
        products = _inner_products(a, b) if torch.is_grad_enabled() else ctx.products
        aa, bb, ab = products
        tiny = torch.finfo(aa.dtype).tiny
        norms = (aa * bb).clamp_min(tiny).sqrt()
        other = -slopes[0] / norms
        own = -other * torch.where(aa * bb > tiny, ab, torch.zeros_like(ab))
        wanted = ctx.needs_input_grad[1:]
        pairs = [*((x, y, aa) for x, y in zip(a, b, strict=True)), *((y, x, bb) for x, y in zip(a, b, strict=True))]
        return None, *(
            torch.addcmul(x * (own / square.clamp_min(tiny)), y, other) if want else None
            for (x, y, square), want in zip(pairs, wanted, strict=True)
        )


def layer_norms(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_l ||a_l - b_l||_2, norms not squared (Yin et al. 2021, Eq. 3)."""
    return torch.stack([torch.linalg.vector_norm(x - y) for x, y in zip(a, b, strict=True)]).sum()


def squared_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_l ||a_l - b_l||_2^2 (Zhu et al. 2019, Eq. 4)."""
    return torch.stack([(x - y).square().sum() for x, y in zip(a, b, strict=True)]).sum()


def relative_error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """||a - b|| / ||b|| over all layers together, in float64; 0 if both are zero."""
    top = sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    bottom = sum(float(y.double().square().sum()) for y in b)
    return 0.0 if top == 0 else float("inf") if bottom == 0 else (top / bottom) ** 0.5
