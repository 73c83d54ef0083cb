"""Statistics that BatchNorm layers see: recorded on the current graph, without hooks that outlive the call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.update import BNStatistics
from frostglass.numerics.second_order_norm import channel_statistics

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def bn_layers(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers by module name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BATCH_NORMS)}


def batch_statistics(x: Tensor) -> BNStatistics:
    """Mean and biased variance per channel (dimension 1) of a layer's input, on the graph of `x`."""
    return _statistics_of(x, 1)[0]


def _statistics_of(x: Tensor, clients: int) -> list[BNStatistics]:
    """Of equal parts of the batch."""
    count = x.numel() // (clients * x.shape[1])
    if clients == 1:
        return [BNStatistics(*channel_statistics(x), count)]
    means, variances = channel_statistics(x.unflatten(0, (clients, -1)), clients=True)
    return [BNStatistics(m, v, count) for m, v in zip(means.unbind(), variances.unbind(), strict=True)]


@contextmanager
def recorded_bn(model: nn.Module) -> Iterator[dict[str, BNStatistics]]:
    """A dict that fills with the batch statistics of every BatchNorm input while the block runs `model`.

    If a layer is passed more than once, the first pass is kept.
    """
    with recorded_bn_of_clients(model, 1) as seen:
        yield seen[0]


@contextmanager
def recorded_bn_of_clients(model: nn.Module, clients: int) -> Iterator[tuple[dict[str, BNStatistics], ...]]:
    """The same for every client, where the batch holds the rows of several in turn, equally many of each."""
    seen: tuple[dict[str, BNStatistics], ...] = tuple({} for _ in range(clients))

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in seen[0]:
                for own, found in zip(seen, _statistics_of(inputs[0], clients), strict=True):
                    own[name] = found

        return hook

    handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in bn_layers(model).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def running_statistics(model: nn.Module) -> dict[str, BNStatistics]:
    """Running mean and variance of every BatchNorm layer that tracks them (count 0: not of one batch)."""
    found = {}
    for name, m in bn_layers(model).items():
        mean, var = getattr(m, "running_mean", None), getattr(m, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            found[name] = BNStatistics(mean.detach().clone(), var.detach().clone(), 0)
    return found


def bn_distance(
    found: Mapping[str, BNStatistics], target: Mapping[str, BNStatistics], *, relative: bool = False
) -> Float[Tensor, ""]:
    """sum_l ||mean - mean*||_2 + ||var - var*||_2 (Yin et al. 2021, Eq. 10); no layer is favoured.

    Args:
        found, target: statistics by layer name; layers present in both count.
        relative: divide by ||sqrt(var*)||_2 and ||var*||_2, so that deep layers with large statistics do not rule.
    """
    parts = []
    for name, goal in target.items():
        if name not in found:
            continue
        means = torch.linalg.vector_norm(found[name].mean - goal.mean)
        variances = torch.linalg.vector_norm(found[name].var - goal.var)
        if relative:  # a mean is measured in standard deviations, as it may be 0
            means = means / (goal.var.sum().sqrt() + 1e-6)
            variances = variances / (torch.linalg.vector_norm(goal.var) + 1e-6)
        parts += [means, variances]
    return torch.stack(parts).sum()
