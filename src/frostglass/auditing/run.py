"""Plays a plan: every cell through the one loop, scored afterwards, written down whole or resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frostglass._version import __version__
from frostglass.attacks.inversion import ranks
from frostglass.auditing import ranked
from frostglass.auditing.cells import CellPlan, expand, outcome
from frostglass.auditing.nonmembers import NonMembers, non_members
from frostglass.auditing.plan import Plan
from frostglass.auditing.plan_checks import make_attack, make_defense
from frostglass.auditing.prepare import Inputs, Prepared, prepare
from frostglass.auditing.recorded_card import with_recorded
from frostglass.auditing.recorded_view import with_recording
from frostglass.auditing.report import write_report
from frostglass.auditing.rows import Account, cell_row, environment_of, pictures, scorecard
from frostglass.auditing.score import Scored, score, unfit
from frostglass.auditing.scorecard import AuditReport, Cell
from frostglass.auditing.simulate import Round, play
from frostglass.auditing.store import RunFolder, Stopwatch, save_tensors
from frostglass.core.defense import Defense
from frostglass.core.drive import Attack, drive, film_steps, problems_of, warnings_of
from frostglass.core.errors import AttackFailed, BadInput, FrostglassError
from frostglass.core.events import Emit, Event, broadcast, silent
from frostglass.core.files import write_json
from frostglass.core.journal import Journal
from frostglass.core.memory import is_memory
from frostglass.core.precision import full_float32
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime, World
from frostglass.core.threat import GradientMessage, Observation

ALONE = World()

CHECKPOINTS = 10
"""At the least so many in one attack; long attacks write one every 200 steps."""


UNSCORED = "done, with no truth to score it against"
"""Of a recorded message whose private images were not given."""
UNRETURNED = "done, and returned no image to compare with the truth"


def run_plan(
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    emit: Emit = silent,
    inputs: Inputs | None = None,
    debug: bool = False,
    world: World = ALONE,
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
        world: ranks that run this plan together, all of them calling: they share the seeds of attacks that can, and
            rank 0 alone runs the others, scores, writes and tells.

    Raises:
        BadInput: the plan cannot be run; nothing has been written then.
        RankLost: another rank is gone; the folder holds what is needed to go on with `resume`.
    """
    with RunFolder(out) as folder, _deterministic():
        ranks.from_first(lambda: folder.check(plan.digest(), resume=resume), world, "the start")
        given = ranks.on_all(lambda: with_recording(plan, inputs), world, "the start")
        prepared = ranks.on_all(lambda: _prepare_all(plan, device, given, debug), world, "the start")
        data = ranks.same_on_all(_data_digest(prepared), world, "images, labels and weights")
        text, sha256, here = plan.to_toml(), plan.digest(), environment_of(device)
        ranks.from_first(lambda: folder.open(text, sha256, data, resume=resume, environment=here), world, "the start")
        tell = broadcast(Journal(out / "events.jsonl"), emit) if world.rank == 0 else silent
        return _run_cells(plan, prepared, given, folder, device, tell, debug, world)


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same plan gives the same result; afterwards torch's global switches are as the caller had them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling every new tensor with NaN helps to find reads of memory never written, and takes a tenth of the time
    memory.fill_uninitialized_memory = False
    try:
        with full_float32():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled


def _prepare_all(plan: Plan, device: torch.device, inputs: Inputs | None, debug: bool) -> list[Prepared]:
    """Loads everything and asks every attack about every observation, so that all problems come out together."""
    ready: list[Prepared | None] = []
    problems: list[str] = []
    for index, scenario in enumerate(plan.scenario):
        try:
            ready.append(prepare(plan, index, device, inputs))
        except (BadInput, MemoryError, RuntimeError) as wrong:
            if not isinstance(wrong, BadInput) and not is_memory(wrong):
                raise
            ready.append(None)
            problems += wrong.problems if isinstance(wrong, BadInput) else [f"{scenario.name}: {_explained(wrong)}."]
    for one in filter(None, ready):
        problems += [f"{one.scenario.name}: {p}" for p in unfit(plan.report, one.probe, one.model)]
    for cell in expand(plan):
        held = ready[cell.index]
        if held is None:
            continue
        try:
            seen = _play(held, make_defense(cell.defense), 0, debug).seen
            if not _not_finite(seen):  # such a cell fails alone, later
                problems += [f"{cell.title}: {p}" for p in problems_of(make_attack(cell.attack), seen)]
        except BadInput as wrong:
            problems += [f"{cell.title}: {p}" for p in wrong.problems]
    if problems:
        raise BadInput(list(dict.fromkeys(problems)))
    return [p for p in ready if p is not None]


