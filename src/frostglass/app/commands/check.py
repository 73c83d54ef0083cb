"""`frostglass check`: does a privacy configuration give what it says? Reads files and numbers; runs none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from frostglass.core.errors import BadInput


@click.command("check", short_help="Find misconfigured privacy in plans, jobs and models")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--model", metavar="FILE|PKG:FACTORY", help="Does a received model carry a layer that copies images?")
@click.option("--clip", type=float, help="Clipping norm C.")
@click.option("--noise", "noise_std", type=float, help="Standard deviation s of the noise on the sum.")
@click.option("--sigma", "noise_multiplier", type=float, help="Noise multiplier s / C, instead of --noise.")
@click.option("--sensitivity", type=float, help="As declared.")
@click.option("--epsilon", type=float, help="As declared.")
@click.option("--delta", type=float, help="As declared.")
@click.option("--classical", is_flag=True, help="The noise follows sqrt(2 ln(1.25/delta)) sensitivity / epsilon.")
@click.option("--per-release", is_flag=True, help="The declared epsilon is spent in every release.")
@click.option("--adjacency", type=click.Choice(["add_remove", "replace_one"]), default="add_remove")
@click.option("--clip-unit", type=click.Choice(["image", "client"]), help="What is clipped.")
@click.option("--claim-unit", type=click.Choice(["image", "client"]), help="What is said to be protected.")
@click.option("--sampling", type=click.Choice(["poisson", "shuffle", "fixed"]), help="How batches are drawn.")
@click.option("--rate", type=float, help="Sampling rate that the accounting assumes.")
@click.option("--steps", type=int, help="Releases: rounds, or steps.")
@click.option("--image", metavar="CxHxW", help="Shape of an image.  [default: 3x224x224; with --model 3x32x32]")
@click.option("--format", "style", type=click.Choice(["text", "json", "sarif"]), default="text", show_default=True)
@click.pass_context
def command(
    context: click.Context, /, config: Path | None, model: str | None, style: str, image: str | None, **numbers: Any
) -> None:
    """Check the privacy configuration in CONFIG, or the numbers given, against its theory.

    CONFIG is a Frostglass plan, a Flower pyproject.toml, an NVFlare filter configuration (JSON), or Python source that
    calls Opacus or Flower. Exit code 1 if a rule reports an error.
    """
    given = {k: v for k, v in numbers.items() if v not in (None, False) and k != "adjacency"}
    if model is not None:
        if config is not None or given:
            raise BadInput("check: --model stands alone; check the configuration with a command of its own.")
        _model(context, model, image, style)
        return
    if (config is None) == (not given):
        raise BadInput(
            "check: give either a CONFIG file or numbers, as in --clip 1 --sensitivity 1e-4 --epsilon 10 --delta 1e-5."
        )
    _configuration(context, config, numbers, image, style)


def _configuration(
    context: click.Context, config: Path | None, numbers: dict[str, Any], image: str | None, style: str
) -> None:
    from frostglass.auditing.linting.check import check_facts, check_file
    from frostglass.auditing.linting.output import as_json, as_sarif, as_text

    if config is not None:
        found = check_file(config)
    else:
        found = check_facts([_facts(numbers, image)], "numbers", "numbers of the command line")
    if style == "sarif":
        click.echo(json.dumps(as_sarif([found]), indent=2))
    else:
        click.echo(json.dumps(as_json(found), indent=2) if style == "json" else as_text(found))
    if found.errors:
        context.exit(1)


def _facts(numbers: dict[str, Any], image: str | None) -> Any:
    from frostglass.app.commands.bound import dimensions_of
    from frostglass.auditing.linting.facts import Facts

    per_release = numbers.pop("per_release")
    if numbers["noise_std"] is not None and numbers["noise_multiplier"] is not None:
        raise BadInput("check: --noise and --sigma say the same; give one of them.")
    epsilon_is: Any = None if numbers["epsilon"] is None else "release" if per_release else "total"
    return Facts("numbers", "Gaussian mechanism", epsilon_is=epsilon_is, dimensions=dimensions_of(image), **numbers)


def _model(context: click.Context, spec: str, image: str | None, style: str) -> None:
    """Looks for layers that hand images over."""
    from frostglass.app.commands.bound import shape_of
    from frostglass.attacks.analytic.imprint_scan import model_report

    if style == "sarif":
        raise BadInput("check: --format sarif is for configurations; use text or json with --model.")
    channels, height, width = shape_of(image) or (3, 32, 32)
    if height != width:
        raise BadInput(f"--image: {image!r} must be square for a model.")
    text, values, suspicious = model_report(spec, channels=channels, size=height)
    click.echo(json.dumps(values, indent=2) if style == "json" else text)
    if suspicious:
        context.exit(1)
