"""One linear system of `peel_residual`: what a convolution reads, given the gradient above its ReLU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from frostglass.attacks.analytic.residual_graph import Graph, Node
from frostglass.numerics import conv_peel
from frostglass.numerics.conv_layer import ConvLayer

ACTIVE = (1.5, 1.0, 3.0, 0.6, 6.0)
"""Of an active unit, relative to the most negative value found, which shows the rounding: thresholds in the order in
which they are tried."""

EXACT = 3e-6
"""Residual at which no other threshold is tried; gradients in float32 leave about 5e-7."""

SUSPECT, CORRECTIONS = 6.0, 30
"""Values up to this multiple of the most negative one may be on the wrong side of their ReLU; switches at the most."""

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
        start: of the subspace iteration, at least as long as the last convolution's input.
    """

    graph: Graph
    layers: Mapping[str, ConvLayer]
    gradients: Mapping[str, Tensor]
    start: Tensor

    @property
    def error(self) -> Tensor:
        """[1, k] softmax minus target: the gradient of the head's bias, for one image."""
        return self.gradients[f"{self.graph.head_name}.bias"][None]

    @property
    def features(self) -> Tensor:
        """[d] what the head read: each row of its weight gradient is a multiple of it."""
        error = self.error[0]
        return error @ self.gradients[f"{self.graph.head_name}.weight"] / error.square().sum()

    def layer(self, node: Node) -> ConvLayer:
        """Of a recognised node."""
        assert node.unit is not None
        return self.layers[node.unit.name]

    def gradient(self, node: Node) -> Tensor:
        """Of its convolution's weight."""
        assert node.unit is not None
        return self.gradients[f"{node.unit.name}.weight"]


def active_of(value: Tensor, relative: float) -> Tensor:
    """Where a ReLU was on, given its output up to rounding."""
    return value > (relative * float(-value.min())) if value.min() < 0 else value > 1e-6 * value.max()


def solve(
    sent: Sent, node: Node, above: Tensor, active: Tensor, value: Tensor, measured: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """(input of the node's convolution, gradient at its output, relative residual).

    Under BatchNorm in train mode the gradient at the output depends on the output: a fixed point, found by Anderson
    acceleration. Where the ReLU follows the norm directly, the output is `value` at `active` places.
    """
    assert node.unit is not None
    layer, gradient, size, delta = sent.layer(node), sent.gradient(node), node.unit.size, above * active
    plain = node.shortcut is None
    xhat = conv_peel.first_guess(layer, value, active) if plain else torch.zeros_like(delta)
    right = gradient.permute(0, 2, 3, 1).flatten(0, 2)
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(ROUNDS if layer.norm == "batch" else 1):
        dz = layer.backward(delta, xhat)
        inputs = _least_squares(conv_peel.design(dz, layer, size), right, size, measured)
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
    near = (value.abs() < SUSPECT * float(-value.min())).flatten().nonzero()[:, 0]
    right = sent.gradient(node).permute(0, 2, 3, 1).flatten(0, 2)
    for _ in range(CORRECTIONS if len(near) else 0):
        unit = _suspect(sent.layer(node), best[0], best[1], right, node.unit.size, near)
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


def _suspect(layer: ConvLayer, inputs: Tensor, dz: Tensor, right: Tensor, size: tuple[int, int], near: Tensor) -> int:
    """Of the units `near` (flat indices), the one whose patch explains most of the residual."""
    system = conv_peel.design(dz, layer, size)
    left, values, _ = torch.linalg.svd(system, full_matrices=True)
    free = left[:, int((values > 1e-9 * values[0]).sum()) :][:, :DIRECTIONS]
    kernel = tuple(layer.weight.shape[2:])
    taps, channels = kernel[0] * kernel[1], layer.weight.shape[1]
    patches = functional.unfold(inputs, kernel, layer.dilation, layer.padding, layer.stride)
    patches = patches.view(channels, taps, -1)
    channel, place = near // patches.shape[2], near % patches.shape[2]
    shown = torch.einsum("ntm,ctn->nmc", free.view(-1, taps, free.shape[1])[channel], patches[:, :, place])
    goal = free.T @ right
    explained = (shown * goal).sum((1, 2)).square() / shown.square().sum((1, 2)).clamp_min(1e-300)
    return int(near[int(explained.argmax())])


def _accelerated(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anderson's next point from (point, step) pairs (Walker & Ni 2011, eq. 2.1)."""
    point, step = history[-1]
    if len(history) == 1:
        return point + step
    points, steps = (torch.stack(v, 1) for v in zip(*history, strict=True))
    dx, df = points.diff(dim=1), steps.diff(dim=1)
    weights = torch.linalg.lstsq(df, step[:, None], driver="gelsd").solution
    return point + step - ((dx + df) @ weights)[:, 0]


def _least_squares(system: Tensor, right: Tensor, size: tuple[int, int], measured: Tensor | None) -> Tensor:
    """[1, c, h, w]; where places are not determined, those that a shortcut shows are taken from there."""
    solution = torch.linalg.lstsq(system, right, driver="gelsd").solution
    values = torch.linalg.svdvals(system)
    if measured is not None and float(values[-1]) < 1e-4 * float(values[0]):
        for c, shown in enumerate(measured.flatten(2)[0]):
            known = ~shown.isnan()
            rest = right[:, c] - system[:, known] @ shown[known]
            solution[known, c] = shown[known]
            solution[~known, c] = torch.linalg.lstsq(system[:, ~known], rest[:, None], driver="gelsd").solution[:, 0]
    return solution.T.reshape(1, -1, *size)
