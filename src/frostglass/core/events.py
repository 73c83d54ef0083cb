"""The one event stream: what happens in a run, for the journal, the terminal and the report alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

Kind = Literal[
    "run_started", "run_finished", "cell_started", "cell_finished", "cell_failed", "cell_skipped",
    "attack_started", "progress", "candidate", "checkpoint", "attack_finished", "note",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Args:
        kind: one of `Kind`.
        where: the cell or attack it belongs to.
        step, steps: of the attack, where that makes sense.
        values: JSON-ready details.
        tensors: pictures on the way (the filmstrip); never written to the journal.
    """

    kind: Kind
    where: str = ""
    step: int = 0
    steps: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


Emit: TypeAlias = Callable[[Event], None]


def silent(_: Event) -> None:
    """An Emit that drops everything."""


def broadcast(*listeners: Emit) -> Emit:
    """One Emit that tells all listeners, in order."""

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell
