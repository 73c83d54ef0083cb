"""`frostglass unmix`: the attacks on an encoded set, as its owner or anybody else could run them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from frostglass.core.errors import BadInput


@click.command("unmix", short_help="Recover the private images behind InstaHide encodings")
@click.argument("encoded", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: new or empty.")
@click.option("--truth", help="The private images, to score with: a folder, digits, or parquet:FILE.")
@click.option(
    "--public", type=click.Path(path_type=Path), help="The pool that was mixed in (`frostglass public-pool`)."
)
@click.option("--groups", type=click.Path(path_type=Path), help=".npy: equal numbers are encodings of one image.")
@click.option("--auxiliary", help="Other images of the same kind: a folder, digits, or parquet:FILE.")
@click.option(
    "--known",
    "known",
    multiple=True,
    metavar="KEY=VALUE[,KEY=VALUE]",
    help="What the attacker knows: images, per_class, k, private, public, c1, c2, mask, law, labels.",
)
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="An attack, as prng_attack:last=1000000.  [default: all that apply]",
)
@click.option("--client", help="Of recorded updates: whose.  [default: the only client]")
@click.option("--model", help="Of recorded updates: the network, where the record names a package.module:factory.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of a plan.")
@click.option("--seed", type=int, help="Of everything random.  [default: 0]")
@click.option("--hide-images", is_flag=True, help="Leave pictures out of the report.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, on stdout.")
@click.option("-v", "--verbose", count=True, help="Print the progress of every attack.")
@click.pass_context
def command(
    context: click.Context, /, encoded: Path, out: Path, overrides: Sequence[str], resume: bool, device: str,
    as_json: bool, verbose: int, **options: Any,
) -> None:  # fmt: skip
    """Try to recover the private images behind ENCODED: an encoded set, arrays, recorded updates, or a plan (.toml).

    ENCODED is a folder that `frostglass encode` wrote, a folder with encryption.npy and label.npy (the InstaHide
    challenge's format), a record of the updates of a client that trains on encodings (`frostglass federate`), or a plan
    that names one. Without --truth images are recovered, and nothing is scored.
    """
    from frostglass.app.terminal import listener
    from frostglass.auditing.unmixing import run_unmix
    from frostglass.core.runtime import pick_device

    plan = _plan(encoded, overrides, options)
    report = run_unmix(plan, out, device=pick_device(device), resume=resume, emit=listener(verbose=verbose))
    if as_json:
        click.echo(json.dumps(report.scorecard.model_dump(mode="json"), indent=2))
    else:
        click.echo(f"\n{report}")
    if report.scorecard.failed:
        context.exit(1)


def _plan(encoded: Path, overrides: Sequence[str], options: dict[str, Any]) -> Any:
    from frostglass.auditing.unmixing_plan import anchored, load_unmix_plan, parse_unmix_plan

    def placed(text: str | Path | None) -> str | None:
        return None if text is None else anchored(str(text), Path.cwd())

    if encoded.suffix == ".toml":
        given = [k for k, value in options.items() if not (value is None or value is False or value == ())]
        if given:
            name = {"attacks": "attack"}.get(given[0], given[0].replace("_", "-"))
            raise BadInput(f"unmix: --{name} goes with a set, not with a plan; write it into the plan, or use --set.")
        return load_unmix_plan(encoded, overrides)
    if overrides:
        raise BadInput("unmix: --set overrides a plan; with a set use --known and --attack.")
    return parse_unmix_plan(
        {
            "name": encoded.resolve().name or "unmix",
            "seed": options["seed"] or 0,
            "encoded": placed(encoded),
            "client": options["client"],
            "model": options["model"],
            "truth": placed(options["truth"]),
            "pool": placed(options["public"]),
            "groups": placed(options["groups"]),
            "auxiliary": placed(options["auxiliary"]),
            "known": _pairs(",".join(options["known"]), "--known"),
            "attack": [_attack(text) for text in options["attacks"]],
            "report": {"show_images": not options["hide_images"]},
        }
    )


def _attack(text: str) -> dict[str, Any]:
    name, _, rest = text.partition(":")
    return {"name": name, **_pairs(rest, "--attack")}


def _pairs(text: str, option: str) -> dict[str, Any]:
    """`a=1,b=text,c=[1,2]` as values; what is no TOML value is text."""
    found: dict[str, Any] = {}
    for part in _split(text):
        key, equals, raw = part.partition("=")
        if not equals or not key.strip():
            raise BadInput(f"{option}: {part!r} must read key=value, as in images=100.")
        try:
            found[key.strip()] = tomllib.loads(f"v = {raw}")["v"]
        except (ValueError, RecursionError):
            found[key.strip()] = raw.strip()
    return found


def _split(text: str) -> list[str]:
    """Parts between commas that are not inside brackets."""
    parts, depth, now = [], 0, ""
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append(now)
            now = ""
        else:
            now += letter
    return [p for p in [*parts, now] if p.strip()]
