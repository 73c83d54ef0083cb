"""`frostglass bound`: what a noise setting proves about reconstruction, without running an attack."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frostglass.core.errors import BadInput

if TYPE_CHECKING:
    from frostglass.guarantees.summary import Bound, Setting

KAPPAS = (0.1, 0.01, 0.001)
LEAST_FIXED = 1e-3
"""gamma below which four decimals are too few."""
MOST_STEPS = 10**12
"""Releases beyond which floating point says nothing."""


@click.command("bound", short_help="What a noise level proves against every attack")
@click.option("--sigma", required=True, type=float, help="Noise multiplier: noise on the sum / clipping norm.")
@click.option("--steps", default=1, show_default=True, help="Releases that are composed (T).")
@click.option("--rate", default=1.0, show_default=True, help="Poisson sampling rate q; 1: no amplification.")
@click.option("--gallery", type=int, help="Candidates among which an image is identified; chance is 1 / N.")
@click.option("--kappa", "kappas", type=float, multiple=True, help="Chance level; may be repeated.")
@click.option("--delta", default=1e-5, show_default=True, help="Of (epsilon, delta).")
@click.option(
    "--adjacency", type=click.Choice(["add_remove", "replace_one"]), default="add_remove", show_default=True
)  # fmt: skip
@click.option(
    "--unit", type=click.Choice(["image", "client"]), default="image", show_default=True, help="Clipped unit."
)
@click.option("--image", metavar="CxHxW", help="Shape for the PSNR ceiling, as 3x32x32.")
@click.option("--samples", type=int, help="Runs, where gamma is simulated.  [default: 2e5, 1e6 for kappa <= 1e-3]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the simulation.")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw gamma against kappa (.png, .svg, .pdf).")
def command(
    sigma: float,
    steps: int,
    rate: float,
    gallery: int | None,
    kappas: Sequence[float],
    delta: float,
    adjacency: str,
    unit: str,
    image: str | None,
    samples: int | None,
    seed: int,
    style: str,
    plot: Path | None,
) -> None:
    """Bound the success of every attack: gamma for a chance level kappa, epsilon, and the PSNR ceiling."""
    from tqdm import tqdm

    from frostglass.core.files import check_writable
    from frostglass.core.randomness import Rng
    from frostglass.guarantees.domain import LEAST_NOISE
    from frostglass.guarantees.rero import samples_for
    from frostglass.guarantees.summary import MOST_SAMPLED, Setting, bounds, epsilons, to_json

    if 0 < sigma < LEAST_NOISE:
        raise BadInput(
            f"--sigma: {sigma:g} is too little noise for anything to be bounded; give at least {LEAST_NOISE:g} (useful "
            "values are around 1)."
        )
    most = MOST_SAMPLED if rate < 1 else MOST_STEPS
    if steps > most:
        raise BadInput(f"--steps: {steps} must be at most {most}{' where --rate is below 1' if rate < 1 else ''}.")
    setting = Setting(sigma, steps, rate, delta, adjacency, unit)  # type: ignore[arg-type]
    levels = _levels(gallery, kappas)
    shape = dimensions_of(image)
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise BadInput(f"--plot: {plot.name!r} must end in .png, .svg or .pdf.")
        check_writable(plot, "bound", "--plot")
    if samples is not None and samples < 1000:
        raise BadInput(f"--samples: {samples} is too few for a standard error; give at least 1000.")
    rng = Rng.from_seed(seed, "bound")
    with ExitStack() as held:

        @functools.cache
        def bar() -> Any:  # once something is simulated, and on a terminal
            total = samples or samples_for(levels)
            return held.enter_context(tqdm(total=total, desc="simulating", unit="run", unit_scale=True, disable=None))

        found = bounds(setting, levels, rng, samples, lambda runs: bar().update(runs))
    spent = epsilons(setting)
    if style == "json":
        click.echo(json.dumps(to_json(setting, found, spent, shape), indent=2))
    else:
        click.echo(_text(setting, found, spent, shape, gallery))
    if plot is not None:
        from frostglass.app.bound_plot import draw

        draw(plot, setting, rng, samples, levels)
        if style == "text":
            click.echo(f"\nPlot: {plot}")


def _levels(gallery: int | None, kappas: Sequence[float]) -> list[float]:
    if gallery is not None and gallery < 2:
        raise BadInput(f"--gallery: {gallery} must be at least 2 candidates.")
    named = [*([1 / gallery] if gallery else []), *kappas]
    return sorted(set(named or KAPPAS) | (set(KAPPAS) if gallery and not kappas else set()), reverse=True)


def dimensions_of(image: str | None) -> int | None:
    """Values of an image of shape `CxHxW`, None for none."""
    shape = shape_of(image)
    return None if shape is None else shape[0] * shape[1] * shape[2]


def shape_of(image: str | None) -> tuple[int, int, int] | None:
    """(channels, height, width) of `CxHxW`, None for none.

    Raises:
        BadInput: it reads otherwise.
    """
    if image is None:
        return None
    parts = image.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise BadInput(f"--image: {image!r} must read channels x height x width, as 3x32x32.")
    channels, height, width = (int(p) for p in parts)
    return channels, height, width


def _text(
    setting: Setting, found: Sequence[Bound], spent: dict[str, float], shape: int | None, gallery: int | None
) -> str:
    """The table for a person."""
    from frostglass.guarantees.psnr_ceiling import SAY_BOTH
    from frostglass.guarantees.summary import ceiling, observations

    sampled = f", sampling rate {setting.rate:g}" if setting.rate < 1 else ", no sampling"
    lines = [
        f"Gaussian mechanism, noise multiplier {setting.noise_multiplier:g}, {setting.steps} "
        f"release{'s' if setting.steps > 1 else ''}{sampled}, unit: one {setting.unit}",
        "",
        "  chance kappa      no attack succeeds more often than      times chance",
    ]
    for b in found:
        error = f" ± {b.standard_error:.1g}" if b.standard_error else ""
        note = f"   <- top-1 of {gallery}" if gallery and b.kappa == 1 / gallery else ""
        gamma = f"{b.gamma:.4f}" if b.gamma >= LEAST_FIXED else f"{b.gamma:.3g}"  # no bound may read 0.0000
        lines.append(f"  {b.kappa:<16.4g}  {f'{gamma}{error}':<38}{b.gamma / b.kappa:>6.1f}x{note}")
    lines += ["", f"  epsilon at delta = {setting.delta:g}:"]
    lines += [f"    {name:<14}{value:>12.4g}" for name, value in spent.items()]
    if shape is not None:
        top = ceiling(setting, shape)
        lines += ["", *_ceiling_lines(shape, top, observations(setting), setting.rate < 1, SAY_BOTH)]
    lines += ["", "This holds if:", *(f"  - {a}" for a in setting.assumptions())]
    if any(b.standard_error for b in found):
        lines.append("± is one standard error of the simulation.")
    elif setting.rate < 1:
        lines.append("Composed numerically and rounded up, by about 1 %.")
    return "\n".join(lines)


def _ceiling_lines(shape: int, top: float | None, seen: int, sampled: bool, both: str) -> list[str]:
    if top is None:
        return ["  PSNR ceiling: none; one image is only a part of a client's clipped update."]
    often = (
        f", in {seen} release{'s' if seen > 1 else ''} as expected; chance may take it more often" if sampled else ""
    )
    return [f"  PSNR ceiling without a prior: {top:.1f} dB ({shape} values, mean square .25{often}).", f"    {both}"]
