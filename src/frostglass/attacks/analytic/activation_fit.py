"""How far the activations of a candidate image are from recovered ones, through the network itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from frostglass.attacks.analytic.residual_graph import Graph
from frostglass.attacks.analytic.residual_solve import active_of

SURE = 1e-3
"""Share of an image's largest value above which a unit was on, whatever the noise."""

FITTED = 2
"""Nodes that pixels are fitted to: the recovered ones nearest to the image."""


def goals_of(graph: Graph, values: Mapping[int, Tensor], like: Tensor) -> dict[int, Tensor]:
    """The recovered nodes nearest to the image by their index: [b, c, h, w] as `like`, 0 where the ReLU was off."""
    lowest = sorted(i for i in values if graph.nodes[i].unit is not None)[:FITTED]
    return {i: (values[i] * active_of(values[i], 1.0)).to(like).contiguous() for i in lowest}


def mismatch(graph: Graph, model: nn.Module, goals: Mapping[int, Tensor], images: Tensor) -> Tensor:
    """[b] relative squared distance of what the ReLUs read to the goals; a negative value is none where one was off.

    Args:
        graph: the network.
        model: the same, in the mode that gives what the client's gave.
        goals: of `goals_of`.
        images: [b, c, h, w] in the bounds of the domain.
    """
    reads, wrote = _run(graph, model, goals, images)
    total = images.new_zeros(len(images))
    for index, value in goals.items():
        node = graph.nodes[index]
        assert node.unit is not None
        y = wrote[node.unit.name]
        if node.shortcut is not None:
            short = node.shortcut
            y = y + (wrote[short.unit.name] if short.unit is not None else short.apply(reads[short.reads]))
        # The noise of a unit that was off may look like a small value: such are compared behind the ReLU.
        sure = value > SURE * value.amax((1, 2, 3), keepdim=True)
        away = torch.where(sure, y, y.relu()) - value
        total = total + away.square().sum((1, 2, 3)) / value.square().sum((1, 2, 3))
    return total / len(goals)


def _run(
    graph: Graph, model: nn.Module, goals: Mapping[int, Tensor], images: Tensor
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """(nodes by index, outputs of norms by the name of their convolution) as far as the goals need them."""
    reads: dict[int, Tensor] = {}
    wrote: dict[str, Tensor] = {}
    handles = []
    for index, unit in graph.readers.items():
        if index <= max(goals):
            conv = model.get_submodule(unit.name)
            handles.append(conv.register_forward_pre_hook(lambda _, args, i=index: reads.__setitem__(i, args[0])))
    for unit in graph.units:
        last = model.get_submodule(unit.norm_name or unit.name)
        # a copy, as what follows may add the shortcut and apply the ReLU in place (torchvision's networks do)
        handles.append(last.register_forward_hook(lambda _, __, out, n=unit.name: wrote.__setitem__(n, out.clone())))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return reads, wrote
