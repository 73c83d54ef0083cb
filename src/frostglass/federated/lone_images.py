"""Clients whose last minibatch of an epoch holds one image, which BatchNorm then normalises by itself.

Torch's loaders make such a step, and so do clients here. Where a layer sees one value a channel, torch refuses it;
elsewhere it trains, but under statistics unlike those of other steps, and can undo in one round what many have learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan
from frostglass.federated.first_step import outputs_of_copy
from frostglass.numerics.bn import bn_layers


def lone_images(model: nn.Module, plan: LocalPlan, held: Sequence[int]) -> list[int]:
    """Clients with a step on one image, where BatchNorm takes its statistics.

    Args:
        model: of all clients.
        plan: of their training.
        held: images of each client.
    """
    if plan.mode == "eval" or not bn_layers(model):
        return []
    return [i for i, n in enumerate(held) if _last(plan, n) == 1]


def refuse_lone_images(
    model: nn.Module, plan: LocalPlan, held: Sequence[int], image_shape: tuple[int, int, int]
) -> None:
    """Nothing, where torch bears a step on one image.

    Args:
        model, plan, held: see `lone_images`.
        image_shape: (channels, height, width).

    Raises:
        BadInput: BatchNorm of this network then has one value a channel.
    """
    found = lone_images(model, plan, held)
    if not found:
        return
    try:
        with torch.no_grad():
            outputs_of_copy(model, image_shape, 1)
    except ValueError:  # torch's "Expected more than 1 value per channel when training"
        raise BadInput(
            f"client.minibatch: {held[found[0]]} images of client {found[0]} leave one to a step of its own, "
            'where BatchNorm has no statistics; choose another size, or model.fix = "opacus".'
        ) from None


def caution_of(model: nn.Module, plan: LocalPlan, held: Sequence[int]) -> str:
    """A sentence on such clients; empty if there is none. Arguments as of `lone_images`."""
    found = lone_images(model, plan, held)
    if not found:
        return ""
    named = ", ".join(f"{i} ({held[i]} images)" for i in found[:3]) + (", ..." if len(found) > 3 else "")
    return (
        f"client.minibatch: {plan.minibatch or 'all'} leaves one image to a step of its own at client"
        f"{'s' if len(found) > 1 else ''} {named}; BatchNorm normalises it by itself, which can undo what was learned. "
        'Choose another size, or model.fix = "opacus".'
    )


def _last(plan: LocalPlan, examples: int) -> int:
    """Images of the last step of an epoch."""
    if plan.whole_batches(examples):
        return examples
    assert plan.minibatch is not None
    return examples % plan.minibatch or plan.minibatch
