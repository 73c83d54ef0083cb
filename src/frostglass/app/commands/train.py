"""`frostglass train`: networks trained plain, with Mixup and with InstaHide, under one budget."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from frostglass.core.errors import BadInput

DATA = "data.json"
"""Tells the images of a run, so that others are not gone on with."""


@click.command("train", short_help="Train plain, with Mixup and with InstaHide; compare")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder: new or empty.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, as training.epochs=2.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run; encoders draw new keys.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON, and only JSON, on stdout.")
def command(plan: Path, out: Path, overrides: Sequence[str], resume: bool, device: str, as_json: bool) -> None:
    """Train what PLAN (a TOML file) compares, and test it with plain and with encoded images."""
    from frostglass.app.surroundings import run_folder
    from frostglass.core.files import claimed, clear_left_over, write_json
    from frostglass.core.runtime import pick_device

    asked = load_train_plan(plan, overrides)
    where = pick_device(device)
    _claim(out, asked, resume)
    with run_folder(out):
        with claimed(out, "plan.toml", asked.to_toml()):
            clear_left_over(out)
            results = _runs(asked, out, resume, where)
        write_json(out / "results.json", {"name": asked.name, "device": str(where), "results": results})
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    click.echo(table(results))


def load_train_plan(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The plan in a file, checked.

    Raises:
        BadInput: every problem that was found, together.
    """
    from pydantic import ValidationError

    from frostglass.auditing.plan_reading import read_values, sentences
    from frostglass.core.files import placed, source_placed
    from frostglass.federated.train_plan import TrainPlan

    values = read_values(path, overrides)
    try:
        plan = TrainPlan.model_validate(values)
    except ValidationError as wrong:
        raise BadInput(sentences(wrong, TrainPlan)) from None
    plan.check()
    for key in ("source", "test"):
        if getattr(plan.data, key):
            setattr(plan.data, key, source_placed(getattr(plan.data, key), path.parent))
    for method in plan.method:
        method.public = placed(method.public, path.parent) if method.public else None
    return plan


def _claim(out: Path, plan: Any, resume: bool) -> None:
    from frostglass.core.files import is_free

    kept = out / "plan.toml"
    if resume and kept.is_file():
        if kept.read_text(encoding="utf-8") != plan.to_toml():
            raise BadInput(f"--resume: {out} belongs to another plan; choose an empty folder.")
    elif not is_free(out, "plan.toml"):
        raise BadInput(f"--out: {out} is not empty; choose another folder, or --resume its run.")


def _runs(plan: Any, out: Path, resume: bool, device: Any) -> list[dict[str, Any]]:
    from tqdm import tqdm

    from frostglass.federated.feeds import encoder_of
    from frostglass.federated.held_out import digest_of_both, images_of
    from frostglass.federated.training import Run

    train, test = images_of(plan.data, plan.seeds[0])
    keep = _same_images(out, digest_of_both(train, test, (m.public for m in plan.method)))
    for method in plan.method:  # what cannot be encoded is said before anything is trained
        if method.kind != "plain":
            encoder_of(method, plan.training, train.images.shape[-1]).begin(
                train.images[:2048], train.labels[:2048], train.classes
            )
    steps = plan.training.epochs * -(-len(train) // plan.training.batch)
    results = []
    for seed in plan.seeds:
        if plan.data.test is None and seed != plan.seeds[0]:
            train, test = images_of(plan.data, seed)
        for method in plan.method:
            title = f"{method.label}-{seed}"
            with tqdm(total=steps, desc=title, unit="step", disable=None) as bar:
                tell = (lambda text, title=title: click.echo(f"  {title}: {text}", err=True)) if bar.disable else _quiet
                run = Run(plan, method, seed, train, test, out / title, device, tell, bar.update, keep)
                results.append(run(resume=resume))
    return results


def _same_images(out: Path, sha256: str) -> Callable[[], object]:
    """Refuses other images than the run began with; else what writes down which they are, before the first result."""
    from frostglass.auditing.store import refuse_other_data
    from frostglass.core.files import write_json

    value, path = {"sha256": sha256}, out / DATA
    if path.exists():
        refuse_other_data(out, path, value)

    def keep() -> None:
        if not path.exists():
            write_json(path, value)

    return keep


def _quiet(_: str) -> None:
    """The bar is enough."""


def table(results: Sequence[dict[str, Any]]) -> str:
    """Mean test accuracy of each method over its seeds, in %."""
    methods = list(dict.fromkeys(r["method"] for r in results))
    counts = sorted({int(n) for r in results for n in r["encoded"]})
    lines = [
        "".join(
            [f"{'method':<26}{'seeds':>6}{'plain':>9}", *(f"{f'{n} enc.':>10}" for n in counts), f"{'enc./image':>12}"]
        )
    ]
    for name in methods:
        mine = [r for r in results if r["method"] == name]

        def mean(values: list[float]) -> str:
            return f"{100 * statistics.fmean(values):.1f}" if values else "-"

        encoded = [mean([r["encoded"][str(n)] for r in mine if str(n) in r["encoded"]]) for n in counts]
        exposure = f"{statistics.fmean(r['encodings_per_image'] for r in mine):.0f}"
        plain = mean([r["plain"] for r in mine])
        lines.append(
            "".join([f"{name:<26}{len(mine):>6}{plain:>9}", *(f"{e:>10}" for e in encoded), f"{exposure:>12}"])
        )
    if any(r["encodings_per_image"] for r in results):
        lines.append(
            "Encodings give no (epsilon, delta); each further encoding of an image makes it easier to recover."
        )
    return "\n".join(lines)