def _play(prepared: Prepared, defense: Defense, unit: int, debug: bool) -> Round:
    """`play`, where whatever the user's network or memory raises becomes a sentence."""
    try:
        return play(prepared, defense, unit)
    except FrostglassError:
        raise
    except Exception as wrong:
        if debug:
            raise
        raise BadInput(
            f"the client's step cannot be computed: {_explained(wrong)}; check model, client.batch and data.size."
        ) from wrong


def _data_digest(prepared: list[Prepared]) -> str:
    """SHA-256 of all images, labels and weights."""
    return hashlib.sha256(b"".join(p.digest() for p in prepared)).hexdigest()


def _run_cells(
    plan: Plan,
    prepared: list[Prepared],
    given: Inputs | None,
    folder: RunFolder,
    device: torch.device,
    tell: Emit,
    debug: bool,
    world: World,
) -> AuditReport:
    out = folder.path
    cells = list(expand(plan))
    here = environment_of(device)
    tell(Event("run_started", plan.name, values={"cells": len(cells), "frostglass": __version__}))
    if moved := folder.moved(here):
        tell(Event("note", plan.name, values={"text": moved}))
    rows: list[Cell] = []
    recovered: dict[str, Tensor] = {}
    shown: dict[str, Tensor] = {}
    others = lru_cache(maxsize=1)(lambda index: non_members(prepared[index], plan.report))  # a scenario at a time
    for cell in cells:
        if world.rank:
            rows.append(_assist(plan, cell, prepared[cell.index], folder, debug, world))
            continue
        row, done = _run_cell(plan, cell, prepared[cell.index], partial(others, cell.index), folder, tell, debug, world)
        ranked.end_cell(row, world)
        rows.append(row)
        recovered |= {f"{cell.id}/{unit}": r.images for unit, r in enumerate(done.results)}
        if plan.report.show_images and done.scored:
            shown |= pictures(cell, done, folder)
    card = scorecard(plan, rows, folder.environment(here), _data_digest(prepared))
    card = with_recorded(plan, card, prepared, given, tell)
    if world.rank:
        return AuditReport(card, out)
    save_tensors(out / "reconstruction.safetensors", recovered)
    if plan.report.show_images:
        save_tensors(out / "pictures.safetensors", shown)
    write_json(out / "scorecard.json", card.model_dump(mode="json"))
    write_report(out)
    said = {"headline": card.headline, "failed": len(card.failed)}
    tell(Event("run_finished", plan.name, values=said | ({"verdict": card.verdict.verdict} if card.verdict else {})))
    return AuditReport(card, out)


def _run_cell(
    plan: Plan,
    cell: CellPlan,
    prepared: Prepared,
    others: Callable[[], NonMembers | None],
    folder: RunFolder,
    tell: Emit,
    debug: bool,
    world: World,
) -> tuple[Cell, Account]:
    done = Account()
    attack, defense = make_attack(cell.attack), make_defense(cell.defense)
    tell(Event("cell_started", cell.id, values={"title": cell.title, "batches": prepared.units}))
    try:
        for unit in range(prepared.units):
            played = _play(prepared, defense, unit, debug)
            result, note = _attack_unit(plan, cell, attack, played, unit, prepared, folder, tell, world)
            scored = score(result, played, plan.report.metrics, others(), null=plan.report.null)
            if unit == 0:
                done.notes += warnings_of(attack, played.seen)
            done.at_truth += _objective_at_truth(attack, played, scored, prepared)
            done.scored.append(scored)
            done.results.append(result)
            done.spent = played.spent
            done.seconds += float(note["seconds"])
            done.iterations = max(done.iterations, int(note["iterations"]))
    except ranks.RankLost:
        raise
    except Exception as wrong:  # whatever breaks one cell, the others go on
        if debug and not isinstance(wrong, AttackFailed):
            raise
        done.error = _explained(wrong)
        tell(Event("cell_failed", cell.id, values={"error": done.error}))
    row = cell_row(plan, cell, prepared, done)
    if done.error is None:
        unscored = UNSCORED if row.pool is None else UNRETURNED
        text = outcome(cell.attack.name, row.summary, row.encoding_summary) if row.summary else unscored
        tell(Event("cell_finished", cell.id, values={"outcome": text, "seconds": round(done.seconds, 2)}))
    return row, done


