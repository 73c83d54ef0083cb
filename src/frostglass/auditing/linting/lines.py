"""Where in a text something stands."""

from __future__ import annotations

import re
from collections.abc import Iterable


def line_of(text: str, pattern: str, after: int = 1) -> int | None:
    """First line, counted from 1, at or below line `after` that `pattern` matches; None if there is none."""
    for number, line in enumerate(text.splitlines(), 1):
        if number >= after and re.search(pattern, line):
            return number
    return None


def lines_of_keys(text: str, keys: Iterable[str], after: int = 1) -> dict[str, int]:
    """Lines on which `key =` or `"key":` stands, at or below `after`."""
    found = {}
    for key in keys:
        spelled = re.escape(key).replace("_", "[-_]")
        line = line_of(text, rf"(?:^|[\s{{,\"'.]){spelled}[\"']?\s*[=:]", after)
        if line is not None:
            found[key] = line
    return found
