"""`frostglass sweep`: what a defence hides against what it costs, over the values of its knob."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click

from frostglass.core.errors import BadInput

PLAN = "plan.toml"
"""Of the run folder: whose run it is."""


@click.command("sweep", short_help="Leakage against accuracy over a defence's parameter")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: new or empty.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, as trials=30.")
@click.option("--resume", is_flag=True, help="Go on with a sweep of this plan; finished points are kept.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the points as JSON, and only JSON, on stdout.")
@click.pass_context
def command(
    context: click.Context, plan: Path, out: Path, overrides: Sequence[str], resume: bool, device: str, as_json: bool
) -> None:
    """Attack and train at every point of PLAN (a TOML file); write sweep.json, sweep.csv and frontier.png.

    Under torchrun the points are shared among the ranks.
    """
    from frostglass.app.surroundings import run_folder
    from frostglass.auditing.sweep import Sweep, complete
    from frostglass.auditing.sweep_plan import load_sweep
    from frostglass.auditing.sweep_report import table, write_sweep
    from frostglass.core.files import claimed, clear_left_over
    from frostglass.core.runtime import World, pick_device

    asked = load_sweep(plan, overrides)
    world = World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    where = pick_device(device)
    _claim(out, asked.to_toml(), resume, world.rank)
    sweep = Sweep(asked, out, where, world, lambda text: click.echo(text, err=True))
    with run_folder(out), claimed(out, PLAN, asked.to_toml()) if world.rank == 0 else nullcontext():
        if world.size == 1:  # others may be writing already
            clear_left_over(out)
        sweep()
    if world.rank:
        return
    rows = complete(sweep, lambda: time.sleep(1.0))
    paths = write_sweep(asked, rows, out)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        click.echo(f"\n{table(rows)}\n\nPicture: {paths[-1]}")
    if any("error" in r for r in rows):
        context.exit(1)


def _claim(out: Path, text: str, resume: bool, rank: int) -> None:
    """Whether this rank may use the folder; ranks above 0 wait until rank 0 has taken it."""
    from frostglass.core.files import is_free

    kept = out / PLAN
    if rank:
        while not kept.is_file():
            time.sleep(0.2)  # torchrun ends this process if rank 0 refuses
    if kept.is_file() and (resume or rank):
        if kept.read_text(encoding="utf-8") != text:
            raise BadInput(f"--resume: {out} belongs to another plan; choose an empty folder.")
        return
    if not is_free(out, PLAN):
        raise BadInput(f"--out: {out} is not empty; choose another folder, or --resume its sweep.")
