"""Whether and where an interrupted run can be gone on with; clears up what came after its last whole round."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from frostglass.core.errors import BadInput
from frostglass.core.files import write_json, write_text
from frostglass.federated.federate_plan import FederatePlan
from frostglass.federated.federation import Federation
from frostglass.federated.flower.gate_mod import JOURNAL
from frostglass.federated.flower.unfinished import SERVER, UNFINISHED, Unfinished, Whole
from frostglass.federated.history import HISTORY
from frostglass.federated.record_files import whole_headers

MODEL = "model.safetensors"

_WAITING = "Rulings of the gate are missing"


def is_done(run: Path, plan: FederatePlan) -> bool:
    """Whether nothing is left to do in a run folder; then what a late kill left of its checkpoints goes too.

    Rulings that a kill kept from the journal after the last round are named in the history.

    Raises:
        BadInput: its history cannot be read.
    """
    held = Unfinished(run)
    done = not held.begun and len(_rounds(run)) == plan.server.rounds + 1
    if done:
        held.remove()
        history = json.loads((run / HISTORY).read_text(encoding="utf-8"))
        before = list(history.get("notes", ()))
        _name_missing(plan, history, {place for _, place in _rulings(run / JOURNAL)})
        if history.get("notes", before) != before:
            write_json(run / HISTORY, history)
    return done


def start_from(made: Federation, run: Path, engine: str) -> Whole | None:
    """Where an interrupted run stands; None if it had not begun, and nothing of it is left then.

    Args:
        made: of the plan that the run began with.
        run: its folder.
        engine: as then.

    Raises:
        BadInput: it went through another engine, on other images, or what it needs is damaged or missing.
    """
    held, record = Unfinished(run), made.record_folder
    for stray in run.glob(".*.part"):
        stray.unlink()
    if not held.begun:
        _refuse_lost(run)
        held.remove()
        for name in (HISTORY, JOURNAL):
            (run / name).unlink(missing_ok=True)
        if record is not None and (run / record).is_dir():
            shutil.rmtree(run / record)
        return None
    whole = held.load()
    if whole.history["engine"] != engine:
        raise BadInput(
            f"--resume: {run} began with --engine {whole.history['engine']}; use that, or choose an empty folder."
        )
    if whole.data != made.digest():
        raise BadInput(f"--resume: the images are not those that {run} began with; choose an empty folder.")
    if record is not None and len(whole_headers(run / record, whole.round)) != whole.recorded:
        raise BadInput(
            f"--resume: {run / record} does not hold the {whole.recorded} updates of the rounds so far; bring them "
            "back, or start anew in an empty folder."
        )
    held.clear_behind(whole.round)
    _cut_journal(made, run / JOURNAL, whole)
    return whole


def _rounds(run: Path) -> list[Any]:
    path = run / HISTORY
    if not path.exists():
        return []
    try:
        held: list[Any] = json.loads(path.read_text(encoding="utf-8"))["rounds"]
        return held
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise BadInput(f"--resume: {path} cannot be used ({wrong}); start anew in an empty folder.") from None


def _refuse_lost(run: Path) -> None:
    """Rounds that were made are not thrown away, nor what clients have spent in them forgotten."""
    made = len(_rounds(run)) - 1
    if made > 0:
        raise BadInput(
            f"--resume: {run / UNFINISHED / SERVER} is missing, from which round {made + 1} could be begun; start anew "
            "in an empty folder."
        )
    if (run / MODEL).exists():  # the weights after some round
        raise BadInput(
            f"--resume: {run / HISTORY} is missing, and {run} holds weights after a round; bring it back, or start "
            "anew in an empty folder."
        )


def _cut_journal(made: Federation, path: Path, whole: Whole) -> None:
    """Rulings of later rounds go; those whose checks still waited ("record") are named in the history."""
    kept = [(line, place) for line, place in _rulings(path) if place[0] <= whole.round]
    if path.exists():
        write_text(path, "".join(f"{line}\n" for line, _ in kept))
    _name_missing(made.plan, whole.history, {place for _, place in kept})


def _rulings(path: Path) -> list[tuple[str, tuple[int, str]]]:
    """(line, (round, client)) of each ruling in a gate's journal."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            row = json.loads(line)
            found.append((line, (int(row["round"]), str(row["client"]))))
        except (ValueError, KeyError, TypeError):
            continue  # cut short by a kill
    return found


def _name_missing(plan: FederatePlan, history: dict[str, Any], found: set[tuple[int, str]]) -> None:
    gate = plan.gate
    if gate is None or gate.action != "record" or plan.server.folder is None:
        return
    used = {(row["round"], c["client"]) for row in history["rounds"] for c in row["clients"]}
    notes = history["notes"]
    notes[:] = [n for n in notes if not n.startswith(_WAITING)]
    if used - found:
        where = ", ".join(f"round {r} client {c}" for r, c in sorted(used - found))
        notes.append(f"{_WAITING}, as their checks still waited when the run was interrupted: {where}.")
