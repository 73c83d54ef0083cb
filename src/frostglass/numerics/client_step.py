"""One client's message under its defence: what training, the simulation and an attacker's own rehearsal all run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense, encoded_by, protected_by, sendable, spent_by
from frostglass.core.randomness import Insecure, Rng, global_draws
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.called import copied
from frostglass.numerics.fedavg import Order, drawn_order
from frostglass.numerics.local_update import local_update, trainable


@dataclass(frozen=True)
class Computed:
    """A client's step before anything is done to its update.

    Args:
        update: what was computed.
        buffers: the model's buffers after the step; empty where a defence replaced it that bears no BatchNorm.
        loss: of the first forward pass; None where a defence replaced the step.
    """

    update: Update
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    loss: float | None = None


def computed_step(
    model: nn.Module, batch: Batch, plan: LocalPlan, defense: Defense, key: Rng, order: Order | None = None
) -> Computed:
    """The step itself, on images that are encoded already.

    Args:
        model: the global model; left as it is.
        batch: what is trained on.
        plan: of the client.
        defense: or a stack; its `gradient` takes the place of the ordinary step where it has one.
        key: secret of this client and round; Dropout's masks follow from it too.
        order: rows that each step sees; None to draw them as the plan says.
    """
    if defense.gradient is not None:
        own = copied(model)  # a step of somebody else's may train it: weights, gradients and statistics stay there
        with global_draws(key.at("model"), batch.images.device):
            made = defense.gradient(own, batch, plan, Insecure(key.at("gradient")))
        update = sendable(defense, "gradient", made, trainable(model))
        return Computed(replace(update, buffers={}), update.buffers)
    if order is None:
        order = drawn_order(plan, len(batch), key.at("order"))
    with global_draws(key.at("model"), batch.images.device):
        trace = local_update(model, batch.images, batch.targets, plan, order=order)
    return Computed(Update(trace.gradients, trace.bn, len(batch), plan), trace.buffers, float(trace.loss))


def defended_step(model: nn.Module, batch: Batch, plan: LocalPlan, defense: Defense, key: Rng) -> tuple[Batch, Update]:
    """(what was trained on, what is sent): encode, compute, protect, each with randomness of its own below `key`.

    Args:
        model: the global model; left as it is.
        batch: private images, augmented already.
        plan: of the client.
        defense: or a stack.
        key: secret of this client and round.
    """
    encoded = encoded_by(defense, batch, Insecure(key.at("encode")))
    update = computed_step(model, encoded, plan, defense, key).update
    sent = protected_by(defense, update, Insecure(key.at("protect")))
    return encoded, sent if sent.spent is not None else replace(sent, spent=spent_by(defense, batch))
