"""What is said wherever InstaHide appears: what it claims, what it costs, and what it does not give."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence

WARNING = (
    "InstaHide is broken: it gives no (epsilon, delta), its sign mask adds nothing to the mixing, and encoding the "
    "same images anew in every epoch is what lets them be recovered. Do not rely on it to keep images secret."
)
INFERENCE = (
    "many encodings of one image sent to a server are themselves an attack surface: their mean square already shows it"
)

RESUMED = (
    "the encodings that were kept for reuse ended with the run that made them: resuming makes new ones of every image, "
    "beyond `rounds`; the ledger counts them"
)
RANKS = (
    "max_exposure and rounds count the encodings of this process alone, so ranks that share images (a "
    "DistributedSampler over one set) go beyond them together; give each rank its own shard (own_part)"
)

_NOT_THE_CALLER = ("frostglass.", "jaxtyping.", "beartype.")  # the latter two wrap functions in tests


class PrivacyCaution(UserWarning):
    """Something that was asked for makes an attack easier."""


def caution(messages: Sequence[str]) -> None:
    """One `PrivacyCaution`, placed at the code outside frostglass that asked for it."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(_NOT_THE_CALLER):
        depth, frame = depth + 1, frame.f_back
    warnings.warn("InstaHide: " + "; ".join(messages) + ".", PrivacyCaution, stacklevel=depth)


def cautions_of(k: int, has_pool: bool, blank_labels: bool = False) -> list[str]:
    """What about these settings makes an attack easier."""
    found = []
    if k < 4:
        found.append(f"k = {k} is below 4: such encodings have been inverted within a minute")
    if not has_pool:
        found.append("no public pool: every partner is a private image, which ties the encodings to each other")
    if blank_labels:
        found.append(
            "quantised labels with c2 below 1/8: a private share that rounds to no quarter leaves a target of zeros"
        )
    return found


def claimed_work(k: int, private: int, images: int, public: int) -> tuple[float, float]:
    """(naive, meet-in-the-middle) tries of the paper's brute-force estimate: n^(unknown partners) and n^(k / 2).

    Both as logarithms to base 10: at k = 100 the numbers themselves are beyond any float.
    """
    if public:
        return (k - private) * math.log10(public), k / 2 * math.log10(public)
    return (k - 1) * math.log10(images), k / 2 * math.log10(images)


def histogram_line(histogram: dict[int, int]) -> str:
    """Appearances and images, short: equal neighbours are not merged, long tables are cut to their ends."""
    items = [f"{images} images in {count}" for count, images in sorted(histogram.items())]
    return "; ".join(items if len(items) <= 8 else [*items[:4], "...", *items[-4:]])
