"""`frostglass list`: what is registered in this installation, and what a plan may grant."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import click

KINDS = ("attacks", "defenses", "metrics", "models", "datasets", "grants")
_NAMES = 22  # characters of the column of names
_HELD = "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"


@click.command("list", short_help="List attacks, defences, metrics, models, data, grants")
@click.argument("what", required=False, type=click.Choice(KINDS))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, on stdout.")
def command(what: str | None, as_json: bool) -> None:
    """List attacks, defenses, metrics, models, datasets or grants, with their parameters."""
    found = {kind: listing(kind) for kind in ([what] if what else KINDS)}
    if as_json:
        click.echo(json.dumps(found[what] if what else found, indent=2))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for kind, rows in found.items():
        if not what:
            click.echo(f"{kind}:")
        for line in lines(rows, bool(what), width):
            click.echo(line)


def lines(rows: Sequence[dict[str, Any]], whole: bool, width: int | None) -> Iterator[str]:
    """What is printed of some entries, under their names.

    Args:
        whole: with parameters and source.
        width: of a terminal, to which texts are broken; None leaves each on a line of its own, for `grep`.
    """
    for row in rows:
        texts = [row["summary"]]
        if whole and row["parameters"]:
            texts.append("parameters: " + ", ".join(f"{k} = {v}" for k, v in row["parameters"].items()))
        if whole and row["paper"]:
            texts.append(f"source: {row['paper']}")
        for n, text in enumerate(texts):
            first, next_ones = f"  {'' if n else row['name']:<{_NAMES - 1}} ", " " * (_NAMES + 2)
            if width is None:
                yield first + text
            else:
                held = text.replace(" = ", _HELD)  # a parameter is not broken between its name and its value
                broken = textwrap.wrap(
                    held, max(width, 2 * _NAMES), initial_indent=first, subsequent_indent=next_ones,
                    break_on_hyphens=False,
                )  # fmt: skip
                # an entry without a summary keeps its name, of which `wrap` makes nothing
                yield from (line.replace(_HELD, " = ") for line in broken or [first.rstrip()])


def listing(kind: str) -> list[dict[str, Any]]:
    """The entries of a kind: name, summary, paper and parameters."""
    if kind == "grants":
        from frostglass.core.threat import ALWAYS, MEANING

        return [
            {"name": k.value, "summary": m + (" (always)" if k in ALWAYS else ""), "paper": "", "parameters": {}}
            for k, m in MEANING.items()
        ]
    rows = []
    for entry in _registry(kind):
        hidden = ("classes", "channels", "size") if kind == "models" else ()
        parameters = {
            k: ("required" if p.default is p.empty else repr(p.default))
            for k, p in entry.parameters.items()
            if k not in hidden
        }
        rows.append({"name": entry.name, "summary": entry.summary, "paper": entry.paper, "parameters": parameters})
    return rows


def _registry(kind: str) -> Any:
    if kind == "attacks":
        from frostglass.attacks.registry import ATTACKS

        return ATTACKS
    if kind == "defenses":
        from frostglass.defenses.registry import DEFENSES

        return DEFENSES
    if kind == "metrics":
        from frostglass.auditing.metrics.registry import METRICS

        return METRICS
    if kind == "models":
        from frostglass.vision.networks import MODELS

        return MODELS
    from frostglass.vision.datasets import DATASETS

    return DATASETS
