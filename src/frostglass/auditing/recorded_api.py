"""`audit_updates`: attacks and checks on updates that a federated engine really sent."""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from frostglass.auditing.api import Entry, followed, names_of, place_of, tables_of
from frostglass.auditing.plan import FROM_PYTHON, ReportPlan, Title
from frostglass.auditing.plan_reading import read_values, sentences
from frostglass.auditing.plan_verdict import Strict, VerdictPlan
from frostglass.auditing.prepare import Inputs
from frostglass.auditing.recorded_choice import UpdatesAudit, audit_plan
from frostglass.auditing.recorded_plan import UpdatesPlan
from frostglass.auditing.recorded_truth import Given
from frostglass.auditing.recorded_view import load_recording
from frostglass.auditing.run import run_plan
from frostglass.auditing.scorecard import AuditReport
from frostglass.core.errors import BadInput
from frostglass.core.events import Emit, silent
from frostglass.core.files import placed, source_placed
from frostglass.core.runtime import pick_device
from frostglass.core.undisturbed import undisturbed

PLACES = ("record", "before", "after", "gradients", "weights")
SOURCES = ("truth", "others")


class UpdatesRequest(Strict):
    """A plan for `frostglass audit-updates`: the scenarios follow from the record."""

    name: Title = Field("recorded updates", min_length=1, description="of the audit, for the report")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")
    updates: UpdatesPlan = Field(description="where the updates are, and what is known about them")
    report: ReportPlan = Field(default_factory=ReportPlan, description="what is measured and shown")
    verdict: VerdictPlan = Field(default_factory=VerdictPlan, description="what a verdict is about")


def parse_request(values: Mapping[str, Any], folder: Path) -> UpdatesRequest:
    """Checks a request; relative paths in it are taken from `folder`.

    Raises:
        BadInput: every problem that was found, together.
    """
    own = {k: v for k, v in values.items() if k not in ("scenario", "threat")}  # a run's plan.toml, where they follow
    try:
        request = UpdatesRequest.model_validate(own)
    except ValidationError as wrong:
        raise BadInput(sentences(wrong, UpdatesRequest)) from None
    updates = request.updates.check()
    places = {k: _placed(getattr(updates, k), folder) for k in PLACES}
    places |= {k: _source(getattr(updates, k), folder) for k in SOURCES}
    request.updates = updates.model_copy(update=places)
    return request


def load_request(path: Path, overrides: Sequence[str] = ()) -> UpdatesRequest:
    """Reads a TOML plan with the table [updates].

    Raises:
        BadInput: as `load_plan`.
    """
    return parse_request(read_values(path, overrides), path.parent)


def _placed(text: str | None, folder: Path) -> str | None:
    return None if text is None else placed(text, folder)


def _source(text: str | None, folder: Path) -> str | None:
    """A folder or `parquet:FILE` from `folder`; names of bundled sources as they are."""
    if text is None or text == FROM_PYTHON:
        return text
    if text.startswith(("parquet:", "folder:")):
        return source_placed(text, folder).removeprefix("folder:")
    return placed(text, folder) if (folder / Path(text).expanduser()).is_dir() else text


def run_request(
    request: UpdatesRequest,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    emit: Emit = silent,
    debug: bool = False,
    model: nn.Module | None = None,
    truth: Given | None = None,
) -> AuditReport:
    """Chooses updates and attacks, and plays them through the one loop.

    Raises:
        BadInput: nothing can be audited; nothing has been written then.
    """
    recording = load_recording(request.updates, model, truth)
    plan = audit_plan(
        recording, name=request.name, seed=request.seed, report=request.report, verdict=request.verdict, device=device
    )
    if resume:
        _refuse_grown(plan, out)
    inputs = Inputs(model=model, recording=recording)
    return run_plan(plan, out, device=device, resume=resume, emit=emit, inputs=inputs, debug=debug)


