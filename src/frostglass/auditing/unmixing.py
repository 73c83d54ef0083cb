"""Plays an audit of encodings: every attack through the one loop, scored afterwards, written whole or resumable."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.plan import Named, ReportPlan
from frostglass.auditing.recorded_truth import MOST_IMAGES as MOST_TRUTH
from frostglass.auditing.rows import environment_of
from frostglass.auditing.run import save_every
from frostglass.auditing.score import Scored, closest, score, score_of_guess, summarise, unfit
from frostglass.auditing.scorecard import Cell, Labels, Summary
from frostglass.auditing.simulate import Round, Truth
from frostglass.auditing.store import RunFolder, Stopwatch
from frostglass.auditing.unmixing_card import UnmixScorecard, make_card
from frostglass.auditing.unmixing_files import pictures_of, write_all
from frostglass.auditing.unmixing_inputs import EncodedSet, range_of, read_encoded, within
from frostglass.auditing.unmixing_plan import UnmixPlan, files_digest
from frostglass.auditing.unmixing_record import is_record, view_of_record
from frostglass.auditing.unmixing_view import View, view_of
from frostglass.core.batch import Batch, Domain, Sealed, one_hot
from frostglass.core.drive import Attack, drive, problems_of, warnings_of
from frostglass.core.errors import BadInput, FrostglassError, first_line
from frostglass.core.events import Emit, Event, broadcast, silent
from frostglass.core.journal import Journal, json_ready
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.update import LocalPlan
from frostglass.vision import datasets
from frostglass.vision.byte_images import load_bytes

UNIT = Domain(0.0, 1.0)


@dataclass(frozen=True)
class Given:
    """The user's own objects instead of what the plan names.

    Args:
        encoded: the set.
        truth: [n, c, h, w] in [0, 1], for scoring alone.
    """

    encoded: EncodedSet | None = None
    truth: Tensor | None = None


class UnmixReport:
    """What `frostglass.unmix` returns: the scorecard, the recovered images, and where everything was written."""

    def __init__(self, scorecard: UnmixScorecard, folder: Path, images: Mapping[str, Tensor]) -> None:
        self.scorecard, self.folder, self.images = scorecard, folder, images

    @property
    def html(self) -> Path:
        """The report page."""
        return self.folder / "report.html"

    def __str__(self) -> str:
        from frostglass.auditing.table import table_text

        verdict = "\n".join(f"- {line}" for line in self.scorecard.findings[1:])
        return f"{self.scorecard.headline}\n\n{table_text(self.scorecard)}\n\n{verdict}\n\nReport: {self.html}"

    def __repr__(self) -> str:
        return f"UnmixReport({len(self.scorecard.cells)} attacks, {self.folder})"


def run_unmix(
    plan: UnmixPlan,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    emit: Emit = silent,
    given: Given | None = None,
) -> UnmixReport:
    """Runs the attacks of `plan` on its encoded set and writes the run folder.

    Args:
        plan: checked by `parse_unmix_plan`.
        out: new, empty, or of this plan with `resume`.
        device: where unmixing and comparisons with a pool compute; the smaller attacks stay on the CPU.
        resume: go on with a killed run.
        emit: told of everything that happens.
        given: objects from Python instead of the plan's paths.

    Raises:
        BadInput: the plan cannot be run; nothing has been written then.
    """
    given = given or Given()
    with RunFolder(out) as folder:
        folder.check(plan.digest(), resume=resume)
        encoded, view = _seen(plan, given)
        truth = _truth(plan, encoded, view, given)
        if truth is not None:
            asked = ReportPlan(metrics=plan.report.metrics, threshold=plan.report.threshold)
            wrong = unfit(asked, torch.zeros(1, *encoded.shape), view.seen.model)
            if wrong:
                raise BadInput(wrong)
        ready, skipped = _applicable(plan, view)
        inputs = encoded.digest + view.digest + files_digest(plan)
        here = environment_of(device)
        folder.open(plan.to_toml(), plan.digest(), inputs, resume=resume, environment=here)
        tell = broadcast(Journal(out / "events.jsonl"), emit)
        tell(Event("run_started", plan.name, values={"cells": len(ready)}))
        if moved := folder.moved(here):
            tell(Event("note", plan.name, values={"text": moved}))
        cells = list(skipped)
        found: dict[str, Tensor] = {}
        shown: dict[str, Tensor] = {}
        for key, entry, attack in ready:
            cell, result, pictures = _run_one(plan, view, encoded, truth, (key, entry, attack), folder, device, tell)
            cells.append(cell)
            if result is not None:
                found[key] = result
                shown |= pictures
        cells.sort(key=lambda c: c.id)
        guess = None if truth is None else _guess(plan, truth)
        card = make_card(plan, encoded, view, cells, folder.environment(here), scored=truth is not None, guess=guess)
        write_all(plan, out, encoded, card, found, shown)
        tell(Event("run_finished", plan.name, values={"headline": card.headline, "failed": len(card.failed)}))
        return UnmixReport(card, out, found)


def _seen(plan: UnmixPlan, given: Given) -> tuple[EncodedSet, View]:
    """(the set, what the attacker sees of it)."""
    if given.encoded is None and is_record(plan.encoded):
        return view_of_record(plan)
    encoded = given.encoded if given.encoded is not None else read_encoded(Path(plan.encoded))
    return encoded, view_of(plan, encoded)


def _truth(plan: UnmixPlan, encoded: EncodedSet, view: View, given: Given) -> Sealed[Truth] | None:
    """The private images, sealed until the attacks have finished."""
    classes = view.seen.classes
    if given.truth is not None:
        x = given.truth.detach().cpu()
        if x.ndim != 4 or tuple(x.shape[1:]) != encoded.shape or not len(x):
            raise BadInput(f"truth: shape {tuple(x.shape)} must be [n, {', '.join(map(str, encoded.shape))}].")
        if not within(x, 0, 1):
            raise BadInput(f"truth: {range_of(x)} must be floating point, finite and in [0, 1]; divide bytes by 255.")
        x = x.float()
        labels, names = [0] * len(x), tuple(f"image {i}" for i in range(len(x)))
    elif plan.truth is not None:
        source = f"folder:{plan.truth}" if Path(plan.truth).is_dir() else plan.truth
        if datasets.count(source) > MOST_TRUTH:
            raise BadInput(
                f"--truth: {datasets.count(source)} images are more than the {MOST_TRUTH} that recovered ones are "
                "compared with; give the private ones alone."
            )
        held = load_bytes(source, size=encoded.shape[1:], channels=encoded.shape[0])
        x, names = held.images.float() / 255, held.names
        labels, classes = held.labels.tolist(), max(classes, held.classes)
    else:
        return None
    if view.images is not None and len(x) < view.images:
        raise BadInput(f"--truth: {len(x)} images, and the set has {view.images} private ones; give all of them.")
    batch = Batch(x, one_hot(labels, max(classes, 2)), UNIT, names)
    return Sealed(Truth(batch, batch))


def _applicable(plan: UnmixPlan, view: View) -> tuple[list[tuple[str, Named, Attack[Any]]], list[Cell]]:
    """Attacks that can run, and a skipped cell for each that cannot where the plan left the choice open."""
    ready, skipped, problems = [], [], []
    for number, entry in enumerate(plan.attacks, 1):
        key = f"{number:02d}-{entry.name.replace('_', '-')}"
        try:
            attack = ATTACKS[entry.name].make(**entry.settings)
            wrong = problems_of(attack, view.seen)
            lacking = sorted(k.value for k in attack.needs if k.value not in view.grants and k.value != "model")
        except BadInput as refused:
            wrong, lacking = list(refused.problems), []
        if lacking and not wrong:
            wrong = [f"it needs the grant {', '.join(map(repr, lacking))}."]
        if not wrong:
            ready.append((key, entry, attack))
        elif plan.automatic:
            skipped.append(_cell(plan, view, key, entry, status="skipped", error=" ".join(wrong)))
        else:
            problems += [w if w.startswith(entry.name) else f"{entry.name}: {w}" for w in wrong]
    if problems:
        raise BadInput(problems)
    return ready, skipped


def _run_one(
    plan: UnmixPlan,
    view: View,
    encoded: EncodedSet,
    truth: Sealed[Truth] | None,
    what: tuple[str, Named, Attack[Any]],
    folder: RunFolder,
    device: torch.device,
    tell: Emit,
) -> tuple[Cell, Tensor | None, dict[str, Tensor]]:
    """One attack: driven or taken from its result file, then scored. (cell, images in [0, 1], pictures)."""
    key, entry, attack = what
    tell(Event("cell_started", key, values={"title": f"{entry.name} on {encoded.name}"}))
    try:
        result, note = _driven(plan, view, key, attack, folder, device, tell)
        turned, scored = _compared(plan, view, attack, result, truth)
        count = int(encoded.manifest.get("images") or view.images or 0)
        if scored is not None and count and encoded.behind is None:  # of gradients nobody counts the images behind them
            scored = closest(scored, count)
        cell = _cell(plan, view, key, entry, status="done", result=result, scored=scored, note=note, attack=attack)
    except Exception as wrong:  # whatever breaks one attack or its scores, the others go on
        text = str(wrong) if isinstance(wrong, FrostglassError) else first_line(wrong)
        tell(Event("cell_failed", key, values={"error": text}))
        return _cell(plan, view, key, entry, status="failed", error=text), None, {}
    images = _in_unit(result.images)  # under the attack's own sign: the truth has no part in what is written
    done = f"{len(images)} images" if scored is None else _outcome(cell)
    tell(Event("cell_finished", key, values={"outcome": done, "seconds": round(cell.seconds, 2)}))
    return cell, images, pictures_of(key, turned, scored) if plan.report.show_images else {}


def _guess(plan: UnmixPlan, truth: Sealed[Truth]) -> Summary | None:
    """What guessing scores, by the threshold's metric alone where another one breaks; None if it is that one."""
    for metrics in (plan.report.metrics, [plan.report.threshold.metric]):
        with suppress(BadInput):  # which metric, and how, is in the cells
            return score_of_guess(truth, metrics, plan.report.threshold)
    return None


