"""`frostglass federate`: clients that train one network together, on Flower, with every update recorded."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from frostglass.core.errors import BadInput, FrostglassError

ENGINES = ("local", "ray", "deployment")

_OPTIONS = {"address": "--superlink", "root_certificates": "--root-certificates"}


@click.command("federate", short_help="Train with several clients on Flower; record updates")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: new or empty.")
@click.option(
    "--engine", type=click.Choice(ENGINES), default="local", show_default=True,
    help="In this process, in Flower's simulation on Ray, or on a running SuperLink.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, as server.rounds=2.")
@click.option("--resume", is_flag=True, help="Go on behind the last whole round of a run that was interrupted.")
@click.option("--superlink", metavar="HOST:PORT", help="Of the SuperLink, for --engine deployment.")
@click.option("--root-certificates", type=click.Path(path_type=Path), help="PEM file of who certified the SuperLink.")
@click.option("--json", "as_json", is_flag=True, help="Print the history as JSON, and only JSON, on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Show Flower's own messages too.")
def command(
    plan: Path,
    out: Path,
    engine: str,
    overrides: Sequence[str],
    resume: bool,
    superlink: str | None,
    root_certificates: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Train what PLAN (a TOML file) describes with several clients, and record the updates that they send."""
    from frostglass.app.surroundings import run_folder
    from frostglass.core.files import check_name, claimed

    asked = load_federate_plan(plan, overrides)
    check_name(out)
    place = _superlink(engine, superlink, root_certificates, resume)
    asked.server.folder = out.resolve().as_posix()
    text = asked.to_toml()
    made = _prepared(text)
    _claim(out, text, resume)
    try:
        with run_folder(out), claimed(out, "plan.toml", text):
            _run(text, out, engine, place, asked, verbose, resume)
    except BadInput as wrong:
        raise BadInput([_as_option(p) for p in wrong.problems]) from None
    history = _history(out, engine)
    if as_json:
        click.echo(json.dumps(history, indent=2))
    else:
        click.echo(summary(history, out, made.record_folder, asked.model.name))
    _refuse_nothing(history)


