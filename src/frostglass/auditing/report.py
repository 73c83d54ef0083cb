"""The report: one HTML page that holds everything it shows, fetches nothing and runs no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from frostglass.auditing import wording
from frostglass.auditing.pictures import film, gallery
from frostglass.auditing.plots import Rows, by_cell, convergence
from frostglass.auditing.recorded_words import update_labels
from frostglass.auditing.scorecard import Cell, ImageScore, Scorecard, load_scorecard
from frostglass.auditing.store import load_tensors
from frostglass.core.files import write_text
from frostglass.core.journal import read_journal
from frostglass.core.threat import ALWAYS, MEANING, Knows

RANGE_DB = 50.0
"""Right end of the small PSNR bars of the overview; what lies beyond is drawn at the end."""


def write_report(folder: Path) -> Path:
    """Renders `report.html` from what a run left in `folder`; whole or absent.

    Pictures are read only if the plan asked to show them, even where a file with pictures lies in the folder.
    """
    scorecard = load_scorecard(folder / "scorecard.json")
    kept = folder / "pictures.safetensors"
    pictures = load_tensors(kept)[0] if scorecard.show_images and kept.exists() else None
    page = folder / "report.html"
    write_text(page, render(scorecard, read_journal(folder / "events.jsonl"), pictures))
    return page


def render(scorecard: Scorecard, events: list[dict[str, Any]], pictures: Mapping[str, Tensor] | None) -> str:
    """The whole page as text.

    Args:
        scorecard: what was found.
        events: rows of the journal, for the convergence plots.
        pictures: by the keys of `pictures.safetensors`; ignored unless the scorecard says `show_images`.
    """
    shown: Mapping[str, Tensor] = (pictures or {}) if scorecard.show_images else {}
    rows = by_cell(events, (c.id for c in scorecard.cells))
    cells = [_view(i, cell, rows[cell.id], shown) for i, cell in enumerate(scorecard.cells, start=1)]
    page = _templates().get_template("report.html.j2").render(
        card=scorecard, cells=cells, subline=wording.subline(scorecard)
    )  # fmt: skip
    return page.lstrip() + "\n"


Words = Callable[..., Any]
"""A function that a template calls by its name."""


@cache
def _templates() -> Environment:
    filters: list[Words] = [
        wording.number,
        wording.percent,
        wording.duration,
        wording.clock,
        wording.plural,
        wording.flat,
    ]
    sentences: list[Words] = [wording.threshold, wording.objective_title, wording.objective_words, wording.labels_words]
    sentences += [wording.spread, wording.batch_words, wording.null_words]
    sentences += [update_labels]
    return templates(filters, sentences)


def templates(filters: Sequence[Words], functions: Sequence[Words]) -> Environment:
    """Pages of this package, with words of `wording` by their names."""
    page = Environment(
        loader=PackageLoader("frostglass.auditing"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_present,
    )  # fmt: skip
    page.filters |= {f.__name__: f for f in filters}
    page.globals |= {f.__name__: f for f in functions}
    return page


def _present(value: Any) -> Any:
    """Whatever a template prints without a filter: a missing value is a dash."""
    return wording.MISSING if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _view(index: int, cell: Cell, batches: Mapping[str, Rows], pictures: Mapping[str, Tensor]) -> dict[str, Any]:
    """Everything the template shows of one cell."""
    granted = set(cell.grants)
    always = {k.value for k in ALWAYS}
    unknown = sorted(granted - {k.value for k in Knows})
    given = [(k.value, MEANING[k]) for k in Knows if k.value in granted] + [(name, "") for name in unknown]
    return {
        "index": index,
        "cell": cell,
        "outcome": wording.outcome(cell),
        "given": sorted(given, key=lambda grant: grant[0] in always),  # what sets this cell apart stands first
        "always": always,
        "beyond": [name for name, _ in given if name not in always],
        "not_given": [(k.value, MEANING[k]) for k in Knows if k.value not in granted],
        "gallery": gallery(cell, pictures),
        "film": film(cell, pictures),
        "plot": convergence(batches, cell.objective_at_truth, f"plot{index}"),
        "range": _range(cell),
        "extras": _extras(cell.images),
        "further": list(dict.fromkeys([*_extras(cell.images), *cell.metric_notes])),
        "encoding_extras": _extras(cell.encoding_images),
    }


def _extras(images: list[ImageScore]) -> list[str]:
    """Names of all further metrics, in the order in which they appear."""
    return list(dict.fromkeys(name for image in images for name in image.extra))


def _range(cell: Cell) -> dict[str, float] | None:
    """Where worst, median, best and threshold lie on the small bar, in percent of its width."""
    summary = cell.summary
    if summary is None or summary.psnr_median is None or not math.isfinite(summary.psnr_median):
        return None

    def place(value: float | None, other: float) -> float:
        chosen = other if value is None or math.isnan(value) else value
        return 100 * min(max(chosen / RANGE_DB, 0.0), 1.0)

    median = summary.psnr_median
    places = {
        "low": place(summary.psnr_worst, 0.0),
        "mid": place(median, median),
        "high": place(summary.psnr_best, median),
    }
    if summary.over_threshold.metric.lower() == "psnr":
        places["bar"] = place(summary.over_threshold.value, 0.0)
    return places
