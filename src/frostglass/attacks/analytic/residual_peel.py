"""The algebra of `peel_residual`: activations of a residual network, from its top down, out of one image's gradient.

The last convolution's input comes from the row space of its gradient (`numerics.conv_subspace`), and with it the
gradient at that convolution's output. From there every weight gradient below is a linear system for what its
convolution reads, as long as it has as many equations as unknowns, and the chain rule gives the gradient at the next
output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from frostglass.attacks.analytic.residual_graph import Graph, Node
from frostglass.numerics import conv_peel
from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.conv_subspace import Shape, shape_of_input

ACTIVE = (1.5, 1.0, 3.0, 0.6, 6.0)
"""Of an active unit, relative to the most negative value found, which shows the rounding: thresholds in the order in
which they are tried."""

EXACT = 3e-6
"""Residual at which no other threshold is tried; gradients in float32 leave about 5e-7."""

USABLE = 2e-2
"""Relative residual of a layer beyond which it and all below are left to the fit of the pixels."""

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


@dataclass
class Peeled:
    """What was recovered, by index of the node.

    Args:
        values: activations after the ReLU, as solved: inactive ones are around 0, not at it.
        above: gradient of the loss at them, as far as it was needed.
        residuals: by name of the convolution that was solved.
        problem: why nothing was recovered, "" if something was.
        features_error: relative distance of the last node's mean to what the head read; not used in solving.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    above: dict[int, Tensor] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    features_error: float = math.nan
    shape: Shape | None = None


def peel_down(sent: Sent) -> Peeled:
    """Recovers activations from the top down, until a gradient has fewer equations than unknowns."""
    nodes = sent.graph.nodes
    top = len(nodes) - 1
    found = Peeled()
    if not _top(sent, found):
        return found
    deltas: dict[int, Tensor] = {}
    for i in range(nodes[top].reads, -1, -1):
        if i not in found.values:
            continue
        _complete(sent, found, deltas, i)
        node = nodes[i]
        if node.unit is None or f"{node.unit.name}.weight" not in sent.gradients:
            break
        if not _descend(sent, found, deltas, i):
            break
    return found


def active_of(value: Tensor, relative: float) -> Tensor:
    """Where a ReLU was on, given its output up to rounding."""
    return value > (relative * float(-value.min())) if value.min() < 0 else value > 1e-6 * value.max()


def _top(sent: Sent, found: Peeled) -> bool:
    """Input of the last convolution, the gradient at its output, and what follows for the input."""
    node = sent.graph.nodes[-1]
    assert node.unit is not None
    _, d, i, j = (1, *node.shape)
    head = (sent.error @ sent.graph.head.weight.detach().double().cpu())[0] / (i * j)
    solved = _by_subspace(sent, node, head, found)
    if solved is None:
        found.problem = (
            f"the gradient of {node.unit.name!r} does not determine what it reads: fewer independent channels than "
            "places, noise, or more than one image"
        )
        return False
    inputs, dz, residual = solved
    found.residuals[node.unit.name] = residual
    found.values[node.reads] = inputs
    found.above[node.reads] = sent.layer(node).gradient_of_input(dz, inputs)
    found.above[len(sent.graph.nodes) - 1] = head.view(1, d, 1, 1).expand(1, d, i, j)
    return True


def _output(layer: ConvLayer, read: Tensor) -> Tensor:
    """Of the convolution and its norm."""
    return layer.scaled(layer.standardise(layer.conv(read)))


def _by_subspace(
    sent: Sent, node: Node, head: Tensor | None, found: Peeled | None = None
) -> tuple[Tensor, Tensor, float] | None:
    """(input, gradient at the output, relative residual) without knowing anything above; None if undetermined."""
    layer, gradient = sent.layer(node), sent.gradient(node)
    assert node.unit is not None
    by_batch = layer.norm == "batch"
    shape = shape_of_input(layer, gradient, node.unit.size, centred=by_batch, start=sent.start)
    if found is not None:
        found.shape = shape
    if shape is None or not shape.unique:
        return None
    kernel = tuple(layer.weight.shape[2:])
    patches = functional.unfold(shape.inputs, kernel, layer.dilation, layer.padding, layer.stride)[0].T
    patches = patches - patches.mean(0) if by_batch else patches
    dz = gradient.flatten(1) @ torch.linalg.pinv(patches, rtol=1e-9)
    factor = _factor(layer, shape.inputs, dz, head)
    inputs, dz = shape.inputs * factor, (dz / factor).view(1, *node.shape)
    residual = float((layer.gradient_of_weight(inputs, dz) - gradient).norm() / gradient.norm())
    return (inputs, dz, residual) if math.isfinite(residual) else None


