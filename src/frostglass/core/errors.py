"""The two ways a request can end without a result."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FrostglassError(Exception):
    """Anything that frostglass itself reports; the command line prints it without a traceback."""


class BadInput(FrostglassError):
    """The request cannot be carried out as asked: one sentence a problem, naming field, value and fix.

    Args:
        problems: one sentence, or all that were found together.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class AttackFailed(FrostglassError):
    """A run that started and broke (non-finite values, out of memory); never turned into a score."""


def first_line(wrong: BaseException) -> str:
    """An exception of somebody else's code in one line: its type, and the first words that it says."""
    text = next((line.strip() for line in str(wrong).splitlines() if line.strip()), "")
    return f"{type(wrong).__name__}: {text}" if text else type(wrong).__name__


def close_match(word: str, known: Iterable[str]) -> str:
    """The closest known word, or the list, for the end of an error sentence: "did you mean 'x'" or "known: x, y"."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]!r}" if near else f"known: {', '.join(names) or 'none'}"
