"""Numbers and sentences that the report and the terminal share, so that both say a result in the same words.

Two rules are held here: a missing value prints as "–", and an attack that did not succeed reads "nothing shown by this
attack", because a failed attack is no evidence of privacy.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from frostglass.auditing.cells import beyond_chance, uncounted_game
from frostglass.auditing.scorecard import Cell, Labels, NullRank, OverThreshold, Scorecard, Summary
from frostglass.auditing.verdict_rules import confidence_words

MISSING = "–"
NOTHING = "nothing shown by this attack"
SLACK = 1.05
"""An objective up to 5 % above the truth's counts as having reached it."""

Tone = Literal["found", "encoding", "nothing", "failed", "skipped"]


def number(value: float | None, digits: int = 1) -> str:
    """Fixed decimals with a true minus sign; "–" where there is no number."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    if not text.strip("-0."):
        text = text.lstrip("-")  # -0.0 is 0.0 to a reader
    return text.replace("-", "−")


def significant(value: float | None) -> str:
    """Three significant digits, for losses and budgets."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.3g}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage; 0 and 100 only where it is none or all."""
    if share is None or math.isnan(share):
        return MISSING
    if 0 < share <= 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def spread(median: float | None, worst: float | None, best: float | None, digits: int = 1, to: str = " to ") -> str:
    """`median [worst to best]`; a dash where an unmatched image stands below every score."""
    if all(number(v) == MISSING for v in (median, worst, best)):
        return MISSING
    return f"{number(median, digits)} [{number(worst, digits)}{to}{number(best, digits)}]"


def duration(seconds: float) -> str:
    """Wall time in at most two units."""
    if seconds < 0.95:
        return "<1 s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def clock(seconds: float) -> str:
    """Wall time in one unit, for narrow columns."""
    minutes = round(seconds / 60)
    return duration(seconds) if seconds < 59.5 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def plural(count: int, word: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}{'es' if word.endswith('h') else 's'}"


