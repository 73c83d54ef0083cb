"""Recognising a plain convolutional network: convolutions, norms and ReLUs in one line, then a linear layer.

Modules are found by walking, their order and what stands between them by probing: what a layer reads is compared with
what the layer before it wrote. So names do not matter, and a functional ReLU is as good as a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from frostglass.core.threat import Observation
from frostglass.core.update import BNStatistics
from frostglass.numerics.conv_layer import ConvLayer, Norm
from frostglass.numerics.local_update import in_mode

_WATCHED = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm, nn.Linear)


@dataclass(frozen=True, eq=False)
class Block:
    """A convolution with its norm; a ReLU follows.

    Args:
        name, conv: of the convolution.
        norm_name, norm: of the norm, "" and None if there is none.
        size: (h, w) of the convolution's input.
    """

    name: str
    conv: nn.Conv2d
    norm_name: str
    norm: nn.BatchNorm2d | nn.GroupNorm | None
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Chain:
    """scale * image + offset -> blocks -> flatten -> head.

    Args:
        scale, offset: [c, h, w] from pixels to the first convolution's input.
        blocks: at least one.
        head_name, head: the Linear layer, which has a bias.
        features: (o, i, j) of the last block's output.
    """

    scale: Tensor
    offset: Tensor
    blocks: tuple[Block, ...]
    head_name: str
    head: nn.Linear
    features: tuple[int, int, int]

    def batch_norms(self, mode: str) -> list[str]:
        """Names of the BatchNorm layers that use the statistics of the batch in `mode`."""
        found = [(b.norm_name, b.norm) for b in self.blocks if isinstance(b.norm, nn.BatchNorm2d)]
        return [name for name, norm in found if mode == "train" or norm.running_mean is None]

    def layers(self, mode: str, statistics: Mapping[str, BNStatistics]) -> tuple[ConvLayer, ...]:
        """As tensors; a layer of `batch_norms(mode)` that `statistics` does not hold uses those of what it is given."""
        seen = {n: statistics.get(n) for n in self.batch_norms(mode)}
        return tuple(as_layer(b, seen.get(b.norm_name), b.norm_name in seen) for b in self.blocks)


@dataclass(frozen=True)
class Call:
    """One call of a watched module in the probe."""

    name: str
    module: nn.Module
    read: Tensor
    wrote: Tensor


def find_chain(seen: Observation) -> tuple[Chain | None, str]:
    """(the network, "") or (None, a sentence on what does not fit)."""
    problem = _foreign(seen)
    if problem:
        return None, problem
    images = probe_images(seen)
    calls, logits = calls_of(seen, images)
    blocks: list[Block] = []
    before: Tensor | None = None  # what the last block wrote, before its ReLU
    at = 0
    while at < len(calls) and isinstance(calls[at].module, nn.Conv2d):
        conv = calls[at]
        if before is not None and not same(conv.read, before.relu()):
            return None, f"what {conv.name!r} reads is not the ReLU of what {_last(blocks)!r} writes; {_PLAIN}"
        at += 1
        norm = calls[at] if at < len(calls) and isinstance(calls[at].module, nn.BatchNorm2d | nn.GroupNorm) else None
        if norm is not None:
            if not same(norm.read, conv.wrote):
                return None, f"{norm.name!r} does not read what {conv.name!r} writes; {_PLAIN}"
            at += 1
        block, problem = as_block(conv, norm)
        if block is None:
            return None, problem
        blocks.append(block)
        before = (norm or conv).wrote
    return _finish(seen, images, logits, calls, at, blocks, before)


_PLAIN = "this attack reads convolutions, norms and ReLUs in one line (no shortcut, no pooling, no other activation)."


def _finish(
    seen: Observation,
    images: Tensor,
    logits: Tensor,
    calls: list[Call],
    at: int,
    blocks: list[Block],
    before: Tensor | None,
) -> tuple[Chain | None, str]:
    """What follows the last convolution, and what precedes the first one."""
    if before is None:
        return None, f"the model does not begin with a Conv2d layer; {_PLAIN}"
    head = calls[at] if at < len(calls) else None
    if head is None or not isinstance(head.module, nn.Linear) or at + 1 != len(calls):
        return None, f"after {_last(blocks)!r} there is no or more than one Linear layer; {_PLAIN}"
    if head.read.shape != before.flatten(1).shape or not same(head.read, before.relu().flatten(1)):
        return None, (
            f"{head.name!r} does not read every value of the ReLU after {_last(blocks)!r}; pooling there hides where "
            "they were, and this attack needs them."
        )
    if head.module.bias is None or not same(logits, head.wrote):
        return None, f"{head.name!r} has no bias, or is not the last thing the model does; this attack needs both."
    affine = _affine(seen, images, calls[0].read)
    if affine is None:
        return None, f"what {calls[0].name!r} reads is not the image scaled pixel by pixel; this attack needs that."
    _, o, i, j = before.shape
    return Chain(*affine, tuple(blocks), head.name, head.module, (o, i, j)), ""


def _foreign(seen: Observation) -> str:
    """A sentence on the first module that cannot be part of a plain network."""
    for name, module in seen.model.named_modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d) and module.p > 0 and seen.mode == "train":
            return f"{name!r} drops values at random in train mode, which an attack cannot repeat."
        known = isinstance(module, _WATCHED) and not isinstance(module, nn.SyncBatchNorm)
        if not known and any(True for _ in module.parameters(recurse=False)):
            return f"{name!r} is a {type(module).__name__}; {_PLAIN}"
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            return f"{name!r} is a {type(module).__name__}, which hides where a value was; {_PLAIN}"
    return ""


def probe_images(seen: Observation) -> Tensor:
    """A dark, a bright and two mixed images, in the model's dtype and on its device."""
    weight = next(iter(seen.model.parameters()))
    low, high = seen.domain.low, seen.domain.high
    size = int(torch.tensor(seen.image_shape).prod())
    ramp = torch.linspace(low, high, size, dtype=weight.dtype, device=weight.device).view(1, *seen.image_shape)
    shuffled = ramp.flatten()[torch.arange(size, device=weight.device) * 7919 % size].view_as(ramp)
    return torch.cat([torch.full_like(ramp, low), torch.full_like(ramp, high), ramp, shuffled])


