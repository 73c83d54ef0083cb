"""Flower mods: what happens to a client's reply on its way out. A mod sees messages, never the images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType
from torch import Tensor, nn

from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import OsKey, Randomness
from frostglass.core.update import LocalPlan, Update
from frostglass.defenses.accounting import Accountant, epsilon_of
from frostglass.federated.exchange import difference, misfits, names_of, protected
from frostglass.federated.flower.wire import (
    ABOUT,
    PARTITION,
    about_of,
    arrays_of,
    examples_of,
    record_of,
    round_of,
    same,
    state_of,
    told,
)
from frostglass.federated.recording import Received, Recorder, shortened

log = logging.getLogger(__name__)

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]

_METRICS = 50
"""Numbers of one reply that a record takes."""

RELEASES = "frostglass.releases"


def protect_mod(
    defense: Defense,
    model: nn.Module,
    plan: LocalPlan,
    *,
    randomness: Callable[[Context, int], Randomness] = lambda context, round: OsKey(),
) -> Mod:
    """Applies `defense.protect` (pruning, noise, clipping) to the update in every reply; buffers pass as they are.

    Args:
        defense: or a stack; `encode` and `gradient` are no mod's work: give them to the `LocalClient`.
        model: the network of these states, for the names alone.
        plan: of local training.
        randomness: (context, round) -> what its noise is drawn from; by default the operating system.

    Raises:
        BadInput: a defence that needs the images.
    """
    if any(d.gradient is not None or d.encodes for d in (defense.parts or (defense,))):
        raise BadInput(
            f"protect_mod: {defense.name!r} works on images, which a mod never sees; give it to the LocalClient."
        )

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        reply = call_next(message, context)
        drawn = randomness(context, round_of(message))
        return protected_reply(message, context, reply, defense, model, plan, drawn)

    return mod


def protected_reply(
    message: Message,
    context: Context,
    reply: Message,
    defense: Defense,
    model: nn.Module,
    plan: LocalPlan,
    randomness: Randomness,
) -> Message:
    """The reply with its update under `defense.protect`; errors and replies to other messages as they are.

    Raises:
        BadInput: what was sent and returned are not states of `model`.
    """
    if not _is_update(message, reply):
        return reply
    sent, returned = state_of(message.content, model), state_of(reply.content, model)
    wrong = misfits(sent, model) + misfits(returned, model)
    if wrong:
        raise BadInput(f"defense {defense.name}: the states do not fit the network: {'; '.join(wrong[:3])}.")
    examples = examples_of(reply.content)
    state, update = protected(model, sent, returned, defense, randomness, examples=examples, plan=plan)
    key = next(k for k, v in reply.content.array_records.items() if v is arrays_of(reply.content))
    reply.content[key] = record_of(state)
    _note_privacy(reply, context, defense, update)
    return reply


def audit_mod(
    recorder: Recorder | Callable[[Context], Recorder],
    model: nn.Module,
    plan: LocalPlan | None = None,
    *,
    defence: str | None = None,
) -> Mod:
    """Records at the client what it really sends. Put it first, so that it sees what all other mods have made.

    Args:
        recorder: or what makes one for this node; every process needs a folder of its own.
        model: the network of these states.
        plan: of local training.
        defence: in words.
    """

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        reply = call_next(message, context)
        if message.metadata.message_type.startswith(MessageType.TRAIN):
            try:
                to = recorder if isinstance(recorder, Recorder) else recorder(context)
                sent = state_of(message.content, model)
                to.sent(round_of(message), sent)
                client = str(context.node_config.get(PARTITION, context.node_id))
                to.received(taken_down(reply, sent, model, round_of(message), client, plan, defence))
            except Exception as wrong:  # auditing must not break training
                log.warning("frostglass audit: a reply was not recorded (%s)", told(wrong))
        return reply

    return mod


def taken_down(
    reply: Message,
    sent: Any,
    model: nn.Module,
    round: int,
    client: str,
    plan: LocalPlan | None,
    defence: str | None,
    problems: tuple[str, ...] = (),
    state: dict[str, Tensor] | None = None,
) -> Received:
    """A reply for a record: the update as W_before - W_after, buffers only where they differ from what was sent.

    `state` is the one in the reply, where that has been read already.
    """
    made = Received(round, client, None, plan=plan, defence=defence, problems=problems)
    if reply.has_error():
        return replace(made, reason=shortened(reply.error.reason or f"error {reply.error.code}"))
    about = [(k, v) for k, v in about_of(reply.content).items() if isinstance(v, str | float | int)][:_METRICS]
    made = replace(made, metrics={shortened(k): shortened(v) if isinstance(v, str) else float(v) for k, v in about})
    try:
        made = replace(made, examples=examples_of(reply.content))
        state = state_of(reply.content, model) if state is None else state
    except BadInput as wrong:
        return replace(made, problems=problems or (str(wrong),), reason=str(wrong))
    names = names_of(model)
    if any(n not in state or state[n].shape != sent[n].shape for n in names.trained):
        return replace(made, gradients=dict(state), reason="kept as it came, since it is no state of this network",
                       problems=problems or tuple(misfits(state, model)))  # fmt: skip
    buffers = {n: state[n] for n in names.carried if n in state and n in sent and not same(sent[n], state[n])}
    return replace(made, gradients=difference(sent, state, names.trained), buffers=buffers)


def _is_update(message: Message, reply: Message) -> bool:
    return message.metadata.message_type.startswith(MessageType.TRAIN) and not reply.has_error()


def _note_privacy(reply: Message, context: Context, defense: Defense, update: Update) -> None:
    """Epsilon of all releases of this node so far: noise on whole updates composes over rounds."""
    if update.spent is None:
        return
    held = context.state.config_records.get(RELEASES)
    count = 1 + (int(held["count"]) if held is not None else 0)  # type: ignore[arg-type]
    context.state[RELEASES] = ConfigRecord({"count": count})
    settings = next((d.settings for d in (defense.parts or (defense,)) if d.name == "clip_and_noise"), {})
    sigma = update.spent.noise_multiplier / (2 if settings.get("adjacency") == "replace" else 1)
    accountant: Accountant = settings.get("accountant", "rdp")
    about = about_of(reply.content) | {
        "epsilon": epsilon_of(sigma, update.spent.delta, count, accountant),
        "delta": update.spent.delta, "unit": update.spent.unit,
    }  # fmt: skip
    about.pop("loss", None)  # nobody noised it
    reply.content[ABOUT] = ConfigRecord(about)
