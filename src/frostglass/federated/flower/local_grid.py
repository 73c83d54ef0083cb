"""Flower's apps in one process, one client after the other: for tests, demonstrations and debuggers.

Flower has no public way to do this: messages want the private `flwr.supercore.task_identity.TaskIdentity` and private
fields of their metadata. The version is pinned, and a test holds these names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from frostglass.federated.flower.wire import PARTITION, refusal, told

_RUN = 1


class LocalGrid(Grid):
    """Calls a ClientApp directly; an exception becomes an errored reply, as in the other engines.

    Args:
        app: of the clients.
        clients: how many nodes there are; node i + 1 has the partition i.
        run_config: of the run.
    """

    def __init__(self, app: ClientApp, clients: int, run_config: Mapping[str, Any] | None = None) -> None:
        self.app = app
        self.contexts = {
            i + 1: Context(
                run_id=_RUN, node_id=i + 1, state=RecordDict(), run_config=dict(run_config or {}),
                node_config={PARTITION: i, "num-partitions": clients},
            )
            for i in range(clients)
        }  # fmt: skip

    def set_run(self, run: Any) -> None:
        """There is one."""

    @property
    def run(self) -> Any:
        """There is no record of it."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """From 1."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not without a queue: strategies use `send_and_receive`."""
        raise NotImplementedError("LocalGrid: use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not without a queue: strategies use `send_and_receive`."""
        raise NotImplementedError("LocalGrid: use send_and_receive")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies in the order of messages; `timeout` has no meaning where nothing runs beside."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        message.metadata.__dict__["_message_id"] = str(uuid4())
        try:
            reply = self.app(message, self.contexts[node])
        except Exception as wrong:
            reply = refusal(message, told(wrong))
        reply.metadata.__dict__["_src_node_id"] = node
        return reply


def run_local(
    server: ServerApp, client: ClientApp, clients: int, run_config: Mapping[str, Any] | None = None
) -> LocalGrid:
    """Runs both apps to the end, and returns the grid with what the nodes remember.

    Args:
        server, client: of the run.
        clients: how many nodes there are.
        run_config: of the run, for both.
    """
    grid = LocalGrid(client, clients, run_config)
    with _identity():
        server(
            grid, Context(run_id=_RUN, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config or {}))
        )
    return grid


@contextmanager
def _identity() -> Iterator[None]:
    """Messages need to know the task of the process; afterwards it is as before."""
    names = ("_run_id", "_task_id", "_node_id")
    before = {n: getattr(TaskIdentity, n) for n in names}
    TaskIdentity.run_id = TaskIdentity.task_id = _RUN
    TaskIdentity.node_id = 0
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
