"""A client's result filter: a last look at what leaves, and a stop for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from frostglass.core.batch import Batch
from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan, Update
from frostglass.federated.exchange import difference, names_of
from frostglass.federated.gate import Action, Gate, OnFailure, Outgoing
from frostglass.federated.local_client import NOTHING
from frostglass.federated.named import named
from frostglass.federated.nvflare.defence_filter import made
from frostglass.federated.nvflare.wire import (
    KINDS,
    SENT_EVENT,
    Network,
    plan_of,
    round_of,
    tensors_of,
    weights_sent,
)

_Base: Any = DXOFilter


class GateFilter(_Base):  # type: ignore[misc]
    """Asks a `frostglass.federated.gate.Gate` about every update; put it last, behind the defences.

    What is blocked does not leave: NVFlare reports TASK_RESULT_FILTER_ERROR to the server, whose controller goes on
    without this client where enough others answer.

    Args:
        checks: what makes the gate's checks: "package.module:function", such as
            "frostglass.auditing.outgoing:outgoing_checks".
        private: "package.module:function": called with the site's name, gives the Batch that it trains on.
        network, classes, channels, size, options: what the weights belong to, see `wire.Network`.
        plan: fields of the client's LocalPlan.
        settings: of the checks.
        defence, defence_settings: what the update went through, for the checks.
        action, on_failure, budget: of the gate.
        journal: a file; "{site}" in it becomes the site's name.

    Raises:
        BadInput: something that cannot be imported or built.
    """

    def __init__(
        self,
        checks: str,
        private: str,
        network: str,
        classes: int,
        channels: int,
        size: int,
        plan: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        defence: str | None = None,
        defence_settings: Mapping[str, Any] | None = None,
        action: Action = "block",
        on_failure: OnFailure = "open",
        budget: float = 30.0,
        journal: str | None = None,
    ) -> None:
        super().__init__(supported_data_kinds=list(KINDS), data_kinds_to_filter=None)
        self.checks, self.private, self.plan, self.settings = checks, private, plan, settings
        self.network, self.classes, self.channels, self.size, self.options = network, classes, channels, size, options
        self.defence, self.defence_settings = defence, defence_settings
        self.action, self.on_failure, self.budget, self.journal = action, on_failure, budget, journal
        self._local_plan = plan_of(plan) or LocalPlan(kind="delta")
        self._defense = NOTHING if defence is None else made(defence, defence_settings)
        self._network = Network(network, classes, channels, size, options).build()
        self._decide = named(checks, "checks")(**(settings or {}))
        self._private = named(private, "private")
        self._gate: Gate | None = None
        self._held: Batch | None = None
        self._sent: tuple[int, dict[str, Tensor]] | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keeps what the server sent; ends the gate with the job."""
        if event_type == SENT_EVENT:
            self._sent = None  # of an earlier round, if this one's weights cannot be read
            self._sent = weights_sent(fl_ctx, self._network)
        elif event_type == EventType.END_RUN and self._gate is not None:
            self._gate.close(self.budget)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Lets the update pass as it is.

        Raises:
            ContentBlockedException: the gate does not.
        """
        site = str(fl_ctx.get_identity_name())
        try:
            ruling = self._gate_of(site)(self._outgoing(dxo, shareable, site))
        except Exception as wrong:  # such an update cannot be judged at all
            if self.action == "block" and self.on_failure == "closed":
                raise ContentBlockedException(f"frostglass gate: the update cannot be judged ({wrong})") from wrong
            self.log_warning(fl_ctx, f"frostglass gate: the update leaves unjudged ({wrong})")
            return
        if not ruling.passed:
            raise ContentBlockedException(f"frostglass gate: {ruling.reason}")

    def _gate_of(self, site: str) -> Gate:
        if self._gate is None:
            journal = None if self.journal is None else self.journal.replace("{site}", site)
            self._gate = Gate(
                self._decide, action=self.action, on_failure=self.on_failure, budget=self.budget, journal=journal
            )
        return self._gate

    def _outgoing(self, dxo: DXO, shareable: Shareable, site: str) -> Outgoing:
        if self._sent is None or self._sent[0] != round_of(shareable, self._sent[0]):
            raise BadInput("what the server sent in this round is not known.")
        if self._held is None:
            self._held = self._private(site)
        number, sent = self._sent
        values, trained = tensors_of(dxo), names_of(self._network).trained
        absent = [n for n in trained if n not in values]
        if absent:
            raise BadInput(f"{len(absent)} parameters are missing, the first {absent[0]!r}.")
        if dxo.data_kind == DataKind.WEIGHT_DIFF:
            own = {n: -values[n] for n in trained}
        else:
            own = difference(sent, values, trained)
        update = Update(own, {}, len(self._held), self._local_plan)
        return Outgoing(self._network, sent, update, self._held, self._defense, round_of(shareable, number), site)