def _factor(layer: ConvLayer, inputs: Tensor, dz: Tensor, head: Tensor | None) -> float:
    """Of the inputs: from the batch's variance, or from the gradient behind the ReLU that the head gives."""
    if layer.norm == "batch":
        spread = layer.conv(inputs).std((0, 2, 3), correction=0)
        used = spread > 1e-3 * spread.max()
        return float((layer.var.sqrt() / spread)[used].median())
    assert head is not None
    slope = layer.gamma * (layer.var + layer.eps).rsqrt() if layer.norm == "fixed" else torch.ones_like(head)
    expected = (slope * head).abs()
    size = dz.abs()
    on = size > 0.5 * size.amax(1, keepdim=True)
    level = (size * on).sum(1) / on.sum(1)
    used = expected > 1e-3 * expected.max()
    return float((level / expected)[used].median())


def _complete(sent: Sent, found: Peeled, deltas: dict[int, Tensor], i: int) -> None:
    """Adds to the gradient at node i what comes through the shortcuts that start there."""
    value, nodes = found.values[i], sent.graph.nodes
    for j, node in enumerate(nodes):
        shortcut = node.shortcut
        if shortcut is None or shortcut.reads != i or (j not in deltas and j != len(nodes) - 1):
            continue
        if shortcut.unit is not None:
            layer = sent.layers[shortcut.unit.name]
            raw = layer.conv(value)
            added = layer.scaled(layer.standardise(raw))
        else:
            added = shortcut.apply(value)
        if j not in deltas:  # the last node, whose ReLU is known only now
            y = _output(sent.layer(node), found.values[node.reads]) + added
            found.values[j] = y.relu()
            deltas[j] = found.above[j] * (y > 0)
            goal = sent.features
            found.features_error = float((found.values[j].mean((0, 2, 3)) - goal).norm() / goal.norm())
        if shortcut.unit is not None:
            dz = layer.backward(deltas[j], layer.standardise(raw))
            more = layer.gradient_of_input(dz, value)
        else:
            more = shortcut.adjoint(deltas[j], value)
        found.above[i] = found.above.get(i, torch.zeros_like(value)) + more


def _descend(sent: Sent, found: Peeled, deltas: dict[int, Tensor], i: int) -> bool:
    """Solves for what the convolution of node i reads; False where its gradient does not determine that."""
    node, value = sent.graph.nodes[i], found.values[i]
    layer = sent.layer(node)
    assert node.unit is not None
    deltas[i] = found.above[i] * active_of(value, ACTIVE[0])
    solvable = bool(found.above[i].isfinite().all()) and conv_peel.determined(layer, 1, node.unit.size)
    if node.reads in found.values or not solvable:
        return False
    best = None
    if layer.norm == "batch" and node.shortcut is not None:
        best = _by_subspace(sent, node, None)
    if best is None:
        best, active = _over_thresholds(sent, found, i)
        deltas[i] = found.above[i] * active
    inputs, dz, found.residuals[node.unit.name] = best
    if not best[2] < USABLE:
        return False
    found.values[node.reads] = inputs
    found.above[node.reads] = layer.gradient_of_input(dz, inputs)
    return True


def _over_thresholds(sent: Sent, found: Peeled, i: int) -> tuple[tuple[Tensor, Tensor, float], Tensor]:
    """(best solution, where the ReLU of node i was on)."""
    node, value = sent.graph.nodes[i], found.values[i]
    measured = _measured(sent, found, node.reads)
    by_batch = sent.layer(node).norm == "batch"
    best: tuple[Tensor, Tensor, float] | None = None
    chosen = active_of(value, ACTIVE[0])
    for relative in ACTIVE[:1] if by_batch and node.shortcut is not None else ACTIVE:
        active = active_of(value, relative)
        tried = _solve(sent, node, found.above[i], active, value, measured)
        if best is None or tried[2] < best[2]:
            best, chosen = tried, active
        if best[2] < EXACT:
            return best, chosen
    assert best is not None
    if by_batch and node.shortcut is not None:
        return best, chosen
    return _corrected(sent, node, found.above[i], chosen, value, measured, best)


def _measured(sent: Sent, found: Peeled, i: int) -> Tensor | None:
    """Node i where a shortcut without parameters shows it behind an active ReLU; NaN elsewhere."""
    for j, node in enumerate(sent.graph.nodes):
        shortcut = node.shortcut
        if shortcut is None or shortcut.reads != i or shortcut.unit is not None or j not in found.values:
            continue
        if node.reads not in found.values:
            continue
        y = _output(sent.layer(node), found.values[node.reads])
        out = found.values[j]
        nan = torch.full_like(out, math.nan)
        seen = torch.where(active_of(out, 10 * ACTIVE[0]), out - y, nan)
        like = torch.full((1, *sent.graph.nodes[i].shape), math.nan, dtype=seen.dtype)
        like[:, :, :: shortcut.stride, :: shortcut.stride] = seen[:, shortcut.before : seen.shape[1] - shortcut.after]
        return like
    return None


def _solve(
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


def _corrected(
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
        tried = _solve(sent, node, above, switched, value, measured)
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
