"""`frostglass.audit`: the whole audit from Python."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.auditing.plan import Plan, load_plan, parse_plan
from frostglass.auditing.run import run_plan
from frostglass.auditing.scorecard import AuditReport
from frostglass.auditing.simulate import Inputs
from frostglass.core.errors import BadInput
from frostglass.core.events import Emit, silent
from frostglass.core.runtime import pick_device

Entry = str | Mapping[str, Any]
"""A name, or a table with `name` and parameters, as in a plan."""


def audit(
    plan: str | Path | Mapping[str, Any] | Plan | None = None,
    *,
    model: nn.Module | None = None,
    images: Tensor | None = None,
    labels: Tensor | Sequence[int] | None = None,
    attacks: Sequence[Entry] = ("thaw",),
    defenses: Sequence[Entry] = ("none",),
    grants: Sequence[str] = ("examples",),
    batch: int | None = None,
    batches: int = 1,
    mode: str = "train",
    seed: int = 0,
    metrics: Sequence[str] = ("psnr", "ssim"),
    show_images: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    resume: bool = False,
    emit: Emit = silent,
) -> AuditReport:
    """Attacks what a client would send, and writes a scorecard and a report.

    Either give a plan (a TOML file, a table, or a Plan), or your own objects:

        report = frostglass.audit(model=net, images=x, labels=y, attacks=["spear"], batch=8)

    Args:
        plan: what to run; the keywords from `attacks` to `show_images` are then taken from it.
        model: takes images in [0, 1] and normalises inside (wrap it with `frostglass.vision.networks.Normalised`
            if it expects normalised ones); returns logits. Replaces the plan's model.
        images: [n, c, h, w] in [0, 1]. Replaces the plan's data.
        labels: [n] class indices; arbitrary ones are taken if left out.
        attacks, defenses: names, or tables with parameters.
        grants: what the attacker knows beyond the model and the update.
        batch: images of one client; all of them if left out.
        batches: independent repetitions.
        mode: of the client's model, "train" or "eval".
        seed: of everything that is random.
        metrics: scores per image.
        show_images: put private images into the report.
        out: the run folder; a new temporary one if left out.
        device: "auto", "cpu" or "cuda".
        resume: go on with a killed run in `out`.
        emit: told of progress.

    Raises:
        BadInput: something cannot be used as given; every problem is named, nothing was computed.
    """
    if plan is None:
        if model is None or images is None:
            raise BadInput("audit: give a plan, or a model and images.")
        scenario = {
            "name": type(model).__name__,
            "data": {"source": "photos"},
            "model": {"name": type(model).__name__, "mode": mode},
            "client": {"batch": batch or len(images), "batches": batches},
            "attack": [_table(a) for a in attacks],
            "defense": [_table(d) for d in defenses],
        }
        shown = {"metrics": list(metrics), "show_images": show_images}
        threat = {"grants": list(grants)}
        checked = parse_plan({"name": "audit", "seed": seed, "scenario": [scenario], "threat": threat, "report": shown})
    elif isinstance(plan, Plan):
        checked = plan
    elif isinstance(plan, Mapping):
        checked = parse_plan(plan)
    else:
        checked = load_plan(Path(plan))
    index = None if labels is None else torch.as_tensor(labels)
    inputs = None if model is None and images is None else Inputs(model, images, index)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="frostglass-")) / "run"
    return run_plan(checked, folder, device=pick_device(device), resume=resume, emit=emit, inputs=inputs)


def _table(entry: Entry) -> dict[str, Any]:
    return {"name": entry} if isinstance(entry, str) else dict(entry)