def load_federate_plan(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The plan in a file, checked.

    Raises:
        BadInput: every problem that was found, together.
    """
    from pydantic import ValidationError

    from frostglass.auditing.plan_reading import read_values, sentences, without_errors
    from frostglass.core.files import placed, source_placed
    from frostglass.federated.federate_plan import FederatePlan

    values = read_values(path, overrides)
    try:
        plan = FederatePlan.model_validate(values)
    except ValidationError as wrong:
        raise BadInput([*sentences(wrong, FederatePlan), *_further(without_errors(values, wrong))]) from None
    plan.check()
    for key in ("source", "test"):
        if getattr(plan.data, key):
            setattr(plan.data, key, source_placed(getattr(plan.data, key), path.parent))
    for part in plan.defense:
        if isinstance(part.settings.get("public"), str):
            part.public = placed(part.settings["public"], path.parent)  # type: ignore[attr-defined]
    return plan


def _further(values: dict[str, Any] | None) -> Sequence[str]:
    """What else is wrong with a plan, leaving out what pydantic has refused."""
    from pydantic import ValidationError

    from frostglass.federated.federate_plan import FederatePlan

    try:
        if values is not None:
            FederatePlan.model_validate(values).check()
    except BadInput as wrong:
        return wrong.problems
    except ValidationError:
        pass
    return ()


def _superlink(engine: str, address: str | None, certificates: Path | None, resume: bool) -> tuple[str, Path] | None:
    if engine != "deployment":
        given = "--superlink" if address else "--root-certificates" if certificates else None
        if given is not None:
            raise BadInput(f"{given}: belongs to --engine deployment, not to --engine {engine}.")
        return None
    if resume:
        raise BadInput(
            "--resume: not with --engine deployment, as what clients have spent is counted at their SuperNodes and "
            "ends with a run of the SuperLink; start anew in an empty folder."
        )
    if not address or certificates is None:
        raise BadInput("--engine: deployment needs --superlink HOST:PORT and --root-certificates FILE.")
    if not certificates.is_file():
        raise BadInput(f"--root-certificates: {certificates} does not exist; name the PEM file of the authority.")
    return address, certificates


def _prepared(text: str) -> Any:
    """Everything is built once before anything starts, so that all problems show here."""
    from frostglass.federated.federation import federation_of

    import_flower()
    return federation_of(text)


def import_flower() -> None:
    """Raises `BadInput` where Flower is missing or of another version."""
    import frostglass.federated.flower  # noqa: F401


def _claim(out: Path, text: str, resume: bool) -> None:
    """Refuses a folder that holds something, unless that is a run of this plan to go on with."""
    from frostglass.core.files import is_free
    from frostglass.federated.federate_plan import plan_of

    if is_free(out, "plan.toml"):
        return
    if not resume:
        raise BadInput(f"--out: {out} is not empty; choose another folder, or --resume its run.")
    try:
        held = plan_of((out / "plan.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise BadInput(f"--resume: {out} holds no run; choose an empty folder.") from None
    except BadInput as wrong:
        raise BadInput(f"--resume: the plan in {out} cannot be used ({wrong}); choose an empty folder.") from None
    held.server.folder = plan_of(text).server.folder  # a run folder may have been moved
    if held.to_toml() != text:
        raise BadInput(f"--resume: {out} belongs to another plan; choose an empty folder.")


def _run(
    text: str, out: Path, engine: str, place: tuple[str, Path] | None, plan: Any, verbose: bool, resume: bool
) -> None:
    from frostglass.federated.flower.engines import on_deployment, on_local, on_ray
    from frostglass.federated.flower.going_on import is_done

    def tell(words: str) -> None:
        click.echo(words, err=True)

    if place is not None:
        limit = plan.server.wait + plan.server.rounds * plan.server.timeout
        try:
            with _ended_by_sigterm():
                on_deployment(text, *place, tell, limit=limit)
        except KeyboardInterrupt:  # elsewhere Ctrl-C is told with the advice to resume, which is not to be had here
            click.echo("Interrupted. The run was stopped at the SuperLink, and cannot be resumed.", err=True)
            sys.exit(130)
    elif resume and is_done(out, plan):
        tell("the run is done already")
    else:
        (on_ray if engine == "ray" else on_local)(text, out, tell, verbose=verbose, resume=resume)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what stands inside as Ctrl-C does: else the run would go on at the SuperLink with nobody waiting."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_option(problem: str) -> str:
    """What the deployment calls by its own names, by those of the command."""
    field, colon, rest = problem.partition(":")
    return f"{_OPTIONS.get(field, field)}{colon}{rest}"


def _history(out: Path, engine: str) -> dict[str, Any]:
    try:
        held: dict[str, Any] = json.loads((out / "history.json").read_text(encoding="utf-8"))
    except OSError:
        if engine == "deployment":
            raise BadInput(
                f"--out: the run is done, but {out} holds no history; the server wrote it elsewhere."
            ) from None
        raise
    return held


def summary(history: dict[str, Any], out: Path, recorded: str | None, model: str = "") -> str:
    """What a person wants to know at the end."""
    from frostglass.defenses.dp_instahide import PIXELS
    from frostglass.federated.history import UNITS

    last = history["rounds"][-1]
    encoded = last["accuracy_encoded"]
    lines = [
        f"{history['name']}: {history['clients']} clients, {_counted(last['round'], 'round')} on "
        f"{history['engine']}, defence {history['defence']}",
        f"accuracy on {history['test_images']} test images: {100 * last['accuracy']:.1f} %"
        + ("" if encoded is None else f" plain, {100 * encoded:.1f} % over encodings"),
    ]
    spent = [c for row in history["rounds"] for c in row["clients"] if c.get("epsilon") is not None]
    if spent:
        worst = max(spent, key=lambda c: c["epsilon"])
        lines.append(
            f"privacy spent: epsilon up to {worst['epsilon']:.2f} {UNITS[worst['unit']]} at delta {worst['delta']:g}"
        )
        if worst["unit"] == PIXELS:
            lines.append("its neighbours differ in one image, exchanged for another; labels are not private")
    exposures = [c["exposure-max"] for row in history["rounds"] for c in row["clients"] if c.get("exposure-max")]
    if exposures:
        lines.append(
            f"an image is in up to {max(exposures)} encodings; encodings give no (epsilon, delta), and each further "
            "one makes it easier to recover"
        )
    lost = sum(len(row["left_out"]) for row in history["rounds"])
    if lost:
        lines.append(f"updates left out: {lost}, for the reasons in {out / 'history.json'}")
    if history["insecure"]:
        lines.append("INSECURE: keys and noise come from a number in the plan; anybody who knows it can undo them")
    lines += history["notes"]
    if recorded is not None:
        own = f" --model {model}" if ":" in model and not model.startswith("torchvision:") else ""
        lines.append(f"Next: frostglass audit-updates {out / recorded} --out {out}-audit{own}")
    return "\n".join(lines)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _refuse_nothing(history: dict[str, Any]) -> None:
    """A federation in which no update could ever be used has failed, and says why."""
    rounds = history["rounds"][1:]
    if any(row["clients"] for row in rounds):
        return
    first = next((lost for row in rounds for lost in row["left_out"]), None)
    why = f"client {first['client']}: {first['reason']}" if first else "no client took part"
    raise FrostglassError(f"federation: no update of any round could be used ({why}).")
