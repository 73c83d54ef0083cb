"""A convolution with its normalisation, as plain tensors: forward, and backward to the convolution's output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

Pair = tuple[int, int]
Norm = Literal["none", "fixed", "batch", "own", "group"]


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """y = gamma xhat + beta, xhat = (conv(x) - mean) / sqrt(var + eps); a ReLU follows.

    Args:
        weight: [o, c, kh, kw]; bias: [o] or None.
        stride, padding, dilation: of the convolution.
        norm: "fixed" are constants (BatchNorm in eval mode), "batch" the observed statistics of a batch in train mode
            (constants forward, not backward), "own" those of whatever batch comes along (train mode, not observed),
            "group" are computed for each image, "none" leaves conv(x) as it is.
        gamma, beta: [o]; ones and zeros where the norm has none.
        mean, var: [o], for "fixed" and "batch".
        groups: for "group".
        eps: of the norm.
    """

    weight: Float[Tensor, "o c kh kw"]
    bias: Float[Tensor, " o"] | None
    stride: Pair
    padding: Pair
    dilation: Pair
    norm: Norm
    gamma: Float[Tensor, " o"]
    beta: Float[Tensor, " o"]
    mean: Float[Tensor, " o"]
    var: Float[Tensor, " o"]
    groups: int = 1
    eps: float = 1e-5

    def to(self, device: torch.device, dtype: torch.dtype) -> ConvLayer:
        """The same elsewhere."""
        names = ("weight", "gamma", "beta", "mean", "var")
        moved = {n: getattr(self, n).detach().to(device, dtype) for n in names}
        bias = None if self.bias is None else self.bias.detach().to(device, dtype)
        return replace(self, bias=bias, **moved)

    def conv(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o i j"]:
        """Before the norm."""
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)

    def statistics(self, raw: Float[Tensor, "b o i j"]) -> tuple[Tensor, Tensor]:
        """(mean, 1 / deviation) of a norm whose input is `raw`: [b, groups] under "group", [o] under "own"."""
        if self.norm == "own":
            var, mean = torch.var_mean(raw, (0, 2, 3), correction=0)
            return mean, (var + self.eps).rsqrt()
        var, mean = torch.var_mean(raw.reshape(len(raw), self.groups, -1), 2, correction=0)
        return mean, (var + self.eps).rsqrt()

    def standardise(self, raw: Float[Tensor, "b o i j"]) -> Float[Tensor, "b o i j"]:
        """conv(x) -> xhat."""
        if self.norm == "none":
            return raw
        if self.norm == "group":
            return functional.group_norm(raw, self.groups, eps=self.eps)
        mean, deviation = self.statistics(raw) if self.norm == "own" else (self.mean, (self.var + self.eps).rsqrt())
        return (raw - column(mean)) * column(deviation)

    def scaled(self, xhat: Float[Tensor, "b o i j"]) -> Float[Tensor, "b o i j"]:
        """xhat -> y, what the ReLU reads."""
        return xhat * column(self.gamma) + column(self.beta)

    def unscaled(self, y: Float[Tensor, "b o i j"]) -> Float[Tensor, "b o i j"]:
        """y -> xhat; a gamma of 0 hides it."""
        small = self.gamma.abs() < 1e-12
        return (y - column(self.beta)) / column(torch.where(small, torch.full_like(self.gamma, 1e-12), self.gamma))

    def backward(
        self,
        dy: Float[Tensor, "b o i j"],
        xhat: Float[Tensor, "b o i j"],
        deviation: Tensor | None = None,
        moment: Float[Tensor, " o"] | None = None,
    ) -> Float[Tensor, "b o i j"]:
        """Gradient at y -> gradient at conv(x).

        Args:
            dy: at y.
            xhat: there; its values where the ReLU is off matter too under "batch", "own" and "group".
            deviation: second of `statistics`, for "group" and "own".
            moment: for "batch" and "own", the sum of dy xhat over images and places where it is known better than from
                `xhat`: it is the gradient of gamma.
        """
        if self.norm == "none":
            return dy
        d = dy * column(self.gamma)
        if self.norm == "group":
            assert deviation is not None
            d, x = (t.reshape(len(dy), self.groups, -1) for t in (d, xhat))
            centred = d - d.mean(2, keepdim=True) - x * (d * x).mean(2, keepdim=True)
            return (deviation[..., None] * centred).view_as(dy)
        if self.norm == "own":
            assert deviation is not None
        else:
            deviation = (self.var + self.eps).rsqrt()
        d = d * column(deviation)
        if self.norm == "fixed":
            return d
        over = (0, 2, 3)
        if moment is None:
            share = (d * xhat).mean(over, keepdim=True)
        else:
            share = column(self.gamma * deviation * moment) / dy[:, 0].numel()
        return d - d.mean(over, keepdim=True) - xhat * share

    def gradient_of_input(self, dz: Float[Tensor, "b o i j"], like: Tensor) -> Float[Tensor, "b c h w"]:
        """Gradient at conv(x) -> gradient at x, shaped as `like`."""
        return _input_gradient(like, self.weight, dz, self)

    def gradient_of_weight(self, x: Float[Tensor, "b c h w"], dz: Float[Tensor, "b o i j"]) -> Tensor:
        """Of the convolution's weight, [o, c, kh, kw]: linear in x and in dz."""
        return conv2d_weight(x, self.weight.shape, dz, self.stride, self.padding, self.dilation)

    def adjoint_of_weight(
        self, direction: Float[Tensor, "o c kh kw"], dz: Float[Tensor, "b o i j"], like: Tensor
    ) -> Float[Tensor, "b c h w"]:
        """d/dx of <direction, gradient_of_weight(x, dz)>: no second derivative of the network is needed."""
        return _input_gradient(like, direction, dz, self)


def column(values: Float[Tensor, " c"]) -> Float[Tensor, "1 c 1 1"]:
    """One value a channel, for images."""
    return values.view(1, -1, 1, 1)


def _input_gradient(like: Tensor, weight: Tensor, dz: Tensor, layer: ConvLayer) -> Tensor:
    return conv2d_input(like.shape, weight, dz, layer.stride, layer.padding, layer.dilation)
