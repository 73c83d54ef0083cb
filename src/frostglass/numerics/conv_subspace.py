"""The inputs of a convolution from its weight gradient alone, up to one factor an image.

For b images dL/dW = D P: rows of P are the patches that the convolution reads, one a place of an image, and D [outputs,
b places] is the gradient at its output, which nobody knows. If there are at least as many outputs as places of all
images, D has full column rank as a rule, so the row space of dL/dW is that of P. Patches overlap, so those of one image
are a linear function of its input a, and every filter n orthogonal to the row space gives a convolution that vanishes:

    conv(a, n) = 0   for all n with dL/dW n = 0.

These are linear, homogeneous equations in a, many more than unknowns; their solutions are the inputs of the b images
and all mixtures of them, among which the inputs are the sparse non-negative ones (`nonnegative_rays`). Neither labels
nor anything behind the convolution is needed. BatchNorm in train mode takes the mean over places and images out of each
row of D, so one direction is lost; the filtered map is then constant over places instead of zero. Frostglass's own
method; the use of shifts is that of ESPRIT (Roy & Kailath 1989), the row space that of SPEAR (Dimitrov et al. 2024).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from frostglass.core.randomness import Rng
from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.nonnegative_rays import rays

NOISE = 1e-6
"""Singular values of the row-normalised gradient below this share of the largest are rounding (float32 leaves 1e-7)."""

UNIQUE = 1e-3
"""Largest ratio of what the worst solution misses and what the next vector misses, for which b solutions are all."""

ITERATIONS = 400
"""Of the eigenvalue solver, at the most."""


@dataclass(frozen=True, eq=False)
class Shapes:
    """What was found.

    Args:
        inputs: [b, c, h, w], in no particular order, each of norm 1 and with a positive sum, as a ReLU's values have.
        least, next_least: squared distance from fulfilling the equations, as a share, of the worst solution and of the
            next vector; the first is 0 up to noise, the second is not.
        rank: of the weight gradient.
    """

    inputs: Float[Tensor, "b c h w"]
    least: float
    next_least: float
    rank: int


def places(layer: ConvLayer, size: tuple[int, int]) -> int:
    """Outputs of one channel."""
    rows, columns = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True)
    )
    return rows * columns


def shapes_of_inputs(
    layer: ConvLayer,
    grad_weight: Float[Tensor, "o c kh kw"],
    size: tuple[int, int],
    examples: int,
    *,
    centred: bool,
    rng: Rng,
) -> Shapes | None:
    """Solves conv(a, n) = 0 for all filters n that the gradient does not contain.

    Args:
        layer: the convolution, in float64.
        grad_weight: observed, for `examples` images.
        size: (h, w) of the input.
        examples: images.
        centred: True if the mean over places and images is missing from D (BatchNorm in train mode).
        rng: of starting points.

    Returns:
        None if the gradient has not the rank that the number of places gives it, the equations have more solutions than
        images, or these were not told apart.
    """
    rows = grad_weight.flatten(1)
    norms = rows.norm(dim=1, keepdim=True)
    used = rows[norms[:, 0] > 1e-12 * norms.max()]
    _, values, right = torch.linalg.svd(used / used.norm(dim=1, keepdim=True), full_matrices=False)
    rank = int((values > NOISE * values[0]).sum())
    wanted = examples * places(layer, size) - int(centred)
    if rank < wanted:
        return None
    missed, basis = _solutions(layer, right[:wanted], size, examples, centred, rng)
    least, next_least = float(missed[examples - 1]), float(missed[examples])
    if not least < UNIQUE * next_least:
        return None
    apart = rays(basis, rng.at("rays").generator())
    if apart is None:
        return None
    return Shapes(apart.T.reshape(examples, -1, *size), least, next_least, rank)


def _solutions(
    layer: ConvLayer, contained: Tensor, size: tuple[int, int], examples: int, centred: bool, rng: Rng
) -> tuple[Tensor, Tensor]:
    """(what each of the first `examples` + 1 vectors misses, the first `examples` of them as columns [c h w, b]).

    Patches that fit together are one subspace, those whose rows the gradient contains another; solutions lie in both.
    They are the eigenvectors, at 1, of the projection on the one, the other and the one again.
    """
    from scipy.sparse.linalg import LinearOperator, lobpcg

    c, kh, kw = layer.weight.shape[1:]
    bank, shape, kernel = contained.view(-1, c, kh, kw), (-1, c, *size), (kh, kw)
    geometry = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}

    def unfolded(a: Tensor) -> Tensor:
        return functional.unfold(a, kernel, **geometry)

    def folded(patches: Tensor) -> Tensor:
        return functional.fold(patches, size, kernel, **geometry)

    # An entry that k patches read counts k times; entries that none reads are 0 and stay so.
    weight = folded(unfolded(torch.ones(1, c, *size, dtype=bank.dtype))).sqrt().clamp_min(1e-300)

    def project(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        a = torch.from_numpy(np.ascontiguousarray(vectors.T)).view(shape) / weight
        seen = functional.conv2d(a, bank, None, layer.stride, layer.padding, layer.dilation)
        out = torch.zeros_like(a)
        if centred:
            seen = seen - seen.mean((2, 3), keepdim=True)
            patches = unfolded(a)
            out = folded(patches.mean(2, keepdim=True).expand_as(patches))
        out = out + torch.nn.grad.conv2d_input(a.shape, bank, seen, layer.stride, layer.padding, layer.dilation)
        made: NDArray[np.float64] = (out / weight).flatten(1).numpy().T
        return made

    count = c * size[0] * size[1]
    operator = LinearOperator(
        (count, count), matvec=lambda v: project(v.reshape(-1, 1))[:, 0], matmat=project, dtype=np.float64
    )
    start = rng.at("start").numpy().standard_normal((count, examples + 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # not all converged: what a vector misses tells by itself
        values, vectors = lobpcg(operator, start, largest=True, maxiter=ITERATIONS, tol=1e-9)
    order = np.argsort(-values)
    missed = torch.from_numpy(1 - values[order][: examples + 1].copy()).clamp_min(0)
    found = torch.from_numpy(np.ascontiguousarray(vectors[:, order[:examples]].T)).view(shape) / weight
    return missed, found.flatten(1).T
