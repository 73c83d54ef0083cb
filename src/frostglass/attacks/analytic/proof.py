"""Labels of a recovered batch, and the proof that the batch is the one that was sent."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.distance import relative_error
from frostglass.numerics.label_solve import labels_from
from frostglass.numerics.labels import classifier_layer
from frostglass.numerics.local_update import in_mode, local_update

TOLERANCE = 1e-2
"""Relative error of the re-computed gradient up to which a recovered batch counts as proved.

Float32 leaves about 1e-6, gradients sent in half precision 1e-3 to 4e-3; a batch with one wrong image is beyond 0.1.
"""


@dataclass(frozen=True)
class Proof:
    """Re-computation of the observed gradient from a recovered batch.

    Args:
        targets: [b, k] solved from the classifier's gradient.
        error: relative error of the re-computed gradient, all layers together.
    """

    targets: Tensor
    error: float

    @property
    def holds(self) -> bool:
        """The re-computed gradient equals the observed one to `TOLERANCE`."""
        return self.error <= TOLERANCE


def solve_targets(seen: Observation, images: Tensor) -> Tensor | None:
    """Targets of known images: the classifier's weight gradient is (1/b) sum_i (p_i - y_i) h_i^T, linear in the rest.

    Args:
        seen: its model, gradients and classes.
        images: [b, c, h, w] in the bounds of the domain.

    Returns:
        [b, classes], rounded to one-hot rows where they are within 0.05 of it; None if there is no classifier layer
        with a gradient, or its features are not linearly independent.
    """
    name = classifier_layer(seen.model, seen.classes, seen.image_shape)
    if name is None or f"{name}.weight" not in seen.gradients:
        return None
    layer = seen.model.get_submodule(name)
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, args, out: kept.append(args[0].detach()))
    model = seen.model
    try:
        with torch.no_grad(), in_mode(model, seen.mode):
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            logits = torch.func.functional_call(model, buffers, (images,))
    finally:
        handle.remove()
    gradient, bias = seen.gradients[f"{name}.weight"].cpu(), seen.gradients.get(f"{name}.bias")
    try:
        solved = labels_from(
            gradient, None if bias is None else bias.cpu(), kept[0].cpu(), torch.softmax(logits, 1).cpu()
        )
    except ValueError:
        return None  # repeated images or too few features: the labels are not determined
    hard = torch.nn.functional.one_hot(solved.labels, seen.classes).double()
    whole = (solved.targets - hard).abs().amax(1, keepdim=True) < 0.05
    return torch.where(whole, hard, solved.targets.clamp_min(0)).float()


def prove(seen: Observation, images: Tensor) -> Proof | None:
    """Re-computes the gradient of a recovered batch, in float64, and compares it with the observation.

    Args:
        seen: its model and gradients.
        images: [b, c, h, w] in the bounds of the domain, on any device.

    Returns:
        None if the observation is no single gradient, or the labels cannot be solved.
    """
    if any(not isinstance(m, GradientMessage) or m.kind != "gradient" for m in seen.messages):
        return None
    images = images.to(next(seen.model.parameters()))
    targets = solve_targets(seen, images)
    if targets is None:
        return None
    model = copy.deepcopy(seen.model).double()
    plan = replace(LocalPlan(), mode="train" if seen.mode == "train" else "eval")
    trace = local_update(model, images.double(), targets.to(images.device).double(), plan)
    shared = [n for n in trace.gradients if n in seen.gradients]
    error = relative_error([trace.gradients[n] for n in shared], [seen.gradients[n] for n in shared])
    return Proof(targets, error)
