"""What is kept of every update that a server received, whether its tensors fitted or not; and the files around it.

RECORDED/
  record.json              what was recorded: engine, network, limits (`RecordInfo`)
  updates.jsonl            a line for every update, in order of arrival (`Header`)
  sent/00001.safetensors   what was sent out; rounds that sent the same share a file
  updates/000001.safetensors   "update.NAME": W_before - W_after or the gradient; "buffer.NAME": as returned
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from frostglass.core.update import LocalPlan

FORMAT = 1
INFO, HEADERS, SENT, PAYLOADS = "record.json", "updates.jsonl", "sent", "updates"
UPDATE, BUFFER = "update.", "buffer."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class RecordInfo(_Strict):
    """About the whole folder."""

    format: int = Field(FORMAT, description="of this layout")
    engine: str = Field(description="what the updates went through: flower, nvflare, ddp, ...")
    model: dict[str, Any] = Field(default_factory=dict, description="name, options, classes, channels, size; if known")
    image_shape: tuple[int, int, int] | None = Field(None, description="channels, height, width; if known")
    max_bytes: int = Field(description="limit of all tensors together")
    note: str = Field("", description="what was seen: a client's own update, an average, a shard")


class Header(_Strict):
    """About one update."""

    number: int = Field(ge=1, description="in order of arrival")
    round: int = Field(ge=0)
    client: str
    kind: Literal["gradient", "delta"]
    examples: int | None = Field(None, ge=0, description="images it was made of, as the client says")
    clients: int = Field(1, ge=1, description="clients summed in it")
    plan: dict[str, Any] | None = Field(None, description="fields of LocalPlan, as far as the server ordered them")
    defence: str | None = Field(None, description="as the client or the job names it")
    file: str | None = Field(None, description="of its tensors; none: they were not kept")
    bytes: int = Field(0, ge=0, description="of its tensors")
    sha256: str | None = Field(None, description="of its tensors, see `digest`")
    sent: str | None = Field(None, description="file of what the client had been sent")
    sent_sha256: str | None = None
    reason: str = Field("", description="why there is no update, or why its tensors were not kept")
    problems: list[str] = Field(default_factory=list, description="what is wrong with it")
    metrics: dict[str, float | str] = Field(default_factory=dict, description="as the client reports them")

    def local_plan(self) -> LocalPlan | None:
        """What the client did; None if the server did not say."""
        return None if self.plan is None else LocalPlan(**self.plan)


def plan_fields(plan: LocalPlan) -> dict[str, Any]:
    """For `Header.plan`."""
    return asdict(plan)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name: name, type, shape and bytes of each, in the order of names."""
    import torch

    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        if t.numel():
            h.update(t.flatten().view(torch.uint8).numpy().data)
    return h.hexdigest()
