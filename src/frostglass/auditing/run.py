"""Plays a plan: every cell through the one loop, scored afterwards, written down whole or resumable."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frostglass._version import __version__
from frostglass.auditing.cells import CellPlan, expand, outcome, pitfalls
from frostglass.auditing.plan import Plan
from frostglass.auditing.plan_checks import make_attack, make_defense
from frostglass.auditing.report import write_report
from frostglass.auditing.score import Scored, score, summarise
from frostglass.auditing.scorecard import AuditReport, Cell, Labels, Scorecard
from frostglass.auditing.simulate import Inputs, Prepared, Round, play, prepare
from frostglass.auditing.store import RunFolder, save_tensors
from frostglass.core.drive import Attack, drive, film_steps
from frostglass.core.errors import AttackFailed, BadInput, FrostglassError
from frostglass.core.events import Emit, Event, broadcast, silent
from frostglass.core.files import write_json
from frostglass.core.journal import Journal
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.numerics.bn import bn_layers

SHOWN = 8
"""Images of a cell's first batch that go into the report's pictures."""

LIMITS = [
    "An attack that fails proves nothing: a stronger attack, more compute or other grants may succeed.",
    "Only the listed attacks were run, on the listed network, images and checkpoints.",
    "Exact recovery and theorems are facts; optimisation results vary between images by several dB.",
    "Scores compare after one-to-one matching by squared error; a person may recognise more, or less.",
]


@dataclass
class _Outcome:
    """What one cell has come to."""

    scored: list[Scored] = field(default_factory=list)
    results: list[Reconstruction] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    seconds: float = 0.0
    iterations: int = 0
    at_truth: list[float] = field(default_factory=list)
    error: str | None = None


def run_plan(
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    emit: Emit = silent,
    inputs: Inputs | None = None,
    debug: bool = False,
) -> AuditReport:
    """Runs every cell of `plan` and writes the run folder.

    Args:
        plan: checked by `parse_plan`.
        out: the folder: new, empty, or of this plan with `resume`.
        device: where attacks compute.
        resume: go on with a run that was killed; finished repetitions are kept, the interrupted one continues from
            its last checkpoint, and the result is that of an uninterrupted run.
        emit: told of everything that happens.
        inputs: the user's own model and images.
        debug: let unexpected errors through instead of noting a failed cell.

    Raises:
        BadInput: the plan cannot be run; nothing has been computed or written then.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    digest = _digest(plan, inputs)
    prepared = _prepare_all(plan, device, inputs)
    folder = RunFolder(out)
    folder.open(plan.to_toml(), digest, resume=resume)
    tell = broadcast(Journal(out / "events.jsonl"), emit)
    cells = list(expand(plan))
    tell(Event("run_started", plan.name, values={"cells": len(cells), "frostglass": __version__}))
    rows: list[Cell] = []
    recovered: dict[str, Tensor] = {}
    pictures: dict[str, Tensor] = {}
    for cell in cells:
        row, done = _run_cell(plan, cell, prepared[cell.index], folder, tell, debug)
        rows.append(row)
        recovered |= {f"{cell.id}/{unit}": r.images for unit, r in enumerate(done.results)}
        if plan.report.show_images and done.scored:
            pictures |= _pictures(cell, done, folder)
    card = _scorecard(plan, rows, digest, device)
    save_tensors(out / "reconstruction.safetensors", recovered)
    if plan.report.show_images:
        save_tensors(out / "pictures.safetensors", pictures)
        folder.drop_frames()
    write_json(out / "scorecard.json", card.model_dump(mode="json"))
    write_report(out)
    tell(Event("run_finished", plan.name, values={"headline": card.headline, "failed": len(card.failed)}))
    return AuditReport(card, out)


def _prepare_all(plan: Plan, device: torch.device, inputs: Inputs | None) -> list[Prepared]:
    """Loads everything and asks every attack about every observation, so that all problems come out together."""
    ready: list[Prepared | None] = []
    problems: list[str] = []
    for index in range(len(plan.scenario)):
        try:
            ready.append(prepare(plan, index, device, inputs))
        except BadInput as wrong:
            ready.append(None)
            problems += wrong.problems
    for cell in expand(plan):
        held = ready[cell.index]
        if held is None:
            continue
        try:
            seen = play(held, make_defense(cell.defense), 0).seen
            problems += [f"{cell.title}: {p}" for p in make_attack(cell.attack).check(seen)]
        except BadInput as wrong:
            problems += [f"{cell.title}: {p}" for p in wrong.problems]
    if problems:
        raise BadInput(list(dict.fromkeys(problems)))
    return [p for p in ready if p is not None]


