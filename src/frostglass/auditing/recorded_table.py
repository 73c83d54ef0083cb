"""The plain-text list of recorded updates that a terminal shows."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from frostglass.auditing.recorded_words import update_labels
from frostglass.auditing.scorecard import Cell, Scorecard
from frostglass.auditing.wording import MISSING, number, outcome
from frostglass.core.printable import plain

MOST_PASSED_OVER = 8


def updates_text(card: Scorecard, width: int | None = None) -> str:
    """One line for each update, then what does not fit, pooled trials and what was passed over."""
    recorded = card.recorded
    if recorded is None:
        return ""
    room = max(40, width if width is not None else shutil.get_terminal_size((100, 24)).columns)
    lines = [
        plain(f"{recorded['source']}: {recorded['engine']}, {recorded['network']}"),
        f"truth: {recorded['truth']}",
    ]
    lines += [f"! {plain(p)}" for p in recorded["problems"]]
    cells = {c.id: c for c in card.cells}
    passed = [r for r in recorded["updates"] if r["status"] == "passed over"]
    for row in recorded["updates"]:
        if row["status"] != "passed over":
            lines += ["", *_update(row, cells)]
    if passed:
        lines += ["", f"passed over: {len(passed)}"]
        lines += [f"- {title_of(r)}: {plain(r['reason'])}" for r in passed[:MOST_PASSED_OVER]]
        lines += [f"- and {len(passed) - MOST_PASSED_OVER} more"] if len(passed) > MOST_PASSED_OVER else []
    for t in recorded["trials"]:
        lines += ["", f"round {t['round']}, {t['attack']}, {t['clients']} clients: {t['verdict']}. {t['text']}"]
    wrapped = [textwrap.wrap(x, room, subsequent_indent="    ") or [""] for x in lines]
    return "\n".join(line for part in wrapped for line in part)


def title_of(row: Mapping[str, Any]) -> str:
    """`round 1, client a`."""
    return f"round {row['round']}, client {plain(str(row['client']))}"


def _update(row: Mapping[str, Any], cells: Mapping[str, Cell]) -> list[str]:
    n = MISSING if row["examples"] is None else row["examples"]
    summed = f", sum of {row['clients']} clients" if row["clients"] > 1 else ""
    lines = [f"{title_of(row)}: {n} images{summed}, {row['read_as']}, {row['mode']} mode"]
    lines.append(f"  labels: {update_labels(row['labels'])}")
    fits = [name for name, why in row["exact"].items() if not why]
    lines.append(f"  exact recovery could apply: {', '.join(fits) or 'none of ' + ', '.join(row['exact'])}")
    for id_ in row["cells"]:
        lines.append(f"  {cells[id_].attack}: {cell_words(cells[id_])}")
    if row["reason"]:
        lines.append(f"  not attacked: {row['reason']}")
    lines += [f"  {f['severity']}, {f['about']}: {plain(f['text'])}" for f in row["findings"]]
    return lines + [f"  linter, {f['severity']}: {plain(f['found'])} {plain(f['meaning'])}" for f in row["linter"]]


def cell_words(cell: Cell) -> str:
    """What an attack came to, in the words of all reports."""
    if cell.status == "failed":
        return f"failed: {plain(cell.error or '')}"
    if cell.summary is None:
        objective = "" if cell.objective is None else f", objective {cell.objective:.3g}"
        return f"done{objective}; " + (
            "no truth to score it with" if cell.pool is None else "it returned no image to compare with the truth"
        )
    scored = "" if cell.summary.psnr_median is None else f" Median PSNR {number(cell.summary.psnr_median)} dB."
    return outcome(cell).sentence + scored
