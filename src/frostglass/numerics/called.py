"""A network called with other weights and buffers, and left as it was."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call


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
