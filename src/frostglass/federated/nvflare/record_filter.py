"""The server's result filter: takes down what every client sent, and lets it pass as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.federated.exchange import difference, misfits, names_of
from frostglass.federated.nvflare.wire import (
    DEFENCE,
    KINDS,
    SENT_EVENT,
    Network,
    fitted,
    peer_of,
    plan_of,
    round_of,
    tensors_of,
    weights_sent,
)
from frostglass.federated.recording import DEFAULT_BYTES, Received, Recorder

_Base: Any = DXOFilter


class RecordFilter(_Base):  # type: ignore[misc]
    """Records updates as they arrive; never changes or refuses one, and breaks no round.

    Args:
        folder: new or empty; a path of the server.
        network, classes, channels, size, options: what the weights belong to, see `wire.Network`.
        plan: fields of the LocalPlan that the server orders, if it does.
        max_bytes: of all tensors together.
        in_flight: updates that wait for the disk at the most.
    """

    def __init__(
        self,
        folder: str,
        network: str,
        classes: int,
        channels: int,
        size: int,
        options: Mapping[str, Any] | None = None,
        plan: Mapping[str, Any] | None = None,
        max_bytes: int = DEFAULT_BYTES,
        in_flight: int = 8,
    ) -> None:
        super().__init__(supported_data_kinds=list(KINDS), data_kinds_to_filter=None)
        self.folder, self.plan, self.max_bytes, self.in_flight = folder, plan, max_bytes, in_flight
        self.network, self.classes, self.channels, self.size, self.options = network, classes, channels, size, options
        self._about = Network(network, classes, channels, size, options)
        self._model = self._about.build()
        self._local_plan = plan_of(plan)
        self._recorder: Recorder | None = None
        self._sent: dict[int, dict[str, Tensor]] = {}
        self._round = 0

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Opens the record with the job, keeps what is sent, closes it at the end."""
        if event_type == EventType.START_RUN:
            try:
                self._recorder = Recorder(
                    self.folder, engine="nvflare", model=self._about.about(),
                    image_shape=(self.channels, self.size, self.size), max_bytes=self.max_bytes,
                    in_flight=self.in_flight, note="every client's own update, as the server received it",
                )  # fmt: skip
            except BadInput as wrong:  # before any round, so that nobody trains for a record that is not made
                self.system_panic(str(wrong), fl_ctx)
        elif event_type == SENT_EVENT:
            self._guarded(self._keep_sent, fl_ctx)
        elif event_type == EventType.END_RUN and self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Also of clients that report an error, or send nothing."""
        code = shareable.get_return_code()
        reason = (
            f"the client says {code}" if code != ReturnCode.OK else "" if _filled(shareable) else "nothing was sent"
        )
        if reason:
            self._guarded(lambda ctx: self._receive(self._from(shareable, ctx, reason)), fl_ctx)
        return super().process(shareable, fl_ctx)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> None:
        """Records one update."""
        self._guarded(lambda ctx: self._receive(self._taken_down(dxo, shareable, ctx)), fl_ctx)

    def _guarded(self, work: Any, fl_ctx: FLContext) -> None:
        try:
            work(fl_ctx)
        except Exception as wrong:  # auditing must not break training
            self.log_warning(fl_ctx, f"frostglass record: not recorded ({wrong})")

    def _keep_sent(self, fl_ctx: FLContext) -> None:
        found = weights_sent(fl_ctx, self._model)
        if found is None or found[0] in self._sent:
            return
        self._round, state = found
        self._sent = {k: v for k, v in self._sent.items() if k >= self._round - 1} | {self._round: state}
        if self._recorder is not None:
            self._recorder.sent(self._round, state)

    def _receive(self, got: Received) -> None:
        if self._recorder is not None:
            self._recorder.received(got)

    def _from(self, shareable: Shareable, fl_ctx: FLContext, reason: str = "") -> Received:
        number = round_of(shareable, self._round)
        return Received(number, peer_of(fl_ctx), None, plan=self._local_plan, reason=reason)

    def _taken_down(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> Received:
        got = replace(
            self._from(shareable, fl_ctx), examples=_whole(dxo.get_meta_prop("examples")),
            defence=dxo.get_meta_prop(DEFENCE), metrics=_numbers(dxo),
        )  # fmt: skip
        try:
            values = {n: t.detach().clone() for n, t in tensors_of(dxo).items()}
        except BadInput as wrong:
            return replace(got, problems=(str(wrong),), reason=str(wrong))
        problems, names = tuple(misfits(values, self._model)), names_of(self._model)
        if any(n not in values or values[n].shape != self._model.state_dict()[n].shape for n in names.trained):
            return replace(
                got, gradients=values, problems=problems, reason="kept as it came, since it is no state of this network"
            )
        sent = self._sent.get(got.round)
        diff = dxo.data_kind == DataKind.WEIGHT_DIFF
        if sent is None and not diff:
            return replace(got, problems=problems, reason="full weights, and what was sent was not seen")
        own = {n: -values[n] for n in names.trained} if diff else difference(sent or {}, values, names.trained)
        carried = {n: values[n] for n in names.carried if n in values}
        if diff:
            known = sent or {}
            carried = {n: known[n] + v for n, v in carried.items() if n in known}
        carried = fitted(carried, self._model)
        return replace(got, gradients=own, buffers=carried, problems=problems)


def _filled(shareable: Shareable) -> bool:
    """Whether there is something that a DXO filter is asked about."""
    try:
        return bool(from_shareable(shareable).data)
    except ValueError:
        return False


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else None


def _numbers(dxo: DXO) -> dict[str, float | str]:
    found: dict[str, float | str] = {"kind": str(getattr(dxo.data_kind, "value", dxo.data_kind))}
    given = {MetaKey.NUM_STEPS_CURRENT_ROUND: dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND)}
    initial = dxo.get_meta_prop(MetaKey.INITIAL_METRICS)
    given |= initial if isinstance(initial, dict) else {}
    return found | {str(k): float(v) for k, v in given.items() if isinstance(v, int | float)}
