"""Several clients in one pass: layers that keep the gradients of their weights apart.

Clients who start from the same weights and hold equally many images each can share one batch: the rows of the first,
then those of the second, and so on. Every weight is given a row for each of them, so that its gradient has one too;
forward pass and input gradients are those of one batch, and what reads a whole batch (statistics of BatchNorm) is
taken for each client. An attack's seeds are such clients: small batches leave most of a step to the cost of calling
layers at all (ResNet-20, one image of 32 px: four seeds in the time of two).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from frostglass.numerics.second_order import convolution, hard_sigmoid
from frostglass.numerics.second_order_norm import batch_norm_of_clients


class NotTogether(Exception):
    """The network uses a weight in a way that is not known here; its clients must be simulated one by one."""


class many_clients(TorchFunctionMode):
    """In the block, layers take weights of shape [clients, ...], of `expanded`.

    Known are two-dimensional convolutions, linear layers, and batch, layer and group normalisation. Their gradients
    can be differentiated once more, to the inputs.

    Args:
        weights: those that have a row for each client.
        clients: how many.

    Raises:
        NotTogether: within the block, where anything else is done with one of these weights.
    """

    def __init__(self, weights: Iterable[Tensor], clients: int) -> None:
        super().__init__()
        self._weights = {id(w) for w in weights}
        self._clients = clients

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces the layers that have such weights, and batch normalisation; everything else passes."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(self._clients, *args, **kwargs)
        if func is F.hardsigmoid:
            return hard_sigmoid(*args, **kwargs)
        if not any(id(x) in self._weights for x in _leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func not in _REPLACED:
            raise NotTogether(getattr(func, "__name__", str(func)))
        return _REPLACED[func](*args, **kwargs)


def expanded(weight: Tensor, clients: int) -> Tensor:
    """[clients, ...]: a leaf whose rows are the same memory, so that only its gradient takes more of it."""
    return weight.detach().expand(clients, *weight.shape).requires_grad_(True)


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(tuple(value.values()))
    else:
        yield value


def _added(y: Tensor, bias: Tensor | None, dims: int) -> Tensor:
    return y if bias is None else y + _stretched(bias, y, dims)


def _stretched(weight: Tensor, like: Tensor, dims: int) -> Tensor:
    """[c], or [s, c] of s clients, as it stretches over [b, c, ...] with `dims` further dimensions.

    Repeated for the rows of a client, which is cheap for a vector, so that the batch need not be taken apart.
    """
    if weight.ndim == 1:
        return weight.view(-1, *[1] * dims)
    rows = weight.repeat_interleave(len(like) // len(weight), 0)
    return rows.view(len(rows), *[1] * (like.ndim - 2 - dims), -1, *[1] * dims)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4:
        raise NotTogether("conv2d")
    return _added(convolution(input, weight, stride, padding, dilation, groups), bias, 2)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim < 2:
        raise NotTogether("linear")
    if weight.ndim == 2:
        return _added(F.linear(input, weight), bias, 0)
    y = input.reshape(len(weight), -1, input.shape[-1]) @ weight.transpose(1, 2)
    return _added(y.view(*input.shape[:-1], -1), bias, 0)


def _batch_norm(
    clients: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,  # noqa: ARG001 - running statistics are not moved
    eps: float = 1e-5,
) -> Tensor:
    """Also where no weight has a row for each client: statistics of the batch are taken for each in any case."""
    if weight is None or bias is None:
        raise NotTogether("batch_norm")
    weight, bias = (w.expand(clients, -1) for w in (weight, bias))
    y = batch_norm_of_clients(input, running_mean, running_var, weight, bias, training, eps, clients)
    if y is None:
        raise NotTogether("batch_norm")
    return y


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not isinstance(normalized_shape, int) and len(normalized_shape) != 1:
        raise NotTogether("layer_norm")
    y = F.layer_norm(input, normalized_shape, None, None, eps)
    return _added(y if weight is None else y * _stretched(weight, y, 0), bias, 0)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    y, dims = F.group_norm(input, num_groups, None, None, eps), input.ndim - 2
    return _added(y if weight is None else y * _stretched(weight, y, dims), bias, dims)


_REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.conv2d: _conv2d,
    F.linear: _linear,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
}
