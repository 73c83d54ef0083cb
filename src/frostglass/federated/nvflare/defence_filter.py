"""A client's result filter: an update-level defence on what leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from frostglass.core.defense import Defense, protected_by
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, OsKey, Randomness, Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.defenses.registry import DEFENSES
from frostglass.federated.exchange import difference, names_of
from frostglass.federated.nvflare.wire import (
    DEFENCE,
    KINDS,
    SENT_EVENT,
    Network,
    like,
    plan_of,
    round_of,
    tensors_of,
    weights_sent,
)

_Base: Any = DXOFilter


class DefenceFilter(_Base):  # type: ignore[misc]
    """Pruning, clipping, noise ... on WEIGHT_DIFF or WEIGHTS; buffers and frozen parameters pass as they are.

    Several filters in a row are a stack. Whatever cannot be protected is not sent: NVFlare then reports
    TASK_RESULT_FILTER_ERROR to the server.

    Args:
        defence: name of a registered defence of the update.
        network, classes, channels, size, options: what the weights belong to, see `wire.Network`.
        settings: parameters of the defence.
        plan: fields of the client's LocalPlan, for defences that read it.
        seed: makes noise repeat, for tests and simulations; None draws it from the operating system.

    Raises:
        BadInput: an unknown defence or setting, or one that works on images: those belong into the client's training.
    """

    def __init__(
        self,
        defence: str,
        network: str,
        classes: int,
        channels: int,
        size: int,
        settings: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        plan: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(supported_data_kinds=list(KINDS), data_kinds_to_filter=None)
        self.defence, self.settings, self.seed, self.plan = defence, settings, seed, plan
        self.network, self.classes, self.channels, self.size, self.options = network, classes, channels, size, options
        self._made = made(defence, settings)
        self._local_plan = plan_of(plan) or LocalPlan(kind="delta")
        self._network = Network(network, classes, channels, size, options).build()
        self._names = names_of(self._network)
        self._sent: tuple[int, dict[str, Tensor]] | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keeps what the server sent, which full weights are compared with."""
        if event_type == SENT_EVENT:
            self._sent = None  # of an earlier round, if this one's weights cannot be read
            self._sent = weights_sent(fl_ctx, self._network)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """The same DXO with its update under the defence.

        Raises:
            BadInput: an entry that is not of the network, or full weights where what was sent is not known.
        """
        values, tied = tensors_of(dxo), self._names.tied
        trained = [n for n in self._names.trained if n in values]
        strange = [n for n in values if tied.get(n, n) not in {*trained, *self._names.carried}]
        if strange:
            raise BadInput(f"defence {self.defence}: {strange[0]!r} is not of the network, so it would leave as it is.")
        number = round_of(shareable, self._sent[0] if self._sent else 0)
        if dxo.data_kind == DataKind.WEIGHT_DIFF:
            own = {n: -_at_least_single(values[n]) for n in trained}
        else:
            start = self._start(trained, number)
            own = difference(start, {n: _at_least_single(values[n]) for n in trained}, tuple(trained))
        update = Update(own, {}, int(dxo.get_meta_prop("examples") or 1), self._local_plan)
        kept = protected_by(self._made, update, self._randomness(fl_ctx, number)).gradients
        # what a defence keeps back must neither leave as it was nor be missing: it does not move
        done = {n: kept[n] if n in kept else torch.zeros_like(own[n]) for n in trained}
        after = {n: -done[n] if dxo.data_kind == DataKind.WEIGHT_DIFF else start[n] - done[n] for n in trained}
        dxo.data = {n: like(v, after[tied.get(n, n)]) if tied.get(n, n) in after else v for n, v in dxo.data.items()}
        before = dxo.get_meta_prop(DEFENCE)
        dxo.set_meta_prop(DEFENCE, f"{before}+{self.defence}" if before else self.defence)
        return dxo

    def _start(self, trained: list[str], number: int) -> dict[str, Tensor]:
        if self._sent is None or self._sent[0] != number or any(n not in self._sent[1] for n in trained):
            raise BadInput(
                f"defence {self.defence}: full weights are to leave and what the server sent is not known; send "
                "differences."
            )
        return {n: _at_least_single(self._sent[1][n]) for n in trained}

    def _randomness(self, fl_ctx: FLContext, number: int) -> Randomness:
        if self.seed is None:
            return OsKey()
        return Insecure(Rng.from_seed(self.seed, "nvflare", str(fl_ctx.get_identity_name())).at(self.defence, number))


def made(name: str, settings: Mapping[str, Any] | None) -> Defense:
    """A defence of the update by name.

    Raises:
        BadInput: unknown name or settings, or a defence that needs the images.
    """
    entry = DEFENSES[name]
    wrong = entry.problems(settings or {}, f"defence {name!r}")
    if wrong:
        raise BadInput(wrong)
    defense = entry.make(**(settings or {}))
    if defense.encodes or defense.gradient is not None:
        raise BadInput(
            f"defence {name!r}: it works on images, which a filter never sees; give it to the LocalClient in the "
            "client's script."
        )
    return defense


def _at_least_single(tensor: Tensor) -> Tensor:
    """Noise in half precision would be rounded away."""
    return tensor.float() if tensor.element_size() < 4 else tensor
