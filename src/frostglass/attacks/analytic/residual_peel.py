"""The algebra of `peel_residual`: activations of a residual network, from its top down, out of a batch's gradient.

The last convolution's inputs come from the row space of its gradient (`numerics.conv_subspace`), and with them the
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
from frostglass.numerics.conv_layer import ConvLayer, column
from frostglass.numerics.conv_subspace import shapes_of_inputs

LARGE = 1e-2
"""Share of an image's largest value from which on a value is read for its size, far above the noise."""

CLEAR = 1e-4
"""Share of an image's largest gradient above which a unit's own can be told from rounding."""

USABLE = 1e-4
"""Relative residual of a layer beyond which it and all below are left to the fit of the pixels."""


@dataclass
class Peeled:
    """What was recovered, by index of the node; b images in one order throughout.

    Args:
        values: activations after the ReLU, as solved: inactive ones are around 0, not at it.
        above: gradient of the loss at them, as far as it was needed.
        residuals: by name of the convolution that was solved.
        dz: gradient at the output of the last convolution.
        problem: why nothing was recovered, "" if something was.
        errors: [b, k] gradient of the loss at the logits, once the last node is known.
        features_error: relative distance of the head's weight gradient to what `errors` and the last node's means give;
            not used in solving.
    """

    values: dict[int, Tensor] = field(default_factory=dict)
    above: dict[int, Tensor] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    dz: Tensor = field(default_factory=lambda: torch.zeros(0))
    problem: str = ""
    errors: Tensor | None = None
    features_error: float = math.nan


def peel_down(sent: Sent) -> Peeled:
    """Recovers activations from the top down, until a gradient has fewer equations than unknowns."""
    nodes = sent.graph.nodes
    first = nodes[-1].reads
    found = Peeled()
    if not _top(sent, found):
        return found
    deltas: dict[int, Tensor] = {}
    for i in range(first, -1, -1):
        if i not in found.values:
            continue
        _complete(sent, found, deltas, i)
        node = nodes[i]
        if node.unit is None or f"{node.unit.name}.weight" not in sent.gradients:
            break
        if not _descend(sent, found, deltas, i):
            break
        if i == first and sent.layer(nodes[-1]).norm != "batch" and not _fix_scale(sent, found, i):
            break
    return found


def _top(sent: Sent, found: Peeled) -> bool:
    """Input of the last convolution, the gradient at its output, and what follows for the input."""
    node = sent.graph.nodes[-1]
    assert node.unit is not None
    solved = _by_subspace(sent, node)
    if solved is None:
        found.problem = (
            f"the gradient of {node.unit.name!r} does not determine what it reads: fewer independent channels than "
            "places, noise, or another number of images than was granted"
        )
        return False
    inputs, found.dz, residual = solved
    found.residuals[node.unit.name] = residual
    found.values[node.reads] = inputs
    found.above[node.reads] = sent.layer(node).gradient_of_input(found.dz, inputs)
    return True


def _output(layer: ConvLayer, read: Tensor) -> Tensor:
    """Of the convolution and its norm."""
    return layer.scaled(layer.standardise(layer.conv(read)))


def _by_subspace(sent: Sent, node: Node) -> tuple[Tensor, Tensor, float] | None:
    """(inputs, gradient at the output, relative residual) without knowing anything above; None if undetermined.

    Unless BatchNorm's statistics of the batch are known, inputs are right up to a factor an image, and gradients up to
    its inverse.
    """
    layer, gradient = sent.layer(node), sent.gradient(node)
    assert node.unit is not None
    by_batch, b = layer.norm == "batch", sent.examples
    shapes = shapes_of_inputs(layer, gradient, node.unit.size, b, centred=by_batch, rng=sent.rng.at(node.unit.name))
    if shapes is None:
        return None
    inputs = shapes.inputs
    if by_batch:  # the factors are those under which the outputs have the batch's means
        zero = layer.conv(torch.zeros_like(inputs[:1])).mean((0, 2, 3))
        means = (layer.conv(inputs).mean((2, 3)) - zero).T / b
        factors = torch.linalg.lstsq(means, (layer.mean - zero)[:, None], driver="gelsd").solution
        inputs = inputs * factors.view(b, 1, 1, 1)
    kernel = tuple(layer.weight.shape[2:])
    patches = functional.unfold(inputs, kernel, layer.dilation, layer.padding, layer.stride)
    patches = patches.transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(0) if by_batch else patches
    dz = (gradient.flatten(1) @ torch.linalg.pinv(patches, rtol=1e-9)).view(-1, b, *node.shape[1:]).transpose(0, 1)
    residual = float((layer.gradient_of_weight(inputs, dz) - gradient).norm() / gradient.norm())
    return (inputs, dz, residual) if math.isfinite(residual) else None


def _fix_scale(sent: Sent, found: Peeled, i: int) -> bool:
    """Finds the factor of each image: what node i reads must give node i, and a norm adds a constant to that.

    Both are known up to the same factor f, so f value = linear(f read) + shift where the ReLU was surely on.
    """
    node = sent.graph.nodes[i]
    assert node.unit is not None
    if node.shortcut is not None:
        found.problem = f"{node.unit.name!r} has a shortcut beside it, which hides how large its images' values are"
        return False
    layer, value, read = sent.layer(node), found.values[i], found.values[node.reads]
    shift = _output(layer, torch.zeros_like(read))
    rest = (value - (_output(layer, read) - shift)) * (value > LARGE * value.amax((1, 2, 3), keepdim=True))
    factor = (shift * rest).sum((1, 2, 3)) / rest.square().sum((1, 2, 3))
    if not bool((factor.isfinite() & (factor > 0)).all()):
        found.problem = f"{node.unit.name!r} does not tell how large its images' values are"
        return False
    factor = factor.view(-1, 1, 1, 1)
    for j in (i, node.reads):
        found.values[j] = found.values[j] * factor
        found.above[j] = found.above[j] / factor
    found.dz = found.dz / factor
    return True


