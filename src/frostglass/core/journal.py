"""The event stream on disk: one JSON object a line, appended, so that a killed run keeps what it had."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from frostglass.core.events import Event


def _json_ready(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN: say it in words
    if isinstance(value, dict):
        return {str(k): _json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(v) for v in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


class Journal:
    """An Emit that appends to `events.jsonl`. Tensors are left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, event: Event) -> None:
        """Appends one line."""
        if event.kind == "candidate":
            return
        row = {"kind": event.kind, "where": event.where}
        if event.steps:
            row |= {"step": event.step, "steps": event.steps}  # type: ignore[dict-item]
        row |= _json_ready(dict(event.values))
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut off by a kill is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
