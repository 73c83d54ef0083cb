"""Coefficients of assigned images where the label does not give them exactly.

The expected unmasked mix v = y tanh(y m / s^2) (the E step of `phase_retrieval`) is a linear mix, so that its
coefficients follow by least squares, on differences as everywhere in unmixing, and are then moved to what the label
allows. What no label fixes is the contrast of an image: twice the pixels and half the coefficients give the same
encodings. Every image is used alike, so all get the same mean coefficient, and natural contrast on average.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from frostglass.numerics.phase_restarts import VARIANCE
from frostglass.numerics.unmixing_assignment import Slots
from frostglass.numerics.unmixing_similarity import differences

LabelKind: TypeAlias = Literal["exact", "quantised", "renormalised", "one_hot", "none"]
"""What a label row tells: the coefficient of each class; that, in quarters; their ratios; one class; nothing."""

_LEAST = 0.01
_QUANTUM = 0.25


def fit_shares(
    y: Float[Tensor, "e c h w"],
    images: Float[Tensor, "p c h w"],
    noise: Float[Tensor, " e"],
    slots: Slots,
    mass: Float[Tensor, "e k"],
    class_of: Int64[Tensor, " p"],
    kind: LabelKind,
    most: float = 0.65,
) -> Slots:
    """`slots` with coefficients by least squares, none above `most` (the c1 of the set), as the label allows."""
    mean = (slots.design(len(images)) @ images.flatten(1)).view_as(y)
    v = y * torch.tanh(y * mean / noise.view(-1, 1, 1, 1))
    flat = differences(images).flatten(1)
    cross, gram = differences(v).flatten(1) @ flat.T, flat @ flat.T
    held = slots.image.clamp_min(0)
    b = cross.gather(1, held)
    a = gram[held[:, :, None], held[:, None, :]]
    ridge = 0.03 * a.diagonal(dim1=1, dim2=2).mean(1)  # towards what was: two images may be alike
    a = a + ridge[:, None, None] * torch.eye(a.shape[1], device=a.device)
    w = torch.linalg.solve(a, b + ridge[:, None] * slots.weight).clamp(_LEAST, most)
    w = torch.where(slots.image >= 0, w, 0.0)
    return Slots(slots.image, _within_label(w, slots.image, mass, class_of, kind))


def _within_label(w: Tensor, image: Tensor, mass: Tensor, class_of: Tensor, kind: LabelKind) -> Tensor:
    """Coefficients scaled, class by class, to the sums that the label allows."""
    if kind in ("one_hot", "none"):
        return w
    column = class_of[image.clamp_min(0)]
    total = torch.zeros_like(mass).scatter_add_(1, column, w)
    if kind == "exact":
        goal = mass
    elif kind == "quantised":
        goal = total.clamp(min=mass - _QUANTUM, max=mass + _QUANTUM)  # rounding by largest remainder is off by less
    else:
        goal = mass * total.sum(1, keepdim=True)
    factor = torch.where((total > 0) & (mass > 0), goal / total.clamp_min(1e-9), 1.0)
    return w * factor.gather(1, column)


def same_contrast(
    images: Float[Tensor, "p c h w"], slots: Slots, kind: LabelKind
) -> tuple[Float[Tensor, "p c h w"], Slots]:
    """Equal images of which the encodings are the same, with mean coefficients alike and natural contrast on average.

    Labels that give coefficients fix the contrast themselves and are left alone.
    """
    if kind in ("exact", "quantised"):
        return images, slots
    design = slots.design(len(images))
    used = (design > 0).sum(0).clamp_min(1)
    mean = design.sum(0) / used
    factor = torch.where(mean > 0, mean / mean[mean > 0].mean(), 1.0)
    scaled = images * factor.view(-1, 1, 1, 1)
    common = (VARIANCE / scaled.square().mean().clamp_min(1e-9)).sqrt()
    factor = factor * common
    weight = slots.weight / factor[slots.image.clamp_min(0)]
    return images * factor.view(-1, 1, 1, 1), Slots(slots.image, weight)
