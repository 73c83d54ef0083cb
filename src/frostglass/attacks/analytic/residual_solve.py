"""One linear system of `peel_residual`: what a convolution reads, given the gradient above its ReLU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from frostglass.attacks.analytic.residual_graph import Graph, Node
from frostglass.core.randomness import Rng
from frostglass.numerics import conv_peel
from frostglass.numerics.conv_layer import ConvLayer, column

ACTIVE = (1.5, 1.0, 3.0, 0.6, 6.0)
"""Of an active unit, relative to the most negative value found, which shows the rounding: thresholds in the order in
which they are tried."""

EXACT = 3e-6
"""Residual at which no other threshold is tried; gradients in float32 leave about 5e-7."""

SUSPECT, CORRECTIONS = 6.0, 30
"""Values up to this multiple of the most negative one may be on the wrong side of their ReLU; switches at the most."""

RANK = 1e-9
"""Singular values below this share of the largest are none."""

DIRECTIONS = 48
"""Of the residual, in which a wrong unit is looked for."""

ROUNDS, MEMORY = 40, 8
"""Of the fixed point for BatchNorm in train mode: iterations, and how many of them the acceleration looks back."""


@dataclass(frozen=True, eq=False)
class Sent:
    """What is read of an observation, in float64 on the CPU.

    Args:
        graph: the network.
        layers: convolutions with their norms by the convolution's name.
        gradients: by parameter name.
        examples: images, b.
        rng: of starting points.
    """

    graph: Graph
    layers: Mapping[str, ConvLayer]
    gradients: Mapping[str, Tensor]
    examples: int
    rng: Rng

    def layer(self, node: Node) -> ConvLayer:
        """Of a recognised node."""
        assert node.unit is not None
        return self.layers[node.unit.name]

    def gradient(self, node: Node) -> Tensor:
        """Of its convolution's weight."""
        assert node.unit is not None
        return self.gradients[f"{node.unit.name}.weight"]

    def moment(self, node: Node) -> Tensor | None:
        """[o] sum over images and places of the norm's output, before gamma and beta, times the gradient above.

        It is the gradient of gamma. None if that was not sent.
        """
        assert node.unit is not None
        return self.gradients.get(f"{node.unit.norm_name}.weight")

    def total(self, node: Node) -> Tensor | None:
        """[o] sum over images and places of the gradient above a norm: that of beta. None if that was not sent."""
        assert node.unit is not None
        return self.gradients.get(f"{node.unit.norm_name}.bias")


def active_of(value: Tensor, relative: float) -> Tensor:
    """Where a ReLU was on, given its output [b, c, h, w] up to rounding, which differs between images."""
    least, most = (reduced(value, (1, 2, 3), keepdim=True) for reduced in (torch.amin, torch.amax))
    return value > torch.where(least < 0, -relative * least, 1e-6 * most)


