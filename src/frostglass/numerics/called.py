"""A network called with other weights and buffers, or copied; it is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

M = TypeVar("M", bound=nn.Module)


def called_with(model: nn.Module, values: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What `model` answers to `images` with `values` in the place of parameters and buffers of these names.

    `torch.func.functional_call` exchanges what a layer holds once for every name of the layer, and leaves the new
    values in one that has two names: weights of a client's steps, and running statistics of its private images. So
    each layer is named once here. A weight that several layers hold is exchanged in all of them.
    """
    names: dict[Tensor, list[str]] = {}
    for prefix, layer in model.named_modules():  # each layer once, under its first name
        weights = layer.named_parameters(prefix, recurse=False, remove_duplicate=False)
        buffers = layer.named_buffers(prefix, recurse=False, remove_duplicate=False)
        for name, held in (*weights, *buffers):
            names.setdefault(held, []).append(name)
    everywhere = {place: values[group[0]] for group in names.values() if group[0] in values for place in group}
    answer: Tensor = functional_call(model, {**values, **everywhere}, (images,), tie_weights=False)
    return answer


def copied(model: M, known: Mapping[int, Any] | None = None) -> M:
    """A copy of `model`, of what it keeps from its last pass too, which `copy.deepcopy` refuses to copy.

    Such are activations that a network keeps to look at, and weights of `torch.nn.utils.weight_norm` and
    `spectral_norm`, which every pass makes anew. The copy holds their values, without the graph.

    Args:
        model: left as it is.
        known: by `id`, what takes the place of a part in the copy.
    """
    memo = dict(known or {})
    for layer in model.modules():
        for held in _tensors(vars(layer)):
            if held.grad_fn is not None:
                memo[id(held)] = held.detach().clone()
    return copy.deepcopy(model, memo)


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping | list | tuple):
        for part in held.values() if isinstance(held, Mapping) else held:
            yield from _tensors(part)
