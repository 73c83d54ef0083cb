"""What stands in a Flower message, by our names; and replies that say what went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from frostglass.core.errors import BadInput, FrostglassError

ARRAYS, CONFIG, METRICS, ABOUT = "arrays", "config", "metrics", "frostglass"
"""Keys of the records in a message; the first three are Flower's own."""

EXAMPLES, ROUND, PARTITION = "num-examples", "server-round", "partition-id"
RAISED = 2
"""Flower's code for a client app that raised."""


def arrays_of(content: RecordDict) -> ArrayRecord:
    """The only array record.

    Raises:
        BadInput: there is none, or several.
    """
    found = list(content.array_records.values())
    if len(found) != 1:
        raise BadInput(f"arrays: {len(found)} array records in a message that should hold one.")
    return found[0]


def state_of(content: RecordDict, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The state in a message; with `model`, counters that an average made floating become whole numbers again.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    try:
        state: dict[str, Tensor] = dict(arrays_of(content).to_torch_state_dict())
    except BadInput:
        raise
    except Exception as wrong:  # whatever bytes somebody sent
        raise BadInput(f"arrays: cannot be read ({type(wrong).__name__}: {wrong}).") from None
    own = {} if model is None else model.state_dict()
    for name, value in own.items():
        got = state.get(name)
        if got is not None and got.is_floating_point() and not value.is_floating_point() and bool(got.isfinite().all()):
            state[name] = got.round().to(value.dtype)
    return state


def record_of(state: Mapping[str, Tensor]) -> ArrayRecord:
    """For a message."""
    return ArrayRecord({name: value.detach().cpu().contiguous() for name, value in state.items()})


def round_of(message: Message) -> int:
    """Of the server; 0 if it does not say."""
    for record in message.content.config_records.values():
        value = record.get(ROUND)
        if isinstance(value, int):
            return value
    return 0


def examples_of(content: RecordDict) -> int:
    """Images that a client says it trained on.

    Raises:
        BadInput: it says nothing, or no number above 0.
    """
    for record in content.metric_records.values():
        value = record.get(EXAMPLES)
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            return max(1, round(value))
        if value is not None:
            raise BadInput(f"{EXAMPLES}: {value!r} is no number above 0.")
    raise BadInput(f"{EXAMPLES}: missing among the metrics.")


def about_of(content: RecordDict) -> dict[str, Any]:
    """What a Frostglass client says about itself beside its update; empty for others."""
    record = content.config_records.get(ABOUT)
    return {} if record is None else dict(record)


def partition_of(context: Context) -> int:
    """Which part of the plan's split this node holds.

    Raises:
        BadInput: the node was started without one.
    """
    value = context.node_config.get(PARTITION)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadInput(f'{PARTITION}: {value!r}; start the SuperNode with --node-config "{PARTITION}=0".')
    return value


def reply_with(message: Message, state: Mapping[str, Tensor], examples: int, about: Mapping[str, Any]) -> Message:
    """A trained state. What is no number to be averaged goes into a record of its own."""
    content = RecordDict({
        ARRAYS: record_of(state),
        METRICS: MetricRecord({EXAMPLES: examples}),
        ABOUT: ConfigRecord({k: v for k, v in about.items() if v is not None}),
    })  # fmt: skip
    return Message(content=content, reply_to=message)


def refusal(message: Message, reason: str) -> Message:
    """An errored reply: the round goes on without this client."""
    return Message(Error(code=RAISED, reason=reason), reply_to=message)


def told(wrong: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(wrong).split())
    return text if isinstance(wrong, FrostglassError) else f"{type(wrong).__name__}: {text}"


def same(left: Tensor, right: Tensor) -> bool:
    """Equal in every bit that matters: shape and values."""
    return left.shape == right.shape and torch.equal(left, right.to(left.dtype))
