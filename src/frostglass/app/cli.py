"""The command line: demo, audit, init, report, and what `commands` holds."""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import frostglass
from frostglass.app import commands
from frostglass.app.leaving import leave
from frostglass.app.sections import Sections
from frostglass.app.streams import make_lasting
from frostglass.app.surroundings import cause_outside, no_room
from frostglass.core.errors import BadInput, FrostglassError
from frostglass.core.printable import plain

OK, INTERNAL, BAD_INPUT = 0, 1, 2

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, on stdout.")
verbose_option = click.option("-v", "--verbose", count=True, help="Print the progress of every attack.")


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(frostglass.__version__, "--version", prog_name="frostglass")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Hide private training images, see through what gradients give away, and say it honestly."""
    context.obj = {"debug": debug}


@cli.command(short_help="Attack real photographs: a first look, in two minutes")
@click.option("--out", default="frostglass-demo", show_default=True, type=click.Path(path_type=Path))
@click.option("--hide-images", is_flag=True, help="Leave pictures out of the report.")
@click.option("--print-plan", is_flag=True, help="Write the demonstration's plan to stdout instead of running it.")
@device_option
@json_option
@verbose_option
@click.pass_context
def demo(
    context: click.Context,
    out: Path,
    hide_images: bool,
    print_plan: bool,
    device: str,
    as_json: bool,
    verbose: int,
) -> None:
    """Show on eight real photographs what a gradient gives away: about two minutes on two cores."""
    from frostglass.app.demo import demo_plan

    plan = demo_plan(show_images=not hide_images)
    if print_plan:
        click.echo(plan.to_toml(), nl=False)
        return
    _run(context, plan, _fresh(out), device, resume=False, as_json=as_json, verbose=verbose)


@cli.command(short_help="Run the attacks of a plan and write a report")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: new or empty.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, as scenario.client.batch=8.")
@click.option("--resume", is_flag=True, help="Go on with a run of this plan that was interrupted.")
@click.option("--gate", is_flag=True, help="Exit by verdict: 0 BOUNDED, 10 VIOLATED, 11 INCONCLUSIVE, 12 BROKEN CLAIM.")
@device_option
@json_option
@verbose_option
@click.pass_context
def audit(
    context: click.Context,
    plan: Path,
    out: Path,
    overrides: Sequence[str],
    resume: bool,
    gate: bool,
    device: str,
    as_json: bool,
    verbose: int,
) -> None:
    """Run the attacks of PLAN (a TOML file) and write scorecard and report to --out."""
    from frostglass.auditing.plan import load_plan

    checked = load_plan(plan, overrides)
    _run(context, checked, out, device, resume=resume, as_json=as_json, verbose=verbose, gate=gate)


@cli.command(short_help="Write a commented starter plan")
@click.argument("path", type=click.Path(path_type=Path), default=Path("plan.toml"))
def init(path: Path) -> None:
    """Write a commented starter plan to PATH (plan.toml)."""
    from frostglass.app.starter import STARTER
    from frostglass.core.files import write_text

    if path.exists():
        raise BadInput(f"init: {path} exists; give another name.")
    try:
        write_text(path, STARTER)
    except OSError as wrong:
        raise BadInput(f"init: {path} cannot be written ({wrong.strerror or wrong}).") from None
    click.echo(f"Wrote {path}. Next: frostglass audit {path} --out run")


@cli.command(short_help="Write a finished run's report.html anew")
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write FOLDER/report.html anew from a finished run."""
    from frostglass.auditing.report import write_report
    from frostglass.auditing.unmixing_report import is_unmix_run, write_unmix_report

    if not (folder / "scorecard.json").exists():
        raise BadInput(f"report: {folder} holds no scorecard.json; finish the run with --resume first.")
    click.echo(str(write_unmix_report(folder) if is_unmix_run(folder) else write_report(folder)))


def _run(
    context: click.Context,
    plan: Any,
    out: Path,
    device: str,
    *,
    resume: bool,
    as_json: bool,
    verbose: int,
    gate: bool = False,
) -> None:
    from frostglass.app.terminal import listener
    from frostglass.attacks.inversion.ranks import joined_world, own_device
    from frostglass.auditing.run import run_plan
    from frostglass.core.runtime import pick_device

    own = own_device(pick_device(device))
    with joined_world(device=own) as world:  # of torchrun; alone where it did not start this process
        report = run_plan(
            plan,
            out,
            device=own,
            resume=resume,
            emit=listener(verbose=verbose),
            debug=context.obj["debug"],
            world=world,
        )
    if world.rank:
        return
    if as_json:
        click.echo(json.dumps(report.scorecard.model_dump(mode="json"), indent=2))
    else:
        click.echo(f"\n{report}")
    if report.scorecard.failed:
        context.exit(INTERNAL)
    if gate and report.scorecard.verdict is not None:
        context.exit(report.scorecard.verdict.exit_code)


def _fresh(out: Path) -> Path:
    """`out`, or `out-2`, `out-3` ... if a demonstration is there already."""
    candidate, number = out, 1
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = out.with_name(f"{out.name}-{number}")
    return candidate


for _command in commands.found():
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: errors become one sentence each on stderr and an exit code, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:  # wherever it stands
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    make_lasting()
    code = _guarded(
        lambda: cli.main(arguments, prog_name="frostglass", standalone_mode=False), debug, lambda: _goes_on(arguments)
    )
    if argv is None:  # the process is ours
        leave(code)
    sys.exit(code)


def _goes_on(arguments: Sequence[str]) -> str:
    """What to do after an interruption of the command that `arguments` call; nothing where it had not begun."""
    name = next((a for a in arguments if a in cli.commands), "")
    out = next((b for a, b in itertools.pairwise(arguments) if a == "--out"), None)
    out = out or next((a.removeprefix("--out=") for a in arguments if a.startswith("--out=")), None)
    if out is not None and not (Path(out).is_dir() and any(Path(out).iterdir())):
        return ""
    if any(p.name == "resume" for p in getattr(cli.commands.get(name), "params", ())):
        return f" `frostglass {name}` with the same arguments and --resume goes on."
    return ""


def _guarded(call: Callable[[], Any], debug: bool, goes_on: Callable[[], str] = str) -> int:
    try:
        result = call()
        return result if isinstance(result, int) else OK
    except click.ClickException as wrong:
        wrong.show()
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"Interrupted.{goes_on()}", err=True)
        return 130
    except Exception as wrong:
        if debug:
            traceback.print_exception(wrong)
        if no_room(wrong):
            told = f"error: the disk is full, so a file cannot be written ({wrong}); make room.{goes_on()}"
            click.echo(told, err=True)
            return BAD_INPUT
        cause = cause_outside(wrong)
        return _told(wrong if cause is None else BadInput(cause))


def _told(wrong: Exception) -> int:
    """One sentence a problem on stderr; the exit code. Of several ranks all refuse the same, and the first says it."""
    if isinstance(wrong, BadInput) and os.environ.get("RANK", "0") != "0":
        return BAD_INPUT
    if isinstance(wrong, FrostglassError):
        for problem in wrong.problems if isinstance(wrong, BadInput) else [str(wrong)]:
            click.echo(f"error: {plain(problem)}", err=True)  # it may quote the name of a file, or a file's content
        return BAD_INPUT if isinstance(wrong, BadInput) else INTERNAL
    text = plain(str(wrong).splitlines()[0]) if str(wrong) else ""
    click.echo(f"internal error: {type(wrong).__name__}: {text}; run with --debug for the traceback.", err=True)
    return INTERNAL
