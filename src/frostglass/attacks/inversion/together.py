"""Several seeds in one pass: what calling a network's layers costs is paid once for all of them.

Seeds are clients who start from the same weights (`numerics.many_clients`). It pays where batches are small: one image
of 32 pixels leaves most of a step to the cost of calling layers. Where it does not, or a network is not known to keep
the images of a batch apart, seeds are evaluated one by one, to the same result but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from frostglass.attacks.inversion.engine import Evaluation, Objective, decoded, evaluate, finished, valued
from frostglass.attacks.inversion.target import Target
from frostglass.attacks.inversion.terms import Candidate
from frostglass.numerics.local_update import local_gradients
from frostglass.numerics.many_clients import NotTogether
from frostglass.numerics.second_order import second_order_layers

PIXELS = {"cpu": 8 * 32 * 32, "cuda": 16 * 224 * 224}
"""Most pixels in one pass; on a CPU more take as long an image as these do (measured on four networks, 32 px)."""

WEIGHTS = {"cpu": 4 * 10**6, "cuda": 512 * 10**6}
"""Most weights in one pass, those of a network counted for every seed: each has gradients of its own in memory."""

ALIKE = 1e-3
"""Largest difference that counts as rounding: of objectives as a share of their size, of gradients 1 - cosine."""


@dataclass(frozen=True)
class Evaluations:
    """Of all seeds.

    Args:
        own, total: objectives, [s]; see `engine.Evaluation`.
        gradient: of the totals, as the variables.
        values: of the terms, [s].
    """

    own: Tensor
    total: Tensor
    gradient: Tensor
    values: Mapping[str, Tensor]


def evaluate_all(z: Tensor, problems: Sequence[Objective], at_once: int) -> Evaluations:
    """Every seed at its variable z[s], `at_once` of them in one pass."""
    found: list[Evaluation] = []
    for s in range(0, len(problems), at_once):
        part = problems[s : s + at_once]
        found += evaluate_together(z[s : s + at_once], part) if len(part) > 1 else [evaluate(z[s], part[0])]
    if not found:
        return Evaluations(z.new_zeros(0), z.new_zeros(0), torch.zeros_like(z), {})
    values = {name: torch.stack([f.values[name] for f in found]) for name in found[0].values}
    gradient = torch.stack([f.gradient for f in found if f.gradient is not None])
    return Evaluations(torch.stack([f.own for f in found]), torch.stack([f.total for f in found]), gradient, values)


def seeds_at_once(target: Target, rows: int) -> int:
    """How many seeds of `rows` images are worth one pass; 1 if seeds are to be evaluated one by one."""
    kind = target.mean.device.type
    _, height, width = target.seen.image_shape
    weights = sum(p.numel() for p in target.model.parameters() if p.requires_grad)
    most = min(PIXELS.get(kind, 0) // (rows * height * width), WEIGHTS.get(kind, 0) // max(weights, 1))
    return max(most, 1)


def evaluate_together(z: Tensor, problems: Sequence[Objective]) -> list[Evaluation]:
    """The objective and its gradient at the variables z [s, ...] of several seeds, as `evaluate` of each.

    Args:
        z: variables.
        problems: of each seed, alike but for what is done to its images; they match one gradient by double backward.

    Raises:
        NotTogether: the network has layers that cannot keep seeds apart.
    """
    z = z.detach().requires_grad_(True)
    first = problems[0]
    with sdpa_kernel(SDPBackend.MATH):
        found = [decoded(own, problem) for own, problem in zip(z.unbind(), problems, strict=True)]
        with first.drawing(), second_order_layers(first.target.kept):
            traces = local_gradients(
                first.target.model,
                torch.stack([images for _, images, _ in found]),
                torch.stack([targets for _, _, targets in found]),
                first.target.plan.mode,
                statistics=any(term.statistics for term in first.terms),
            )
        values = [
            valued(problem, Candidate(*own, trace, problem.target))
            for problem, own, trace in zip(problems, found, traces, strict=True)
        ]
        slopes = torch.autograd.grad(torch.stack([total for _, total, _ in values]).sum(), z)[0]
    return [finished(*value, slope) for value, slope in zip(values, slopes.unbind(), strict=True)]


def can_be_together(z: Tensor, problems: Sequence[Objective]) -> bool:
    """Whether these seeds give in one pass what they give one by one.

    A network may mix the images of a batch, or draw (Dropout): such are told by trying, at the starts of some seeds.

    Args:
        z: [s, ...] variables of two seeds or more, which differ.
        problems: of each.
    """
    first = problems[0]
    if first.engine != "double_backward" or first.target.plan.kind != "gradient":
        return False
    if not any(term.gradient for term in first.terms):
        return False
    try:
        found = evaluate_all(z, problems, len(problems))
    except (NotTogether, RuntimeError, ValueError, TypeError, IndexError):  # also out of memory
        return False
    return alike(found, evaluate_all(z, problems, 1))


def alike(found: Evaluations, wanted: Evaluations) -> bool:
    """Whether two evaluations of the same seeds differ by no more than rounding."""
    tiny = torch.finfo(found.total.dtype).tiny
    off = (found.total - wanted.total).abs() / wanted.total.abs().clamp_min(tiny)
    cosines = torch.nn.functional.cosine_similarity(found.gradient.flatten(1), wanted.gradient.flatten(1), 1)
    return bool((off < ALIKE).all()) and bool((cosines > 1 - ALIKE).all())