def _outcome(cell: Cell) -> str:
    s = cell.summary
    if s is None or s.ssim_median is None:
        return "nothing shown"
    return f"{s.over_threshold.count} of {s.images} images recognisable, median SSIM {s.ssim_median:.2f}"


def _driven(
    plan: UnmixPlan, view: View, key: str, attack: Attack[Any], folder: RunFolder, device: torch.device, tell: Emit
) -> tuple[Reconstruction, Mapping[str, Any]]:
    kept = folder.load_result(key, 0)
    if kept is not None:
        return kept
    last, watch = {"step": 0}, Stopwatch()

    def listen(event: Event) -> None:
        last["step"] = event.step
        if event.kind == "attack_started":
            watch.goes_on(event.step)
        tell(Event(event.kind, f"{key}/0", event.step, event.steps, event.values))

    result = drive(
        attack,
        view.seen,
        Runtime(Rng.from_seed(plan.seed, "attack", attack.name).at(key), device),
        emit=listen,
        store=folder.checkpoint(key, 0, device, watch),
        save_every=save_every(attack),
    )
    note = {"seconds": watch.seconds, "iterations": last["step"]}
    folder.save_result(key, 0, result, note)
    return result, note


def _compared(
    plan: UnmixPlan, view: View, attack: Attack[Any], result: Reconstruction, truth: Sealed[Truth] | None
) -> tuple[Tensor, Scored | None]:
    """(images in [0, 1], scores) under the sign, one for the whole set, that fits better where the attack leaves it
    open."""
    either = getattr(attack, "sign_free", False) or result.info.get("sign_free") is True
    signs = (1.0, -1.0) if either and truth is not None else (1.0,)
    best: tuple[float, Tensor, Scored | None] | None = None
    for sign in signs:
        images = _in_unit(sign * result.images)
        if truth is None:
            return images, None
        played = Round(view.seen, truth, None, LocalPlan())
        scored = score(replace(result, images=images), played, plan.report.metrics, None, null=False)
        value = sum(row.ssim or 0.0 for row in scored.private)
        if best is None or value > best[0]:
            best = value, images, scored
    assert best is not None
    return best[1], best[2]


