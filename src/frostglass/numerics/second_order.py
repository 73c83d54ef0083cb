"""Layers whose gradients are cheap to differentiate: for simulations of a client step that keep the graph.

Batch normalisation is in `second_order_norm`; convolutions are here.

PyTorch's double backward of a convolution takes the second gradient of the weight for a batch of images and the
gradient of the output for kernels of an image's size, which is slow on CPU. The same sum is an ordinary input gradient.
With g the gradient of y = conv(x, w), and a and b what its gradients of x and of w are multiplied with,

    d/dg = conv(a, w) + conv(x, b),    d/dx = input gradient of (g, b),    d/dw = weight gradient of (g, a).

Where tiles make them faster (`tiled_convolution`), all of these convolutions are taken by tiles.

Where several clients share one batch (see `many_clients`), w has a row for each, all alike: then conv(x, w) and the
input gradient are those of one batch, and only the gradient of w, and what b is used for, is taken for each client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from frostglass.numerics.second_order_norm import batch_norm
from frostglass.numerics.tile_weights import Kept
from frostglass.numerics.tiled_convolution import CHANNELS, tiling
from frostglass.numerics.tiled_layer import tiled_convolution, wanted


class second_order_layers(TorchFunctionMode):
    """In the block, `conv2d` and `batch_norm` have gradients that are cheap to differentiate once more, to their input
    and to weights that are themselves results; so has `hardsigmoid`, which has none otherwise.

    Weights that are leaves get a gradient where a graph is kept (`create_graph=True`) and none in the pass after it: an
    attack's derivative goes to the images. Third derivatives are refused.

    Args:
        kept: what may be remembered of the weights from one block to the next, for as long as they stay the same.
    """

    def __init__(self, kept: Kept | None = None) -> None:
        super().__init__()
        self._kept = Kept() if kept is None else kept

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces these layers, convolutions where their padding is explicit; everything else passes."""
        if not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        if func is F.batch_norm:
            return batch_norm(*args, **(kwargs or {}))
        if func is F.hardsigmoid:
            return hard_sigmoid(*args, **(kwargs or {}))
        if func is torch.conv2d:
            return _conv2d(lambda x, w, form: convolution(x, w, *form, self._kept), *args, **(kwargs or {}))
        return _called(func, args, kwargs or {})


class first_order_layers(TorchFunctionMode):
    """In the block, `conv2d` is by tiles where that is faster, and `batch_norm` that of `second_order_norm`; both for
    one ordinary backward pass.

    Args:
        kept: as for `second_order_layers`; None for weights that are those of this block alone.
    """

    def __init__(self, kept: Kept | None) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces batch normalisation and convolutions that tiles cover; everything else passes."""
        if func is F.batch_norm:
            return batch_norm(*args, **(kwargs or {}))
        if func is torch.conv2d:
            return _conv2d(self._convolved, *args, **(kwargs or {}))
        return _called(func, args, kwargs or {})

    def _convolved(self, x: Tensor, w: Tensor, form: _Form) -> Tensor:
        how = tiling(x, w, *form)
        if how is not None:
            return tiled_convolution(x, w, self._kept, how, once=True)
        return torch.conv2d(_laid_out(x, x, w)[1], w, None, *form)


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func(...), where networks may flatten by `view` what lies as channels_last only here."""
    if func is not torch.Tensor.view and func is not torch.Tensor.view_as:
        return func(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        if args[0].is_contiguous():
            raise
        return func(args[0].contiguous(), *args[1:], **kwargs)


def hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: ARG001 - never in place
    """`F.hardsigmoid`, of which PyTorch has no second derivative."""
    return F.relu6(input + 3) / 6


class _Form(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def _conv2d(
    convolved: Callable[[Tensor, Tensor, _Form], Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = convolved(input, weight, _Form(_pair(stride), _pair(padding), _pair(dilation), groups))
    return y if bias is None else y + bias.view(-1, 1, 1)


def convolution(
    x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, kept: Kept | None = None
) -> Tensor:
    """As `conv2d` without a bias.

    Args:
        x: [b, i, h, w].
        w: [o, i, kh, kw], or [s, o, i, kh, kw] of s clients who have the same weights and b / s images each.
        stride, padding, dilation: numbers or pairs.
        groups: of channels.
        kept: where spread kernels of a model's own parameters are kept, so that tiles may be used.
    """
    form = _Form(_pair(stride), _pair(padding), _pair(dilation), groups)
    if kept is not None and isinstance(w, nn.Parameter) and (how := tiling(x, w, *form)) is not None:
        return tiled_convolution(x, w, kept, how)
    y: Tensor = _Convolution.apply(x, w, form)  # type: ignore[no-untyped-call]
    return y


def _pair(value: Any) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return (both[0], both[-1])


def _shared(w: Tensor) -> Tensor:
    return w[0] if w.ndim == 5 else w


def _laid_out(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Images as convolutions on a CPU want them: as channels_last, like those of tiles, where there are many channels.

    Where kernels are larger than images oneDNN would lay kernels out anew for them, and take three times as long for
    the gradient of the kernels.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or w.ndim != 4:
        return g, x
    if w.numel() > x.numel():
        return g.contiguous(), x.contiguous()
    if len(w) < CHANNELS:
        return g, x
    last = torch.channels_last
    return g.contiguous(memory_format=last), x.contiguous(memory_format=last)


def _convolved(x: Tensor, w: Tensor, form: _Form) -> Tensor:
    x = _laid_out(x, x, w)[1]
    y: Tensor = torch.ops.aten.convolution(
        x, w, None, form.stride, form.padding, form.dilation, False, (0, 0), form.groups
    )
    return y


def _slopes(g: Tensor, x: Tensor, w: Tensor, form: _Form, of_x: bool, of_w: bool) -> tuple[Tensor | None, ...]:
    """Gradients of conv(x, w) times g: (of x, of w), None where not asked for."""
    g, x = _laid_out(g, x, w)
    found = torch.ops.aten.convolution_backward(
        g, x, w, None, form.stride, form.padding, form.dilation, False, (0, 0), form.groups, (of_x, of_w, False)
    )
    return found[0] if of_x else None, found[1] if of_w else None


def _side_by_side(x: Tensor, clients: int) -> Tensor:
    """[s b, c, ...] of s clients -> [b, s c, ...]: in s groups, a convolution has kernels of its own for each."""
    return x.unflatten(0, (clients, -1)).transpose(0, 1).flatten(1, 2)


def _one_after_another(y: Tensor, clients: int) -> Tensor:
    """[b, s c, ...] -> [s b, c, ...]."""
    return y.unflatten(1, (clients, -1)).transpose(0, 1).flatten(0, 1)


def _convolved_apart(x: Tensor, b: Tensor, form: _Form) -> Tensor:
    """conv(x, b), where each client has kernels of its own."""
    if b.ndim == 4:
        return _convolved(x, b, form)
    s = len(b)
    y = _convolved(_side_by_side(x, s), b.flatten(0, 1), form._replace(groups=form.groups * s))
    return _one_after_another(y, s)


def _slopes_apart(g: Tensor, x: Tensor, b: Tensor, form: _Form, of_x: bool, of_w: bool) -> tuple[Tensor | None, ...]:
    """`_slopes` of that."""
    if b.ndim == 4:
        return _slopes(g, x, b, form, of_x, of_w)
    s = len(b)
    sides = _side_by_side(g, s), _side_by_side(x, s), b.flatten(0, 1), form._replace(groups=form.groups * s)
    to_x, to_w = _slopes(*sides, of_x, of_w)
    return (
        None if to_x is None else _one_after_another(to_x, s),
        None if to_w is None else to_w.unflatten(0, (s, -1)),
    )


def _shared_slopes(g: Tensor, x: Tensor, w: Tensor, form: _Form, of_x: bool, of_w: bool) -> tuple[Tensor | None, ...]:
    """The same where all clients have the same kernels: the images' side is that of one batch."""
    if w.ndim == 4:
        return _slopes(g, x, w, form, of_x, of_w)
    to_x = _slopes(g, x, w[0], form, True, False)[0] if of_x else None
    return to_x, _slopes_apart(g, x, w, form, False, True)[1] if of_w else None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, form: _Form) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.form = form
        return _convolved(x, _shared(w), form)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        asked = (ctx.needs_input_grad[0], wanted(w))
        taken = _Slopes.apply if torch.is_grad_enabled() else _shared_slopes
        return *taken(slopes[0], x, w, ctx.form, *asked), None


class _Slopes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, form: _Form, of_x: bool, of_w: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return _shared_slopes(g, x, w, form, of_x, of_w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, w = ctx.saved_tensors
        form, needs = ctx.form, ctx.needs_input_grad
        of_g = of_x = of_w = None
        if needs[0] and a is not None:
            of_g = _convolved(a, _shared(w), form)
        if needs[0] and b is not None:
            more = _convolved_apart(x, b, form)
            of_g = more if of_g is None else of_g.add_(more)
        if needs[1] and b is not None:
            of_x = _slopes_apart(g, x, b, form, True, False)[0]
        if a is not None and wanted(w):
            of_w = _slopes(g, a, w, form, False, True)[1]
        return of_g, of_x, of_w, None, None, None
