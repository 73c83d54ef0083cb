"""The factored gradient that `spear` searches: rank, noise floor, and the layer seen from the row space of dL/dW."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TOLERANCE = 8.0  # |A q| counts as zero below this many standard deviations of the measured noise
# The same for a gradient that shows nothing but float32 rounding: equal pixels round alike, so errors add up.
ROUNDING = 60.0
COLUMNS = 4096  # columns of the gradient converted to float64 at a time: bounds the memory for large images


@dataclass(frozen=True)
class SpearProblem:
    """The factored gradient, in float64. h units, r images looked for, d inputs.

    rank: numerical rank of dL/dW; `batch`: the batch size given (or the rank). r = min(batch, rank). rank < batch means
    repeated images (their columns of S add up) or images whose loss gradient lies below the noise.
    noise: share of ||dL/dW|| outside the r leading directions (relative, Frobenius): the measured noise floor.
    """

    left: Float[Tensor, "h r"]
    right: Float[Tensor, "r d"]
    values: Float[Tensor, " r"]  # singular values of dL/dW
    offset: Float[Tensor, " r"]  # A^T dL/db = Q 1
    forward: Float[Tensor, "h r"]  # W R^T: pre-activations are forward @ u + bias
    bias: Float[Tensor, " h"]
    gain: Float[Tensor, " h"]  # length of each row of W
    sigma: Float[Tensor, " h"]  # standard deviation of the noise per entry of a row of dL/dW
    live: Bool[Tensor, " h"]  # units with a gradient above the noise
    batch: int
    rank: int
    noise: float

    @property
    def size(self) -> int:
        """r: number of distinct images that can be looked for."""
        return self.left.shape[1]

    @property
    def tolerance(self) -> float:
        """Number of standard deviations of the noise below which a value counts as zero."""
        return ROUNDING if self.noise < 1e-6 else TOLERANCE

    @property
    def separable(self) -> bool:
        """Whether there are enough live units (more than r + 4) for zeros to single out one image."""
        return int(self.live.sum()) > self.size + 4 or self.size == 1

    @property
    def samples(self) -> int:
        """Suggested `samples` of one `search` call: roughly 0.05 to 0.3 s on one core."""
        cost = 40.0 * (self.left.shape[0] * self.size**2 + 40.0 * self.size**3)
        return max(8, min(128, int(1.2e9 / cost)))


def prepare(
    weight: Float[Tensor, "h d"],
    bias: Float[Tensor, " h"],
    grad_weight: Float[Tensor, "h d"],
    grad_bias: Float[Tensor, " h"] | None,
    batch: int | None = None,
) -> SpearProblem:
    """Factor dL/dW into r = min(batch, rank) directions and measure the noise floor; any float dtype, computed in
    float64.

    batch: number of images; None estimates it by the numerical rank.
    Raises ValueError: NaN or infinity, a zero gradient, no bias gradient, shapes that do not fit, or batch < 1.
    """
    _check(weight, bias, grad_weight, grad_bias, batch)
    assert grad_bias is not None
    energy, vectors = torch.linalg.eigh(_gram(grad_weight))
    spectrum = energy.flip(0).clamp_min(0).sqrt()
    rank = _numerical_rank(spectrum[: int((grad_weight != 0).any(1).sum())])
    size = min(rank, batch or rank)
    left, values = vectors.flip(1)[:, :size].contiguous(), spectrum[:size]
    right = left.new_empty(size, grad_weight.shape[1])
    forward, rest, gain, total = torch.zeros_like(left), left.new_zeros(len(left)), left.new_zeros(len(left)), 0.0
    for start in range(0, grad_weight.shape[1], COLUMNS):
        part = slice(start, start + COLUMNS)
        block, w = grad_weight[:, part].double(), weight[:, part].double()
        right[:, part] = left.T @ block
        forward += w @ right[:, part].T
        gain += w.square().sum(1)
        total += float(block.square().sum())
        rest += torch.addmm(block, left, right[:, part], alpha=-1).square_().sum(1)
    # a row of small entries may show less rounding noise than the sums behind it carried, hence the common floor
    spread = (rest / max(grad_weight.shape[1] - size, 1)).sqrt()
    sigma = torch.maximum(spread, 0.1 * spread.square().mean().sqrt())
    sigma = sigma.clamp_min(1e-15 * math.sqrt(total / grad_weight.numel()))
    live = (left * values).norm(dim=1) > 3 * TOLERANCE * math.sqrt(size) * sigma
    return SpearProblem(
        left=left,
        right=right,
        values=values,
        offset=left.T @ grad_bias.double(),
        forward=forward,
        bias=bias.double(),
        gain=gain.sqrt(),
        sigma=sigma,
        live=live,
        batch=batch or rank,
        rank=rank,
        noise=math.sqrt(float(rest.sum()) / total),
    )


def zero_level(problem: SpearProblem, q: Float[Tensor, "n r"]) -> Float[Tensor, "n h"]:
    """Standard deviation that the gradient's noise alone gives to the unit row a_k . q; A's column j carries sigma /
    value j.
    """
    scale = problem.sigma / problem.left.norm(dim=1).clamp_min(1e-300)
    lengths: Tensor = (q / problem.values).norm(dim=1)
    return lengths[:, None] * scale


def mean_coordinates(problem: SpearProblem, count: int) -> Float[Tensor, "n r"]:
    """The point of u . offset = 1 nearest to 0: a mixture of all images, the start of every cell fit."""
    return (problem.offset / problem.offset.square().sum())[None].expand(count, -1)


def _check(weight: Tensor, bias: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, batch: int | None) -> None:
    if grad_bias is None:
        raise ValueError("spear needs the gradient of the layer's bias: without it the scale of each input is open")
    units = weight.shape[:1]
    if weight.ndim != 2 or grad_weight.shape != weight.shape or bias.shape != units or grad_bias.shape != units:
        raise ValueError("spear needs weight and its gradient as [units, inputs] and bias and its gradient as [units]")
    if not all(bool(torch.isfinite(t).all()) for t in (weight, bias, grad_weight, grad_bias)):
        raise ValueError("spear needs finite numbers: the layer or its gradient contains NaN or infinity")
    if not bool(grad_weight.any()) or not bool(grad_bias.any()):
        raise ValueError("the gradient of the layer is zero: it carries no image")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


def _gram(matrix: Float[Tensor, "h d"]) -> Float[Tensor, "h h"]:
    """matrix @ matrix.T in float64, a block of columns at a time."""
    out = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for start in range(0, matrix.shape[1], COLUMNS):
        block = matrix[:, start : start + COLUMNS].double()
        out.addmm_(block, block.T)
    return out


def _numerical_rank(spectrum: Float[Tensor, " k"]) -> int:
    """Last clear drop of the spectrum: noise falls smoothly (ratio near 1), images end in a step.

    Values below 3e-8 of the first are round-off of the squared spectrum. In the lower half of the spectrum, where
    pure noise
    may also fall fast, only a step of 100 counts. No drop at all: full rank.
    """
    clipped = spectrum.clamp_min(3e-8 * float(spectrum[0]))
    ratio = clipped[:-1] / clipped[1:]
    need = torch.where(torch.arange(len(ratio)) < len(ratio) // 2, 1.7, 100.0)
    drops = (ratio > need).nonzero().flatten()
    return int(drops[-1]) + 1 if len(drops) else len(spectrum)
