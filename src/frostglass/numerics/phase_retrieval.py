"""Images from absolute values of known mixtures of them: y = |W x + n|, all pixels and images at once.

Expectation-maximisation for the folded normal (our own derivation):

    E:  m = W x,   v = y tanh(y m / s_e^2)                          expected unmasked mix of encoding e
    M:  x = argmin sum_e |v_e - (W x)_e|^2 / s_e^2 + r <x, K^-1 x>   weighted least squares under an image prior
        s_e^2 = mean over pixels of y^2 - 2 v m + m^2               noise of each encoding: its public share

K is the covariance of natural images: diagonal in the cosine basis, falling as a power of the frequency, and in
opponent colours. Because the noise of an encoding is one number, the M step is one eigenproblem of size P and a product
in the cosine basis. The weight r of the prior starts high and falls, which makes EM go from coarse to fine. What EM
cannot see is the sign of a pixel, common to all images: the leading eigenvector of neighbours' agreement decides it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from frostglass.numerics.phase_restarts import VARIANCE, restart_pixels

_FLOOR = 1e-4
_PRODUCTS = 1 << 24  # products of two coefficients that are held at a time
_EVEN = 0.1  # least noise of an encoding, of the median one's
_SLOPE = 1.1  # power of 1 / frequency^2 in the spectrum
_COLOURS = (2.7, 0.2, 0.08)  # share of the three opponent colours, summing to about 3


@dataclass(frozen=True)
class FoldEM:
    """How long, and how strongly smoothed, EM runs.

    Args:
        steps: EM iterations.
        prior: weight r of the image prior at the first iteration ...
        decay: ... multiplied by this at each iteration ...
        least: ... down to this.
        align: iterations before which pixel signs are aligned.
        restarts: how often, at most, doubtful pixels start again from their neighbours ...
        settle: ... with so many EM iterations after each time ...
        gain: ... until the mean log-likelihood per pixel gains less than this.
    """

    steps: int = 20
    prior: float = 10.0
    decay: float = 0.8
    least: float = 0.1
    align: tuple[int, ...] = (0, 5, 10)
    restarts: int = 4
    settle: int = 5
    gain: float = 1e-4


_PRODUCTS = 1 << 24  # products of two coefficients that are held at a time


def start_bytes(images: int, pixels: int) -> int:
    """Memory of `spectral_start`: its matrix of all pairs of images for every pixel, twice, with its eigenvectors."""
    return 3 * 4 * images**2 * pixels


@functools.cache
def cosine_basis(n: int) -> Float[Tensor, "n n"]:
    """Orthonormal DCT-II matrix: row k is the k-th cosine."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi / n * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis.float()


@functools.cache
def _opponent(channels: int) -> Tensor:
    if channels != 3:
        return torch.eye(channels)
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
    return axes / torch.linalg.vector_norm(axes, dim=1, keepdim=True)


@functools.lru_cache(maxsize=8)
def natural_spectrum(channels: int, height: int, width: int) -> Float[Tensor, "c h w"]:
    """Prior variance of each coefficient of `to_spectrum` for images in [-1, 1] of mean grey."""
    fy, fx = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    power = (fy.square() + fx.square() + (0.5 / max(height, width)) ** 2) ** -_SLOPE
    colours = torch.tensor(_COLOURS if channels == 3 else (1.0,) * channels)
    return power / power.mean() * VARIANCE * colours[:, None, None]


def to_spectrum(x: Float[Tensor, "p c h w"]) -> Float[Tensor, "p c h w"]:
    """Orthonormal: opponent colours, then a cosine transform of each."""
    rows, columns = cosine_basis(x.shape[-2]).to(x), cosine_basis(x.shape[-1]).to(x)
    return torch.einsum("ij,pjhw->pihw", _opponent(x.shape[1]).to(x), rows @ x @ columns.T)


