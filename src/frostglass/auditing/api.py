"""`frostglass.audit`: the whole audit from Python."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.attacks.inversion.ranks import joined_world, own_device
from frostglass.auditing.plan import FROM_PYTHON, DataPlan, Plan, load_plan, parse_plan
from frostglass.auditing.prepare import Inputs
from frostglass.auditing.run import run_plan
from frostglass.auditing.scorecard import AuditReport
from frostglass.core.errors import BadInput
from frostglass.core.events import Emit, silent
from frostglass.core.runtime import pick_device
from frostglass.core.undisturbed import undisturbed

Entry = str | Mapping[str, Any]
"""A name, or a table with `name` and parameters, as in a plan."""


@undisturbed()
def audit(
    plan: str | Path | Mapping[str, Any] | Plan | None = None,
    *,
    model: nn.Module | None = None,
    images: Tensor | None = None,
    labels: Tensor | Sequence[int] | None = None,
    attacks: Entry | Sequence[Entry] = ("thaw",),
    defenses: Entry | Sequence[Entry] = ("none",),
    grants: str | Sequence[str] = ("examples",),
    batch: int | None = None,
    batches: int = 1,
    mode: str = "train",
    seed: int = 0,
    metrics: str | Sequence[str] = ("psnr", "ssim"),
    show_images: bool = False,
    out: str | Path | None = None,
    device: str | torch.device | None = "auto",
    resume: bool = False,
    emit: Emit | None = None,
    ranks: bool = False,
) -> AuditReport:
    """Attacks what a client would send, and writes a scorecard and a report.

    Either give a plan (a TOML file, a table, or a Plan), or your own objects:

        report = frostglass.audit(model=net, images=x, labels=y, attacks=["spear"], batch=8)

    Calls from several threads of a process take turns.

    Args:
        plan: what to run; the keywords from `attacks` to `show_images` are then taken from it.
        model: takes images in [0, 1] and normalises inside (wrap it with `frostglass.vision.networks.Normalised`
            if it expects normalised ones); returns logits. Replaces the plan's model; a copy is used.
        images: [n, c, h, w] in [0, 1]. Replaces the plan's data.
        labels: [n] class indices; arbitrary ones are taken if left out.
        attacks, defenses: names, or tables with parameters, as in a plan.
        grants: what the attacker knows beyond the model and the update.
        batch: images of one client; all of them if left out.
        batches: independent repetitions.
        mode: of the client's model, "train" or "eval".
        seed: of everything that is random.
        metrics: scores per image.
        show_images: put private images into the report.
        out: the run folder; a new temporary one if left out.
        device: "auto", "cpu" or "cuda".
        resume: go on with a killed run in `out`, which must be given.
        emit: told of progress, if given.
        ranks: share the work among the ranks that `torchrun` started, or that have joined a process group already: all
            of them must call, with the same arguments, and `out` must be given; rank 0 alone writes and tells.

    Raises:
        BadInput: something cannot be used as given; every problem is named, nothing was computed.
    """
    if plan is None:
        if model is None or images is None:
            raise BadInput("audit: give a plan, or a model and images.")
        checked = parse_plan(
            {
                "name": "audit",
                "seed": seed,
                "scenario": [
                    {
                        "name": type(model).__name__,
                        "data": {"source": FROM_PYTHON},
                        "model": {"name": _called(model), "mode": mode},
                        "client": {"batch": _rows_of(images) if batch is None else batch, "batches": batches},
                        "attack": tables_of(attacks, "attacks"),
                        "defense": tables_of(defenses, "defenses"),
                    }
                ],
                "threat": {"grants": names_of(grants, "grants")},
                "report": {"metrics": names_of(metrics, "metrics"), "show_images": show_images},
            }
        )
    elif isinstance(plan, Plan):
        checked = parse_plan(plan.model_dump())
    elif isinstance(plan, Mapping):
        checked = parse_plan(plan)
    else:
        checked = load_plan(Path(place_of(plan, "plan") or ""))
    if labels is not None and images is None:
        raise BadInput("labels: they belong to images given with them; give images too, or leave them out.")
    tell = followed(out, resume, emit)
    inputs = Inputs(model, images, labels)
    changed = _with_inputs(checked, inputs)
    if not ranks:
        return _run(changed, out, pick_device(device), resume, tell, inputs)
    if out is None:
        raise BadInput("out: ranks that share a run need one folder; give it.")
    own = own_device(pick_device(device))
    with joined_world(device=own) as world:
        return run_plan(changed, Path(out), device=own, resume=resume, emit=tell, inputs=inputs, world=world)


def _run(
    plan: Plan, out: str | Path | None, device: torch.device, resume: bool, emit: Emit, inputs: Inputs
) -> AuditReport:
    if out is not None:
        return run_plan(plan, Path(out), device=device, resume=resume, emit=emit, inputs=inputs)
    folder = Path(tempfile.mkdtemp(prefix="frostglass-"))
    try:
        return run_plan(plan, folder, device=device, emit=emit, inputs=inputs)
    except BadInput:
        shutil.rmtree(folder)  # ours, and empty: a refused request leaves nothing behind
        raise


def _with_inputs(plan: Plan, inputs: Inputs) -> Plan:
    """The plan that says what is really run: the user's objects in place of what it named."""
    changed = plan.model_copy(deep=True)
    for scenario in changed.scenario:
        if inputs.images is not None:
            scenario.data = DataPlan(source=FROM_PYTHON)
        if inputs.model is not None:
            scenario.model.name, scenario.model.options = _called(inputs.model), {}
    return changed


def _called(model: Any) -> str:
    return f"{FROM_PYTHON}:{type(model).__name__}"


def _rows_of(images: Any) -> int:
    """How many there are; none counts as one, since what is wrong with their shape is said where they are read."""
    try:
        return max(1, len(images))
    except TypeError:
        raise BadInput(f"images: {type(images).__name__} is not taken here; give a tensor [n, c, h, w].") from None


def followed(out: Any, resume: Any, emit: Any) -> Emit:
    """Who is told of a run; nobody for None.

    Raises:
        BadInput: `out` is no path, `emit` is no function, or a run is to go on in no folder.
    """
    if place_of(out, "out") is None and resume:
        raise BadInput("resume: a run goes on in its own folder; give it as out.")
    if emit is not None and not callable(emit):
        raise BadInput(f"emit: {type(emit).__name__} is not taken here; give a function of an event, or None.")
    tell: Emit = silent if emit is None else emit
    return tell


def names_of(given: Any, what: str) -> list[Any]:
    """One name, or several.

    Raises:
        BadInput: it is neither.
    """
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise BadInput(f"{what}: {given!r} must be a name or a list of names.")
    return [given] if isinstance(given, str) else list(given)


def tables_of(given: Any, what: str) -> list[dict[str, Any]]:
    """Names and tables as tables.

    Raises:
        BadInput: something is neither.
    """
    entries = [given] if isinstance(given, str | Mapping) else names_of(given, what)
    wrong = [e for e in entries if not isinstance(e, str | Mapping)]
    if wrong:
        raise BadInput(f"{what}: {wrong[0]!r} must be a name, or a table with a name and parameters.")
    return [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in entries]


def place_of(given: Any, what: str) -> str | None:
    """A path, or the name of a source, as text.

    Raises:
        BadInput: it is neither.
    """
    if given is not None and not isinstance(given, str | Path):
        raise BadInput(f"{what}: {type(given).__name__} is not taken here; give a path.")
    return None if given is None else str(given)
