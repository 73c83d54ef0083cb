"""Recognising the upper part of a residual network: which ReLU output is made of which convolutions and shortcuts.

As for plain networks (`chain`), modules are found by walking and what stands between them by probing: a tensor that a
convolution reads is compared with what sums of earlier tensors would give. What is not understood, such as pooling near
the image, ends the recognised part and is no obstacle above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from frostglass.attacks.analytic.chain import Block, Call, as_block, calls_of, probe_images, same
from frostglass.core.threat import Observation


@dataclass(frozen=True, eq=False)
class Shortcut:
    """What is added before a ReLU.

    Args:
        kind: "identity", "pad" (every s-th place, channels filled with zeros: option A), or "unit" (convolution, norm).
        reads: the node it starts from.
        unit: of a "unit".
        stride, before, after: of a "pad": step over places, channels of zeros on either side.
    """

    kind: Literal["identity", "pad", "unit"]
    reads: int
    unit: Block | None = None
    stride: int = 1
    before: int = 0
    after: int = 0

    def apply(self, x: Tensor) -> Tensor:
        """Of the node's value; not for a "unit"."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, self.before, self.after))

    def adjoint(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Gradient at `apply(x)` -> gradient at x, shaped as `like`."""
        out = torch.zeros_like(like)
        out[:, :, :: self.stride, :: self.stride] = gradient[:, self.before : gradient.shape[1] - self.after]
        return out


@dataclass(frozen=True, eq=False)
class Node:
    """relu(unit(node `reads`) + shortcut): what convolutions read, or the head averages.

    Args:
        unit: convolution and norm; None where the node's origin was not recognised.
        reads: the node that the convolution reads.
        shortcut: None where there is none.
        shape: (c, h, w).
    """

    unit: Block | None
    reads: int
    shortcut: Shortcut | None
    shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Graph:
    """The recognised nodes in the order of the forward pass; the last one is averaged over places for the head."""

    nodes: tuple[Node, ...]
    head_name: str
    head: nn.Linear

    @property
    def units(self) -> tuple[Block, ...]:
        """All recognised convolutions, each once."""
        found = [n.unit for n in self.nodes] + [n.shortcut.unit for n in self.nodes if n.shortcut is not None]
        return tuple({u.name: u for u in found if u is not None}.values())

    @property
    def readers(self) -> dict[int, Block]:
        """A convolution that reads the node, for each node that one reads."""
        return {n.reads: n.unit for n in reversed(self.nodes) if n.unit is not None}


def find_graph(seen: Observation) -> tuple[Graph | None, str]:
    """(the upper part of the network, "") or (None, a sentence on what does not fit)."""
    calls, logits = calls_of(seen, probe_images(seen))
    units = _units(calls)
    if not calls or not isinstance(calls[-1].module, nn.Linear) or not units:
        return None, "the model does not end with a Linear layer above convolutions; this attack needs that."
    head = calls[-1]
    assert isinstance(head.module, nn.Linear)
    if head.module.bias is None or not same(logits, head.wrote):
        return None, f"{head.name!r} has no bias, or is not the last thing the model does; this attack needs both."
    values: list[Tensor] = []
    for unit in units:
        if not any(v is unit.read or same(v, unit.read) for v in values):
            values.append(unit.read)
    last = next((out for out in _outputs(units, values) if same(head.read, out.mean((2, 3)))), None)
    if last is None:
        return None, (
            f"{head.name!r} does not read the average over places of a ReLU after a convolution and its norm; this "
            "attack reads networks that end so."
        )
    values.append(last)
    nodes = tuple(_node(i, values, units) for i in range(len(values)))
    return Graph(nodes, head.name, head.module), ""


@dataclass(frozen=True, eq=False)
class _Unit:
    """One call of a convolution and its norm."""

    block: Block
    read: Tensor
    wrote: Tensor


def _units(calls: Sequence[Call]) -> list[_Unit]:
    found = []
    for i, call in enumerate(calls):
        if not isinstance(call.module, nn.Conv2d):
            continue
        after = calls[i + 1] if i + 1 < len(calls) else None
        fits = after is not None and isinstance(after.module, nn.BatchNorm2d) and same(after.read, call.wrote)
        norm = after if fits else None
        block, _ = as_block(call, norm)
        if block is not None:
            found.append(_Unit(block, call.read, (norm or call).wrote))
    return found


def _outputs(units: Sequence[_Unit], values: Sequence[Tensor]) -> list[Tensor]:
    """All that a ReLU over one of the last two units could give, with every shortcut there may be."""
    found = []
    for unit in reversed(units[-2:]):
        found.append(unit.wrote.relu())
        found += [(unit.wrote + added).relu() for added, _ in _shortcuts(unit, units, values)]
    return found


def _node(index: int, values: Sequence[Tensor], units: Sequence[_Unit]) -> Node:
    value = values[index]
    shape = (int(value.shape[1]), int(value.shape[2]), int(value.shape[3]))
    fitting = [u for u in units if u.wrote.shape == value.shape]
    for unit in sorted(fitting, key=lambda u: -u.block.conv.weight[0, 0].numel()):  # a shortcut's kernel is 1 x 1
        reads = _index(unit.read, values[:index])
        if reads is None:
            continue
        if same(unit.wrote.relu(), value):
            return Node(unit.block, reads, None, shape)
        for added, shortcut in _shortcuts(unit, units, values[:index]):
            if same((unit.wrote + added).relu(), value):
                return Node(unit.block, reads, shortcut, shape)
    return Node(None, -1, None, shape)


def _shortcuts(unit: _Unit, units: Sequence[_Unit], values: Sequence[Tensor]) -> list[tuple[Tensor, Shortcut]]:
    """What may be added to the output of `unit`, nearest nodes first."""
    c, h = unit.wrote.shape[1:3]
    found: list[tuple[Tensor, Shortcut]] = []
    for i in reversed(range(len(values))):
        x = values[i]
        more, stride = c - x.shape[1], x.shape[2] // h if h else 0
        if stride < 1 or more < 0 or x.shape[2] != stride * h:
            continue
        kind: Literal["identity", "pad"] = "identity" if x.shape == unit.wrote.shape else "pad"
        for before in dict.fromkeys((more // 2, 0)):
            made = Shortcut(kind, i, None, stride, before, more - before)
            added = made.apply(x)
            if added.shape == unit.wrote.shape:
                found.append((added, made))
    for other in units:
        reads = _index(other.read, values)
        if other is not unit and other.wrote.shape == unit.wrote.shape and reads is not None:
            found.append((other.wrote, Shortcut("unit", reads, other.block)))
    return found


def _index(value: Tensor, values: Sequence[Tensor]) -> int | None:
    return next((i for i, v in enumerate(values) if v is value or same(v, value)), None)
