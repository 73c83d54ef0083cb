"""Minibatches of a FedAvg client: whose turn it is at which step, and what becomes of images found once an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.numerics.assign import assign

Order = tuple[Tensor, ...]
"""Rows of the images that each step sees, for all steps of all epochs."""


def own_order(plan: LocalPlan, examples: int) -> Order:
    """The images as they lie, the same in every epoch."""
    rows = torch.arange(examples)
    if plan.whole_batches(examples):
        return (rows,) * plan.steps_for(examples)
    assert plan.minibatch is not None
    return rows.split(plan.minibatch) * plan.epochs


def drawn_order(plan: LocalPlan, examples: int, rng: Rng) -> Order | None:
    """What a client's data loader does: every epoch a permutation of its own. None if every step sees all images."""
    if plan.whole_batches(examples):
        return None
    assert plan.minibatch is not None
    epochs = [rng.at("epoch", e).permutation(examples).split(plan.minibatch) for e in range(plan.epochs)]
    return tuple(rows for epoch in epochs for rows in epoch)


def epoch_order(plan: LocalPlan, examples: int) -> Order:
    """For images held once an epoch, [epochs x examples, ...]: epoch e goes through its own block as it lies."""
    one = own_order(replace(plan, epochs=1), examples)
    return tuple(rows + e * examples for e in range(plan.epochs) for rows in one)


def order_free(plan: LocalPlan, examples: int) -> LocalPlan:
    """As many steps, each over all images: to first order in lr the same update, whatever the order was.

    The gradients of an epoch's minibatches sum to as many gradients of the whole batch; what differs is where each is
    taken, and, in train mode, the statistics it is taken with. A last, smaller minibatch weighs its images more; that
    is lost too.
    """
    if plan.whole_batches(examples):
        return plan
    steps = plan.steps_for(examples) // plan.epochs
    return replace(plan, minibatch=None, local_steps=steps)


def merge_epochs(
    images: Float[Tensor, "r c h w"], epochs: int, labels: Sequence[int] | None = None
) -> Float[Tensor, "n c h w"]:
    """Images found once an epoch -> one of each: matched to the first epoch's one-to-one, then averaged.

    After Dimitrov et al. 2022, sec. 4.3.

    Args:
        images: [epochs x n, c, h, w], epoch by epoch.
        epochs: from 1.
        labels: of the n images; only images of one label are matched. None to match by likeness alone.
    """
    first, *others = images.unflatten(0, (epochs, -1))
    total = first.clone()
    kinds = torch.zeros(len(first), dtype=torch.long) if labels is None else torch.as_tensor(list(labels))
    for other in others:
        for kind in kinds.unique().tolist():
            rows = (kinds == kind).nonzero().flatten()
            total[rows] += other[rows][assign(other[rows].cpu(), first[rows].cpu())]
    return total / epochs
