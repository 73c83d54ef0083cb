"""A Flower ClientApp whose local training is a `LocalClient`: any defence, one account of what it has spent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from frostglass.core.errors import BadInput
from frostglass.federated.exchange import names_of
from frostglass.federated.federation import Federation, federation_of
from frostglass.federated.flower.gate_mod import plan_gate_mod
from frostglass.federated.flower.memory import keep, restore
from frostglass.federated.flower.mods import Mod, protected_reply
from frostglass.federated.flower.wire import (
    ABOUT,
    PARTITION,
    partition_of,
    refusal,
    reply_with,
    round_of,
    state_of,
    told,
)
from frostglass.federated.local_client import NOTHING, LocalClient, Trained

log = logging.getLogger(__name__)

Buffers = Literal["send", "keep"]


def client_app(
    make_client: Callable[[Context], LocalClient],
    *,
    mods: Sequence[Mod] = (),
    buffers: Buffers | Callable[[Context], Buffers] = "send",
) -> ClientApp:
    """A ClientApp that trains `make_client(context)` on every "train" message.

    What the client has spent (privacy, exposures) is kept in the node's `Context.state` from round to round, so that a
    new process for every message, as in Flower's deployment, makes no difference. A client that raises, or a mod that
    does, answers with an errored reply that says why; the round goes on without it.

    Args:
        make_client: the node's client with its own images; called for every message.
        mods: Flower mods, the outermost first: `audit_mod`, then `gate_mod`, then `protect_mod`.
        buffers: "keep" leaves BatchNorm statistics and counters at the client and returns those that were sent.
    """
    app = ClientApp(mods=[_answered, *mods])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        held = buffers if isinstance(buffers, str) else buffers(context)
        return _trained(message, context, make_client(context), held)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        """Who is there: the roll call of simulations."""
        about = ConfigRecord()
        if PARTITION in context.node_config:
            about[PARTITION] = context.node_config[PARTITION]
        return Message(RecordDict({ABOUT: about}), reply_to=message)

    return app


def plan_client_app(text: str | None = None, *, mods: Sequence[Mod] = ()) -> ClientApp:
    """The ClientApp of a plan: the node's "partition-id" says which part of the split it holds.

    Args:
        text: the plan (TOML); None to read it from the run's configuration, key "plan".
        mods: further mods, outside the plan's defence of updates.
    """

    def federation(context: Context) -> Federation:
        return federation_of(text if text is not None else plan_text(context))

    def protect(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        made = federation(context)
        reply = call_next(message, context)
        if not made.protects:
            return reply
        randomness = made.protection(partition_of(context), round_of(message))
        plan = made.plan.client.local_plan()
        return protected_reply(message, context, reply, made.outside, made.model, plan, randomness)

    return client_app(
        lambda context: federation(context).client(partition_of(context)),
        mods=[*mods, plan_gate_mod(federation), protect],
        buffers=lambda context: federation(context).plan.buffers,
    )


def plan_text(context: Context) -> str:
    """The plan in a run's configuration.

    Raises:
        BadInput: there is none.
    """
    text = context.run_config.get("plan")
    if not isinstance(text, str):
        raise BadInput('run_config: lacks "plan", the text of a plan; `frostglass federate` gives it.')
    return text


def _answered(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """The outermost mod: an exception becomes an errored reply here, so that `Context.state` is kept."""
    try:
        return call_next(message, context)
    except Exception as wrong:
        log.debug("client failed", exc_info=True)
        return refusal(message, told(wrong))


def _trained(message: Message, context: Context, client: LocalClient, buffers: Buffers) -> Message:
    sent = state_of(message.content, client.model)
    restore(client, context)
    try:
        done = client.train(sent, round_of(message))
    finally:
        keep(client, context)
    state = dict(done.state)
    if buffers == "keep":
        tied = names_of(client.model).tied
        state |= {n: t for n, t in sent.items() if tied.get(n, n) not in done.update.gradients}
    return reply_with(message, state, done.examples, _facts(client, done, context))


def _facts(client: LocalClient, done: Trained, context: Context) -> dict[str, Any]:
    """Numbers for the server's history; no loss where a defence replaced the step: nobody noised it."""
    facts: dict[str, Any] = {
        "client": client.name, "loss": done.loss, "epsilon": done.epsilon,
        "insecure": True if done.insecure and (client.encoder is not None or client.defense is not NOTHING) else None,
    }  # fmt: skip
    if PARTITION in context.node_config:
        facts[PARTITION] = context.node_config[PARTITION]
    spent = done.update.spent
    if spent is not None:
        facts |= {"delta": spent.delta, "unit": spent.unit}
    ledger = None if client.encoder is None else client.encoder.ledger
    if ledger is not None:
        facts |= {"exposure-mean": float(ledger.total.float().mean()), "exposure-max": int(ledger.total.max())}
    return facts