def solve(
    sent: Sent, node: Node, above: Tensor, active: Tensor, value: Tensor, measured: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """(input of the node's convolution, gradient at its output, relative residual).

    Under BatchNorm in train mode the gradient at the output depends on the output: a fixed point, found by Anderson
    acceleration. Where the ReLU follows the norm directly, the output is `value` at `active` places. How much of the
    output the gradient holds is what the gradient of gamma says.
    """
    assert node.unit is not None
    layer, gradient, size, delta = sent.layer(node), sent.gradient(node), node.unit.size, above * active
    plain = node.shortcut is None
    xhat = conv_peel.first_guess(layer, value, active) if plain else torch.zeros_like(delta)
    right = gradient.permute(0, 2, 3, 1).flatten(0, 2)
    by_batch, moment = layer.norm == "batch", sent.moment(node)
    free: Tensor | None = None
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(ROUNDS if by_batch else 1):
        dz = layer.backward(delta, xhat, moment=moment)
        dz = dz - dz.mean((0, 2, 3), keepdim=True) if by_batch else dz  # as that of the true output is
        inputs, free = _least_squares(conv_peel.design(dz, layer, size), right, size, measured, free)
        if by_batch and plain and free is not None and len(free):
            inputs = _completed(layer, inputs, free, value, active)
        estimate = layer.standardise(layer.conv(inputs.clamp_min(0)))
        moved = conv_peel.with_hidden(layer, xhat, layer.scaled(estimate), active) if plain else estimate
        step = moved - xhat
        if float(step.norm()) < 1e-8 * float(moved.norm()):
            break
        history = [*history[-MEMORY:], (xhat.flatten(), step.flatten())]
        xhat = _accelerated(history).view_as(xhat)
    fit = float((layer.gradient_of_weight(inputs, dz) - gradient).norm() / gradient.norm())
    return inputs, dz, fit if math.isfinite(fit) else math.inf


def corrected(
    sent: Sent,
    node: Node,
    above: Tensor,
    active: Tensor,
    value: Tensor,
    measured: Tensor | None,
    best: tuple[Tensor, Tensor, float],
) -> tuple[tuple[Tensor, Tensor, float], Tensor]:
    """Switches units that rounding put on the wrong side of their ReLU, one by one, as long as the residual falls.

    A wrong unit adds one patch to one channel's rows of the gradient. Of the units nearest to zero, the one is switched
    whose patch explains most of what the least squares leave (matching pursuit).
    """
    assert node.unit is not None
    near = (value.abs() < -SUSPECT * value.amin((1, 2, 3), keepdim=True)).flatten().nonzero()[:, 0]
    right = sent.gradient(node).permute(0, 2, 3, 1).flatten(0, 2)
    for _ in range(CORRECTIONS if len(near) else 0):
        unit = _suspect(sent, node, best[0], best[1], right, near)
        switched = active.clone().flatten()
        switched[unit] = ~switched[unit]
        switched = switched.view_as(active)
        tried = solve(sent, node, above, switched, value, measured)
        if not tried[2] < 0.9 * best[2]:
            break
        best, active = tried, switched
        if best[2] < EXACT:
            break
    return best, active


def _suspect(sent: Sent, node: Node, inputs: Tensor, dz: Tensor, right: Tensor, near: Tensor) -> int:
    """Of the units `near` (flat indices), the one whose patch explains most of the residual."""
    assert node.unit is not None
    layer = sent.layer(node)
    reached = torch.linalg.qr(conv_peel.design(dz, layer, node.unit.size)).Q
    directions = min(DIRECTIONS, len(reached) - reached.shape[1])
    drawn = sent.rng.at("directions").normal((len(reached), directions), like=reached)
    free = torch.linalg.qr(drawn - reached @ (reached.T @ drawn)).Q
    kernel = tuple(layer.weight.shape[2:])
    taps, channels = kernel[0] * kernel[1], layer.weight.shape[1]
    patches = functional.unfold(inputs, kernel, layer.dilation, layer.padding, layer.stride)
    patches = patches.view(len(inputs), channels, taps, -1)
    free = free.view(-1, taps, free.shape[1])
    # What a unit shows in the free directions is its patch times the rows of its channel: here its product with the
    # residual, and its square, for all units at once.
    residual = torch.einsum("otm,mc->otc", free, free.flatten(0, 1).T @ right)
    product = torch.einsum("bctp,otc->bop", patches, residual)
    square = torch.einsum("bctp,bcsp->bpts", patches, patches).flatten(2) @ (free @ free.mT).flatten(1).T
    explained = product.square() / square.transpose(1, 2).clamp_min(1e-300)
    return int(near[int(explained.flatten()[near].argmax())])


def _accelerated(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's next point from (point, step) pairs (Walker & Ni 2011, eq. 2.1)."""
    point, step = history[-1]
    if len(history) == 1:
        return point + step
    points, steps = (torch.stack(v, 1) for v in zip(*history, strict=True))
    dx, df = points.diff(dim=1), steps.diff(dim=1)
    weights = torch.linalg.lstsq(df, step[:, None], driver="gelsd").solution
    return point + step - ((dx + df) @ weights)[:, 0]


def _least_squares(
    system: Tensor, right: Tensor, size: tuple[int, int], measured: Tensor | None, free: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """([b, c, h, w], free directions [q, b, h, w], the same for each channel).

    Where places are hardly determined, those that a shortcut shows are taken from there, and no direction is returned.

    Args:
        free: what the last call returned, for a system like the last one.
    """
    count = system.shape[1] // (size[0] * size[1])
    if free is not None:  # full rank together with the free directions: ten times faster than singular values
        rows = free.flatten(1) * system.norm() / math.sqrt(system.shape[1])
        both, nothing = torch.cat([system, rows]), right.new_zeros(len(rows), right.shape[1])
        solution = torch.linalg.lstsq(both, torch.cat([right, nothing]), driver="gels").solution
        return solution.view(count, *size, -1).permute(0, 3, 1, 2), free
    orthogonal, triangle = torch.linalg.qr(system)
    left, values, rows = torch.linalg.svd(triangle)
    held = values > RANK * values[0]
    inner = left[:, held].T @ (orthogonal.T @ right)
    solution = rows[: len(held)][held].T @ (inner / values[held, None])
    free = rows[int(held.sum()) :].view(-1, count, *size)
    if measured is not None and float(values[-1]) < 1e-4 * float(values[0]):
        for c, shown in enumerate(measured.transpose(0, 1).flatten(1)):
            known = ~shown.isnan()
            rest = right[:, c] - system[:, known] @ shown[known]
            solution[known, c] = shown[known]
            solution[~known, c] = torch.linalg.lstsq(system[:, ~known], rest[:, None], driver="gelsd").solution[:, 0]
        free = None
    return solution.view(count, *size, -1).permute(0, 3, 1, 2), free


def _completed(layer: ConvLayer, inputs: Tensor, free: Tensor, value: Tensor, active: Tensor) -> Tensor:
    """`inputs` with as much of the free directions in each channel as makes the output `value` where it is known.

    BatchNorm in train mode leaves such directions below a stride: places that one kernel tap alone reads enter the
    gradient in differences only.
    """
    b, (o, c) = len(inputs), layer.weight.shape[:2]
    taps = layer.weight.transpose(0, 1).reshape(c * o, 1, *layer.weight.shape[2:])
    parts = [
        functional.conv2d(f[:, None], taps, None, layer.stride, layer.padding, layer.dilation).view(b, c, o, -1)
        for f in free
    ]
    shown = torch.stack(parts).permute(1, 3, 4, 0, 2).flatten(3)[active.flatten(2)]  # known outputs x (free, channel)
    raw = layer.unscaled(value) * column((layer.var + layer.eps).sqrt()) + column(layer.mean)
    missing = (raw - layer.conv(inputs))[active]
    amounts = torch.linalg.lstsq(shown.T @ shown, (shown.T @ missing)[:, None], driver="gelsd").solution
    return inputs + torch.einsum("qc,qbhw->bchw", amounts.view(len(free), c), free)
