"""The gate as a Flower mod: a last look at the update before it leaves the client."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, MessageType
from torch import Tensor, nn

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense, stack
from frostglass.core.errors import BadInput
from frostglass.core.update import BNStatistics, LocalPlan, Update
from frostglass.federated.exchange import difference, misfits, names_of, statistics_sent
from frostglass.federated.federation import Federation
from frostglass.federated.flower.mods import Mod
from frostglass.federated.flower.wire import PARTITION, examples_of, partition_of, refusal, round_of, state_of
from frostglass.federated.gate import Gate, Outgoing
from frostglass.federated.local_client import NOTHING

JOURNAL = "gate.jsonl"
"""Rulings, in the run folder."""

log = logging.getLogger(__name__)

_GATES: dict[tuple[str, int], Gate] = {}
"""Of the plans that this process has seen, by plan and client."""


def gate_mod(
    gate: Gate,
    model: nn.Module,
    plan: LocalPlan,
    private: Callable[[Context], Batch],
    *,
    defence: Defense = NOTHING,
) -> Mod:
    """Asks the gate about every update; put it outside `protect_mod`, so that it sees what would leave.

    What the gate blocks becomes an errored reply with its reason, and the round goes on without this client. A reply
    that holds no state of the network is none that the gate could judge: it is blocked too.

    Args:
        gate: of this client.
        model: the network of the states.
        plan: of local training.
        private: the node's own images in [0, 1], which a mod does not see otherwise; they stay in this process.
        defence: what the update went through, for the gate's checks.
    """

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        reply = call_next(message, context)
        if not message.metadata.message_type.startswith(MessageType.TRAIN) or reply.has_error():
            return reply
        sent, returned = state_of(message.content, model), state_of(reply.content, model)
        wrong = misfits(sent, model) + misfits(returned, model)
        if wrong:
            return refusal(message, f"the gate cannot judge what is no state of the network: {'; '.join(wrong[:3])}")
        held, examples = private(context), examples_of(reply.content)
        update = Update(
            difference(sent, returned, names_of(model).trained),
            _statistics(model, sent, returned, held, plan, examples), examples, plan,
        )  # fmt: skip
        client = str(context.node_config.get(PARTITION, context.node_id))
        ruling = gate(Outgoing(model, sent, update, held, defence, round_of(message), client))
        return reply if ruling.passed else refusal(message, f"blocked by the client's gate: {ruling.reason}")

    return mod


def plan_gate_mod(federation: Callable[[Context], Federation]) -> Mod:
    """The gate of a plan, one a client and process; passes everything where the plan has none."""

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        made = federation(context)
        asked = made.plan.gate
        if asked is None:
            return call_next(message, context)
        number = partition_of(context)
        key = made.plan.to_toml(), number

        def begin() -> Gate:
            decide = made.gate_checks()
            assert decide is not None  # the plan has a gate
            return Gate(
                decide, action=asked.action, on_failure=asked.on_failure, budget=asked.budget, journal=_journal(made)
            )

        gate = _kept(key, begin)
        defence = stack(*(d for d in (made.inside, made.outside) if d is not NOTHING)) if made.defended else NOTHING
        look = gate_mod(
            gate, made.model, made.plan.client.local_plan(), lambda _: made.private(number), defence=defence
        )
        return look(message, context, call_next)

    return mod


def _kept(key: tuple[str, int], begin: Callable[[], Gate]) -> Gate:
    """The gate of a plan and client, begun where there is none.

    A function of the module: Ray sends the mod to its actors with the values of the globals that it names, which for
    `_GATES` would be the gates of this process, and in the actor a table that nobody closes.
    """
    if key not in _GATES:
        _GATES[key] = begin()
    return _GATES[key]


def close_gates() -> None:
    """Under "record" the last checks still run: waits for all gates together, as long as for one of them."""
    gates = list(_GATES.values())
    _GATES.clear()
    end = time.monotonic() + max((gate.patience for gate in gates), default=0.0)
    for gate in gates:
        gate.close(max(0.0, end - time.monotonic()))


def drop_gates() -> None:
    """Whoever interrupts a run does not wait for its checks."""
    _GATES.clear()


atexit.register(close_gates)


def _journal(made: Federation) -> Path | None:
    """In the run folder, where that is on this machine."""
    folder = None if made.plan.server.folder is None else Path(made.plan.server.folder)
    return folder / JOURNAL if folder is not None and folder.is_dir() else None


def _statistics(
    model: nn.Module, sent: dict[str, Tensor], returned: dict[str, Tensor], held: Batch, plan: LocalPlan, examples: int
) -> dict[str, BNStatistics]:
    """Batch statistics that the server could read off the buffers; none after several steps, or if they stay here."""
    if plan.mode != "train" or plan.steps_for(examples) > 1 or not plan.whole_batches(examples):
        return {}
    try:
        found = statistics_sent(model, sent, returned, held.image_shape, examples)
    except BadInput:
        return {}
    kept = all(bool((sent[f"{n}.running_mean"] == returned[f"{n}.running_mean"]).all()) for n in found)
    return {} if kept else found
