"""What compressing defences do to gradients: clip, keep the largest, round to few levels; and their slopes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frostglass.core.randomness import Rng

Scope: TypeAlias = Literal["global", "layer"]
Rounding: TypeAlias = Literal["nearest", "stochastic"]


def total_norm(gradients: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """L2 norm over all tensors together."""
    return torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]).norm()


def clipped(gradients: Mapping[str, Tensor], norm: float) -> dict[str, Tensor]:
    """All tensors times min(1, norm / total norm); differentiable."""
    total = total_norm(gradients)
    factor = (norm / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp(max=1.0)
    return {name: g * factor for name, g in gradients.items()}


def largest(g: Float[Tensor, " n"], keep: int) -> Bool[Tensor, " n"]:
    """Where the `keep` entries of greatest magnitude are; of any size (torch.quantile ends at 2^24)."""
    mask = torch.zeros(g.numel(), dtype=torch.bool, device=g.device)
    if keep:
        mask[g.abs().topk(keep, sorted=False).indices] = True
    return mask


def kept(gradients: Mapping[str, Tensor], fraction: float, scope: Scope, least: int = 1) -> dict[str, Tensor]:
    """Gradients with the smallest `fraction` of the entries set to 0.

    Args:
        gradients: by name.
        fraction: of entries that become 0, over all tensors together ("global") or in each ("layer").
        scope: see above.
        least: entries that stay in any case, in what `scope` names.
    """

    def count(n: int) -> int:
        return min(n, max(least, n - round(fraction * n)))

    if scope == "layer":
        return {n: g * largest(g.flatten(), count(g.numel())).view_as(g) for n, g in gradients.items()}
    flat = torch.cat([g.flatten() for g in gradients.values()])
    parts = largest(flat, count(len(flat))).split([g.numel() for g in gradients.values()])
    return {n: g * part.view_as(g) for (n, g), part in zip(gradients.items(), parts, strict=True)}


def sent_only(own: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`own` where something was sent, 0 elsewhere: a pruned entry is exactly 0 in the message."""
    return {n: g * (observed[n] != 0).to(g) if n in observed else g for n, g in own.items()}


def pruned_alike(
    own: Mapping[str, Tensor], observed: Mapping[str, Tensor], fraction: float, scope: Scope, least: int = 1
) -> dict[str, Tensor]:
    """`own` where something was sent; where noise hides what was, the own entries that pruning would send."""
    zeros = sum(int((g == 0).sum()) for g in observed.values())
    total = sum(g.numel() for g in observed.values())
    expected = max(0, total - max(least, total - round(fraction * total)))
    return sent_only(own, observed) if 2 * zeros >= expected else kept(own, fraction, scope, least)


def quantised(g: Tensor, bits: int, rounding: Rounding = "nearest", rng: Rng | None = None) -> Tensor:
    """Rounded to 2^bits - 1 levels, evenly spaced in [-max |g|, max |g|] with 0 among them.

    Args:
        g: one tensor.
        bits: from 2.
        rounding: to the nearest level, or up or down at random so that the mean stays g (QSGD's rounding).
        rng: for stochastic rounding.
    """
    steps = 2 ** (bits - 1) - 1
    scale = g.abs().max() / steps if g.numel() else g.new_zeros(())
    if not float(scale) > 0:
        return g.clone()
    level = g / scale
    if rounding == "stochastic":
        assert rng is not None
        level = (level + rng.uniform(g.shape).to(g)).floor()
    else:
        level = level.round()
    return level.clamp(-steps, steps) * scale


def signs(g: Tensor, *, magnitude: bool) -> Tensor:
    """sign(g), times the mean of |g| if `magnitude` is kept (one more number a tensor)."""
    return g.sign() * g.abs().mean() if magnitude and g.numel() else g.sign()


def straight_through(g: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """rounded(g) with the slope of g itself (Bengio et al. 2013): the derivative of rounding is 0 almost everywhere."""
    return g + (rounded(g.detach()) - g.detach())