def _run_cell(
    plan: Plan, cell: CellPlan, prepared: Prepared, folder: RunFolder, tell: Emit, debug: bool
) -> tuple[Cell, _Outcome]:
    done = _Outcome()
    attack, defense = make_attack(cell.attack), make_defense(cell.defense)
    tell(Event("cell_started", cell.id, values={"title": cell.title, "batches": prepared.units}))
    try:
        for unit in range(prepared.units):
            played = play(prepared, defense, unit)
            result, note = _attack_unit(plan, cell, attack, played, unit, prepared, folder, tell)
            done.results.append(result)
            done.rounds.append(played)
            done.seconds += float(note["seconds"])
            done.iterations = max(done.iterations, int(note["iterations"]))
            done.scored.append(score(result, played, plan.report.metrics))
            done.at_truth += _objective_at_truth(attack, played, done.scored[-1], prepared)
    except (FrostglassError, MemoryError, torch.OutOfMemoryError, RuntimeError) as wrong:
        if debug and not isinstance(wrong, AttackFailed):
            raise
        done.error = _explained(wrong)
        tell(Event("cell_failed", cell.id, values={"error": done.error}))
    row = _cell_row(plan, cell, prepared, attack, done)
    if done.error is None:
        text = outcome(cell.attack.name, row.summary, row.encoding_summary)
        tell(Event("cell_finished", cell.id, values={"outcome": text, "seconds": round(done.seconds, 2)}))
    return row, done