def value_text(value: Any) -> str:
    """Any JSON value for a reader: "–" for missing, yes and no for booleans."""
    if value is None or value in ("", "nan", [], {}):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return MISSING if math.isnan(value) else f"{value:.6g}".replace("inf", "∞")
    if isinstance(value, list | tuple):
        return ", ".join(value_text(v) for v in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {value_text(v)}" for k, v in value.items())
    return str(value)


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted name, text) rows."""
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{name}.")
        else:
            yield name, value_text(value)


def metric_words(metric: str) -> str:
    """As sentences write it: PSNR and SSIM in capitals, others by their names."""
    return metric.upper() if metric in ("psnr", "ssim") else metric


def threshold(over: OverThreshold) -> str:
    """`PSNR 20 dB`: the score from which an image counts as recovered."""
    return f"{metric_words(over.metric)} {over.value:g}{' dB' if over.metric.lower() == 'psnr' else ''}"


def null_words(null: NullRank | None) -> str:
    """`PSNR .010, SSIM .030 (n0 = 99)`: ranks among non-members, with what they were taken among."""
    if null is None:
        return MISSING

    def told(ranks: Mapping[str, float]) -> str:
        return ", ".join(f"{metric_words(name)} {p:.3f}" for name, p in ranks.items()) or MISSING

    if null.any_n0 is None:
        return f"{told(null.p)} (n0 = {null.n0})"
    other = f"; any class: {told(null.any_p)} (n0 = {null.any_n0})" if null.any_n0 else ""
    return f"n/a (n0 = {null.n0}){other}"


@dataclass(frozen=True)
class Outcome:
    """What a cell shows: a tone for colour, a word for a chip, and a sentence.

    Args:
        tone: its class.
        word: one to five words.
        sentence: the result with its n.
    """

    tone: Tone
    word: str
    sentence: str


def outcome(cell: Cell) -> Outcome:
    """Reads a cell without ever turning a failure into good news."""
    if cell.status == "failed":
        return Outcome("failed", "failed, no result", "This cell broke and has no result. A broken run shows nothing.")
    if cell.status == "skipped" or cell.summary is None:
        word = "skipped" if cell.status == "skipped" else "no score"
        unscored = cell.status == "done" and cell.objective is not None
        why = " No truth was given, and the attack proved nothing by itself." if unscored else ""
        if unscored and cell.pool is not None:
            why = " The attack returned no image that could be compared with the truth."
        return Outcome("skipped", word, f"This cell was not scored.{why} It shows nothing in either direction.")
    if cell.summary.asked:
        return _named(cell, cell.summary)
    found, n, proved = cell.summary.over_threshold.count, cell.summary.images, cell.summary.proved
    bar = threshold(cell.summary.over_threshold)
    if cell.images and cell.images[0].target == "recovered":
        said = f"{proved} of {plural(n, 'image')} of this message {'is' if proved == 1 else 'are'} proved"
        return Outcome("found", "proved", f"{said}: verified algebraically. No truth was given to score the rest with.")
    reach = f"{found} of {plural(n, 'private image')} reach {bar}, fixed before the run as recognisable"
    if proved:
        verb = "is" if proved == 1 else "are"
        more = f"; {proved} of {n} {verb} proved: the attack verified {'it' if proved == 1 else 'them'} algebraically."
        return Outcome("found", "recovered, proved" if found else "proved", reach + more)
    if found:
        return Outcome("found", "recovered", reach + ".")
    coded = cell.encoding_summary
    if coded and (coded.proved or coded.over_threshold.count):
        hits = f"{coded.over_threshold.count} of {coded.images} reach {threshold(coded.over_threshold)}"
        more = f" and {coded.proved} {'is' if coded.proved == 1 else 'are'} proved" if coded.proved else ""
        return Outcome("encoding", "encodings only", f"{reach}; of the encodings that were trained on, {hits}{more}.")
    return Outcome("nothing", NOTHING, f"{reach}. Other attacks may recover more.")


def _named(cell: Cell, summary: Summary) -> Outcome:
    """Of an identification game; "identified" by the rule of the verdict, so that the two never disagree."""
    named, asked, n = summary.identified or 0, summary.asked or 0, summary.candidates or 1
    said = (
        f"The image was named among {n} candidates in {named} of {plural(asked, 'message')}; guessing names it in "
        f"{asked / n:.3g}"
    )
    why = uncounted_game(cell)
    if why:
        return Outcome("nothing", NOTHING, f"{said}. This cannot be counted: {' '.join(why)}")
    v = cell.verdict
    sure = "95 % confidence" if v is None else confidence_words(v.confidence, v.tests)
    if beyond_chance(cell):
        return Outcome("found", "identified", f"{said}. That is more than guessing explains ({sure}).")
    return Outcome("nothing", NOTHING, f"{said}, and this is no more ({sure}). Other attacks may name more.")


def subline(scorecard: Scorecard) -> str:
    """The headline's plain-language second sentence: how many cells ended how."""
    tones = Counter(outcome(c).tone for c in scorecard.cells)
    named = any(outcome(c).word == "identified" for c in scorecard.cells)
    ends: dict[Tone, str] = {
        "found": f"{'recovered or identified' if named else 'recovered'} at least one private image",
        "encoding": "recovered encodings but no private image",
        "nothing": "showed nothing with the attack that was run",
        "failed": "failed and have no result" if tones["failed"] != 1 else "failed and has no result",
        "skipped": "were not scored" if tones["skipped"] != 1 else "was not scored",
    }
    parts = [f"{tones[tone]} {text}" for tone, text in ends.items() if tones[tone]]
    return f"Of {plural(len(scorecard.cells), 'cell')}, {', '.join(parts)}." if parts else "No cell was run."


