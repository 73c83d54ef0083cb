"""What NVFlare exchanges, as states and updates: DXOs of arrays, the round, the peer.

NVFlare's WEIGHT_DIFF is W_after - W_before, the negative of what Frostglass calls a delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.vision import networks

KINDS = [DataKind.WEIGHT_DIFF, DataKind.WEIGHTS]
SENT_EVENT = EventType.AFTER_TASK_DATA_FILTER
DEFENCE = "frostglass_defence"
"""Of a DXO's properties: what was done to it, for the record."""


@dataclass(frozen=True)
class Network:
    """Constructor arguments that name a network; weights do not matter.

    Args:
        network: as for `frostglass.vision.networks.build`: a name, or "package.module:Class".
        classes, channels, size, options: of it.
    """

    network: str
    classes: int
    channels: int
    size: int
    options: Mapping[str, Any] | None = None

    def build(self) -> nn.Module:
        """The network.

        Raises:
            BadInput: it cannot be built.
        """
        return networks.build(
            self.network, classes=self.classes, channels=self.channels, size=self.size, options=self.options,
            rng=Rng.from_seed(0),
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """For a record."""
        return {
            "name": self.network, "options": dict(self.options or {}), "classes": self.classes,
            "channels": self.channels, "size": self.size,
        }  # fmt: skip


def tensors_of(dxo: DXO) -> dict[str, Tensor]:
    """Arrays by name on the CPU, sharing their memory if they lie there.

    Raises:
        BadInput: something that is no array, or values that another filter has encrypted or packed.
    """
    done = dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)
    if done:
        raise BadInput(f"update: it was processed by {done!r} already; put frostglass's filters before that one.")
    try:
        return {n: v.cpu() if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for n, v in dxo.data.items()}
    except (TypeError, ValueError) as wrong:
        raise BadInput(f"update: an entry is no array of numbers ({str(wrong).splitlines()[0]}).") from None


def like(value: Any, tensor: Tensor) -> Any:
    """The tensor in type and container of `value`: a numpy array, or a torch tensor where that lies."""
    if isinstance(value, Tensor):
        return tensor.to(value.device, value.dtype)
    return tensor.detach().cpu().numpy().astype(np.asarray(value).dtype)


def fitted(values: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Arrays as a state of `model`, in its types and in memory of their own.

    FedAvg of NVFlare averages BatchNorm's counters too, and sends them as fractions from the second round on.
    """
    own = model.state_dict()
    out = {}
    for name, value in values.items():
        t = torch.as_tensor(value).detach().clone()
        wanted = own[name].dtype if name in own else t.dtype
        whole = t.is_floating_point() and not wanted.is_floating_point
        out[name] = t.round().to(wanted) if whole else t.to(wanted)
    return out


def weights_sent(fl_ctx: FLContext, model: nn.Module) -> tuple[int, dict[str, Tensor]] | None:
    """(round, global weights as a state) of the task that was just sent or received; None of any other."""
    task = fl_ctx.get_prop(FLContextKey.TASK_DATA)
    if not isinstance(task, Shareable):
        return None
    try:
        dxo = from_shareable(task)
    except ValueError:
        return None
    if dxo.data_kind != DataKind.WEIGHTS:
        return None
    return round_of(task), fitted(tensors_of(dxo), model)


def round_of(shareable: Shareable, otherwise: int = 0) -> int:
    """As NVFlare counts: from 0."""
    found = shareable.get_header(AppConstants.CURRENT_ROUND, None)
    return otherwise if found is None else int(found)


def peer_of(fl_ctx: FLContext) -> str:
    """Name of the other side."""
    peer = fl_ctx.get_peer_context()
    return str(peer.get_identity_name()) if peer is not None else "unknown"


def plan_of(fields: Mapping[str, Any] | None) -> LocalPlan | None:
    """A local plan from constructor arguments; None if there are none.

    Raises:
        BadInput: unknown fields.
    """
    if fields is None:
        return None
    try:
        return LocalPlan(**{"kind": "delta", **fields})
    except TypeError as wrong:
        raise BadInput(f"plan: {wrong}; give fields of LocalPlan.") from None
