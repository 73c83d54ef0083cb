"""The event "recovered" of a trial: which score counts, what calibrates it, and what it was decided on, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from frostglass.auditing.metrics.registry import METRICS
from frostglass.auditing.nonmembers import LEAST_NULL
from frostglass.auditing.plan import Plan
from frostglass.auditing.scorecard import Cell, ImageScore
from frostglass.auditing.wording import metric_words, plural


def reaches(plan: Plan, row: ImageScore) -> bool:
    """Whether the image's score is on the good side of the plan's threshold; False without a score."""
    bar, held = plan.report.threshold, score_of(plan, row)
    if held is None:
        return False
    return held >= bar.value if METRICS[bar.metric].make().higher_is_closer else held <= bar.value


def score_of(plan: Plan, row: ImageScore) -> float | None:
    """The score that the threshold is about; None where there is no picture, or no truth to score it with."""
    return {"psnr": row.psnr, "ssim": row.ssim, **row.extra}.get(plan.report.threshold.metric)


def bar_words(plan: Plan) -> str:
    """`SSIM at least 0.5`."""
    bar = plan.report.threshold
    side = "at least" if METRICS[bar.metric].make().higher_is_closer else "at most"
    return f"{metric_words(bar.metric)} {side} {bar.value:g}"


def decided_on(
    plan: Plan, cell: Cell, rows: Sequence[Sequence[ImageScore]], targets: Sequence[ImageScore]
) -> list[str]:
    """What the trials were decided on, a sentence each, so that pictures of other images seem no contradiction.

    Args:
        rows: images by message; targets: the one of each that its trial is about.
    """
    found = []
    near = [t for t in targets if reaches(plan, t)]
    if len(targets) == 1 and len(rows[0]) > 1:
        score = score_of(plan, targets[0])
        has = f"has {metric_words(plan.report.threshold.metric)} {score:.3g}" if score is not None else "has no picture"
        found.append(
            f"The trial is about one image alone, drawn by the seed: image {rows[0].index(targets[0]) + 1} of "
            f"{len(rows[0])}, which {has} ({bar_words(plan)} is needed)."
        )
    elif len(targets) > 1 and cell.batch > 1:
        found.append(
            f"The trials are about one image of each message, drawn by the seed: {len(near)} of these "
            f"{len(targets)} {'is' if len(near) == 1 else 'are'} recognisable."
        )
    typical = [t for t in near if not t.proved and _rankable(plan, cell, t) and not calibrated(plan, cell, t)]
    if typical:
        found.append(f"As close to other images of the class, so not counted: {len(typical)} of {len(near)}.")
    blind = [t for t in targets if t not in near and not t.proved and not _rankable(plan, cell, t)]
    if blind and not METRICS[plan.report.threshold.metric].make().needs_context:
        # of those that reach the threshold, the verdict says it
        held = [t.null.n0 for t in blind if t.null is not None]
        has = f"the source holds {min(held)}" if held else "there was no such comparison"
        found.append(
            f"Without proof, no picture could have counted in {plural(len(blind), 'trial')}: that takes "
            f"{_least_others(plan, cell)} other images of the target's class to compare with, and {has}."
        )
    return found


def _least_others(plan: Plan, cell: Cell) -> int:
    """Images of the class beside the target that a rank at the level of `calibrated` takes."""
    return max(LEAST_NULL, math.ceil(matched_among(cell) / plan.verdict.chance - 1 - 1e-9))


def _rankable(plan: Plan, cell: Cell, row: ImageScore) -> bool:
    null = row.null
    return null is not None and plan.report.threshold.metric in null.p and null.n0 >= _least_others(plan, cell)


def calibrated(plan: Plan, cell: Cell, row: ImageScore) -> bool:
    """Closer to its original than to other images of its class, at a level that pays for matching in the batch."""
    p = row.null.p.get(plan.report.threshold.metric) if row.null else None
    if row.null is None or p is None:
        return False
    among = row.null.n0 + 1
    return round(p * among) <= among * plan.verdict.chance / matched_among(cell) * (1 + 1e-9)  # `p` has six digits


def matched_among(cell: Cell) -> int:
    """Images among which matching chose the closest: those of the message or of its pool, or more rows."""
    return max(cell.pool or cell.batch, cell.rows or 0)
