"""What a sweep leaves behind: JSON, CSV, a table for the terminal and the picture of the frontier."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frostglass._version import __version__
from frostglass.auditing.sweep_plan import SweepPlan
from frostglass.core.files import write_json, written_beside

COLUMNS = (
    "id", "title", "family", "knob", "value", "claim", "attack", "event", "statistic", "trials", "independent",
    "successes", "rate", "lower", "upper", "chance", "bound", "epsilon_of_one_message", "unit", "accuracy",
    "accuracy_lower", "accuracy_upper", "test_images", "epsilon_of_training", "seconds", "error",
)  # fmt: skip
NOTE = (
    "Attack rates are of the attacks run alone: a low rate is no bound. Bars are exact {confidence:g} % intervals; "
    "an upper limit of the rate says nothing about stronger attacks. Bounds hold for one message."
)


def write_sweep(plan: SweepPlan, rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """sweep.json, sweep.csv and frontier.png in `out`."""
    note = NOTE.format(confidence=100 * plan.confidence)
    write_json(out / "sweep.json", {"name": plan.name, "frostglass": __version__, "note": note, "points": list(rows)})
    with written_beside(out / "sweep.csv") as beside, beside.open("w", newline="", encoding="utf-8") as held:
        writer = csv.DictWriter(held, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)
    draw(plan, rows, out / "frontier.png", note)
    return [out / name for name in ("sweep.json", "sweep.csv", "frontier.png")]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each point."""
    width = max([len(r["title"]) for r in rows], default=10) + 2
    lines = [f"{'defence':<{width}}{'attack':>9}{'interval':>16}{'bound':>8}{'accuracy':>10}{'interval':>16}"]
    for r in rows:
        if "error" in r:
            lines.append(f"{r['title']:<{width}}failed: {r['error']}")
            continue
        bound = "-" if r["bound"] is None else f"{100 * r['bound']:.1f}"
        attack = f"{100 * r['lower']:.1f} - {100 * r['upper']:.1f}"
        accuracy = f"{100 * r['accuracy_lower']:.1f} - {100 * r['accuracy_upper']:.1f}"
        shown = f"{100 * r['rate']:>9.1f}{attack:>16}{bound:>8}{100 * r['accuracy']:>10.1f}{accuracy:>16}"
        lines.append(f"{r['title']:<{width}}{shown}")
    return "\n".join([*lines, "All numbers in %."])


def draw(plan: SweepPlan, rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    """The frontier: attack success to the right, accuracy up; bounds as open triangles on the same height."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"text.parse_math": False}):  # names are the user's: a $ in them is no formula
        _drawn(plan, rows, path, note)


def _drawn(plan: SweepPlan, rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    from matplotlib import pyplot as plt

    done = [r for r in rows if "error" not in r]
    figure, axes = plt.subplots(figsize=(9, 5.6), dpi=150)
    families = list(dict.fromkeys(r["family"] for r in done))
    colours = dict(zip(families, plt.get_cmap("tab10").colors * 3, strict=False))  # type: ignore[attr-defined]
    placed: list[tuple[float, float]] = []
    for number, r in enumerate(done, 1):
        colour = colours[r["family"]]
        x, y = 100 * r["rate"], 100 * r["accuracy"]
        axes.errorbar(
            x, y, fmt="o", color=colour, markersize=5, capsize=2, linewidth=1,
            xerr=[[x - 100 * r["lower"]], [100 * r["upper"] - x]],
            yerr=[[y - 100 * r["accuracy_lower"]], [100 * r["accuracy_upper"] - y]],
        )  # fmt: skip
        if r["bound"] is not None:
            axes.plot(100 * r["bound"], y, marker=">", markerfacecolor="none", markeredgecolor=colour, markersize=8)
        near = sum(abs(x - u) < 4 and abs(y - v) < 4 for u, v in placed)  # numbers of one spot stand side by side
        placed.append((x, y))
        axes.annotate(str(number), (x, y), (6 + 9 * near, 5), textcoords="offset points", fontsize=9, color=colour)
        axes.plot([], [], "o", color=colour, label=f"{number}  {r['title']}")
    if any(r["bound"] is not None for r in done):
        axes.plot([], [], ">", markerfacecolor="none", markeredgecolor="black", label="proved bound of one message")
    chance = next((r["chance"] for r in done if r["chance"] is not None), None)
    if chance is not None:
        axes.axvline(100 * chance, color="grey", linewidth=1, linestyle=":", label=f"chance, {100 * chance:g} %")
    axes.set_xlim(-3, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"attack success, % of messages ({done[0]['attack']})" if done else "attack success, %")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(plan.name)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.text(0.01, 0.005, note, fontsize=6.5, color="dimgrey", wrap=True)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")
    plt.close(figure)
