"""What the classifier's gradient says about the labels of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from frostglass.core.draws import kept_draws
from frostglass.numerics.called import called_with
from frostglass.numerics.local_update import in_mode


def classifier_layer(model: nn.Module, classes: int, shape: Sequence[int]) -> str | None:
    """Name of the Linear layer with `classes` outputs that the network ends in, None if there is none.

    Told from a pass of grey images, not from the order of registration: an auxiliary head may be registered last. A
    layer that is called more than once, or given more than one vector an image, is none: its gradient is no sum of one
    product an image.

    Args:
        model: left unchanged.
        classes: outputs.
        shape: (c, h, w) of an image.
    """
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        return None
    calls: list[tuple[str, int]] = []

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        return layer.register_forward_pre_hook(lambda _, given: calls.append((name, given[0].ndim)))

    hooks = [watch(*head) for head in heads]
    try:
        with in_mode(model, "eval"), torch.no_grad(), kept_draws():
            own = {n: b.clone() for n, b in model.named_buffers()}
            called_with(model, own, heads[0][1].weight.new_full((2, *shape), 0.5))
    finally:
        for hook in hooks:
            hook.remove()
    name, dims = calls[-1] if calls else ("", 0)
    return name if dims == 2 and [n for n, _ in calls].count(name) == 1 else None


def row_minimum(grad_weight: Float[Tensor, "k d"], examples: int) -> Int[Tensor, " examples"]:
    """The classes whose smallest weight gradient is lowest (Yin et al. 2021, Eq. 8).

    Holds for distinct labels and non-negative features; at one example it is the argmin, not "< 0": a
    saturated softmax gives a gradient of exactly 0.

    Raises:
        ValueError: more examples than classes, where the rule cannot hold.
    """
    if examples > len(grad_weight):
        raise ValueError(
            f"the row-minimum rule names distinct classes: {examples} examples, {len(grad_weight)} classes"
        )
    return grad_weight.amin(1).argsort()[:examples]


def label_counts(
    grad_bias: Float[Tensor, " k"], examples: int, posterior: Float[Tensor, " k"] | None = None
) -> Float[Tensor, " k"]:
    """Labels per class from the bias gradient: n_k = K (p_k - g_k), made whole and summing to K.

    Args:
        grad_bias: gradient of the mean cross-entropy with respect to the classifier's bias.
        examples: K.
        posterior: mean softmax over the batch; uniform if None, which suits untrained networks.

    Returns:
        non-negative whole numbers that sum to K (largest remainders).
    """
    classes = len(grad_bias)
    p = torch.full_like(grad_bias, 1 / classes) if posterior is None else posterior
    return largest_remainder(examples * (p - grad_bias), examples)


def largest_remainder(estimate: Float[Tensor, " k"], total: int) -> Float[Tensor, " k"]:
    """Whole numbers near `estimate` that are non-negative and sum to `total`; ties go to the lower class."""
    mass = estimate.double().clamp_min(0)
    if float(mass.max()) <= 0:
        mass = torch.ones_like(mass)
    mass = mass / mass.max()  # a sum may be too small to divide by, or too large to be taken
    mass = mass * (total / mass.sum())
    whole = mass.floor()
    short = total - int(whole.sum())
    order = (mass - whole).argsort(descending=True, stable=True)
    whole[order[:short]] += 1
    return whole.to(estimate.dtype)


def counts_to_targets(counts: Float[Tensor, " k"]) -> Float[Tensor, "b k"]:
    """One one-hot row per counted label, in class order."""
    index = torch.repeat_interleave(torch.arange(len(counts)), counts.round().long().cpu())
    return torch.nn.functional.one_hot(index, len(counts)).to(counts.dtype)


def set_accuracy(found: Float[Tensor, " k"], truth: Float[Tensor, " k"]) -> float:
    """Share of the classes present in `truth` that `found` names too."""
    present = truth > 0
    return float(((found > 0) & present).sum() / present.sum().clamp_min(1))


def count_accuracy(found: Float[Tensor, " k"], truth: Float[Tensor, " k"]) -> float:
    """1 - ||found - truth||_1 / (2 K): share of labels right as a multiset."""
    return float(1 - (found - truth).abs().sum() / (2 * truth.sum().clamp_min(1e-9)))


def no_gradient_guess(truth: Float[Tensor, " k"]) -> float:
    """`count_accuracy` of guessing K / C per class without any gradient: print it beside every label score."""
    guess = torch.full_like(truth, float(truth.sum()) / len(truth))
    return count_accuracy(guess, truth)


def sum_rule(grad_weight: Float[Tensor, "k d"], examples: int) -> Int[Tensor, " examples"]:
    """The classes with the smallest row sums of the weight gradient: iDLG extended to a batch of distinct labels.

    Raises:
        ValueError: more examples than classes, where the rule cannot hold.
    """
    if examples > len(grad_weight):
        raise ValueError(f"the sum rule names distinct classes: {examples} examples, {len(grad_weight)} classes")
    return grad_weight.sum(1).argsort(stable=True)[:examples]


def single_label(grad_weight: Float[Tensor, "k d"], grad_bias: Float[Tensor, " k"] | None = None) -> int:
    """The label of a single image (Zhao et al. 2020, iDLG), by argmin of the bias gradient or of the row sums.

    Not by "< 0": where the softmax is saturated the gradient of the true class is exactly 0.
    """
    return int((grad_weight.sum(1) if grad_bias is None else grad_bias).argmin())
