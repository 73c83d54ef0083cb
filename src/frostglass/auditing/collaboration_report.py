"""The report of a comparison of federations: accuracy by round, leakage by client, in one self-contained page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from frostglass.auditing import wording
from frostglass.auditing.plots import lines_svg
from frostglass.auditing.recorded_words import update_labels
from frostglass.auditing.report import Words, templates
from frostglass.core.errors import BadInput
from frostglass.core.files import write_text
from frostglass.defenses.dp_instahide import PIXELS
from frostglass.federated.history import UNITS

RESULTS = "collaboration.json"


def write_collaboration(folder: Path) -> Path:
    """Renders `report.html` from `collaboration.json`; whole or absent.

    Raises:
        BadInput: the folder holds no whole comparison.
    """
    try:
        value = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = {}
    if not value.get("whole"):
        raise BadInput(f"{folder}: holds no whole comparison; go on with it by --resume.")
    page = folder / "report.html"
    write_text(page, render(value))
    return page


def render(value: Mapping[str, Any]) -> str:
    """The whole page as text."""
    rows = [summary(m) for m in value["methods"]]
    filters: list[Words] = [wording.number, wording.percent, wording.plural, wording.flat]
    functions: list[Words] = [update_labels, told_game]
    page = templates(filters, functions).get_template("collaboration.html.j2")
    told = page.render(
        value=value, rows=rows, svg=accuracy_svg(value["methods"]), headline=headline(rows), units=UNITS, pixels=PIXELS
    )
    return told.lstrip() + "\n"


def best(row: Mapping[str, Any]) -> float:
    """Accuracy in a round as the method's networks are used: over encodings where they are trained on those."""
    encoded = row["accuracy_encoded"]
    return float(row["accuracy"] if encoded is None else encoded)


def summary(method: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the overview."""
    last = [best(run["rounds"][-1]) for run in method["runs"]]
    plain = [float(run["rounds"][-1]["accuracy"]) for run in method["runs"]]
    clients = [c for run in method["runs"] for row in run["rounds"] for c in row["clients"]]
    spent = [c for c in clients if c.get("epsilon") is not None]
    exposed = [c["exposure-max"] for c in clients if c.get("exposure-max") is not None]
    games = [g for row in method["leakage"] if (g := row.get("game")) and "share" in g]
    labels = [r["labels"] for r in method["leakage"] if r["labels"] and r["labels"].get("count_accuracy") is not None]
    images = [i for row in method["leakage"] for i in row["images"]]
    return {
        "name": method["name"], "defence": method["defence"], "seeds": len(last),
        "rounds": len(method["runs"][0]["rounds"]) - 1,
        "accuracy": statistics.fmean(last), "least": min(last), "most": max(last),
        "plain": statistics.fmean(plain),
        "encoded": method["runs"][0]["rounds"][-1]["accuracy_encoded"] is not None,
        "test_images": method["runs"][0]["test_images"],
        "epsilon": max((c["epsilon"] for c in spent), default=None),
        "delta": spent[0]["delta"] if spent else None, "unit": spent[0]["unit"] if spent else None,
        "exposure": max(exposed, default=None),
        "named": statistics.fmean(g["share"] for g in games) if games else None,
        "chance": games[0]["chance"] if games else None, "updates": len(method["leakage"]),
        "labels": statistics.fmean(x["count_accuracy"] for x in labels) if labels else None,
        "guess": statistics.fmean(x["guess"] for x in labels) if labels else None, "labelled": len(labels),
        "recovered": sum(i["recognisable"] for i in images), "attacked": sum(i["images"] for i in images),
        "verdict": method["verdict"], "said": method["said"],
        "insecure": any(run["insecure"] for run in method["runs"]),
    }  # fmt: skip


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """What it comes to, in a sentence."""
    found = [f"{r['name']} {100 * r['accuracy']:.1f} %" for r in rows]
    return f"Test accuracy after training together: {'; '.join(found)}."


def table(value: Mapping[str, Any]) -> str:
    """A line for each method, for the terminal."""
    rows = [summary(m) for m in value["methods"]]
    width = max(len(r["name"]) for r in rows) + 2
    lines = [f"{'':<{width}}{'accuracy %':>17}{'epsilon':>10}{'encodings':>11}{'labels told':>13}{'images named':>14}"]
    for r in rows:
        accuracy = f"{100 * r['least']:.1f} to {100 * r['most']:.1f}"
        epsilon = "-" if r["epsilon"] is None else f"{r['epsilon']:.1f}"
        exposure = "-" if r["exposure"] is None else str(r["exposure"])
        labels = "-" if r["labels"] is None else f"{r['labels']:.2f} ({r['guess']:.2f})"
        named = "-" if r["named"] is None else f"{r['named']:.2f} ({r['chance']:.2f})"
        lines.append(f"{r['name']:<{width}}{accuracy:>17}{epsilon:>10}{exposure:>11}{labels:>13}{named:>14}")
    note = "In brackets: what guessing without the update scores. Attacks that fail prove nothing."
    seeds = wording.plural(len(value["seeds"]), "seed")
    return "\n".join([*lines, f"{seeds}; updates of the first are audited. {note}"])


def told_game(game: Mapping[str, Any] | None) -> str:
    """An update's identification games in words."""
    if not game:
        return "not played"
    if "share" not in game:
        return str(game["reason"])
    return f"{wording.percent(game['share'])} of the images asked for; chance {wording.percent(game['chance'])}"


def accuracy_svg(methods: Sequence[Mapping[str, Any]]) -> Markup:
    """Mean accuracy over seeds by round, with the band from the least to the greatest."""
    series = {}
    for method in methods:
        runs = [[best(row) for row in run["rounds"]] for run in method["runs"]]
        rounds = range(len(runs[0]))
        values = [[100 * run[i] for run in runs] for i in rounds]
        series[method["name"]] = [(i, statistics.fmean(v), min(v), max(v)) for i, v in zip(rounds, values, strict=True)]
    return lines_svg(series, x="round", y="test accuracy, %")