def from_spectrum(z: Float[Tensor, "p c h w"]) -> Float[Tensor, "p c h w"]:
    """Inverse of `to_spectrum`."""
    rows, columns = cosine_basis(z.shape[-2]).to(z), cosine_basis(z.shape[-1]).to(z)
    return rows.T @ torch.einsum("ji,pjhw->pihw", _opponent(z.shape[1]).to(z), z) @ columns


def least_squares(
    weights: Float[Tensor, "e p"], noise: Float[Tensor, " e"], values: Float[Tensor, "e c h w"], prior: float
) -> Float[Tensor, "p c h w"]:
    """The M step: images that explain signed `values` best, under the natural-image prior of weight `prior`."""
    scaled = weights / noise[:, None]
    strength, axes = torch.linalg.eigh((weights.T @ scaled).double())
    shape = values.shape[1:]
    z = to_spectrum((axes.to(values).T @ (scaled.T @ values.flatten(1))).view(-1, *shape))
    level = strength.to(values).clamp_min(0).view(-1, 1, 1, 1)
    z = z / (level + prior / natural_spectrum(*shape).to(values))
    return (axes.to(values) @ from_spectrum(z).flatten(1)).view(-1, *shape)


def spectral_start(y: Float[Tensor, "e c h w"], weights: Float[Tensor, "e p"]) -> Float[Tensor, "p c h w"]:
    """Per pixel the top eigenvector of W^T diag(y^2 - mean y^2) W, scaled to the mean of y^2 (Chen et al. 2020)."""
    power = y.square().flatten(1)
    images = weights.shape[1]
    centred, matrix = power - power.mean(0), power.new_zeros(images * images, power.shape[1])
    for rows in torch.arange(len(power), device=power.device).split(max(1, _PRODUCTS // images**2)):
        w = weights[rows]
        matrix += (w[:, :, None] * w[:, None, :]).flatten(1).T @ centred[rows]
    matrix = matrix.T.reshape(-1, images, images)
    top = torch.linalg.eigh(matrix)[1][:, :, -1].T
    return (top * (0.25 * images * power.mean(0)).sqrt()).reshape(images, *y.shape[1:])


def pixel_signs(x: Float[Tensor, "p c h w"]) -> Float[Tensor, "c h w"]:
    """One sign a pixel and channel, common to all images, that makes neighbours agree: angular synchronisation
    (Singer 2011) over Z_2, on cosines between the pixels' vectors of P values."""
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import eigsh

    unit = torch.nn.functional.normalize(x.double().cpu(), dim=0)
    c = unit.shape[1]
    index = torch.arange(unit[0].numel()).view(unit.shape[1:])
    pairs = [(slice(None), slice(1, None), slice(None)), (slice(None), slice(None), slice(1, None))]
    back = [(slice(None), slice(None, -1), slice(None)), (slice(None), slice(None), slice(None, -1))]
    edges = [(index[a], index[b], (unit[:, *a] * unit[:, *b]).sum(0)) for a, b in zip(pairs, back, strict=True)]
    edges += [(index[i], index[j], (unit[:, i] * unit[:, j]).sum(0)) for i in range(c) for j in range(i + 1, c)]
    i, j, value = (torch.cat([e[n].flatten() for e in edges]).numpy() for n in range(3))
    graph = coo_matrix((value, (i, j)), shape=(index.numel(), index.numel())).tocsr()
    graph = graph + graph.T
    scale = diags(1 / np.sqrt(np.asarray(abs(graph).sum(1)).ravel() + 1e-9))
    # The next eigenvectors, waves over the image, are close: from anywhere else than nearby it would take long.
    top = eigsh(scale @ graph @ scale, k=1, which="LA", v0=_signs_along_tree(graph), tol=1e-5)[1][:, 0]
    sign = torch.from_numpy(np.where(top < 0, -1.0, 1.0)).view(unit.shape[1:])
    return sign.to(x)


def _signs_along_tree(graph: Any) -> NDArray[np.float64]:
    """Signs that agree along every edge of the spanning tree of strongest agreement (or disagreement)."""
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    cost = graph.copy()
    cost.data = 2.0 - np.abs(cost.data)  # above 0: csgraph takes 0 for no edge
    tree = minimum_spanning_tree(cost)
    order, parent = breadth_first_order(tree, 0, directed=False)
    children = order[1:]
    agree = np.where(np.asarray(graph[children, parent[children]]).ravel() < 0, -1.0, 1.0)
    sign = np.ones(graph.shape[0])
    for child, before, value in zip(children, parent[children], agree, strict=True):
        sign[child] = sign[before] * value
    return sign


def fold_em(
    y: Float[Tensor, "e c h w"],
    weights: Float[Tensor, "e p"],
    images: Float[Tensor, "p c h w"] | None = None,
    noise: Float[Tensor, " e"] | None = None,
    how: FoldEM | None = None,
) -> tuple[Float[Tensor, "p c h w"], Float[Tensor, " e"]]:
    """Images and noise variances under which y = |W x + n| is likely, each pixel's sign aligned with its neighbours'.

    Args:
        y: absolute values of encodings, in [0, 1].
        weights: W, the private coefficients.
        images: where to start; without them a spectral start.
        noise: variance of each encoding where to start.
        how: number of iterations and prior.

    Returns:
        (images [P, c, h, w] up to one common sign, noise variance [E]).
    """
    how = how or FoldEM()
    x = spectral_start(y, weights) if images is None else images
    s2 = (y.square().mean() / 2).expand(len(y)) if noise is None else noise
    for t in range(how.steps):
        if t in how.align:
            x = x * pixel_signs(x)
        x, s2 = em_step(y, weights, x, s2, max(how.prior * how.decay**t, how.least))
    value = mean_log_likelihood(y, weights, x, s2)
    for _ in range(how.restarts):
        z = restart_pixels(y, weights, s2, x)
        z, r2 = z * pixel_signs(z), s2
        for _ in range(how.settle):
            z, r2 = em_step(y, weights, z, r2, how.least)
        now = mean_log_likelihood(y, weights, z, r2)
        if now <= value:
            break
        gained, x, s2, value = now - value, z, r2, now
        if gained < how.gain:
            break
    return x * pixel_signs(x), s2


def em_step(
    y: Float[Tensor, "e c h w"],
    weights: Float[Tensor, "e p"],
    x: Float[Tensor, "p c h w"],
    noise: Float[Tensor, " e"],
    prior: float,
) -> tuple[Float[Tensor, "p c h w"], Float[Tensor, " e"]]:
    """One iteration: (images, noise variances)."""
    mean = (weights @ x.flatten(1)).view_as(y)
    v = y * torch.tanh(y * mean / noise.view(-1, 1, 1, 1))
    x = least_squares(weights, noise, v, prior)
    mean = (weights @ x.flatten(1)).view_as(y)
    left = (y.square() + mean * (mean - 2 * v)).mean((1, 2, 3))
    # An encoding that is fitted exactly would outweigh all others and be fitted ever after.
    return x, left.clamp_min(max(_FLOOR, _EVEN * float(left.median())))


def mean_log_likelihood(
    y: Float[Tensor, "e c h w"], weights: Float[Tensor, "e p"], x: Float[Tensor, "p c h w"], noise: Float[Tensor, " e"]
) -> float:
    """log p(y | x), mean over encodings and pixels."""
    mean = (weights @ x.flatten(1)).view_as(y)
    return float(fold_log_likelihood(y, mean, noise.view(-1, 1, 1, 1)).mean())


def fold_log_likelihood(y: Tensor, mean: Tensor, noise: Tensor) -> Tensor:
    """log p(y | mean, noise) of the folded normal, elementwise (broadcast); mean may have either sign."""
    a = y * mean.abs() / noise
    return -(y - mean.abs()).square() / (2 * noise) + torch.log1p(torch.exp(-2 * a)) - (2 * math.pi * noise).log() / 2