def _errors(sent: Sent, found: Peeled, on: Tensor, xhat: Tensor) -> tuple[Tensor, float]:
    """(gradient at the logits [b, k], `features_error`), given where the last ReLU was on.

    The head averages over places, so the gradient above is one number e_k w / places for each image and channel, which
    the gradient below the ReLU shows wherever a unit was on.
    """
    node = sent.graph.nodes[-1]
    layer, weight = sent.layer(node), sent.graph.head.weight.detach().double().cpu() / on[0, 0].numel()
    alone = torch.eye(sent.examples, dtype=xhat.dtype).view(sent.examples, sent.examples, 1, 1, 1)
    parts = torch.stack([layer.backward(on * one, xhat) for one in alone])
    systems = parts.permute(2, 1, 3, 4, 0).flatten(1, 3)
    goals = found.dz.transpose(0, 1).flatten(1)[..., None]
    head = torch.linalg.lstsq(systems, goals, driver="gelsd").solution[..., 0].T
    seen = on.sum((2, 3)).double().sqrt()
    errors = torch.stack(
        [
            torch.linalg.lstsq((weight * s).T, (h * s)[:, None], driver="gelsd").solution[:, 0]
            for h, s in zip(head, seen, strict=True)
        ]
    )
    rows = weight[:, (seen > 0).all(0)].T
    goal = rows @ sent.gradients[f"{sent.graph.head_name}.weight"]
    means = found.values[len(sent.graph.nodes) - 1].mean((2, 3))
    return errors, float((rows @ errors.T @ means - goal).norm() / goal.norm())


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
            xhat = sent.layer(node).standardise(sent.layer(node).conv(found.values[node.reads]))
            y = sent.layer(node).scaled(xhat) + added
            found.values[j] = y.relu()
            found.errors, found.features_error = _errors(sent, found, (y > 0).to(y), xhat)
            head = found.errors @ sent.graph.head.weight.detach().double().cpu() / y[0, 0].numel()
            above = head[..., None, None].expand_as(y)
            deltas[j] = above * _shown(sent, node, above, y > 0, xhat, found.dz)
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
    solvable = bool(found.above[i].isfinite().all()) and conv_peel.determined(layer, sent.examples, node.unit.size)
    if node.reads in found.values or not solvable:
        return False
    best = None
    if layer.norm == "batch" and node.shortcut is not None:
        best = _in_order(_by_subspace(sent, node), layer.backward(deltas[i], torch.zeros_like(value)))
    if best is None:
        best, active = _over_thresholds(sent, found, i)
    else:
        xhat = layer.standardise(layer.conv(best[0]))
        active = _shown(sent, node, found.above[i], active_of(value, ACTIVE[0]), xhat, best[1])
    deltas[i] = found.above[i] * active
    inputs, dz, found.residuals[node.unit.name] = best
    if not best[2] < USABLE:
        return False
    found.values[node.reads] = inputs
    found.above[node.reads] = layer.gradient_of_input(dz, inputs)
    return True


def _in_order(solved: tuple[Tensor, Tensor, float] | None, delta: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """The images of `_by_subspace` in the order of those whose gradient `delta` behind the norm is known."""
    from scipy.optimize import linear_sum_assignment

    if solved is None or len(delta) == 1:
        return solved
    inputs, dz, residual = solved
    known, found = (functional.normalize(t.flatten(1)) for t in (delta, dz))
    order = torch.from_numpy(linear_sum_assignment((known @ found.T).numpy(), maximize=True)[1])
    return inputs[order], dz[order], residual


def _shown(sent: Sent, node: Node, above: Tensor, active: Tensor, xhat: Tensor, dz: Tensor) -> Tensor:
    """Where the ReLU of a node was on, by the gradient below its norm where that is known; else `active`.

    BatchNorm in train mode takes two means out of a gradient, which the gradients of its beta and gamma tell.
    """
    layer = sent.layer(node)
    slope = layer.gamma * (layer.var + layer.eps).rsqrt() if layer.norm in ("batch", "fixed") else layer.gamma
    through = dz
    if layer.norm == "batch":
        total, moment = sent.total(node), sent.moment(node)
        if total is None or moment is None:
            return active
        through = dz + column(slope) * (column(total) + xhat * column(moment)) / dz[:, 0].numel()
    whole = column(slope) * above
    clear = whole.abs() > CLEAR * whole.abs().amax((1, 2, 3), keepdim=True)
    return torch.where(clear, through * whole.sign() > 0.5 * whole.abs(), active)


def _over_thresholds(sent: Sent, found: Peeled, i: int) -> tuple[tuple[Tensor, Tensor, float], Tensor]:
    """(best solution, where the ReLU of node i was on)."""
    node, value = sent.graph.nodes[i], found.values[i]
    measured = _measured(sent, found, node.reads)
    best: tuple[Tensor, Tensor, float] | None = None
    chosen = active_of(value, ACTIVE[0])
    for relative in ACTIVE:
        active = active_of(value, relative)
        tried = solve(sent, node, found.above[i], active, value, measured)
        if best is None or tried[2] < best[2]:
            best, chosen = tried, active
        if best[2] < EXACT:
            return best, chosen
    assert best is not None
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
        like = torch.full((len(out), *sent.graph.nodes[i].shape), math.nan, dtype=seen.dtype)
        like[:, :, :: shortcut.stride, :: shortcut.stride] = seen[:, shortcut.before : seen.shape[1] - shortcut.after]
        return like
    return None
