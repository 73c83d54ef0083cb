"""One client's message under its defence: what the simulation, training and an attacker's own rehearsal all run."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.fedavg import drawn_order
from frostglass.numerics.local_update import local_update


def defended_step(model: nn.Module, batch: Batch, plan: LocalPlan, defense: Defense, key: Rng) -> tuple[Batch, Update]:
    """(what was trained on, what is sent): encode, compute, protect, each with randomness of its own below `key`.

    Args:
        model: the global model; left as it is.
        batch: private images, augmented already.
        plan: of the client.
        defense: or a stack.
        key: secret of this client and round.
    """
    encoded = defense.encode(batch, Insecure(key.at("encode")))
    if defense.gradient is not None:
        update = defense.gradient(model, encoded, plan, Insecure(key.at("gradient")))
    else:
        order = drawn_order(plan, len(encoded), key.at("order"))
        trace = local_update(model, encoded.images, encoded.targets, plan, order=order)
        update = Update(trace.gradients, trace.bn, len(encoded), plan)
    sent = defense.protect(update, Insecure(key.at("protect")))
    if sent.spent is None and defense.account is not None:
        sent = replace(sent, spent=defense.account(batch))
    return encoded, sent
