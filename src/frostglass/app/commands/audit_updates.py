"""`frostglass audit-updates`: attacks and checks on updates that a federated engine really sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from frostglass.app.commands.unmix import _attack, _pairs
from frostglass.core.errors import BadInput

LOCAL = ("mode", "lr", "local_steps", "epochs", "minibatch", "optimizer", "momentum", "weight_decay")


@click.command("audit-updates", short_help="Attack updates that a federated engine really sent")
@click.argument("sources", nargs=-1, type=click.Path(path_type=Path), metavar="SOURCE...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: new or empty.")
@click.option("--truth", help="The private images, to score with: a folder (of clients), digits, or parquet:FILE.")
@click.option("--others", help="Images that no client holds: a folder, digits, or parquet:FILE.")
@click.option("--gradients", type=click.Path(path_type=Path), help="Raw gradients by parameter name, with --weights.")
@click.option("--weights", type=click.Path(path_type=Path), help="Weights that the gradients were taken at.")
@click.option("--loss-scale", type=float, help="Of raw gradients: their loss is so many times a mean over images.")
@click.option("--model", help="A network by name, or package.module:factory.  [default: the record's]")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="A parameter of the network's maker.")
@click.option("--classes", type=int, help="Outputs of the network.")
@click.option("--channels", type=int, help="Of the images.")
@click.option("--size", type=int, help="Pixels a side.")
@click.option("--examples", type=int, help="Images in an update, where the client does not say it.")
@click.option("--mode", type=click.Choice(["train", "eval"]), help="Of two states: mode of the client's network.")
@click.option("--lr", type=float, help="Of two states: learning rate of the client.")
@click.option("--local-steps", type=int, help="Of two states: full-batch steps.")
@click.option("--epochs", type=int, help="Of two states: passes over the images.")
@click.option("--minibatch", type=int, help="Of two states: images a step.")
@click.option("--optimizer", type=click.Choice(["sgd", "adam"]), help="Of two states.")
@click.option("--momentum", type=float, help="Of two states.")
@click.option("--weight-decay", type=float, help="Of two states.")
@click.option("--round", "rounds", type=int, multiple=True, help="Audit this round.  [default: first, middle, last]")
@click.option("--client", "clients", multiple=True, help="Audit this client.  [default: all]")
@click.option("--most", type=int, help="Updates that are audited at the most.  [default: 12]")
@click.option("--attack", "attacks", multiple=True, metavar="NAME[:KEY=VALUE,...]", help="[default: those that fit]")
@click.option(
    "--budget", type=click.Choice(["small", "full"]), help="Of the attacks that are chosen.  [default: small]"
)
@click.option("--grant", "grants", multiple=True, help="Knowledge beyond such a server's: an upper bound.")
@click.option("--defense", metavar="NAME[:KEY=VALUE,...]", help="That the clients are said to apply.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of a plan.")
@click.option("--seed", type=int, help="Of everything random.  [default: 0]")
@click.option("--show-images", is_flag=True, help="Put private images into the report.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted.")
@click.option("--gate", is_flag=True, help="Exit by verdict: 0 BOUNDED, 10 VIOLATED, 11 INCONCLUSIVE, 12 BROKEN CLAIM.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, on stdout.")
@click.option("-v", "--verbose", count=True, help="Print the progress of every attack.")
@click.pass_context
def command(
    context: click.Context, /, sources: Sequence[Path], out: Path, overrides: Sequence[str], resume: bool, gate: bool,
    device: str, as_json: bool, verbose: int, **options: Any,
) -> None:  # fmt: skip
    """Attack and check updates that a federated engine sent.

    SOURCE is a folder of recorded updates (`frostglass federate` writes one), two states of a client BEFORE AFTER, or
    a plan (.toml) with the table [updates]; --gradients and --weights take its place. Without --truth nothing is
    scored: labels, certificates of exact recovery and objectives are told.
    """
    from frostglass.app.terminal import listener
    from frostglass.auditing.recorded_api import run_request
    from frostglass.auditing.recorded_table import updates_text
    from frostglass.core.runtime import pick_device

    request = _request(sources, overrides, options)
    report = run_request(
        request, out, device=pick_device(device), resume=resume, emit=listener(verbose=verbose),
        debug=context.obj["debug"],
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report.scorecard.model_dump(mode="json"), indent=2))
    else:
        click.echo(f"\n{updates_text(report.scorecard)}\n\n{report}")
    if report.scorecard.failed:
        context.exit(1)
    if gate and report.scorecard.verdict is not None:
        context.exit(report.scorecard.verdict.exit_code)


def _request(sources: Sequence[Path], overrides: Sequence[str], options: dict[str, Any]) -> Any:
    from frostglass.auditing.recorded_api import load_request, parse_request

    if len(sources) == 1 and sources[0].suffix == ".toml":
        beside = [k for k, v in options.items() if v not in (None, (), False)]
        if beside:
            name = beside[0].replace("_", "-")
            name = name if name == "show-images" else name.removesuffix("s")
            raise BadInput(f"audit-updates: --{name} goes with updates, not with a plan; write it there, or use --set.")
        return load_request(sources[0], overrides)
    if overrides:
        raise BadInput("audit-updates: --set overrides a plan; with updates use the options.")
    if len(sources) > 2:
        raise BadInput(f"audit-updates: {len(sources)} sources; give one record, two states, or a plan.")
    local = {k: options[k] for k in LOCAL if options[k] is not None}
    plain = ("truth", "others", "gradients", "weights", "model", "classes", "channels", "size", "examples", "most",
             "loss_scale", "budget")  # fmt: skip
    table: dict[str, Any] = {k: _plain(options[k]) for k in plain if options[k] is not None}
    table |= {k: list(options[k]) for k in ("rounds", "clients", "grants") if options[k]}
    table |= {
        "local": local,
        "options": _pairs(",".join(options["options"]), "--option"),
        "attacks": [_attack(text) for text in options["attacks"]],
    }
    if options["defense"]:
        table["defense"] = _attack(options["defense"])
    names = ("record",) if len(sources) == 1 else ("before", "after")
    table |= {name: str(path) for name, path in zip(names, sources, strict=bool(sources))}
    values = {
        "name": sources[0].resolve().name if len(sources) == 1 else "recorded updates",
        "seed": options["seed"] or 0,
        "updates": table,
        "report": {"show_images": options["show_images"]},
    }
    return parse_request(values, Path.cwd())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
