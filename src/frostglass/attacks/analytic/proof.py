"""Labels of a recovered batch, and the proof that the batch is the one that was sent."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.distance import relative_error
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
    name = classifier_layer(seen.model, seen.classes)
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
    features, p = kept[0].double(), torch.softmax(logits.double(), 1)
    bias = seen.gradients.get(f"{name}.bias")
    known = [seen.gradients[f"{name}.weight"].double().T] + ([bias.double()[None]] if bias is not None else [])
    design = torch.cat([features.T] + ([torch.ones(1, len(images)).to(features)] if bias is not None else []))
    residual = torch.linalg.lstsq(design.cpu(), len(images) * torch.cat(known).cpu(), driver="gelsd").solution
    targets = p.cpu() - residual  # rows of mass 1: p - y; InstaHide's exact labels have mass 1 inside one data set
    hard = torch.nn.functional.one_hot(targets.argmax(1), seen.classes).double()
    return torch.where((targets - hard).abs().amax(1, keepdim=True) < 0.05, hard, targets.clamp_min(0)).float()


def prove(seen: Observation, images: Tensor) -> Proof | None:
    """Re-computes the gradient of a recovered batch, in float64, and compares it with the observation.

    Returns:
        None if the observation is no single gradient, or the labels cannot be solved.
    """
    if any(not isinstance(m, GradientMessage) or m.kind != "gradient" for m in seen.messages):
        return None
    targets = solve_targets(seen, images)
    if targets is None:
        return None
    model = copy.deepcopy(seen.model).double()
    plan = replace(LocalPlan(), mode="train" if seen.mode == "train" else "eval")
    device = next(model.parameters()).device
    trace = local_update(model, images.to(device).double(), targets.to(device).double(), plan)
    shared = [n for n in trace.gradients if n in seen.gradients]
    error = relative_error([trace.gradients[n] for n in shared], [seen.gradients[n] for n in shared])
    return Proof(targets, error)
