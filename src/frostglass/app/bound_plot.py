"""The picture of `frostglass bound --plot`: gamma against chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from frostglass.core.errors import BadInput
from frostglass.core.files import written_beside
from frostglass.core.randomness import Rng
from frostglass.guarantees.summary import Setting, bounds

CURVE_SAMPLES = 100_000
"""Of the simulated curve, where none are named: a line is no table."""


def draw(path: Path, setting: Setting, rng: Rng, samples: int | None, marked: Sequence[float]) -> None:
    """Writes the plot; whole or not at all.

    Raises:
        BadInput: the file cannot be written.
    """
    levels = np.geomspace(min(1e-4, *marked), 0.5, 60).tolist()
    curve = bounds(setting, levels, rng, samples or CURVE_SAMPLES)
    dots = bounds(setting, marked, rng, samples or CURVE_SAMPLES)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    gammas = np.array([b.gamma for b in curve])
    axes.plot(levels, gammas, color="#0f6285", linewidth=2, label="no attack exceeds this (gamma)")
    if setting.rate < 1:
        errors = 3 * np.array([b.standard_error for b in curve])
        axes.fill_between(levels, gammas - errors, gammas + errors, color="#0f6285", alpha=0.2, linewidth=0)
    axes.plot(levels, levels, color="#5c7280", linestyle="--", linewidth=1.2, label="guessing (kappa)")
    for b in dots:
        axes.plot([b.kappa], [b.gamma], "o", color="#b4560f", markersize=5)
        axes.annotate(f"{b.gamma:.3g}", (b.kappa, b.gamma), xytext=(0, 7), textcoords="offset points", ha="center")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1.6)
    axes.set_xlabel("chance of a guess without access, kappa")
    axes.set_ylabel("probability of success")
    rate = f", q = {setting.rate:g}" if setting.rate < 1 else ""
    axes.set_title(
        f"Gaussian mechanism, noise {setting.noise_multiplier:g}, {setting.steps} releases{rate}", fontsize=11
    )
    axes.grid(which="major", color="#d3dfe7", linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        with written_beside(path) as beside:
            figure.savefig(beside, format=path.suffix[1:].lower(), dpi=150, metadata={})
    except OSError as wrong:
        raise BadInput(f"--plot: {path} cannot be written ({wrong.strerror or wrong}).") from None
