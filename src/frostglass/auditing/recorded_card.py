"""What stands beside the cells of an audit of recorded updates: every update, what it is, and what is told from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from frostglass.attacks.inversion.counting import MISFIT
from frostglass.attacks.inversion.restore import Restored, by_counts, restored_of
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.linting.plan_defenses import defense_facts
from frostglass.auditing.linting.rules import findings
from frostglass.auditing.plan import Plan
from frostglass.auditing.prepare import Inputs, Prepared
from frostglass.auditing.recorded_choice import PLACEHOLDER, scenario_of, too_long
from frostglass.auditing.recorded_head import too_many
from frostglass.auditing.recorded_inputs import Sent
from frostglass.auditing.recorded_pool import headline_of, pooled, total
from frostglass.auditing.recorded_selection import chosen, unreadable
from frostglass.auditing.recorded_validator import read_as, same_norms, validate
from frostglass.auditing.recorded_view import Recording, mode_of, prepare_scenario
from frostglass.auditing.recorded_words import update_labels
from frostglass.auditing.score import score
from frostglass.auditing.scorecard import Cell, Labels, Scorecard
from frostglass.core.errors import BadInput
from frostglass.core.events import Emit, Event
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.threat import Observation

EXACT = ("linear_exact", "spear", "peel", "peel_residual", "imprint")
"""Attacks that prove what they show, where they apply."""


def with_recorded(
    plan: Plan, card: Scorecard, prepared: Sequence[Prepared], given: Inputs | None, tell: Emit
) -> Scorecard:
    """The scorecard with every recorded update, its checks, and trials pooled over clients; others pass as they are."""
    if plan.recorded_updates is None or given is None or given.recording is None:
        return card
    recording = given.recording
    picked, left = chosen(recording)
    readable = []
    for sent in picked:
        wrong = unreadable(recording, sent)
        if wrong:
            left[sent.header.number] = wrong
        else:
            readable.append(sent)
    norms = same_norms(recording, readable)
    by_number: dict[int, Prepared] = {}
    for one in prepared:
        if one.scenario.recorded is not None:
            by_number.setdefault(one.scenario.recorded.number, one)  # before any identification game
    rows = []
    for sent in recording.source.updates:
        number = sent.header.number
        row = _about(sent) | {"status": "passed over", "reason": left.get(number, "")}
        if number not in left:
            ready = by_number.get(number) or _bare(recording, sent, plan.seed)
            row |= _looked_at(recording, sent, ready, plan, card.cells)
            row["findings"] += [asdict(norms[number])] if number in norms else []
            tell(Event("note", str(number), values={"text": f"{sent.title}: labels {update_labels(row['labels'])}"}))
        rows.append(row)
    trials = pooled(plan, card.cells)
    recorded = {
        "source": recording.source.name,
        "engine": recording.source.engine,
        "note": recording.source.note,
        "network": recording.network.name,
        "image_shape": list(recording.network.image_shape),
        "problems": list(recording.source.problems),
        "rounds": sorted({u.header.round for u in readable}),
        "truth": _truth_words(recording),
        "updates": rows,
        "trials": trials,
    }
    return card.model_copy(
        update={
            "recorded": recorded,
            "headline": headline_of(card, rows),
            "verdict": None if card.verdict is None else total(card.verdict, trials),
        }
    )


def _bare(recording: Recording, sent: Sent, seed: int) -> Prepared:
    """An update that no attack was chosen for."""
    return prepare_scenario(recording, scenario_of(recording, sent, [PLACEHOLDER]), seed, torch.device("cpu"))


def _about(sent: Sent) -> dict[str, Any]:
    h = sent.header
    return {
        "number": h.number, "round": h.round, "client": h.client, "kind": h.kind, "examples": h.examples,
        "clients": h.clients, "defence": h.defence, "metrics": dict(h.metrics), "sha256": h.sha256, "findings": [],
        "labels": None, "exact": {}, "linter": [], "cells": [], "read_as": "", "mode": "",
    }  # fmt: skip


def _looked_at(recording: Recording, sent: Sent, ready: Prepared, plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    assert ready.arrived is not None
    assert ready.scenario.recorded is not None
    seen = ready.arrived.round.seen
    number = sent.header.number
    names = {s.name for s in plan.scenario if s.recorded is not None and s.recorded.number == number}
    own = [c for c in cells if c.scenario in names]
    reason = "" if own else too_long(recording, sent) or "no attack fits"
    return {
        "status": "attacked" if own else "checked",
        "reason": reason,
        "read_as": read_as(recording, sent),
        "mode": mode_of(sent, recording.source.tensors(sent)),
        "grants": list(ready.threat.grants),
        "beyond": list(ready.scenario.recorded.beyond),
        "findings": [asdict(f) for f in validate(recording, sent, seen)],
        "labels": _labels(ready, seen),
        "exact": {name: _applies(name, seen) for name in EXACT},
        "linter": [asdict(f) for one in defense_facts(plan, ready.scenario, ready.scenario.defense[0])
                   for f in findings(one)],
        "cells": [c.id for c in own],
    }  # fmt: skip


def _applies(name: str, seen: Observation) -> str:
    """Empty if an exact attack applies; else why it does not."""
    if any(getattr(m, "kind", "gradient") == "delta" for m in seen.messages):
        return "the update is a difference of several steps, and exact attacks read the gradient of one"
    try:
        problems = ATTACKS[name].make().check(seen)
    except BadInput as wrong:
        problems = list(wrong.problems)
    return problems[0] if problems else ""


def _labels(ready: Prepared, seen: Observation) -> dict[str, Any]:
    """Counts of labels with residual and confidence, and what guessing without the update scores."""
    assert ready.arrived is not None
    if too_many(seen):
        return {"problem": too_many(seen)}
    try:
        found = restored_of(seen, by_counts())
    except BadInput as wrong:
        return {"problem": wrong.problems[0].removeprefix("attack: ")}
    except (RuntimeError, ValueError) as wrong:  # values that no client sends break the solvers
        return {"problem": f"its values break the equations ({str(wrong).splitlines()[0]})"}
    shape = seen.image_shape
    result = Reconstruction(
        torch.zeros(0, *shape), torch.zeros(0, dtype=torch.bool), float("nan"), label_counts=found.counts
    )
    scored: Labels = score(result, ready.arrived.round, [], null=False).labels
    return {
        "confidence": "low" if found.confidence == "high" and found.residual > MISFIT else found.confidence,
        "rule": found.rule,
        "residual": None if found.residual != found.residual else round(found.residual, 6),
        "counts": None if found.counts is None else [round(float(c), 2) for c in found.counts],
        "count_accuracy": scored.count_accuracy,
        "set_accuracy": scored.set_accuracy,
        "guess": scored.no_gradient_guess if scored.no_gradient_guess is not None else _guess(found),
    }


def _guess(found: Restored) -> float | None:
    """What guessing every class equally often would score if the restored labels were right."""
    from frostglass.numerics.labels import no_gradient_guess

    return None if found.counts is None or found.confidence == "none" else no_gradient_guess(found.counts)


def _truth_words(recording: Recording) -> str:
    truth = recording.truth
    if truth is None:
        return "none was given: labels, certificates and objectives only, no scores"
    if "" in truth.pools:
        n = len(truth.pools[""])
        return (
            f"one pool of {n} images for all clients: where a message holds fewer, each row is matched to the nearest "
            f"of them, and counts only if closer than chance allows among {n}"
        )
    return "the images of " + ", ".join(f"{c} ({len(p)})" for c, p in truth.pools.items())
