"""`frostglass.unmix`: the audit of an encoded set from Python."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frostglass.auditing.api import Entry, followed, place_of, tables_of
from frostglass.auditing.unmixing import Given, UnmixReport, run_unmix
from frostglass.auditing.unmixing_inputs import from_tensors
from frostglass.auditing.unmixing_plan import UnmixPlan, anchored, load_unmix_plan, parse_unmix_plan
from frostglass.core.errors import BadInput
from frostglass.core.events import Emit
from frostglass.core.runtime import pick_device
from frostglass.core.undisturbed import undisturbed


@undisturbed()
def unmix(
    encoded: str | Path | Tensor | UnmixPlan,
    *,
    targets: Tensor | None = None,
    truth: str | Path | Tensor | None = None,
    public: str | Path | None = None,
    groups: str | Path | None = None,
    auxiliary: str | None = None,
    client: str | None = None,
    model: str | None = None,
    known: Mapping[str, Any] | None = None,
    attacks: Entry | Sequence[Entry] = (),
    seed: int = 0,
    show_images: bool = True,
    out: str | Path | None = None,
    device: str | torch.device | None = "auto",
    resume: bool = False,
    emit: Emit | None = None,
) -> UnmixReport:
    """Attacks an encoded set, and writes recovered images, a scorecard and a report.

        report = frostglass.unmix("SET/", truth="IMAGES/")
        print(report)

    Args:
        encoded: an encoded set, a folder with `encryption.npy` and `label.npy`, a record of a client's updates, a plan
            (.toml), an `UnmixPlan`, or a tensor [E, c, h, w] in [-1, 1]. With a plan, the keywords from `targets` to
            `show_images` are taken from it.
        targets: [E, classes] labels of a tensor's encodings.
        truth: the private images (a source as for `frostglass encode`, or a tensor [N, c, h, w] in [0, 1]); opened
            for scoring alone, after the attacks have finished.
        public: folder of the public pool that was mixed in.
        groups: .npy with a number for each encoding; those with equal numbers are of one image.
        auxiliary: a data source with other images of the same kind.
        client: of recorded updates: whose; the only client if left out.
        model: of recorded updates: confirms the package.module:factory that the record names.
        known: what the attacker knows, keys as in a plan's [known]: images, per_class, k, private, labels, ...
        attacks: names, or tables with parameters; all that apply if left out.
        seed: of everything random.
        show_images: put pictures into the report and PNG files into the folder.
        out: the run folder; a new temporary one if left out.
        device: "auto", "cpu" or "cuda".
        resume: go on with a killed run in `out`, which must be given.
        emit: told of progress, if given.

    Raises:
        BadInput: something cannot be used as given; nothing was computed.
    """
    place = pick_device(device)
    tell = followed(out, resume, emit)
    if isinstance(encoded, UnmixPlan):
        return _run(parse_unmix_plan(encoded.model_dump()), out, place, resume, tell, Given())
    if not isinstance(encoded, Tensor) and Path(place_of(encoded, "encoded") or "").suffix == ".toml":
        return _run(load_unmix_plan(Path(encoded)), out, place, resume, tell, Given())
    given = Given()
    if isinstance(encoded, Tensor):
        given = replace(given, encoded=from_tensors(encoded, targets))
    elif targets is not None:
        raise BadInput("targets: they belong to a tensor of encodings; a folder has its own.")
    if isinstance(truth, Tensor):
        given = replace(given, truth=truth)
    if known is not None and not isinstance(known, Mapping):
        raise BadInput(f"known: {known!r} must be a table of keys and values.")
    plan = parse_unmix_plan(
        {
            "name": "unmix",
            "seed": seed,
            "encoded": "python" if isinstance(encoded, Tensor) else _placed(encoded, "encoded"),
            "truth": "python" if isinstance(truth, Tensor) else _placed(truth, "truth"),
            "pool": _placed(public, "public"),
            "groups": _placed(groups, "groups"),
            "auxiliary": _placed(auxiliary, "auxiliary"),
            "client": client,
            "model": model,
            "known": dict(known or {}),
            "attack": tables_of(attacks, "attacks"),
            "report": {"show_images": show_images},
        }
    )
    return _run(plan, out, place, resume, tell, given)


def _placed(given: Any, what: str) -> str | None:
    text = place_of(given, what)
    return None if text is None else anchored(text, Path.cwd())


def _run(plan: UnmixPlan, out: Any, device: Any, resume: bool, emit: Emit, given: Given) -> UnmixReport:
    if plan.encoded == "python" and given.encoded is None:
        raise BadInput("encoded: it was given from Python; run frostglass.unmix with it again.")
    if plan.truth == "python" and given.truth is None:
        raise BadInput("truth: it was given from Python; run frostglass.unmix with it again.")
    if out is not None:
        return run_unmix(plan, Path(out), device=device, resume=resume, emit=emit, given=given)
    folder = Path(tempfile.mkdtemp(prefix="frostglass-"))
    try:
        return run_unmix(plan, folder, device=device, emit=emit, given=given)
    except BadInput:
        shutil.rmtree(folder)
        raise
