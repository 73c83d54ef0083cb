"""FedAvg that repeats: who takes part follows from the seed, and updates are summed in the order of clients."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.federated.flower.tap import Answer, AuditTap
from frostglass.federated.flower.wire import (
    ARRAYS,
    CONFIG,
    EXAMPLES,
    PARTITION,
    ROUND,
    about_of,
    examples_of,
    record_of,
    state_of,
)
from frostglass.federated.local_client import mean_state

__all__ = ["Answer", "AuditTap", "AuditedFedAvg", "OrderedFedAvg"]

log = logging.getLogger(__name__)


class OrderedFedAvg(FedAvg):
    """FedAvg whose sums are made in the order of clients, in the types of the network, and whose draws are seeded.

    Flower's own draws clients with Python's generator, sums replies as they come in, and turns counters into float64.

    Args:
        clients: that hold images; awaited at the start.
        per_round: drawn for each round; None for all.
        rng: of the draws.
        wait: seconds to wait for all of them to connect at the start; those that are there then go on alone.
        roll_call: whether to ask every node for its partition first, so that nodes that fail have a name.
    """

    def __init__(
        self,
        *,
        clients: int,
        per_round: int | None = None,
        rng: Rng,
        wait: float = 600.0,
        roll_call: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.clients, self.per_round, self.rng = clients, per_round or clients, rng
        self.wait, self.roll_call = wait, roll_call
        self.partitions: dict[int, int] = {}
        self.notes: list[str] = []
        self._begun = False
        self._types: dict[str, torch.dtype] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same weights for every client that takes part."""
        nodes = sorted(self._online(grid), key=lambda n: (self.partitions.get(n, self.clients), n))
        drawn = self.rng.at("clients of a round", server_round).permutation(len(nodes))[: self.per_round]
        config[ROUND] = server_round
        self._types = {n: getattr(torch, a.dtype) for n, a in arrays.items() if hasattr(torch, a.dtype)}
        record = RecordDict({ARRAYS: arrays, CONFIG: config})
        return [Message(record, nodes[i], MessageType.TRAIN) for i in drawn.sort().values.tolist()]

    def configure_evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Nobody is asked: the server tests by itself."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean weighted by images; errored replies are left out. Put `AuditTap` before it for all other faults."""
        good = sorted((m for m in replies if not m.has_error()), key=self._place)
        if not good:
            return None, None
        examples = [examples_of(m.content) for m in good]
        mean = mean_state([state_of(m.content) for m in good], examples)
        mean = {n: t.to(self._types.get(n, t.dtype)) if t.is_floating_point() else t for n, t in mean.items()}
        return record_of(mean), MetricRecord({EXAMPLES: sum(examples), "clients": len(good)})

    # ---- inside

    def _place(self, reply: Message) -> tuple[int, int]:
        own = about_of(reply.content).get(PARTITION)
        return (own if isinstance(own, int) else self.clients), reply.metadata.src_node_id

    def _online(self, grid: Grid) -> list[int]:
        """Node ids: at the start all that are awaited, later those that are there."""
        until = time.monotonic() + self.wait
        nodes = list(grid.get_node_ids())
        while time.monotonic() < until and len(nodes) < (1 if self._begun else self.clients):
            time.sleep(0.2)
            nodes = list(grid.get_node_ids())
        if not nodes:
            raise BadInput(f"server.wait: no client is connected after {self.wait:g} seconds; start the SuperNodes.")
        if not self._begun and len(nodes) < self.clients:
            self.notes.append(f"{len(nodes)} of {self.clients} clients were connected after {self.wait:g} seconds.")
            log.warning(self.notes[-1])
        if not self._begun and self.roll_call:
            self._call(grid, nodes)
        self._begun = True
        return nodes

    def _call(self, grid: Grid, nodes: list[int]) -> None:
        asked = [Message(RecordDict(), n, MessageType.QUERY) for n in nodes]
        for reply in grid.send_and_receive(asked, timeout=self.wait):
            found = None if reply.has_error() else about_of(reply.content).get(PARTITION)
            if isinstance(found, int):
                self.partitions[reply.metadata.src_node_id] = found


class AuditedFedAvg(AuditTap, OrderedFedAvg):
    """Both, ready for use; see there for the parameters.

    Args:
        done: rounds of an interrupted run before this one, whose rounds `start` would count from 1 again.
    """

    def __init__(self, *args: Any, done: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.done = done

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Of the run's round."""
        return super().configure_train(self.done + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Of the run's round."""
        return super().aggregate_train(self.done + server_round, replies)

    def name_of(self, node: int) -> str:
        """The client behind a node; the roll call knows them all."""
        return str(self.partitions[node]) if node in self.partitions else super().name_of(node)
