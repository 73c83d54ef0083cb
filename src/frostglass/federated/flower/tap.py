"""The audit tap: what an honest-but-curious server sees, taken down while any strategy goes on with its work."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan
from frostglass.federated.exchange import misfits, names_of
from frostglass.federated.flower.mods import taken_down
from frostglass.federated.flower.wire import PARTITION, about_of, examples_of, state_of, told
from frostglass.federated.recording import MOST, Received, Recorder, shortened

log = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds that a round's end waits for the disk to take what was sent; then it is recorded as not kept."""


@dataclass(frozen=True)
class Answer:
    """One client's part in a round.

    Args:
        client: its name: the partition where it is known, else Flower's node id.
        examples: images, as it says.
        about: numbers that it sent along.
        reason: why its update was left out; empty if it was used.
    """

    client: str
    examples: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class AuditTap(Strategy):
    """Mix in BEFORE a strategy: `class Audited(AuditTap, FedAvg)`. Records all updates, leaves out the broken ones.

    Left out, with the reason in the record, are replies that are errors or hold no state of the network (names, shapes,
    values that are not finite), no number of examples, or an update that is longer than `largest` times the weights.
    The strategy gets the others. Recording never raises, and is done beside the training.

    Args:
        recorder: None to leave out what breaks the round and record nothing.
        model: the network whose states are exchanged.
        plan: what clients are told to do, if that is known.
        defence: what they say protects them.
        largest: greatest length of an update, in lengths of the weights (at least 1) that were sent.
    """

    def __init__(
        self,
        *args: Any,
        model: nn.Module,
        recorder: Recorder | None = None,
        plan: LocalPlan | None = None,
        defence: str | None = None,
        largest: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tapped, self.recorder, self.local_plan, self.defence = model, recorder, plan, defence
        self.largest = largest
        self.answers: dict[int, list[Answer]] = {}
        self.names: dict[int, str] = {}
        self._sent: dict[str, Tensor] = {}
        self._asked: list[int] = []
        self._writing: threading.Thread | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages; what they send is kept."""
        messages = list(super().configure_train(server_round, arrays, config, grid))  # type: ignore[safe-super]
        self._asked = [m.metadata.dst_node_id for m in messages]
        try:
            self._sent = state_of(RecordDict({"arrays": arrays}), self.tapped)
            if self.recorder is not None:
                self._writing = threading.Thread(
                    target=self._keep_sent, args=(server_round, self._sent), name="frostglass-sent", daemon=True
                )
                self._writing.start()
        except Exception as wrong:
            self._sent = {}
            log.warning("frostglass tap: what was sent is not recorded (%s)", told(wrong))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the replies that can be used; (None, None) and the old weights if none can."""
        listed = list(replies)
        if self._writing is not None:
            self._writing.join(_PATIENCE)
            self._writing = None
        self.answers[server_round] = []
        nodes = self._nodes_of(listed)
        used = [m for m, node in zip(listed, nodes, strict=True) if self._looked_at(server_round, m, node)]
        self._missing(server_round, set(nodes))
        if not used:
            log.warning("round %d: no update could be used; the weights stay as they are", server_round)
            return None, None
        return super().aggregate_train(server_round, used)  # type: ignore[safe-super]

    def name_of(self, node: int) -> str:
        """The client behind a node."""
        return self.names.get(node, f"node {node}")

    # ---- inside

    def _keep_sent(self, server_round: int, sent: dict[str, Tensor]) -> None:
        """In a thread of its own, while clients train."""
        try:
            if self.recorder is not None:
                self.recorder.sent(server_round, sent)
        except Exception as wrong:
            log.warning("frostglass tap: what was sent is not recorded (%s)", told(wrong))

    def _nodes_of(self, replies: list[Message]) -> list[int]:
        """Who each reply is about: for a node that is gone the SuperLink answers, under a name of its own."""
        senders = [m.metadata.src_node_id for m in replies]
        silent = [n for n in self._asked if n not in senders]
        strange = [i for i, n in enumerate(senders) if n not in self._asked and replies[i].has_error()]
        if len(silent) == len(strange):
            for i, node in zip(strange, silent, strict=True):
                senders[i] = node
        return senders

    def _looked_at(self, server_round: int, reply: Message, node: int) -> bool:
        """Whether the strategy gets it; it is recorded either way."""
        about: dict[str, Any] = {}
        examples, state = None, None
        try:
            problems: tuple[str, ...] = ()
            if not reply.has_error():
                about = about_of(reply.content)
                if isinstance(about.get(PARTITION), int):
                    self.names[node] = str(about[PARTITION])
                state, found = self._judged(reply)
                problems = tuple(found)
                examples = examples_of(reply.content) if not problems else None
            reason = (reply.error.reason or f"error {reply.error.code}") if reply.has_error() else "; ".join(problems)
        except Exception as wrong:  # a message that cannot even be looked at
            problems, reason = (told(wrong),), told(wrong)
        client = self.name_of(node)
        self.answers[server_round].append(
            Answer(client, examples, _kept(about), shortened(reason.removeprefix(f"client {client}: ")))
        )
        self._record(server_round, reply, client, problems, state)
        return not reason

    def _judged(self, reply: Message) -> tuple[dict[str, Tensor] | None, list[str]]:
        """(the state in a reply, what keeps it from being used)."""
        try:
            examples_of(reply.content)
            state = state_of(reply.content, self.tapped)
        except BadInput as wrong:
            return None, [str(wrong)]
        found = misfits(state, self.tapped)
        if found or not self._sent:
            return state, found
        trained = names_of(self.tapped).trained
        moved = _length([state[n] - self._sent[n] for n in trained])
        limit = self.largest * max(1.0, _length([self._sent[n] for n in trained]))
        return state, [f"the update has length {moved:.3g}, above the limit of {limit:.3g}"] if moved > limit else []

    def _record(
        self,
        server_round: int,
        reply: Message,
        client: str,
        problems: tuple[str, ...],
        state: dict[str, Tensor] | None,
    ) -> None:
        if self.recorder is None:
            return
        try:
            self.recorder.received(
                taken_down(reply, self._sent, self.tapped, server_round, client, self.local_plan, self.defence,
                           problems, state)
            )  # fmt: skip
        except Exception as wrong:
            log.warning("frostglass tap: round %d, client %s is not recorded (%s)", server_round, client, told(wrong))
            self.recorder.received(Received(server_round, client, None, reason=told(wrong), problems=problems))

    def _missing(self, server_round: int, heard: set[int]) -> None:
        for node in self._asked:
            if node not in heard:
                client, reason = self.name_of(node), "no reply in time"
                self.answers[server_round].append(Answer(client, reason=reason))
                if self.recorder is not None:
                    self.recorder.received(Received(server_round, client, None, reason=reason))


def _kept(about: dict[str, Any]) -> dict[str, Any]:
    """Numbers and short texts: answers stay in memory to the end, however much a client sends along."""
    plain = [(k, v) for k, v in about.items() if isinstance(v, str | float | int)][:MOST]
    return {shortened(k): shortened(v) if isinstance(v, str) else v for k, v in plain}


def _length(parts: list[Tensor]) -> float:
    return float(torch.stack([n.double() for n in torch._foreach_norm(parts)]).norm()) if parts else 0.0
