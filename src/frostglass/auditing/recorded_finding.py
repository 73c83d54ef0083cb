"""One sentence about a recorded update that a reader of its results must know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What does not fit, or what the values tell.

    Args:
        severity: error: nothing can be attacked; warning: results may mislead; note: a fact about the update.
        about: names, buffers, mode, normalisation, scale, pruning, quantised, noise, clipping, steps, examples, ...
        text: a sentence or two, with what to do.
    """

    severity: Literal["error", "warning", "note"]
    about: str
    text: str
