"""The algebra of `peel_residual`: activations of a residual network, from its top down, out of one image's gradient.

The last convolution's input comes from the row space of its gradient (`numerics.conv_subspace`), and with it the
gradient at that convolution's output. From there every weight gradient below is a linear system for what its
convolution reads, as long as it has as many equations as unknowns, and the chain rule gives the gradient at the next
output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from frostglass.attacks.analytic.residual_graph import Node
from frostglass.attacks.analytic.residual_solve import ACTIVE, EXACT, Sent, active_of, corrected, solve
from frostglass.numerics import conv_peel
from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.conv_subspace import shape_of_input

USABLE = 2e-2
"""Relative residual of a layer beyond which it and all below are left to the fit of the pixels."""


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


def _top(sent: Sent, found: Peeled) -> bool:
    """Input of the last convolution, the gradient at its output, and what follows for the input."""
    node = sent.graph.nodes[-1]
    assert node.unit is not None
    _, d, i, j = (1, *node.shape)
    head = (sent.error @ sent.graph.head.weight.detach().double().cpu())[0] / (i * j)
    solved = _by_subspace(sent, node, head)
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


def _by_subspace(sent: Sent, node: Node, head: Tensor | None) -> tuple[Tensor, Tensor, float] | None:
    """(input, gradient at the output, relative residual) without knowing anything above; None if undetermined."""
    layer, gradient = sent.layer(node), sent.gradient(node)
    assert node.unit is not None
    by_batch = layer.norm == "batch"
    shape = shape_of_input(layer, gradient, node.unit.size, centred=by_batch, start=sent.start)
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
        tried = solve(sent, node, found.above[i], active, value, measured)
        if best is None or tried[2] < best[2]:
            best, chosen = tried, active
        if best[2] < EXACT:
            return best, chosen
    assert best is not None
    if by_batch and node.shortcut is not None:
        return best, chosen
    return corrected(sent, node, found.above[i], chosen, value, measured, best)


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
