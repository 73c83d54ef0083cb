"""Labels of a recovered batch, and the proof that the batch is the one that was sent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frostglass.core.randomness import Rng, global_draws
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.called import called_with, copied
from frostglass.numerics.distance import relative_error
from frostglass.numerics.label_solve import SolvedLabels, labels_from
from frostglass.numerics.labels import classifier_layer
from frostglass.numerics.local_update import in_mode, local_update

TOLERANCE = 1e-2
"""Relative error of the re-computed gradient up to which a recovered batch counts as proved.

Float32 leaves about 1e-6, gradients sent in half precision 1e-3 to 4e-3; a batch with one wrong image is beyond 0.1.
"""
FITTED = 2e-3
"""The same where the factor of the loss was fitted, which takes up a part of what does not fit: of smoothed labels 6e-3
is left then."""

DRAWS = Rng.from_seed(0).at("proof")
"""Of a network's dropout: the same at each reading of a result, and not taken from whoever runs the attack."""


@dataclass(frozen=True)
class Proof:
    """Re-computation of the observed gradient from a recovered batch.

    Args:
        targets: [b, k] solved from the classifier's gradient.
        error: relative error of the re-computed gradient, all layers together.
        factor: of the loss, beside the mean over the batch: b for a sum, or the loss scale of mixed precision.
        tolerance: of the error.
    """

    targets: Tensor
    error: float
    factor: float = 1.0
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """The re-computed gradient equals the observed one."""
        return self.error <= self.tolerance

    @property
    def whole(self) -> bool:
        """Every image has one label."""
        return bool((self.targets.amax(1) == 1).all())

    @property
    def told(self) -> dict[str, float | int | str | bool]:
        """For the report; a factor only where there is one."""
        factor = {} if self.factor == 1 else {"loss_factor": self.factor}
        return {"recomputed_gradient_error": self.error, **factor}


def solve_targets(seen: Observation, images: Tensor) -> Tensor | None:
    """Targets of known images: the classifier's weight gradient is (1/b) sum_i (p_i - y_i) h_i^T, linear in the rest.

    Args:
        seen: its model, gradients and classes.
        images: [b, c, h, w] in the bounds of the domain.

    Returns:
        [b, classes], rounded to one-hot rows where they are within 0.05 of it; None if there is no classifier layer
        with a gradient, or its features are not linearly independent.
    """
    with global_draws(DRAWS, images.device):
        solved = _solved(seen, images)
    return None if solved is None else _targets(*solved, 1.0)


def prove(seen: Observation, images: Tensor) -> Proof | None:
    """Re-computes the gradient of a recovered batch, in float64, and compares it with the observation.

    Where it is not that of a mean over the batch, it may be that of a sum, or of a loss that was multiplied: one factor
    for all layers, found from the classifier's gradient. Then all the others must agree as well. Where a network
    changes what its classifier gives (a temperature), whole labels alone are tried.

    Args:
        seen: its model and gradients.
        images: [b, c, h, w] in the bounds of the domain, on any device.

    Returns:
        None if the observation is no single gradient, or the labels cannot be solved.
    """
    if any(not isinstance(m, GradientMessage) or m.kind != "gradient" for m in seen.messages):
        return None
    images = images.to(next(seen.model.parameters()))
    with global_draws(DRAWS, images.device):
        return _prove(seen, images)


def _prove(seen: Observation, images: Tensor) -> Proof | None:
    solved = _solved(seen, images)
    if solved is None:
        return None
    model = copied(seen.model).double()
    plan = replace(LocalPlan(), mode="train" if seen.mode == "train" else "eval")

    def with_targets(targets: Tensor, factor: float, tolerance: float) -> Proof:
        trace = local_update(model, images.double(), targets.to(images.device).double(), plan)
        shared = [n for n in trace.gradients if n in seen.gradients]
        own = [factor * trace.gradients[n] for n in shared]
        return Proof(targets, relative_error(own, [seen.gradients[n] for n in shared]), factor, tolerance)

    def with_factor(factor: float, tolerance: float = TOLERANCE) -> Proof:
        return with_targets(_targets(*solved, factor), factor, tolerance)

    mean = with_factor(1.0)
    if mean.holds and mean.whole:
        return mean
    fitted = _factor(*solved)
    tried = [mean, with_factor(float(len(images))), *([with_factor(fitted, FITTED)] if fitted > 0 else [])]
    holding = [proof for proof in tried if proof.holds]
    # a shorter gradient (clipping) is also that of soft labels near the posteriors: whole ones are likelier
    whole = [proof for proof in holding if proof.whole and proof.error <= 3 * min(p.error for p in holding)]
    if not holding:  # a temperature or a softmax of the network bends the slopes; they are lowest at the label still
        lowest = (solved[1].double() - solved[0].targets).argmin(1)
        bent = with_targets(torch.nn.functional.one_hot(lowest, solved[1].shape[1]).float(), 1.0, TOLERANCE)
        holding = [bent] if bent.holds else []
    return (whole or holding or [mean])[0]


def _solved(seen: Observation, images: Tensor) -> tuple[SolvedLabels, Tensor] | None:
    """(labels of a mean over the batch, [b, k] posteriors) on the CPU; None as in `solve_targets`."""
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
            logits = called_with(model, buffers, images)
    finally:
        handle.remove()
    gradient, bias = seen.gradients[f"{name}.weight"].cpu(), seen.gradients.get(f"{name}.bias")
    posteriors = torch.softmax(logits, 1).cpu()
    try:
        return labels_from(gradient, None if bias is None else bias.cpu(), kept[0].cpu(), posteriors), posteriors
    except ValueError:
        return None  # repeated images or too few features: the labels are not determined


def _targets(solved: SolvedLabels, posteriors: Tensor, factor: float) -> Tensor:
    """[b, k] of a loss that was multiplied by `factor`, rounded where they are nearly one-hot."""
    targets = posteriors.double() - (posteriors.double() - solved.targets) / factor
    hard = torch.nn.functional.one_hot(targets.argmax(1), targets.shape[1]).double()
    whole = (targets - hard).abs().amax(1, keepdim=True) < 0.05
    return torch.where(whole, hard, targets.clamp_min(0)).float()


def _factor(solved: SolvedLabels, posteriors: Tensor) -> float:
    """Of the loss, under which the labels come nearest to whole ones; the gradient is negative at the label alone."""
    slopes = posteriors.double() - solved.targets  # factor (p - y)
    labels = torch.nn.functional.one_hot(slopes.argmin(1), slopes.shape[1])
    expected = posteriors.double() - labels
    return float((slopes * expected).sum() / expected.square().sum().clamp_min(1e-300))