def _assist(plan: Plan, cell: CellPlan, prepared: Prepared, folder: RunFolder, debug: bool, world: World) -> Cell:
    """What ranks other than 0 do in a cell: their share of the attacks that it calls them to; returns its row."""
    attack, defense = make_attack(cell.attack), make_defense(cell.defense)
    while not isinstance(call := ranked.next_call(world), Cell):
        run = _runtime(plan, cell, call, attack, prepared, world)
        slots = ranked.slots_of(folder, cell.id, call, run)
        try:
            seen = _play(prepared, defense, call, debug).seen
            ranked.drive_share(attack, seen, run, slots, save_every=save_every(attack))
        except ranks.RankLost:
            raise
        except AttackFailed:
            pass  # rank 0 meets the same, and writes it down
        ranked.drop(slots)
    return call


def _runtime(plan: Plan, cell: CellPlan, unit: int, attack: Attack[Any], prepared: Prepared, world: World) -> Runtime:
    """Of one repetition. One way: the attack's key says nothing about the client's, which have a root of their own and
    mix in the images."""
    rng = Rng.from_seed(plan.seed, "attack", attack.name).at(cell.id, unit)
    return Runtime(rng, prepared.device, world=world if ranked.shares(attack, world) else World())


def save_every(attack: Attack[Any]) -> int:
    """Steps between two checkpoints: the attack's own number where its steps are long and its limit says little."""
    return int(getattr(attack, "save_every", max(1, min(200, attack.steps // CHECKPOINTS))))


def _explained(wrong: BaseException) -> str:
    text = next((line.strip() for line in str(wrong).splitlines() if line.strip()), "no detail")
    if is_memory(wrong):
        return f"out of memory; lower client.batch, data.size or the attack's seeds ({text})"
    return text if isinstance(wrong, FrostglassError) else f"{type(wrong).__name__}: {text}"


def _not_finite(seen: Observation) -> list[str]:
    """Parameters whose gradient holds a NaN or an infinity."""
    sent = [m.gradients for m in seen.messages if isinstance(m, GradientMessage)]
    return [name for gradients in sent for name, g in gradients.items() if not bool(g.isfinite().all())]


def _attack_unit(
    plan: Plan,
    cell: CellPlan,
    attack: Attack[Any],
    played: Round,
    unit: int,
    prepared: Prepared,
    folder: RunFolder,
    tell: Emit,
    world: World,
) -> tuple[Reconstruction, Mapping[str, Any]]:
    """One repetition: from its result file, from its checkpoint, or from the start."""
    kept = folder.load_result(cell.id, unit)
    if kept is not None:
        return kept
    broken = _not_finite(played.seen)
    if broken:
        raise AttackFailed(
            f"update: {broken[0]!r} holds values that are not finite ({len(broken)} such tensors); lower client.lr, or "
            "check the model's weights"
        )
    run = _runtime(plan, cell, unit, attack, prepared, world)
    last, watch = {"step": 0}, Stopwatch()

    def listen(event: Event) -> None:
        last["step"] = event.step
        if event.kind == "attack_started":
            watch.goes_on(event.step)
        if event.kind == "candidate":
            folder.save_frame(cell.id, event.step, event.tensors["images"][:64])
            return
        tell(Event(event.kind, f"{cell.id}/{unit}", event.step, event.steps, event.values))

    film = film_steps(attack.steps) if plan.report.show_images and unit == 0 else frozenset()
    every = save_every(attack)
    if run.world.size > 1:
        ranked.call_others(unit, world)
        slots = ranked.slots_of(folder, cell.id, unit, run, watch)
        result = ranked.drive_share(attack, played.seen, run, slots, save_every=every, emit=listen, film=film)
    else:
        store = folder.checkpoint(cell.id, unit, prepared.device, watch)
        result = drive(attack, played.seen, run, emit=listen, store=store, save_every=every, film=film)
    note = {"seconds": watch.seconds, "iterations": last["step"]}
    folder.save_result(cell.id, unit, result, note)
    return result, note


def _objective_at_truth(attack: Attack[Any], played: Round, scored: Scored, prepared: Prepared) -> list[float]:
    """The attack's objective at what was trained on: far below the one reached means that the optimiser fell short."""
    measure = getattr(attack, "objective_of", None)
    if measure is None:
        return []
    if scored.truth is None or not scored.truth.exact or scored.truth.encoded:
        return []
    truth = scored.truth.trained
    run = Runtime(Rng.from_seed(0), prepared.device)
    return [float(measure(played.seen, truth.images, truth.targets, run))]
