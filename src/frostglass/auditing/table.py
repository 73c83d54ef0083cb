"""The plain-text table that a terminal shows at the end of a run."""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from frostglass.auditing.scorecard import Cell, Scorecard
from frostglass.auditing.wording import MISSING, NOTHING, clock, number, outcome, spread, threshold
from frostglass.core.printable import plain

GAP = "  "
LEAST_NAME = 11
"""Names are not cut below this many columns on average; columns of numbers go first."""
SHORTEST_NAME = 5
"""Nor below this many for the sake of PSNR: what was recovered and the verdict fit into 40 columns, PSNR does not."""
PSNR = "PSNR [worst, best]"
GOES_FIRST = ("time", "batches", "SSIM", "proved", PSNR)


@dataclass
class _Column:
    head: str
    texts: list[str]
    name: bool = False

    @property
    def width(self) -> int:
        return max(_width(t) for t in [self.head, *self.texts])


def table_text(scorecard: Scorecard, width: int | None = None) -> str:
    """One aligned row a cell, then footnotes; no colour codes.

    Args:
        scorecard: what was found.
        width: columns to fit in; None takes the terminal's, 100 where there is none.
    """
    room = max(40, width if width is not None else shutil.get_terminal_size((100, 24)).columns)
    if not scorecard.cells:
        return "No cell was run."
    columns = _columns(scorecard.cells)
    widths = _fit(columns, room)
    heads = _line([c.head for c in columns], columns, widths)
    rule = GAP.join("─" * w for w in widths)
    body = [_line([c.texts[i] for c in columns], columns, widths) for i in range(len(scorecard.cells))]
    told = _notes(scorecard.cells, columns)
    notes = [line for note in told for line in textwrap.wrap(note, room, subsequent_indent="  ")]
    return "\n".join([heads, rule, *body, *([""] if notes else []), *notes])


def verdict_text(scorecard: Scorecard, width: int | None = None) -> str:
    """The verdict on the whole audit, wrapped; empty where none was given."""
    if scorecard.verdict is None:
        return ""
    room = max(40, width if width is not None else shutil.get_terminal_size((100, 24)).columns)
    return textwrap.fill(f"Verdict: {plain(scorecard.verdict.text)}", room, subsequent_indent="  ")


def _columns(cells: Sequence[Cell]) -> list[_Column]:
    done = [c.summary if c.status == "done" else None for c in cells]

    def recovered(cell: Cell) -> str:
        if cell.status != "done" or cell.summary is None:
            return outcome(cell).word.split(",")[0]
        if cell.images and cell.images[0].target == "recovered":
            return MISSING
        if cell.summary.asked:
            return f"{cell.summary.identified}/{cell.summary.asked} ¹"
        return f"{cell.summary.over_threshold.count}/{cell.summary.images}"

    judged = [c.verdict.verdict + ("" if c.verdict.role == "test" else " °") if c.verdict else MISSING for c in cells]
    verdicts = [_Column("verdict", judged)] if any(c.verdict for c in cells) else []
    return [
        _Column("scenario", [plain(c.scenario) for c in cells], name=True),
        _Column("defence", [plain(c.defense) for c in cells], name=True),
        _Column("attack", [plain(c.attack) + (" *" if c.upper_bound else "") for c in cells], name=True),
        _Column("recovered", [recovered(c) for c in cells]),
        _Column("proved", [str(s.proved) if s else MISSING for s in done]),
        _Column(PSNR, [_psnr(s.psnr_median, s.psnr_worst, s.psnr_best) if s else MISSING for s in done]),
        _Column("SSIM", [number(s.ssim_median, 2) if s else MISSING for s in done]),
        _Column("batches", [str(s.batches) if s else MISSING for s in done]),
        _Column("time", [clock(c.seconds) for c in cells]),
        *verdicts,
    ]


def _psnr(median: float | None, worst: float | None, best: float | None) -> str:
    return spread(median, worst, best, to=", ")


def _fit(columns: list[_Column], room: int) -> list[int]:
    """Widths that fit: names share what the numbers leave; in a narrow terminal the least important numbers go."""

    def left(kept: list[_Column]) -> int:
        return room - sum(c.width for c in kept if not c.name) - len(GAP) * (len(kept) - 1)

    wanted, named = sum(c.width for c in columns if c.name), sum(c.name for c in columns)
    for head in GOES_FIRST:
        if left(columns) >= min(wanted, named * (SHORTEST_NAME if head == PSNR else LEAST_NAME)):
            break
        columns[:] = [c for c in columns if c.head != head]
    names = sorted((c for c in columns if c.name), key=lambda c: c.width)
    share, open_columns = left(columns), len(names)
    widths: dict[str, int] = {}
    for column in names:  # narrow names first: what they leave goes to the wide ones
        widths[column.head] = min(column.width, max(3, share // open_columns))
        share, open_columns = share - widths[column.head], open_columns - 1
    return [widths.get(c.head, c.width) for c in columns]


def _line(texts: Sequence[str], columns: Sequence[_Column], widths: Sequence[int]) -> str:
    parts = []
    for text, column, width in zip(texts, columns, widths, strict=True):
        mark = " *" if column.name and text.endswith(" *") else ""
        cut = _cut(text.removesuffix(mark), width - len(mark)) + mark
        pad = " " * (width - _width(cut))
        parts.append(cut + pad if column.name else pad + cut)
    return GAP.join(parts).rstrip()


def _notes(cells: Sequence[Cell], columns: Sequence[_Column]) -> list[str]:
    notes, heads = [], {c.head for c in columns}
    bars = sorted({threshold(c.summary.over_threshold) for c in cells if c.summary})
    if bars:
        medians = ["PSNR in dB"] * (PSNR in heads) + ["SSIM"] * ("SSIM" in heads)
        of = f"; {' and '.join(medians)} {'are medians' if len(medians) == 2 else 'is a median'} over the images"
        notes.append(f"recovered: reaches {' or '.join(bars)}{of if medians else ''}")
    if any(outcome(c).tone == "nothing" for c in cells):
        notes.append(f"0 recovered: {NOTHING}; another may recover more")
    games = sorted({c.summary.candidates or 0 for c in cells if c.summary and c.summary.asked})
    if games:
        notes.append(f"¹ messages in which the image was named among {' or '.join(map(str, games))} candidates")
    if any(c.upper_bound for c in cells):
        notes.append("* upper bound: the grants exceed what such a client really sends")
    if any(c.verdict and c.verdict.role != "test" for c in cells):
        notes.append("° a control or beside the primary test: has no part in the verdict")
    for cell in cells:
        coded = cell.encoding_summary
        if coded and cell.status == "done":
            hits = f"{coded.over_threshold.count} of {coded.images} recovered, {coded.proved} proved"
            psnr = _psnr(coded.psnr_median, coded.psnr_worst, coded.psnr_best)
            notes.append(f"encodings of {plain(cell.title)}: {hits}, PSNR {psnr}")
        if cell.status != "done" and cell.error:
            notes.append(f"{cell.status}: {plain(cell.title)}: {plain(cell.error.strip().splitlines()[-1])}")
    return notes


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _width(text: str) -> int:
    return sum(_char_width(c) for c in text)


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    kept, used = "", 0
    for char in text:
        if used + _char_width(char) > width - 1:
            break
        kept, used = kept + char, used + _char_width(char)
    return kept.rstrip() + "…"
