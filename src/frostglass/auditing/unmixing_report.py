"""The report of an audit of encodings: one HTML page that holds all it shows, fetches nothing and runs no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from safetensors.torch import load_file
from torch import Tensor

from frostglass.attacks.registry import ATTACKS
from frostglass.auditing import wording
from frostglass.auditing.pictures import SMOOTH_FROM, Tile, gallery, picture_uri
from frostglass.auditing.plots import Rows, by_cell, convergence
from frostglass.auditing.report import Words, templates
from frostglass.auditing.scorecard import Cell
from frostglass.auditing.unmixing_card import UnmixScorecard, load_unmix_scorecard
from frostglass.core.files import write_text
from frostglass.core.journal import read_journal

BARS = 40
"""Bars of the exposure histogram at the most."""


def is_unmix_run(folder: Path) -> bool:
    """Whether `frostglass unmix` left this folder: its scorecard describes an encoded set."""
    try:
        return "encoded" in json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def write_unmix_report(folder: Path) -> Path:
    """Renders `report.html` from what `frostglass unmix` left in `folder`; whole or absent."""
    card = load_unmix_scorecard(folder / "scorecard.json")
    kept = folder / "pictures.safetensors"
    pictures = load_file(kept) if card.show_images and kept.exists() else {}
    page = folder / "report.html"
    write_text(page, render_unmix(card, read_journal(folder / "events.jsonl"), pictures))
    return page


def render_unmix(card: UnmixScorecard, events: list[dict[str, Any]], pictures: Mapping[str, Tensor]) -> str:
    """The whole page as text.

    Args:
        card: what was found.
        events: rows of the journal.
        pictures: `CELL/private` and `CELL/reconstruction`; ignored unless the card says `show_images`.
    """
    shown = pictures if card.show_images else {}
    rows = by_cell(events, (c.id for c in card.cells))
    views = [_view(i, cell, rows[cell.id], shown, card) for i, cell in enumerate(card.cells, start=1)]
    page = _templates().get_template("unmixing.html.j2").render(
        card=card, cells=views, bars=exposure_bars(card.encoded.get("exposure_histogram") or {})
    )  # fmt: skip
    return page.lstrip() + "\n"


@cache
def _templates() -> Environment:
    filters: list[Words] = [
        wording.number,
        wording.duration,
        wording.clock,
        wording.plural,
        wording.flat,
        wording.value_text,
    ]
    functions: list[Words] = [wording.spread, wording.threshold]
    return templates(filters, functions)


def _view(
    index: int, cell: Cell, batches: Mapping[str, Rows], pictures: Mapping[str, Tensor], card: UnmixScorecard
) -> dict[str, Any]:
    known = cell.attack in ATTACKS
    return {
        "index": index,
        "cell": cell,
        "outcome": outcome(cell),
        "summary": ATTACKS[cell.attack].summary if known else "",
        "paper": ATTACKS[cell.attack].paper if known else "",
        "gallery": gallery(cell, pictures) if card.scored else None,
        "tiles": () if card.scored else tiles(pictures.get(f"{cell.id}/reconstruction")),
        "pixelated": max(card.encoded["shape"][1:]) < SMOOTH_FROM,
        "plot": convergence(batches, None, f"plot{index}"),
    }


def outcome(cell: Cell) -> wording.Outcome:
    """A chip and a sentence for one attack; a failure is never good news."""
    if cell.status == "skipped":
        return wording.Outcome("skipped", "does not apply", "It was not run; it shows nothing in either direction.")
    if cell.status == "failed" or cell.summary is not None:
        found = wording.outcome(cell)
        if cell.attack == "demask" and found.tone == "found":
            return wording.Outcome("encoding", "best case", f"{found.sentence} A best case: see below.")
        return found
    n = int(cell.info.get("recovered", 0))
    if cell.attack == "prng_attack" and not n:
        return wording.Outcome("nothing", "no seed found", "No seed in the searched range gives these labels.")
    if not n:
        return wording.Outcome("nothing", wording.NOTHING, "It returned no image. Other attacks may recover more.")
    return wording.Outcome("encoding", "not scored", f"{wording.plural(n, 'image')} returned; look at them below.")


def tiles(images: Tensor | None) -> tuple[Tile, ...]:
    """Recovered images by themselves, where there is no truth to put beside them."""
    if images is None:
        return ()
    return tuple(Tile(picture_uri(image), f"Recovered image {i}", str(i)) for i, image in enumerate(images, 1))


def exposure_bars(histogram: Mapping[str, int]) -> list[dict[str, Any]]:
    """Bars of the exposure histogram: encodings an image is in, images, height in percent; neighbours are merged."""
    counts = sorted((int(k), int(v)) for k, v in histogram.items())
    if not counts:
        return []
    least, most = counts[0][0], counts[-1][0]
    width = -(-(most - least + 1) // BARS)
    merged: dict[int, int] = {}
    for count, images in counts:
        merged[(count - least) // width] = merged.get((count - least) // width, 0) + images
    top = max(merged.values())
    bars = []
    for i in range((most - least) // width + 1):
        low, high = least + i * width, min(most, least + (i + 1) * width - 1)
        images = merged.get(i, 0)
        bars.append({"label": f"{low}" if low == high else f"{low} to {high}", "images": images,
                     "height": round(100 * images / top, 1)})  # fmt: skip
    return bars
