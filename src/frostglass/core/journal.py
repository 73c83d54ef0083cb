"""The event stream on disk: one JSON object a line, appended, so that a killed run keeps what it had."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frostglass.core.events import Event


def json_ready(value: Any) -> Any:
    """The same value in types that JSON has; what it cannot hold becomes text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN: say it in words
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


class Journal:
    """An Emit that appends to `events.jsonl`. Tensors are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            with path.open("a", encoding="utf-8") as out:
                out.write("\n")  # a kill cut the last line: the next one must not be lost with it

    def __call__(self, event: Event) -> None:
        """Appends one line."""
        if event.kind == "candidate":
            return
        row: dict[str, Any] = {"kind": event.kind, "where": event.where}
        if event.steps:
            row |= {"step": event.step, "steps": event.steps}
        row |= {k: v for k, v in json_ready(event.values).items() if k not in row}
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line cut off by a kill is passed over."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):  # not splitlines: a name may hold other line ends, which JSON leaves as they are
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict)]
