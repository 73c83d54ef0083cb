"""Batch normalisation whose gradient is cheap to differentiate, and statistics in two passes.

PyTorch takes the second derivative of a batch normalisation in some fifty operations, and its statistics with a
running algorithm that takes longer than the convolution before it (CPU). With xh = (x - m) r, r = (v + eps)^-1/2,
y = w xh + b, and <.> the mean over a channel, the gradients of y times g are

    of x: w r P(g),  P(u) = u - <u> - xh <u xh>    of w: sum g xh    of b: sum g,

and what these are multiplied with, a, c and e, adds up to

    of g: w r P(a) + c xh + e
    of x: r (-w r <g xh> P(a) + (c - w r <a xh>) P(g)) - w r^2 (<a g> - <a> <g> - <a xh> <g xh>) xh
    of w: n r (<a g> - <a> <g> - <a xh> <g xh>).

In eval mode m and v are constants: P(u) = u, and of x only r c g is left.

Several clients can share one batch (`clients`): its rows are theirs in turn, equally many, and every statistic and
weight has a row for each of them, [s, c] for [c].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def channel_statistics(
    x: Float[Tensor, "*s b c *rest"], *, clients: bool = False
) -> tuple[Float[Tensor, "*s c"], Float[Tensor, "*s c"]]:
    """Mean and biased variance of each channel, on the graph of `x`, to any order.

    Args:
        x: [b, c, ...], or [s, b, c, ...] with `clients`.
        clients: take them for each of the s clients.
    """
    mean, var = _Statistics.apply(x, clients)  # type: ignore[no-untyped-call]
    return mean, var


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with the derivatives of this module, where it has weights of 32 or 64 bits."""
    if not _covered(input, running_mean, running_var, weight, bias, training):  # PyTorch's own, or its complaint
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training:
        with torch.no_grad():
            mean, var = _two_pass(input.detach())
            _move(running_mean, running_var, mean, var, input.numel() // input.shape[1], momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.detach().clone(), running_var.detach().clone()  # a later step may move them
    y: Tensor = _Norm.apply(input, weight, bias, _Form(mean, var, (var + eps).rsqrt(), training, eps))  # type: ignore[no-untyped-call]
    return y


def batch_norm_of_clients(
    input: Float[Tensor, "sb c *rest"],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Float[Tensor, "s c"] | None,
    bias: Float[Tensor, "s c"] | None,
    training: bool,
    eps: float,
    clients: int,
) -> Tensor | None:
    """The same for several clients, each with statistics and weights of its own; running statistics are not moved.

    Returns:
        [sb, c, ...], or None where it is not covered (`batch_norm` leaves it to PyTorch).
    """
    if not _covered(input[: len(input) // clients], running_mean, running_var, weight, bias, training):
        return None
    x = input.unflatten(0, (clients, -1))
    if training:
        mean, var = _two_pass(x.detach(), clients=True)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = (t.detach().expand(clients, -1) for t in (running_mean, running_var))
    y: Tensor = _Norm.apply(x, weight, bias, _Form(mean, var, (var + eps).rsqrt(), training, eps))  # type: ignore[no-untyped-call]
    return y.flatten(0, 1)


def _covered(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> bool:
    if weight is None or bias is None or x.dtype not in (torch.float32, torch.float64):
        return False
    return x.numel() > x.shape[1] if training else running_mean is not None and running_var is not None


class _Form(NamedTuple):
    mean: Tensor
    var: Tensor
    rate: Tensor
    training: bool
    eps: float


def _two_pass(x: Tensor, *, clients: bool = False) -> tuple[Tensor, Tensor]:
    dims = _others(x, clients)
    mean = x.mean(dims)
    return mean, (x - _wide(mean, x)).square_().mean(dims)


def _others(x: Tensor, clients: bool) -> list[int]:
    """All dimensions but the channels of [b, c, ...], or the clients and channels of [s, b, c, ...]."""
    kept = (0, 2) if clients else (1,)
    return [d for d in range(x.ndim) if d not in kept]


def _wide(per_channel: Tensor, like: Tensor) -> Tensor:
    """[c] or [s, c] as it stretches over [b, c, ...] or [s, b, c, ...]."""
    if per_channel.ndim == 1:
        return per_channel.view(1, -1, *[1] * (like.ndim - 2))
    return per_channel.reshape(len(per_channel), 1, -1, *[1] * (like.ndim - 3))


def _move(mean: Tensor | None, var: Tensor | None, m: Tensor, v: Tensor, count: int, momentum: float) -> None:
    """Running statistics, as PyTorch moves them: the variance unbiased."""
    if mean is not None and var is not None:
        mean.lerp_(m, momentum)
        var.lerp_(v * (count / max(count - 1, 1)), momentum)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clients: bool) -> tuple[Tensor, Tensor]:
        mean, var = _two_pass(x, clients=clients)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        steep = slopes[1] * (2 * mean.numel() / x.numel())
        level = slopes[0] * (mean.numel() / x.numel()) - steep * mean
        return torch.addcmul(_wide(level, x), x, _wide(steep, x)), None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, form: _Form) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.form = form
        if w.ndim == 2:
            slope = w * form.rate
            return torch.addcmul(_wide(b - slope * form.mean, x), x, _wide(slope, x))
        y: Tensor = torch.native_batch_norm(x, w, b, form.mean, form.var, False, 0.0, form.eps)[0]
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        taken = _Slopes.apply if torch.is_grad_enabled() else _slopes
        return *taken(slopes[0], x, w, ctx.form), None


def _slopes(g: Tensor, x: Tensor, w: Tensor, form: _Form) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the normalisation times g: (of x, of w, of b)."""
    if w.ndim == 2:
        return _slopes_of_clients(g, x, w, form)
    saved = (form.mean, form.rate) if form.training else (None, None)
    known = (None, None) if form.training else (form.mean, form.var)
    of_x, of_w, of_b = torch.ops.aten.native_batch_norm_backward(
        g, x, w, *known, *saved, form.training, form.eps, (True, True, True)
    )
    return of_x, of_w, of_b


def _slopes_of_clients(g: Tensor, x: Tensor, w: Tensor, form: _Form) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with a row of each statistic and weight for every client."""
    dims = _others(x, True)
    of_b, of_w = g.sum(dims), (g * (x - _wide(form.mean, x))).sum(dims) * form.rate
    steep = w * form.rate
    if not form.training:
        return g * _wide(steep, g), of_w, of_b
    share = steep * (form.mean.numel() / x.numel())
    return _sum((steep, g), (None, None), (-share * of_w, x), -share * of_b, form.mean, form.rate), of_w, of_b


class _Slopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, form: _Form) -> tuple[Tensor, Tensor, Tensor]:
        of_x, of_w, of_b = _slopes(g, x, w, form)
        ctx.save_for_backward(g, x, w, of_w, of_b)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return of_x, of_w, of_b

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, a: Tensor | None, c: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        """As the module says; every result is a sum of a, g and x with a factor for each channel."""
        g, x, w, of_w, of_b = ctx.saved_tensors
        mean, _, rate, training, _ = ctx.form
        zero = torch.zeros_like(mean)
        c, e = zero if c is None else c, zero if e is None else e
        count, steep = x.numel() // mean.numel(), w * rate
        a_of, ax_of, ag_of = (zero, zero, zero) if a is None else _means(a, x, g, mean, rate)
        g_of, gx_of = of_b / count, of_w / count
        by_g, both = rate * c, zero
        if training:
            by_g = by_g - rate * steep * ax_of
            both = ag_of - a_of * g_of - ax_of * gx_of
            along, level = c - steep * ax_of, e - steep * a_of
            bent = steep * rate * gx_of
            x_of = bent * ax_of - by_g * gx_of - steep * rate * both
            of_x = _sum((None if a is None else -bent, a), (by_g, g), (x_of, x), bent * a_of - by_g * g_of, mean, rate)
        else:
            along, level = c, e
            both = ag_of
            of_x = g * _wide(by_g, g)
        of_g = _sum((None if a is None else steep, a), (None, None), (along, x), level, mean, rate)
        of_weight = count * rate * both if w.requires_grad and not w.is_leaf else None
        return of_g, of_x, of_weight, None


def _means(a: Tensor, x: Tensor, g: Tensor, mean: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(<a>, <a xh>, <a g>) of each channel."""
    dims = _others(x, mean.ndim == 2)
    level = a.mean(dims)
    return level, (a * (x - _wide(mean, x))).mean(dims) * rate, (a * g).mean(dims)


def _sum(
    first: tuple[Tensor | None, Tensor | None],
    second: tuple[Tensor | None, Tensor | None],
    normalised: tuple[Tensor, Tensor],
    level: Tensor,
    mean: Tensor,
    rate: Tensor,
) -> Tensor:
    """first + second + factor * xh + level, each a factor for every channel times a tensor."""
    factor, x = normalised
    slope = factor * rate
    total = torch.addcmul(_wide(level - slope * mean, x), x, _wide(slope, x))
    for by, what in (first, second):
        if by is not None and what is not None:
            total.addcmul_(what, _wide(by, x))
    return total