def _refuse_grown(plan: UpdatesAudit, out: Path) -> None:
    """Says what has changed where it is the record: its updates are a part of the plan, which is what is compared."""
    try:
        held = tomllib.loads((out / "plan.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told by the folder itself
        return
    now = tomllib.loads(plan.to_toml())
    differ = {key for key in {*held, *now} if held.get(key) != now.get(key)}
    if differ == {"scenario"}:
        raise BadInput(
            f"--resume: the updates in {plan.updates.record} are not those that {out} began with (has it grown?); "
            "audit it in an empty folder."
        )


@undisturbed()
def audit_updates(
    recorded: str | Path | UpdatesRequest | None = None,
    *,
    before: str | Path | None = None,
    after: str | Path | None = None,
    gradients: str | Path | None = None,
    weights: str | Path | None = None,
    model: str | nn.Module | None = None,
    truth: str | Path | Mapping[str, tuple[Tensor, Tensor | None]] | tuple[Tensor, Tensor | None] | None = None,
    others: str | Path | None = None,
    attacks: Entry | Sequence[Entry] = (),
    known: Mapping[str, Any] | None = None,
    local: Mapping[str, Any] | None = None,
    metrics: str | Sequence[str] = ("psnr", "ssim"),
    show_images: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    device: str | torch.device | None = "auto",
    resume: bool = False,
    emit: Emit | None = None,
) -> AuditReport:
    """Attacks what a federated engine sent, and writes a scorecard and a report.

        report = audit_updates("RECORDED/", truth="IMAGES/")

    Args:
        recorded: a folder of recorded updates, a plan (.toml) with the table [updates], or an `UpdatesRequest`. With a
            plan, the keywords from `before` to `seed` are taken from it, but for a network and for tensors.
        before, after: or a client's state before and after its training (.safetensors, .pt).
        gradients, weights: or raw gradients by parameter name, and the weights that they were taken at.
        model: a name, "package.module:factory", or the network itself; the record's if left out.
        truth: the private images, for scoring alone: a folder (with a subfolder for each client, if there are such),
            "digits", "parquet:FILE", or tensors: (images [n, c, h, w] in [0, 1], labels [n] or None), or such pairs by
            client.
        others: a source of images that no client holds.
        attacks: names, or tables with parameters; those that fit if left out.
        known: further keys of the table [updates]: classes, size, examples, rounds, clients, most, grants, budget, ...
        local: the client's steps where no record says them: mode, lr, local_steps, epochs, minibatch, optimizer, ...
        metrics: scores per image.
        show_images: put private images into the report.
        seed: of everything random.
        out: the run folder; a new temporary one if left out.
        device: "auto", "cpu" or "cuda".
        resume: go on with a killed run in `out`, which must be given.
        emit: told of progress, if given.

    Raises:
        BadInput: something cannot be used as given; nothing was computed.
    """
    tell = followed(out, resume, emit)
    network = model if isinstance(model, nn.Module) else None
    given = _given(truth)
    if isinstance(recorded, UpdatesRequest):
        request = recorded
    elif recorded is not None and Path(place_of(recorded, "recorded") or "").suffix == ".toml":
        request = load_request(Path(recorded))
    else:
        for name, values in (("known", known), ("local", local)):
            if values is not None and not isinstance(values, Mapping):
                raise BadInput(f"{name}: {values!r} must be a table of keys and values.")
        table = {
            "record": place_of(recorded, "recorded"), "before": place_of(before, "before"),
            "after": place_of(after, "after"), "gradients": place_of(gradients, "gradients"),
            "weights": place_of(weights, "weights"), "others": place_of(others, "others"),
            "model": place_of(model, "model") if network is None else _called(network),
            "truth": FROM_PYTHON if given is not None else place_of(truth, "truth"),
            "attacks": tables_of(attacks, "attacks"),
            "local": dict(local or {}), **dict(known or {}),
        }  # fmt: skip
        report = {"metrics": names_of(metrics, "metrics"), "show_images": show_images}
        request = parse_request({"seed": seed, "updates": table, "report": report}, Path.cwd())
    place = pick_device(device)
    if out is not None:
        return run_request(request, Path(out), device=place, resume=resume, emit=tell, model=network, truth=given)
    folder = Path(tempfile.mkdtemp(prefix="frostglass-"))
    try:
        return run_request(request, folder, device=place, emit=tell, model=network, truth=given)
    except BadInput:
        shutil.rmtree(folder)
        raise


def _called(model: nn.Module) -> str:
    return f"{FROM_PYTHON}:{type(model).__name__}"


def _given(truth: Any) -> Given | None:
    """Images and labels by client; None where they are not given from Python."""
    if truth is None or isinstance(truth, str | Path):
        return None
    given = truth if isinstance(truth, Mapping) else {"": truth}
    if not given:
        raise BadInput("truth: it is empty; give images and labels by client, or leave it out.")
    for pair in given.values():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Tensor):
            raise BadInput("truth: give a folder or a source, (images, labels) as tensors, or such pairs by client.")
    return {name: (images, labels) for name, (images, labels) in given.items()}