def calls_of(seen: Observation, images: Tensor) -> tuple[list[Call], Tensor]:
    """Calls of watched modules in their order, in eval mode, and the logits; the model is left as it was."""
    calls: list[Call] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            calls.append(Call(name, module, args[0].detach().clone(), out.detach().clone()))

        return module.register_forward_hook(hook)

    handles = [watch(n, m) for n, m in seen.model.named_modules() if isinstance(m, _WATCHED)]
    try:
        with torch.no_grad(), in_mode(seen.model, "eval"):
            logits: Tensor = seen.model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def as_block(conv: Call, norm: Call | None) -> tuple[Block | None, str]:
    """(the block, "") or (None, a sentence on what is not read of its convolution)."""
    module = conv.module
    assert isinstance(module, nn.Conv2d)
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None, f"{conv.name!r} has groups, a padding mode or a padding by name, which this attack does not read."
    h, w = conv.read.shape[2:]
    kind = norm.module if norm is not None else None
    assert kind is None or isinstance(kind, nn.BatchNorm2d | nn.GroupNorm)
    return Block(conv.name, module, norm.name if norm else "", kind, (h, w)), ""


def _last(blocks: list[Block]) -> str:
    return blocks[-1].norm_name or blocks[-1].name


def _affine(seen: Observation, images: Tensor, read: Tensor) -> tuple[Tensor, Tensor] | None:
    """(scale, offset) with read = scale * image + offset, None if there are none."""
    if read.shape != images.shape:
        return None
    scale = (read[1] - read[0]) / (seen.domain.high - seen.domain.low)
    offset = read[0] - scale * seen.domain.low
    fits = bool((scale != 0).all()) and same(read, scale * images + offset)
    return (scale, offset) if fits else None


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def as_layer(block: Block, statistics: BNStatistics | None, by_batch: bool) -> ConvLayer:
    """A block as tensors, in the model's dtype.

    Args:
        block: the block.
        statistics: of the batch, None if they were not seen.
        by_batch: whether its BatchNorm normalises by the batch.
    """
    conv, norm = block.conv, block.norm
    like = conv.weight.detach()
    ones, zeros = like.new_ones(conv.out_channels), like.new_zeros(conv.out_channels)
    kind: Norm = "none" if norm is None else "group" if isinstance(norm, nn.GroupNorm) else "fixed"
    mean, var = zeros, ones
    if isinstance(norm, _BatchNorm):
        if statistics is not None:
            kind, mean, var = "batch", statistics.mean, statistics.var
        elif by_batch:
            kind = "own"
        elif norm.running_mean is not None and norm.running_var is not None:
            mean, var = norm.running_mean, norm.running_var
    return ConvLayer(
        weight=like,
        bias=None if conv.bias is None else conv.bias.detach(),
        stride=_pair(conv.stride),
        padding=_pair(conv.padding),
        dilation=_pair(conv.dilation),
        norm=kind,
        gamma=ones if norm is None or norm.weight is None else norm.weight.detach(),
        beta=zeros if norm is None or norm.bias is None else norm.bias.detach(),
        mean=mean,
        var=var,
        groups=norm.num_groups if isinstance(norm, nn.GroupNorm) else 1,
        eps=norm.eps if norm is not None else 0.0,
    )


def _pair(values: tuple[int, ...] | str) -> tuple[int, int]:
    assert not isinstance(values, str)
    return values[0], values[1]
