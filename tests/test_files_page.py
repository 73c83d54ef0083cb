"""The check of files against docs/files.md sees what is missing, what is new, and what has another type."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from documented import misfits

ROUND: dict[str, Any] = {
    "round": 0, "accuracy": 0.1, "accuracy_encoded": None, "loss": None, "seconds": 0.5, "clients": [],
    "left_out": [{"client": "2", "examples": None, "reason": "no answer", "loss": 0.5}],
}  # fmt: skip
HISTORY: dict[str, Any] = {
    "name": "x", "engine": "local", "defence": "none", "seed": 0, "insecure": False, "clients": 1, "examples": [4],
    "test_images": 9, "buffers": "send", "rounds": [ROUND], "notes": [],
}  # fmt: skip


def test_differences_are_seen() -> None:
    assert misfits("history.json", HISTORY) == []
    broken = deepcopy(HISTORY)
    broken["rounds"][0]["accuracy"] = "0.1"
    broken["rounds"][0]["extra"] = 1
    del broken["engine"], broken["rounds"][0]["left_out"][0]["reason"]
    broken["seed"] = True
    broken["examples"] = [4.0]
    assert sorted(misfits("history.json", broken)) == [
        ".engine is not there",
        "examples[] is 4.0, not whole number",
        "rounds[].accuracy is '0.1', not number",
        "rounds[].extra is not documented",
        "rounds[].left_out[].reason is not there",
        "seed is True, not whole number",
    ]
