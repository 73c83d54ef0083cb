"""The convergence plot: an inline SVG in the colours of its page, so that one drawing suits light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Rows: TypeAlias = list[Mapping[str, Any]]

NOT_TERMS = frozenset({"kind", "where", "step", "steps", "lr", "seconds", "time", "eta", "rate"})
MOST_TERMS = 6
MOST_POINTS = 300
LEAST = 1e-100  # below, a loss is zero, and log axes run out of floats
INK, GRID = "#010101", "#020202"
SERIES = tuple(f"#0{i}0{i}0{i}" for i in range(3, 3 + MOST_TERMS))
"""Colours that nobody would choose: each is exchanged for a CSS variable of the page."""
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)), (0, (3, 3)))
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Plot:
    """A drawing and what its page needs to explain it.

    Args:
        svg: ready for the page.
        terms: names in the order of the colours `--s0`, `--s1`, ...
        lines: batches drawn, one thin line each.
        left_out: terms that a log axis cannot show, or that were too many.
        truth: whether the objective at the truth is drawn.
        alt: what the drawing shows, in words.
    """

    svg: Markup
    terms: tuple[str, ...]
    lines: int
    left_out: tuple[str, ...]
    truth: bool
    alt: str


def by_cell(events: Iterable[Mapping[str, Any]], ids: Iterable[str]) -> dict[str, dict[str, Rows]]:
    """Progress rows by cell and, within a cell, by batch. The longest id that starts a row's `where` owns it."""
    found: dict[str, dict[str, Rows]] = {i: {} for i in ids}
    longest_first = sorted(found, key=len, reverse=True)
    for row in events:
        where = str(row.get("where", ""))
        home = next((i for i in longest_first if where == i or where.startswith(f"{i}/")), None)
        if row.get("kind") == "progress" and home is not None and isinstance(row.get("step"), int):
            found[home].setdefault(where, []).append(row)
    return found


def convergence(batches: Mapping[str, Rows], at_truth: float | None, prefix: str) -> Plot | None:
    """Terms of the objective against the step, on a log axis; None if there is nothing to draw.

    Args:
        batches: progress rows of each batch of one cell.
        at_truth: drawn as a dashed level where positive.
        prefix: makes the drawing's ids unique on the page.
    """
    curves = {term: _curves(batches, term) for term in _terms(batches.values())}
    drawable = [term for term, lines in curves.items() if lines]
    shown = tuple(drawable[:MOST_TERMS])
    if not any(len(steps) > 1 for term in shown for steps, _ in curves[term]):
        return None  # an attack of one step has no course to draw
    figure = Figure(figsize=(6.0, 2.9))
    axes = figure.add_axes((0.105, 0.165, 0.875, 0.805))
    for i, term in enumerate(shown):
        _draw(axes, curves[term], i)
    truth = at_truth is not None and math.isfinite(at_truth) and at_truth > 0
    if truth and at_truth is not None:
        axes.axhline(at_truth, color=INK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
    _dress(axes)
    steps = max(float(x[-1]) for term in shown for x, _ in curves[term])
    alt = f"Convergence over {steps:.0f} steps: {', '.join(_in_words(t, curves[t]) for t in shown)}."
    return Plot(
        _inline(figure, prefix, alt), shown, len(batches), tuple(t for t in curves if t not in shown), truth, alt
    )


def lines_svg(series: Mapping[str, Sequence[tuple[float, float, float, float]]], *, x: str, y: str) -> Markup:
    """Lines with a band each, in the colours of the page: `--s0` for the first.

    Args:
        series: by name, in order: (place, middle, least, greatest).
        x, y: labels of the axes.
    """
    figure = Figure(figsize=(7.2, 3.4))
    axes = figure.add_axes((0.085, 0.145, 0.9, 0.83))
    told = []
    for i, (name, points) in enumerate(series.items()):
        at, middle, least, greatest = (np.array(v) for v in zip(*points, strict=True))
        colour = SERIES[i % MOST_TERMS]
        axes.fill_between(at, least, greatest, color=colour, alpha=0.16, linewidth=0)
        axes.plot(at, middle, color=colour, linestyle=DASHES[i % MOST_TERMS], linewidth=1.6)
        told.append(f"{name} from {middle[0]:.3g} to {middle[-1]:.3g}")
    _dress(axes, log=False)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    return _inline(figure, "lines", f"{y} by {x}: {'; '.join(told)}.")


def _terms(batches: Iterable[Rows]) -> list[str]:
    """Names of all numbers that were reported, the objective first."""
    names = dict.fromkeys(k for rows in batches for row in rows for k in row if k not in NOT_TERMS)
    return sorted(names, key=lambda n: n not in ("loss", "objective"))  # stable: the others stay as reported


def _curves(batches: Mapping[str, Rows], term: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(steps, values) per batch, without what a log axis cannot show."""
    lines = []
    for rows in batches.values():
        points: dict[int, float] = {}
        for row in rows:  # a resumed run reports some steps twice: the later row holds
            value = row.get(term)
            if isinstance(value, int | float) and not isinstance(value, bool) and LEAST < value < math.inf:
                points[row["step"]] = float(value)
        if points:
            steps = np.array(sorted(points))
            keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).round().astype(int))
            lines.append((steps[keep], np.array([points[s] for s in steps[keep].tolist()])))
    return lines


def _draw(axes: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], series: int) -> None:
    first = series == 0
    for steps, values in lines:
        axes.plot(
            steps, values, color=SERIES[series], linestyle=DASHES[series], zorder=3 if first else 2,
            linewidth=1.5 if first else 1.0, alpha=0.9 if len(lines) < 5 else 0.6,
            marker="o" if len(steps) == 1 else None, markersize=4,
        )  # fmt: skip


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 1.7 * low:  # a flat line would fill the axis with its rounding errors
        low, high = low / 1.3, high * 1.3
        axes.set_ylim(low, high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6 if decades > 3 else 15))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _dress(axes: Axes, *, log: bool = True) -> None:
    if log:
        _log(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}".replace(",", " ")))
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, labelcolor=INK, color=GRID, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _tick(value: float, _: int | None = None) -> str:
    if value <= 0:
        return ""
    exponent = round(math.log10(value))
    if 1e-2 <= value < 1e4:
        return f"{value:g}"
    lead = value / 10.0**exponent
    power = "10" + str(exponent).translate(_SUPERSCRIPT)
    return power if abs(lead - 1) < 1e-6 else f"{value:.0e}"


def _in_words(term: str, lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    start, end = (float(np.median([y[i] for _, y in lines])) for i in (0, -1))
    return f"{term} from {start:.3g} to {end:.3g}"


def _inline(figure: Figure, prefix: str, alt: str) -> Markup:
    """The figure as an SVG element for an HTML page: no prolog, page colours and font, ids of its own."""
    figure.patch.set_visible(False)
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)  # an inline style is page-wide
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{i})")
    svg = svg.replace(INK, "var(--muted)").replace(GRID, "var(--line)")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    label = Markup('<svg class="plot" role="img" aria-label="{}" {} ').format(alt, Markup(box.group() if box else ""))
    return label + Markup('xmlns:xlink="http://www.w3.org/1999/xlink">' + svg[svg.index(">") + 1 :])