def _in_unit(images: Tensor) -> Tensor:
    return ((images + 1) / 2).clamp(0, 1)


def _picked(entry: Named, result: Reconstruction | None, scored: Scored | None) -> list[str]:
    """What the matching has chosen by the truth, and an attacker could not."""
    if result is None or scored is None or scored.truth is None:
        return []
    held, found = len(scored.private), []
    if scored.truth.pool is not None:
        found.append(
            f"--truth holds {scored.truth.pool} images and the set {held} private ones: scored are the {held} that "
            "come closest to what was recovered."
        )
    if len(result.images) > held and entry.name != "demask":  # which says so in words of its own
        found.append(
            f"Scored are, of {len(result.images)} images returned, those closest to the {held} private ones; whoever "
            "holds the encodings sees all of them and cannot pick so."
        )
    return found


def _cell(
    plan: UnmixPlan,
    view: View,
    key: str,
    entry: Named,
    *,
    status: str,
    error: str | None = None,
    result: Reconstruction | None = None,
    scored: Scored | None = None,
    note: Mapping[str, Any] | None = None,
    attack: Attack[Any] | None = None,
) -> Cell:
    defaults = {k: p.default for k, p in ATTACKS[entry.name].parameters.items() if p.default is not p.empty}
    info = {} if result is None else {"recovered": len(result.images), **result.info}
    finite = result is not None and np.isfinite(result.objective)
    warned = [] if attack is None else warnings_of(attack, view.seen)
    warned = [*warned, *_picked(entry, result, scored)]
    return Cell(
        id=key,
        title=entry.name,
        scenario=plan.name,
        attack=entry.name,
        defense="encodings" if view.law is None else f"k = {view.law.k} ({view.law.private} private)",
        defense_claim="heuristic",
        model="none was sent",
        mode="eval",
        threat="whoever holds the encodings",
        grants=list(view.grants),
        upper_bound=False,
        batch=view.images or 0,
        batches=1,
        update="encodings",
        status=status,
        error=error,
        seconds=0.0 if note is None else round(float(note["seconds"]), 3),
        iterations=0 if note is None else int(note["iterations"]),
        objective=float(result.objective) if finite and result is not None else None,
        labels=Labels(source="granted" if view.seen.labels is not None else "unused"),
        images=[] if scored is None else scored.private,
        summary=None if scored is None else summarise([scored.private], plan.report.threshold),
        info=json_ready(info),
        warnings=[*warned, *view.notes],
        settings=json_ready({"attack": {**defaults, **entry.settings}, "known": plan.known.model_dump()}),
    )
