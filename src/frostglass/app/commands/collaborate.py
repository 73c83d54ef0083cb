"""`frostglass collaborate`: one federation under several defences, accuracy and leakage side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from frostglass.core.errors import FrostglassError


@click.command("collaborate", short_help="Accuracy beside leakage under several defences")
@click.argument("plan", required=False, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: new or empty.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, as seeds=[0].")
@click.option("--resume", is_flag=True, help="Keep the federations and audits that are whole, and do the others.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, and only JSON, on stdout.")
def command(plan: Path | None, out: Path, overrides: Sequence[str], resume: bool, as_json: bool) -> None:
    """Train together without a defence, with InstaHide inside and across data sets, and with DP-SGD; audit the updates.

    Without PLAN: four clients that hold digits of unequal classes (a Dirichlet split); --set changes that comparison
    too. Writes report.html with accuracy by round and leakage by client.
    """
    from frostglass.app.surroundings import run_folder
    from frostglass.auditing.collaboration import run_collaboration
    from frostglass.auditing.collaboration_plan import digits, load_collaboration
    from frostglass.auditing.collaboration_report import table

    asked = digits(overrides) if plan is None else load_collaboration(plan, overrides)

    def tell(words: str) -> None:
        click.echo(words, err=True)

    with run_folder(out):
        value = run_collaboration(asked, out, tell=tell, resume=resume)
    if as_json:
        click.echo(json.dumps(value, indent=2))
    else:
        click.echo(f"\n{table(value)}\n\nReport: {out / 'report.html'}")
    broken = [text for m in value["methods"] for row in m["leakage"] for text in row["broken"]]
    if broken:
        raise FrostglassError(f"audit: {len(broken)} attacks broke, so leakage is not fully known ({broken[0]}).")
