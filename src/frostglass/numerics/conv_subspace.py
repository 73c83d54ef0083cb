"""The input of a convolution from its weight gradient alone, up to one factor.

For one image dL/dW = D P: rows of P are the patches that the convolution reads, one a place, and D [outputs, places] is
the gradient at its output, which nobody knows. If there are at least as many outputs as places, D has full column rank
as a rule, so the row space of dL/dW is that of P. Patches overlap, so P is a linear function of the input a, and every
filter n orthogonal to the row space gives a convolution that vanishes on a:

    conv(a, n) = 0   for all n with dL/dW n = 0.

These are linear, homogeneous equations in a, many more than unknowns; their solution is a, up to a factor. Neither
labels nor anything behind the convolution is needed. BatchNorm in train mode takes the mean over places out of each row
of D, so one direction is lost; the filtered map is then constant over places instead of zero. Frostglass's own method;
the use of shifts is that of ESPRIT (Roy & Kailath 1989), the row space that of SPEAR (Dimitrov et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from frostglass.numerics.conv_layer import ConvLayer

NOISE = 1e-6
"""Singular values of the row-normalised gradient below this share of the largest are rounding (float32 leaves 1e-7)."""

UNIQUE = 1e-3
"""Largest ratio of the two smallest eigenvalues for which the solution counts as unique."""


@dataclass(frozen=True, eq=False)
class Shape:
    """What was found.

    Args:
        inputs: [1, c, h, w] of norm 1; the sign makes the sum positive, as the values of a ReLU are.
        least, next_least: eigenvalues of the equations; the first is 0 up to noise, the second is not.
        rank: of the weight gradient.
    """

    inputs: Float[Tensor, "1 c h w"]
    least: float
    next_least: float
    rank: int

    @property
    def unique(self) -> bool:
        """The equations have one solution."""
        return self.least < UNIQUE * self.next_least


def places(layer: ConvLayer, size: tuple[int, int]) -> int:
    """Outputs of one channel."""
    rows, columns = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True)
    )
    return rows * columns


def shape_of_input(
    layer: ConvLayer, grad_weight: Float[Tensor, "o c kh kw"], size: tuple[int, int], *, centred: bool, start: Tensor
) -> Shape | None:
    """Solves conv(a, n) = 0 for all filters n that the gradient does not contain.

    Args:
        layer: the convolution, in float64.
        grad_weight: observed, for one image.
        size: (h, w) of the input.
        centred: True if the mean over places is missing from D (BatchNorm in train mode).
        start: [c h w] of the iteration.

    Returns:
        None if the gradient has not the rank that the number of places gives it, or the iteration does not end.
    """
    rows = grad_weight.flatten(1)
    norms = rows.norm(dim=1, keepdim=True)
    used = rows[norms[:, 0] > 1e-12 * norms.max()]
    _, values, right = torch.linalg.svd(used / used.norm(dim=1, keepdim=True), full_matrices=False)
    rank = int((values > NOISE * values[0]).sum())
    wanted = places(layer, size) - int(centred)
    if rank < wanted:
        return None
    return _least(layer, right[:wanted], size, centred, start, rank)


def _least(
    layer: ConvLayer, contained: Tensor, size: tuple[int, int], centred: bool, start: Tensor, rank: int
) -> Shape | None:
    """The two smallest eigenvalues of |P a|^2 - |P a contained^T|^2, both after centring if asked for."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    c, kh, kw = layer.weight.shape[1:]
    filters = contained.view(-1, c, kh, kw)
    every = torch.eye(c * kh * kw, dtype=filters.dtype).view(-1, c, kh, kw)
    shape = (1, c, *size)

    def square(a: Tensor, bank: Tensor) -> Tensor:
        seen = functional.conv2d(a, bank, None, layer.stride, layer.padding, layer.dilation)
        seen = seen - seen.mean((2, 3), keepdim=True) if centred else seen
        return torch.nn.grad.conv2d_input(shape, bank, seen, layer.stride, layer.padding, layer.dilation)

    def apply(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        a = torch.from_numpy(np.ascontiguousarray(vector)).view(shape)
        return (square(a, every) - square(a, filters)).flatten().numpy()

    count = c * size[0] * size[1]
    operator = LinearOperator((count, count), matvec=apply, dtype=np.float64)
    try:
        values, vectors = eigsh(operator, k=2, which="SA", v0=start.numpy(), ncv=min(count - 1, 60), maxiter=200)
    except ArpackNoConvergence:
        return None
    found = torch.from_numpy(vectors[:, int(values.argmin())].copy()).view(shape)
    total = float(found.sum())
    return Shape(found if total >= 0 else -found, float(values.min()), float(values.max()), rank)