def _explained(wrong: BaseException) -> str:
    text = str(wrong).strip().splitlines()[0] if str(wrong).strip() else ""
    if isinstance(wrong, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text:
        return f"out of memory; lower client.batch, data.size or the attack's seeds ({text or 'no detail'})"
    return text if isinstance(wrong, FrostglassError) else f"{type(wrong).__name__}: {text}"


def _attack_unit(
    plan: Plan,
    cell: CellPlan,
    attack: Attack[Any],
    played: Round,
    unit: int,
    prepared: Prepared,
    folder: RunFolder,
    tell: Emit,
) -> tuple[Reconstruction, Mapping[str, Any]]:
    """One repetition: from its result file, from its checkpoint, or from the start."""
    kept = folder.load_result(cell.id, unit)
    if kept is not None:
        return kept
    # one way: the attack's key says nothing about the client's, which have a root of their own and mix in the images
    rng = Rng.from_seed(plan.seed, "attack", attack.name).at(cell.id, unit)
    last = {"step": 0}

    def listen(event: Event) -> None:
        last["step"] = event.step
        if event.kind == "candidate":
            folder.save_frame(cell.id, event.step, event.tensors["images"][:64])
            return
        tell(Event(event.kind, f"{cell.id}/{unit}", event.step, event.steps, event.values))

    film = film_steps(attack.steps) if plan.report.show_images and unit == 0 else frozenset()
    begun = time.perf_counter()
    result = drive(
        attack,
        played.seen,
        Runtime(rng, prepared.device),
        emit=listen,
        store=folder.checkpoint(cell.id, unit, prepared.device),
        film=film,
    )
    note = {"seconds": time.perf_counter() - begun, "iterations": last["step"]}
    folder.save_result(cell.id, unit, result, note)
    return result, note


def _objective_at_truth(attack: Attack[Any], played: Round, scored: Scored, prepared: Prepared) -> list[float]:
    """The attack's objective at what was trained on: far below the one reached means that the optimiser fell short."""
    measure = getattr(attack, "objective_of", None)
    if measure is None:
        return []
    truth = scored.truth.trained
    run = Runtime(Rng.from_seed(0), prepared.device)
    return [float(measure(played.seen, truth.images, truth.targets, run))]


def _cell_row(plan: Plan, cell: CellPlan, prepared: Prepared, attack: Attack[Any], done: _Outcome) -> Cell:
    client = cell.scenario.client
    defense = make_defense(cell.defense)
    warnings = pitfalls(
        cell,
        units=prepared.units,
        repeats_images=prepared.repeats_images,
        batchnorm=bool(bn_layers(prepared.model)),
    )
    warnings += list(prepared.data.notes) + _contradictions(done.scored)
    objectives = [r.objective for r in done.results if r.objective == r.objective]
    spent = done.rounds[0].spent if done.rounds else None
    threshold = plan.report.threshold
    return Cell(
        id=cell.id,
        title=cell.title,
        scenario=cell.scenario.name,
        attack=cell.attack.name,
        defense=cell.defense.label,
        defense_claim=defense.claim,
        model=cell.scenario.model.name,
        mode=cell.scenario.model.mode,
        threat=cell.threat.name,
        grants=_grants(cell),
        upper_bound=cell.upper_bound,
        batch=client.batch * client.cohort,
        batches=prepared.units,
        update=client.update,
        status="done" if done.error is None else "failed",
        error=done.error,
        seconds=round(done.seconds, 3),
        iterations=done.iterations,
        objective=_mean(objectives),
        objective_at_truth=_mean(done.at_truth),
        labels=_pooled_labels([s.labels for s in done.scored]),
        images=[row for s in done.scored for row in s.private],
        summary=summarise([s.private for s in done.scored], threshold),
        encoding_images=[row for s in done.scored for row in s.encoding],
        encoding_summary=summarise([s.encoding for s in done.scored if s.encoding], threshold),
        privacy_spent=None if spent is None else vars(spent),
        info=dict(done.results[0].info) if done.results else {},
        warnings=warnings,
        settings={
            "attack": {**_defaults(attack), **cell.attack.settings},
            "defense": [{"name": p.name, **p.settings} for p in cell.defense.parts],
            "client": client.model_dump(),
            "data": cell.scenario.data.model_dump(),
            "model": cell.scenario.model.model_dump(),
        },
    )


def _defaults(attack: Attack[Any]) -> dict[str, Any]:
    from frostglass.attacks.registry import ATTACKS

    known = ATTACKS[attack.name].parameters if attack.name in ATTACKS else {}
    return {k: p.default for k, p in known.items() if isinstance(p.default, bool | int | float | str | None)}


def _grants(cell: CellPlan) -> list[str]:
    from frostglass.core.threat import ThreatModel, parse_grants

    return list(ThreatModel(cell.threat.name, parse_grants(cell.threat.grants)).grants)


def _contradictions(scored: Sequence[Scored]) -> list[str]:
    """A proved row that resembles nothing would be a fault of ours: say it, never hide it."""
    rows = [r for s in scored for r in (s.encoding or s.private) if r.proved]
    wrong = [r.id for r in rows if r.psnr is None or r.psnr < 40]
    if not wrong:
        return []
    return [f"Contradiction: {len(wrong)} rows were proved and match no image above 40 dB; please report this bug."]


def _pooled_labels(each: Sequence[Labels]) -> Labels:
    if not each:
        return Labels(source="unused")

    def mean(values: Sequence[float | None]) -> float | None:
        return _mean([v for v in values if v is not None])

    return Labels(
        source=each[0].source,
        restored=each[0].restored,
        set_accuracy=mean([e.set_accuracy for e in each]),
        count_accuracy=mean([e.count_accuracy for e in each]),
        no_gradient_guess=mean([e.no_gradient_guess for e in each]),
    )


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    return round(sum(finite) / len(finite), 9) if finite else None


def _pictures(cell: CellPlan, done: _Outcome, folder: RunFolder) -> dict[str, Tensor]:
    """First batch of a cell: private, encoding, reconstruction and filmstrip, in the order of the private images."""
    first, result = done.scored[0], done.results[0]
    truth = first.truth
    low, high = truth.trained.domain.low, truth.trained.domain.high
    encoded = bool(first.encoding)
    order = (first.encoding_order if encoded else first.order)[:SHOWN]

    def matched(images: Tensor) -> Tensor:
        rows = torch.full((len(order), *truth.trained.image_shape), float("nan"))
        for i, j in enumerate(order.tolist()):
            if 0 <= j < len(images):
                rows[i] = (images[j] - low) / (high - low)
        return rows

    found = {
        f"{cell.id}/private": truth.private.images[:SHOWN].cpu().float(),
        f"{cell.id}/reconstruction": matched(result.images),
    }
    if encoded:
        found[f"{cell.id}/encoding"] = truth.trained.images[:SHOWN].cpu().float()
    for step, frame in folder.frames(cell.id).items():
        found[f"{cell.id}/film/{step:06d}"] = matched(frame)
    return found


def _digest(plan: Plan, inputs: Inputs | None) -> str:
    """Of the plan and of the user's own objects, so that a folder belongs to both."""
    h = hashlib.sha256(plan.digest().encode())
    if inputs is not None:
        tensors = [inputs.images, inputs.labels]
        tensors += list(inputs.model.state_dict().values()) if inputs.model is not None else []
        for t in tensors:
            h.update(b"-" if t is None else t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def _scorecard(plan: Plan, rows: list[Cell], digest: str, device: torch.device) -> Scorecard:
    return Scorecard(
        name=plan.name,
        seed=plan.seed,
        headline=headline(rows),
        frostglass=__version__,
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "system": f"{platform.system()} {platform.machine()}",
            "threads": str(torch.get_num_threads()),
        },
        plan_sha256=digest,
        show_images=plan.report.show_images,
        cells=rows,
        limits=LIMITS,
    )


def headline(rows: Sequence[Cell]) -> str:
    """One sentence: the worst that was shown, and under which grants."""
    done = [r for r in rows if r.summary is not None]
    if not done:
        return "No cell finished: nothing was measured."

    def weight(r: Cell) -> tuple[float, ...]:
        assert r.summary is not None
        n = max(1, r.summary.images)
        ssim = r.summary.ssim_mean or 0.0
        return (not r.upper_bound, r.summary.proved / n, r.summary.over_threshold.count / n, ssim)

    shown = [r for r in done if r.summary and (r.summary.proved or r.summary.over_threshold.count)]
    if not shown:
        return (
            f"None of the {len(done)} attack runs showed a recognisable image; that is no proof of privacy: see the "
            "limits."
        )
    worst = max(shown, key=weight)
    extra = [g for g in worst.grants if g not in ("model", "messages", "domain", "mode")]
    granted = f"granted {', '.join(extra)}" if extra else "granted nothing else"
    text = outcome(worst.attack, worst.summary, worst.encoding_summary)
    bound = " (upper bound)" if worst.upper_bound else ""
    kind = "gradient" if worst.update == "gradient" else "weight difference"
    against = "" if worst.defense == "none" else f" despite {worst.defense}"
    return f"From one {kind} of {worst.scenario}{against}, {text}{bound}: the server held the model and was {granted}."
