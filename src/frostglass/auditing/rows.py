"""From what a cell has come to, to its row of the scorecard, its pictures and the headline."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from frostglass._version import __version__
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.cells import CellPlan, beyond_chance, outcome, pitfalls
from frostglass.auditing.judging import judge
from frostglass.auditing.plan import Plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import Prepared
from frostglass.auditing.score import Scored, summarise
from frostglass.auditing.scorecard import Cell, ImageScore, Labels, Scorecard
from frostglass.auditing.standards import standards
from frostglass.auditing.store import RunFolder
from frostglass.auditing.verdict import audit_verdict
from frostglass.core.journal import json_ready
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.registry import Registry
from frostglass.core.threat import ALWAYS, ThreatModel, parse_grants
from frostglass.core.update import PrivacySpent
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.bn import bn_layers
from frostglass.vision.networks import MODELS

SHOWN = 8
"""Images of a cell's first batch that go into the report's pictures."""

LIMITS = [
    "An attack that fails proves nothing: a stronger attack, more compute or other grants may succeed.",
    "Only the listed attacks were run, on the listed network, images and checkpoints.",
    "Exact recovery and theorems are facts; optimisation results vary between images by several dB.",
    "Scores compare after one-to-one matching by squared error; a person may recognise more, or less.",
]


@dataclass
class Account:
    """What one cell has come to, a list entry for each repetition that was finished.

    Args:
        scored: opened and compared.
        results: what the attack returned.
        at_truth: the attack's objective at what was trained on, where it can be measured.
        notes: what the attack finds suspicious about the first update.
        spent: privacy spent by one message.
        seconds: of all attacks.
        iterations: of the longest.
        error: why the cell failed, None if it did not.
    """

    scored: list[Scored] = field(default_factory=list)
    results: list[Reconstruction] = field(default_factory=list)
    at_truth: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spent: PrivacySpent | None = None
    seconds: float = 0.0
    iterations: int = 0
    error: str | None = None


def cell_row(plan: Plan, cell: CellPlan, prepared: Prepared, done: Account) -> Cell:
    """The scorecard's entry for a cell; of a failed one, it covers the repetitions that were finished."""
    client = cell.scenario.client
    threshold = plan.report.threshold
    most = max((len(r.images) for r in done.results), default=0)
    return Cell(
        id=cell.id,
        title=cell.title,
        scenario=cell.scenario.name,
        attack=cell.attack.name,
        defense=_defense_words(cell),
        defense_claim=make_defense(cell.defense).claim,
        model=cell.scenario.model.name,
        mode=cell.scenario.model.mode,
        threat=cell.threat.name,
        grants=list(ThreatModel(cell.threat.name, parse_grants(cell.threat.grants)).grants),
        upper_bound=cell.upper_bound,
        batch=prepared.per_message,
        batches=prepared.units,
        update=client.update,
        status="done" if done.error is None else "failed",
        error=done.error,
        seconds=round(done.seconds, 3),
        iterations=done.iterations,
        objective=_mean([r.objective for r in done.results]),
        objective_at_truth=_mean(done.at_truth),
        labels=_pooled_labels([s.labels for s in done.scored]),
        images=[row for s in done.scored for row in _named(s)],
        summary=summarise([_named(s) for s in done.scored], threshold),
        encoding_images=[row for s in done.scored for row in s.encoding],
        encoding_summary=summarise([s.encoding for s in done.scored if s.encoding], threshold),
        privacy_spent=None if done.spent is None else json_ready(vars(done.spent)),
        info=json_ready(done.results[0].info) if done.results else {},
        warnings=_warnings(cell, prepared, done),
        metric_notes={name: note for s in reversed(done.scored) for name, note in s.notes.items()},
        settings=json_ready(_settings(cell)),
        pool=next((s.truth.pool for s in done.scored if s.truth is not None), None),
        rows=most if most > prepared.per_message else None,
        batchnorm=bool(bn_layers(prepared.model)),
    )


def _named(scored: Scored) -> list[ImageScore]:
    """Scores of the private images; the first is the one that an identification game is about."""
    if scored.identified is None or not scored.private:
        return scored.private
    game = {"identified": scored.identified, "candidates": scored.candidates}
    return [scored.private[0].model_copy(update=game), *scored.private[1:]]


def _defense_words(cell: CellPlan) -> str:
    """Its label; of a recorded update, what it was declared with, as the audit itself applies nothing."""
    recorded = cell.scenario.recorded
    declared = recorded.declared if recorded is not None and cell.defense.label == "none" else None
    return cell.defense.label if declared in (None, "none") else f"{declared} (declared)"


def _warnings(cell: CellPlan, prepared: Prepared, done: Account) -> list[str]:
    found = pitfalls(
        cell,
        units=prepared.units,
        repeats_images=prepared.repeats_images,
        batchnorm=bool(bn_layers(prepared.model)),
    )
    if done.error is not None and done.scored:
        found.append(f"Failed after {len(done.scored)} of {prepared.units} batches: the scores are of those alone.")
    return found + done.notes + list(prepared.data.notes) + _contradictions(done.scored)