def fell_short(end: float | None, truth: float | None) -> bool:
    """True if an optimiser ended above the objective of the truth: the attack failed, whatever it shows."""
    if end is None or truth is None or math.isnan(end) or math.isnan(truth):
        return False
    return end > truth + (SLACK - 1) * abs(truth) + 1e-12


def objective_title(cell: Cell) -> str:
    """Heading above `objective_words`."""
    summary = cell.encoding_summary or cell.summary
    if summary is not None and summary.proved == summary.images:
        return "How it is known to be exact"
    return "Progress of the attack" if cell.objective is None else "Did the optimiser do its work?"


def objective_words(cell: Cell) -> str:
    """Whether the optimiser did its work, told from the attack's loss at its end and at the truth."""
    end, truth = cell.objective, cell.objective_at_truth
    summary = cell.encoding_summary or cell.summary
    if summary is not None and summary.proved == summary.images and end is not None:
        return (
            "Nothing was optimised blindly: the gradient was computed again from the recovered batch and equals the "
            f"observed one (relative error {significant(end)}). This is a fact, not an estimate."
        )
    if cell.info.get("certificate") is True and end is not None:
        return (
            "The algebra of the attack held: its own residuals are at rounding level, a certificate that uses no "
            f"ground truth. Fitting pixels then ended at an objective of {significant(end)}."
        )
    if end is None or math.isnan(end):
        return "This attack reports no objective: it optimises nothing, and there is no gap to the truth to test."
    if truth is None or math.isnan(truth):
        return (
            f"The attack ended at an objective of {significant(end)}. The objective at the truth was not computed, "
            "so an optimiser failure cannot be told apart from privacy."
        )
    both = f"at {significant(end)}, and the private batch itself scores {significant(truth)}"
    if fell_short(end, truth):
        if outcome(cell).tone in ("found", "encoding"):
            return f"The optimiser ended {both}: it stopped above the truth, and a better one could recover more."
        return f"The optimiser ended above the truth’s objective ({both}): the attack failed, privacy was not shown."
    if outcome(cell).tone == "found":
        return f"The optimiser ended {both}: it got as low as the truth, or within 5 % of it."
    return (
        f"The optimiser ended {both}: other pictures score at least as well as the truth. "
        "This objective does not single out the private images; another one may."
    )


def labels_words(labels: Labels, batches: int, show: bool) -> str:
    """How the attack came by the labels; the labels themselves only where the plan shows pictures too."""
    over = "" if batches == 1 else f" (means over {batches} batches)"
    if labels.source == "granted":
        return "The labels were granted, in no particular order; a real server would have to restore them."
    if labels.source == "unused":
        return "This attack uses no labels."
    scores = [
        (labels.set_accuracy, "of the classes present were named (set accuracy)"),
        (labels.count_accuracy, "of the labels were right with their multiplicity (count accuracy)"),
    ]
    told = "; ".join(f"{percent(value)} {text}" for value, text in scores if value is not None)
    words = "The attack restored the labels from the update"
    words += f": {told}{over}" if told else "; no accuracy was recorded"
    if labels.no_gradient_guess is not None:
        words += f". Guessing without the update reaches {percent(labels.no_gradient_guess)}"
    if labels.restored and not show:
        words += ". The labels themselves are withheld here, like the pictures"
    elif labels.restored:
        counts = sorted(Counter(labels.restored).items())
        words += f". Restored{'' if batches == 1 else ' in the first batch'}: " + ", ".join(
            f"class {k}" + (f" × {m}" if m > 1 else "") for k, m in counts
        )
    return words + "."


def batch_words(summary: Summary) -> str:
    """The spread between independent batches, or that there is none to give."""
    means: Sequence[float] = summary.psnr_batch_means
    if len(means) < 2:
        return "one batch: no spread between batches can be given"
    shown = ", ".join(number(m) for m in means[:6]) + (", …" if len(means) > 6 else "")
    return f"batch means {shown} dB; standard deviation {number(statistics.stdev(means))}"
