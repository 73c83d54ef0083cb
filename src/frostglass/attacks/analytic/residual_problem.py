"""What `peel_residual` reads of an observation, and why it cannot read one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from frostglass.attacks.analytic.chain import as_layer
from frostglass.attacks.analytic.residual_graph import Graph, find_graph
from frostglass.attacks.analytic.residual_solve import Sent
from frostglass.attacks.inversion.target import update_problems
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import BNStatistics
from frostglass.numerics.called import copied
from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.conv_subspace import places


@dataclass(frozen=True, eq=False)
class Prepared:
    """An observation laid out for the algebra (`sent`) and for the fit of pixels (`model`)."""

    graph: Graph
    sent: Sent
    model: nn.Module


def problems_of(seen: Observation) -> list[str]:
    """Why this observation cannot be attacked; the first kind that applies."""
    problems = update_problems(seen)
    if problems:
        return problems
    if any(not isinstance(m, GradientMessage) or m.kind != "gradient" for m in seen.messages):
        return ["update: a gradient is wanted, not a weight difference."]
    if not seen.examples:
        return ["client.batch: an unknown number of images; this attack has to know it: grant 'examples'."]
    graph, misfit = find_graph(seen)
    if graph is None:
        return [misfit]
    node = graph.nodes[-1]
    wanted = [f"{graph.head_name}.weight", f"{graph.head_name}.bias"]
    assert node.unit is not None
    absent = [n for n in (*wanted, f"{node.unit.name}.weight") if n not in seen.gradients]
    if absent:
        return [f"update: the gradient of {n!r} was not sent; this attack needs it." for n in absent]
    layer = as_layer(node.unit, None, False)
    count, outputs = places(layer, node.unit.size), layer.weight.shape[0]
    if max(layer.weight.shape[2:]) == 1:
        return [f"model: {node.unit.name!r} has a kernel of one place; this attack needs a wider one there."]
    if count * seen.examples > outputs:
        most = outputs // count
        return [
            f"client.batch: {seen.examples} images write {count * seen.examples} places in the {outputs} channels of "
            f"{node.unit.name!r}; this attack needs at most as many places as channels"
            + (f", here {most} images." if most else ", which one image exceeds: give it a wider network.")
        ]
    if seen.mode == "train" and _norms(graph) - set(seen.bn_batch or {}):
        return ["threat.grants: in train mode this attack needs the batch's BatchNorm statistics; grant 'bn_batch'."]
    return []


def _norms(graph: Graph) -> set[str]:
    return {u.norm_name for u in graph.units if u.norm_name}


def prepare(seen: Observation, run: Runtime) -> Prepared:
    """Lays an observation out; `problems_of` must have found nothing."""
    graph, _ = find_graph(seen)
    assert graph is not None
    by_batch = seen.mode == "train"
    statistics = (seen.bn_batch or {}) if by_batch else {}
    cpu = torch.device("cpu")
    layers: dict[str, ConvLayer] = {
        u.name: as_layer(u, statistics.get(u.norm_name), by_batch).to(cpu, torch.float64) for u in graph.units
    }
    gradients = {n: g.detach().double().cpu() for n, g in seen.gradients.items()}
    assert seen.examples
    model = _with_statistics(seen.model, statistics).to(run.device, run.dtype)
    return Prepared(graph, Sent(graph, layers, gradients, seen.examples, run.rng.at("subspace")), model)


def _with_statistics(model: nn.Module, statistics: Mapping[str, BNStatistics]) -> nn.Module:
    """A copy in eval mode whose BatchNorm layers use the batch's statistics, where they were seen."""
    made = copied(model).eval().requires_grad_(False)
    for name, seen in statistics.items():
        norm = made.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean, norm.running_var = seen.mean.detach().clone(), seen.var.detach().clone()
    return made
