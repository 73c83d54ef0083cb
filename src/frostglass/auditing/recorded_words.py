"""Words about recorded updates that the report and the terminal share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from frostglass.auditing.wording import percent


def update_labels(labels: Mapping[str, Any] | None) -> str:
    """What the update says about its labels."""
    if not labels:
        return "not tried"
    if "problem" in labels:
        return f"not restored; {labels['problem']}"
    residual = "" if labels["residual"] is None else f", residual {labels['residual']:.2g}"
    guess = "" if labels["guess"] is None else f"; guessing without the update: {percent(labels['guess'])}"
    if labels["confidence"] == "none":
        return f"not told by this update{residual}{guess}"
    right = "" if labels["count_accuracy"] is None else f"{percent(labels['count_accuracy'])} right, "
    return f"{right}confidence {labels['confidence']}{residual} ({labels['rule']}){guess}"
