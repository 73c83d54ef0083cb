"""What the classifier's part of an update says about its sign, its scale and its noise.

With cross-entropy and targets of mass 1, sum_c (p_c - y_c) = 0 for every image, so the columns of the classifier's
gradient sum to 0 over the classes, whatever the images: what they do sum to is noise, rounding or another loss. The
bias gradient is mean(p - y): negative only in classes that are present, and of the size of p where a class is absent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from frostglass.attacks.inversion.head import classifier_of, head_of
from frostglass.auditing.recorded_finding import Finding
from frostglass.auditing.recorded_inputs import Sent
from frostglass.core.errors import BadInput
from frostglass.core.threat import Observation
from frostglass.numerics import label_counts
from frostglass.numerics.label_counts import Head

QUIET = 1e-4
"""Deviation of a column from 0, relative to the gradient's own size, that rounding explains."""
UNSURE = 0.35
"""Mean largest posterior below which absent classes tell the scale."""
MOST_LABELS, MOST_STEPS = 2048, 1000
TWICE = 2.5
"""Factor from which a scale is called wrong."""


def too_many(seen: Observation) -> str:
    """Why labels are not counted, half a sentence: what a client claims must not decide how long an audit takes."""
    examples, plan = seen.examples or 0, seen.local_plan
    if examples > MOST_LABELS:
        return f"{examples} images are more than the {MOST_LABELS} whose labels are counted"
    steps = plan.steps_for(examples) if plan is not None and _is_delta(seen) else 1
    if steps > MOST_STEPS:
        return f"{steps} local steps are more than the {MOST_STEPS} through which labels are counted"
    return ""


def head_findings(sent: Sent, seen: Observation) -> Iterator[Finding]:
    """Sentences on sign, scale and noise; none where the network has no linear classifier."""
    try:
        _, weight, bias = classifier_of(seen)
    except BadInput:
        return
    level = noise_level(weight)
    typical = float(weight.square().mean().sqrt())
    decays = seen.local_plan is not None and seen.local_plan.weight_decay > 0 and _is_delta(seen)
    adam = sent.plan is not None and sent.plan.optimizer == "adam" and _is_delta(seen)
    if typical and level > QUIET * typical and not decays and not adam:
        yield Finding(
            "note", "noise", "The classifier's gradient does not sum to 0 over the classes, as that of a cross-entropy "
            f"does: as if noise of about {level:.2g} were on every value, which are of {typical:.2g} themselves. It is "
            "noise, rounding, pruning, or another loss.",
        )  # fmt: skip
        return  # sign and scale cannot be told through noise
    if bias is None or seen.examples is None or seen.examples < 1 or too_many(seen):
        return
    try:
        head = head_of(seen)
    except BadInput:
        return
    if head.silent:
        return
    if turned(head):
        yield Finding(
            "warning", "scale", "The sign is turned: more classes have a negative bias gradient than there are images, "
            "which W_before - W_after cannot have. It was recorded as W_after - W_before.",
        )  # fmt: skip
        return
    factor = scale_of(head)
    if factor is not None and not 1 / TWICE < factor < TWICE:
        yield Finding("warning", "scale", _scale_words(sent, seen, factor))


def _is_delta(seen: Observation) -> bool:
    return any(getattr(m, "kind", "gradient") == "delta" for m in seen.messages)


def noise_level(weight: torch.Tensor) -> float:
    """Standard deviation of independent noise on every value that would explain the columns' sums.

    Args:
        weight: [k, d] gradient of the classifier.
    """
    return float(weight.sum(0).square().mean().sqrt() / len(weight) ** 0.5)


def noise_share(seen: Observation) -> float:
    """`noise_level` of the classifier's gradient over the size of its values; 0 where there is no linear classifier."""
    try:
        _, weight, _ = classifier_of(seen)
    except BadInput:
        return 0.0
    return noise_level(weight) / max(float(weight.square().mean().sqrt()), torch.finfo(weight.dtype).tiny)


def turned(head: Head) -> bool:
    """Whether the sign is certainly wrong: only the classes of the images can have negative entries."""
    negative, positive = int((head.grad_bias < 0).sum()), int((head.grad_bias > 0).sum())
    return negative > head.examples and positive <= head.examples


def scale_of(head: Head) -> float | None:
    """By how much an update of an unsure network was multiplied, about; None where too few classes are surely absent.

    The mean feature, a ratio, does not depend on the scale, and gives the posterior that absent classes must show.
    """
    posterior = torch.softmax(head.weight @ label_counts.mean_feature(head) + head.bias, 0)
    absent = head.grad_bias > 0
    if 2 * head.examples > head.classes or float(posterior.max()) > UNSURE or not bool(absent.any()):
        return None
    return float(head.grad_bias[absent].sum() / posterior[absent].sum())


def _scale_words(sent: Sent, seen: Observation, factor: float) -> str:
    start = f"The update is about {factor:.2g} times as large as the gradient of a mean cross-entropy"
    if sent.header.kind == "gradient" and factor < 1:
        return f"{start}: a weight difference that was recorded as a gradient? Then say kind = 'delta' and its lr."
    if sent.header.kind == "delta" and seen.local_plan is not None:
        return (
            f"{start} that lr = {seen.local_plan.lr:g} and the local plan's steps make: another learning rate, other "
            "steps, a sum that was not divided by its clients, clipping, or a loss that was multiplied."
        )
    return f"{start}: a sum over images or clients, a loss scale of mixed precision, or clipping."
