"""The exact input of a convolution, from its weight gradient and what its ReLU let through.

Once the inputs of the classifier are known, so are the ReLU's pattern and the gradient above the norm of the last
convolution, and dL/dW = sum over images and places of dz (x) input is *linear* in the unknown input: for each of its
channels o kh kw equations in b h w unknowns. What stands in the way is BatchNorm in train mode (and GroupNorm), where
dz depends on the norm's output at places the ReLU hides; a fixed-point iteration input -> hidden output -> dz -> input
finds it. Frostglass's own method; Zhu & Blaschko 2021 (R-GAP) solve convolutions for one image without norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from frostglass.numerics.conv_layer import ConvLayer, column

THRESHOLDS = (1e-5, 1e-6, 3e-5, 1e-7, 1e-4)
"""Of an active unit, relative to the largest one, in the order in which they are tried."""

CERTIFIED = 3e-5
"""Largest residual of an input that counts as exact."""

ITERATIONS = 40


@dataclass(frozen=True, eq=False)
class PeelProblem:
    """What is known of one convolution, in float64.

    Args:
        layer: the convolution with its norm.
        outputs: [b, o, i, j] after the ReLU, up to rounding.
        above: [b, o, i, j] gradient of the loss at `outputs`.
        grad_weight: [o, c, kh, kw] observed.
        size: (h, w) of the input.
        rectified: True if the input comes out of a ReLU.
        deviation: [b, groups] first guess of GroupNorm's 1 / deviation, else None.
    """

    layer: ConvLayer
    outputs: Float[Tensor, "b o i j"]
    above: Float[Tensor, "b o i j"]
    grad_weight: Float[Tensor, "o c kh kw"]
    size: tuple[int, int]
    rectified: bool
    deviation: Float[Tensor, "b g"] | None = None


@dataclass(frozen=True, eq=False)
class Peeled:
    """One solution.

    Args:
        inputs: [b, c, h, w] of the convolution.
        dz: [b, o, i, j] gradient at the convolution's output.
        fit: relative residual of the weight gradient.
        forward: relative distance of what the inputs give to the known outputs, where the ReLU is on.
    """

    inputs: Float[Tensor, "b c h w"]
    dz: Float[Tensor, "b o i j"]
    fit: float
    forward: float

    @property
    def residual(self) -> float:
        """Of both; below `CERTIFIED` the inputs are exact. Infinite if the solve broke down."""
        total = self.fit + self.forward
        return total if math.isfinite(total) else math.inf


def determined(layer: ConvLayer, examples: int, size: tuple[int, int]) -> bool:
    """Whether a weight gradient has at least as many equations a channel as there are unknowns.

    A stride splits places and kernel taps into classes that do not meet, so each class is counted by itself.
    """
    axes = zip(size, layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True)
    rows, columns = (_classes(*axis) for axis in axes)
    outputs = layer.weight.shape[0]
    return all(outputs * tr * tc >= examples * nr * nc for nr, tr in rows for nc, tc in columns)


def _classes(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[tuple[int, int]]:
    """(places, taps) along one axis, for each remainder of the stride."""
    taps = [(k * dilation - padding) % stride for k in range(kernel)]
    return [(len(range(r, size, stride)), taps.count(r)) for r in range(stride)]


def peel(problem: PeelProblem, relative: float) -> Peeled:
    """Solves for the input of the convolution.

    Args:
        problem: what is known.
        relative: units above this share of the largest one count as active (and above twice the most negative value
            of their image, which shows the rounding of the outputs).
    """
    layer, outputs = problem.layer, problem.outputs
    noise = 2 * (-outputs).amax((1, 2, 3), keepdim=True)
    active = outputs > noise.clamp_min(relative * float(outputs.max()))
    dy = problem.above * active
    xhat, deviation = first_guess(layer, outputs, active), problem.deviation
    right, unseen = problem.grad_weight.permute(0, 2, 3, 1).flatten(0, 2), layer.norm == "own"
    goal, spread, before = right, torch.ones_like(layer.gamma), math.inf
    for _ in range(ITERATIONS):
        dz = layer.backward(dy, xhat, spread if unseen else deviation)
        system = design(dz, layer, problem.size)
        if unseen:
            spread = unseen_deviation(system, right, len(spread))
            goal, dz = right * _rows(spread, right), dz / column(spread)
        solution = torch.linalg.lstsq(system, goal, driver="gelsd").solution
        fit = float((system @ solution - goal).norm() / goal.norm())
        inputs = solution.view(len(outputs), *problem.size, -1).permute(0, 3, 1, 2)
        if problem.rectified:
            inputs = inputs.clamp_min(0)
        raw = layer.conv(inputs)
        estimate = layer.standardise(raw)
        if unseen:  # not by the deviation of `raw`, as `eps` is known in the scale of the truth alone
            estimate = (raw - raw.mean((0, 2, 3), keepdim=True)) / column(spread)
            spread = torch.ones_like(spread)
        forward = float((estimate - xhat)[active].norm() / xhat[active].norm())
        stalled = abs(before - fit - forward) < 1e-4 * (fit + forward)
        if layer.norm in ("none", "fixed") or (fit < 1e-6 and forward < 1e-5) or stalled:
            break
        before = fit + forward
        xhat = with_hidden(layer, xhat, layer.scaled(estimate), active)
        deviation = layer.statistics(raw)[1] if layer.norm == "group" else None
    return Peeled(inputs, dz, fit, forward)


def unseen_deviation(
    system: Float[Tensor, "equations unknowns"], right: Float[Tensor, "equations c"], outputs: int
) -> Float[Tensor, " o"]:
    """The deviations s of a BatchNorm whose statistics were not seen, up to a common factor.

    Without them the equations are system x = s * right, linear and homogeneous in x and s together. Projecting on what
    `system` cannot reach leaves a quadratic form in s, whose null vector it is. Channels without gradient get 1.

    Args:
        system: `design` of the gradient for deviations of 1.
        right: the weight gradient, a column a channel of the input.
        outputs: channels of the output.
    """
    reachable = torch.linalg.qr(system).Q.view(outputs, -1, system.shape[1])
    per_output = right.view(outputs, -1, right.shape[1])
    size = per_output.square().sum((1, 2)).sqrt()
    used = size > 1e-12 * size.max()
    unit = per_output / torch.where(used, size, torch.ones_like(size))[:, None, None]
    inside = torch.einsum("okn,okc->onc", reachable, unit).flatten(1)
    left = torch.linalg.eigh(torch.eye(outputs, dtype=right.dtype) - inside @ inside.T).eigenvectors[:, 0]
    s = left * left.sum().sign() / torch.where(used, size, torch.ones_like(size))
    typical = s[used].abs().median()
    return torch.where(used & (s.abs() > 1e-9 * typical), s / typical, torch.ones_like(s))


def _rows(values: Float[Tensor, " o"], like: Float[Tensor, "equations c"]) -> Float[Tensor, "equations 1"]:
    """One value an output channel, for each of its equations."""
    return values.repeat_interleave(len(like) // len(values))[:, None]


def design(
    dz: Float[Tensor, "b o i j"], layer: ConvLayer, size: tuple[int, int]
) -> Float[Tensor, "equations unknowns"]:
    """The matrix that takes one input channel of all images to its part of the weight gradient."""
    b, o = dz.shape[:2]
    kh, kw = layer.weight.shape[2:]
    shifts = torch.eye(kh * kw, dtype=dz.dtype, device=dz.device).view(1, kh * kw, kh, kw)
    reach = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(dz.shape[2:], layer.stride, layer.padding, layer.dilation, (kh, kw), strict=True)
    ]
    missed = (size[0] - reach[0], size[1] - reach[1])  # rows and columns that the stride does not reach
    placed = functional.conv_transpose2d(
        dz.reshape(b * o, 1, *dz.shape[2:]), shifts, None, layer.stride, layer.padding, missed, 1, layer.dilation
    )
    return placed.view(b, o * kh * kw, size[0] * size[1]).transpose(0, 1).reshape(o * kh * kw, -1)


def with_hidden(layer: ConvLayer, xhat: Tensor, y: Tensor, active: Tensor) -> Tensor:
    """`xhat` with its hidden entries taken from an estimate `y` of the ReLU's input, which is not positive there."""
    return torch.where(active, xhat, layer.unscaled(y.clamp_max(0)))


def first_guess(layer: ConvLayer, outputs: Tensor, active: Tensor) -> Tensor:
    """xhat with one constant for the hidden entries of a channel; under BatchNorm the mean of xhat is 0."""
    xhat = torch.where(active, layer.unscaled(outputs), torch.zeros_like(outputs))
    if layer.norm in ("batch", "own"):
        hidden = -xhat.sum((0, 2, 3)) / (~active).sum((0, 2, 3)).clamp_min(1)
    else:
        hidden = torch.full_like(layer.gamma, -0.8)  # the mean of a standard normal below 0
    return torch.where(active, xhat, column(hidden).expand_as(xhat))