def _settings(cell: CellPlan) -> dict[str, Any]:
    """Every setting of a cell, defaults included."""
    model = cell.scenario.model
    options = {**_defaults(MODELS, model.name), **model.options}
    return {
        "attack": {**_defaults(ATTACKS, cell.attack.name), **cell.attack.settings},
        "defense": [{"name": p.name, **_defaults(DEFENSES, p.name), **p.settings} for p in cell.defense.parts],
        "client": cell.scenario.client.model_dump(),
        "data": cell.scenario.data.model_dump(),
        "model": model.model_dump() | {"options": options},
    }


def _defaults(registry: Registry[Any], name: str) -> dict[str, Any]:
    known = registry[name].parameters if name in registry else {}
    return {k: p.default for k, p in known.items() if p.default is not p.empty}


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
    finite = [v for v in values if math.isfinite(v)]
    return round(sum(finite) / len(finite), 9) if finite else None


def pictures(cell: CellPlan, done: Account, folder: RunFolder) -> dict[str, Tensor]:
    """First batch of a cell: private, encoding, reconstruction and filmstrip, in the order of the private images.

    Without a truth there are only the last two, in the attack's own order.
    """
    first, result = done.scored[0], done.results[0]
    truth, low, high = first.truth, first.domain.low, first.domain.high
    encoded = bool(first.encoding)
    order = (first.encoding_order if encoded else first.order)[:SHOWN]

    def matched(images: Tensor) -> Tensor:
        rows = torch.full((len(order), *result.images.shape[1:]), float("nan"))
        for i, j in enumerate(order.tolist()):
            if 0 <= j < len(images):
                rows[i] = (images[j] - low) / (high - low)
        return rows

    found = {f"{cell.id}/reconstruction": matched(result.images)}
    if truth is not None:
        found[f"{cell.id}/private"] = truth.private.images[:SHOWN].cpu().float()
    if truth is not None and encoded:
        found[f"{cell.id}/encoding"] = truth.trained.images[:SHOWN].cpu().float()
    for step, frame in folder.frames(cell.id).items():
        found[f"{cell.id}/film/{step:06d}"] = matched(frame)
    return found


def scorecard(
    plan: Plan, rows: list[Cell], environment: Mapping[str, str], data_sha256: str | None = None
) -> Scorecard:
    """All cells with what made them, their verdicts, and what standards ask for."""
    judged = judge(plan, rows)
    card = _scorecard(plan, judged, environment).model_copy(update={"verdict": audit_verdict(judged)})
    return card.model_copy(update={"standards": standards(plan, card, data_sha256)})


def environment_of(device: torch.device) -> dict[str, str]:
    """Versions and hardware; no names of machines."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def _scorecard(plan: Plan, rows: list[Cell], environment: Mapping[str, str]) -> Scorecard:
    return Scorecard(
        name=plan.name,
        seed=plan.seed,
        headline=headline(rows),
        frostglass=__version__,
        environment=dict(environment),
        plan_sha256=plan.digest(),
        show_images=plan.report.show_images,
        cells=rows,
        limits=LIMITS,
    )


_SHORT = {
    "examples": "the number of images",
    "labels": "the labels",
    "labels_distinct": "that labels are distinct",
    "local_plan": "the client's plan",
    "bn_running": "the running statistics",
    "bn_batch": "the batch statistics",
    "augmentation": "the augmentation",
    "auxiliary": "similar images",
    "cohort": "the cohort's size",
    "defence": "the defence",
    "gallery": "the candidates and all other images of the message",
    "modified_model": "how it had changed the model",
}
"""Grants in the headline's words."""


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


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
    shown = shown or [r for r in done if beyond_chance(r)]
    if not shown:
        who = "The attack" if len(done) == 1 else f"None of the {len(done)} attack runs"
        showed = "showed no recognisable image" if len(done) == 1 else "showed a recognisable image"
        return f"{who} {showed}; that is no proof of privacy: see the limits."
    worst = max(shown, key=weight)
    extra = [_SHORT.get(g, g) for g in worst.grants if g not in ALWAYS]
    knew = f"knew {_listed(extra)}" if extra else "knew nothing else"
    text = outcome(worst.attack, worst.summary, worst.encoding_summary)
    bound = " (upper bound)" if worst.upper_bound else ""
    kind = "gradient" if worst.update == "gradient" else "weight difference"
    messages = worst.summary.batches if worst.summary else worst.batches  # of a failed cell, those that were attacked
    sent = f"one {kind}" if messages == 1 else f"{messages} {kind}s"
    against = "" if worst.defense == "none" else f" despite {worst.defense}"
    return f"From {sent} of “{worst.scenario}”{against}: {text}{bound}. The server held the model and {knew}."
