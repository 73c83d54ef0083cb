"""Names and texts of others on a terminal."""

from __future__ import annotations

import unicodedata


def plain(text: str) -> str:
    """One line without control characters: a name must not steer the terminal, nor pass for a line of its own."""
    shown = "".join(" " if c in "\n\t" else c for c in text)
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in shown).strip()
