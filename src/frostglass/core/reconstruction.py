"""What an attack returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frostglass.core.batch import Domain


@dataclass(frozen=True)
class Reconstruction:
    """Images read out of an observation, with the attack's own account of them.

    Args:
        images: [r, c, h, w] in the bounds of the observation's domain; r may be below the batch size, 0 if none.
        targets: [r, k] the attack's belief about the targets, or None.
        proved: [r] rows that the attack verified algebraically against the observation.
        objective: the attack's own final loss (lower is better), NaN if it has none.
        label_counts: [k] restored counts per class, None if labels were granted or not restored.
        info: further numbers and words for the report.
    """

    images: Float[Tensor, "r c h w"]
    proved: Bool[Tensor, " r"]
    objective: float
    targets: Float[Tensor, "r k"] | None = None
    label_counts: Float[Tensor, " k"] | None = None
    info: Mapping[str, float | int | str | bool] = field(default_factory=dict)


def faults(found: object, shape: tuple[int, int, int], classes: int, domain: Domain) -> list[str]:
    """What is wrong with what an attack returned, a sentence's end each; scores of such a result would mislead.

    Args:
        found: what its `read` returned.
        shape: (channels, height, width) of the observation's images.
        classes: outputs of its model.
        domain: bounds of a pixel. A thousandth beyond them is taken for rounding.
    """
    if not isinstance(found, Reconstruction):
        return [f"read returned {type(found).__name__}; it must return a Reconstruction"]
    x, proved, counts, objective = found.images, found.proved, found.label_counts, found.objective
    if not isinstance(x, Tensor) or x.shape[1:] != shape or x.ndim != 4 or not x.is_floating_point() or x.requires_grad:
        return [f"images are {_spelled(x)}; they must be floating point of shape (rows, {', '.join(map(str, shape))})"]
    wrong = []
    if not bool(x.isfinite().all()):
        wrong.append("the result holds values that are not finite; lower lr or the term's weight")
    elif x.numel() and not _within(x, domain):
        wrong.append(
            f"images reach from {float(x.min()):.3g} to {float(x.max()):.3g}; pixels lie between {domain.low:g} and "
            f"{domain.high:g}, as seen.domain.clamp leaves them"
        )
    if not isinstance(proved, Tensor) or proved.dtype != torch.bool or proved.shape != (len(x),):
        wrong.append(f"proved is {_spelled(proved)}; it must be torch.bool of shape ({len(x)},), one an image")
    if isinstance(objective, bool) or not isinstance(objective, float | int):
        wrong.append(f"objective is {_spelled(objective)}; it must be a number, NaN if there is none")
    targets = found.targets
    if targets is not None and (not isinstance(targets, Tensor) or targets.ndim != 2 or len(targets) != len(x)):
        wrong.append(f"targets are {_spelled(targets)}; they must be None, or a tensor with a row for each image")
    if not isinstance(found.info, Mapping):
        wrong.append(f"info is {_spelled(found.info)}; it must be a mapping, empty if there is nothing to say")
    if counts is not None and not _counting(counts, classes):
        wrong.append(f"label_counts are {_spelled(counts)}; they must be {classes} finite numbers from 0, one a class")
    return wrong


def _within(images: Tensor, domain: Domain) -> bool:
    slack = 1e-3 * (domain.high - domain.low)
    return float(images.min()) >= domain.low - slack and float(images.max()) <= domain.high + slack


def _counting(counts: object, classes: int) -> bool:
    if not isinstance(counts, Tensor) or counts.shape != (classes,):
        return False
    return bool(counts.isfinite().all()) and bool((counts >= 0).all())


def _spelled(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    graph = ", part of a graph (detach it)" if value.requires_grad else ""
    return f"{value.dtype} of shape {tuple(value.shape)}{graph}"
