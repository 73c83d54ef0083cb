"""From scored cells to verdicts: which trials count, what they show, and what a negative statement still lacks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from frostglass.auditing.cells import CellPlan, expand, messages_of, repeated, uncounted_game
from frostglass.auditing.claims import guarantee_of
from frostglass.auditing.linting.plan_defenses import defense_facts
from frostglass.auditing.linting.rules import findings
from frostglass.auditing.metrics.registry import METRICS
from frostglass.auditing.plan import Plan
from frostglass.auditing.plan_verdict import LEAST_TRIALS
from frostglass.auditing.scorecard import AuditVerdict, Cell, ImageScore, Verdict
from frostglass.auditing.trial_event import bar_words, calibrated, decided_on, matched_among, reaches, score_of
from frostglass.auditing.verdict_rules import EXIT_CODES, Evidence, decide, overall
from frostglass.auditing.wording import fell_short, metric_words, plural
from frostglass.core.randomness import Rng
from frostglass.guarantees.interval import clopper_pearson

CHECKPOINTS = 3
"""Stages of training that a negative statement needs: init, early, final."""


@dataclass(frozen=True)
class Trials:
    """What the messages of a cell have come to: one trial a message, its target fixed by the plan's seed.

    Args:
        outcomes: success of each trial.
        kappa: chance of a success.
        proved: private images that were verified.
        invalid: why the successes cannot be counted.
        recognisable, about: as in `Evidence`.
    """

    outcomes: tuple[bool, ...]
    kappa: float
    proved: int
    invalid: tuple[str, ...]
    recognisable: str = ""
    about: tuple[str, ...] = ()

    def works(self, confidence: float) -> bool:
        """The attack is shown to do better than guessing, or has proved an image."""
        if self.proved:
            return True
        if not self.outcomes or self.invalid:
            return False
        return clopper_pearson(sum(self.outcomes), len(self.outcomes), confidence)[0] > self.kappa


def trials_of(plan: Plan, cell: Cell) -> Trials:
    """One trial for each finished message of a cell."""
    rows = messages_of(cell)
    rng = Rng.from_seed(plan.seed, "verdict target").at(cell.scenario)
    targets = [t for u, unit in enumerate(rows) if (t := _target(plan, unit, rng.at(u))) is not None]
    named = plan.verdict.event == "identified"
    sizes = {t.candidates for t in targets if t.candidates}
    kappa = 1 / max(sizes) if named and sizes else plan.verdict.chance
    invalid = list(_invalid(plan, cell, rows, targets))
    outcomes = tuple(_success(plan, cell, t) for t in targets)
    proved = sum(r.proved for r in cell.images)
    if plan.verdict.event != "recovered" or all(score_of(plan, row) is None for row in cell.images):
        return Trials(outcomes, kappa, proved, tuple(invalid))
    reached = [row for row in cell.images if reaches(plan, row)]
    are = "is" if len(cell.images) == 1 else "are"
    told = (
        f"{len(reached)} of {plural(len(cell.images), 'image')} {are} recognisable ({bar_words(plan)})"
        if reached
        else ""
    )
    about = tuple(decided_on(plan, cell, rows, targets))
    return Trials(outcomes, kappa, proved, tuple(invalid), told, about)


def _target(plan: Plan, unit: Sequence[ImageScore], rng: Rng) -> ImageScore | None:
    """The image of a message that its trial is about; the choice knows nothing of any result."""
    if plan.verdict.event == "identified":
        unit = [row for row in unit if row.identified is not None]
    return unit[int(rng.integers(len(unit), (1,)))] if unit else None


def _success(plan: Plan, cell: Cell, row: ImageScore) -> bool:
    if plan.verdict.event == "identified":
        return bool(row.identified)
    if plan.verdict.event == "proved":
        return row.proved
    return row.proved or (reaches(plan, row) and calibrated(plan, cell, row))


def _invalid(plan: Plan, cell: Cell, rows: Sequence[Sequence[ImageScore]], targets: Sequence[ImageScore]) -> list[str]:
    found = []
    event = plan.verdict.event
    if event == "identified":
        found += uncounted_game(cell)
        if not targets:
            found.append('No image was named among candidates; run the attack "gallery" with the grant "gallery".')
    elif len(rows) > 1 and repeated([row for unit in rows for row in unit]):
        found.append("The same image is in several messages: trials are not independent.")
    if event == "recovered":
        among = matched_among(cell)
        metric, level = plan.report.threshold.metric, plan.verdict.chance / among
        shown, close = metric_words(metric), [t for t in targets if not t.proved and reaches(plan, t)]
        if close and METRICS[metric].make().needs_context:
            found.append(f"{shown} compares with a pool and takes no rank among other images, so it is not calibrated.")
        elif any(t.null is None or metric not in t.null.p for t in close):
            found.append(
                f"The {shown} of a target could not be calibrated: its source holds fewer than 99 other images of "
                "its class, or report.null is off."
            )
        elif any(t.null is not None and (t.null.n0 + 1) * level < 1 - 1e-9 for t in close):
            many = f"{among} reconstructions" if among == cell.rows else f"{among} images"
            lower = 'grant "examples"' if among == cell.rows else "lower client.batch"
            found.append(
                f"A chance of {level:g} an image ({plan.verdict.chance:g}, {many}) needs at least "
                f"{1 / level - 1:.0f} other images of the class; raise verdict.chance, or {lower}."
            )
    return found


def role_of(plan: Plan, cell: CellPlan) -> Literal["test", "control", "exploratory"]:
    """Whether a cell is a test, shows that its attack works, or is beside the point."""
    several = any(d.label != "none" for d in cell.scenario.defense)
    if cell.scenario.control or (cell.defense.label == "none" and several):
        return "control"
    if plan.verdict.primary is not None and cell.attack.name != plan.verdict.primary:
        return "exploratory"
    return "test"


def with_verdicts(plan: Plan, cells: Sequence[Cell]) -> list[Cell]:
    """The cells, each with its verdict."""
    plans = {c.id: c for c in expand(plan)}
    known = [(cell, plans[cell.id], trials_of(plan, cell)) for cell in cells]
    tests = tests_of(plan, cells)
    return [
        cell.model_copy(update={"verdict": _verdict(plan, cell, cell_plan, trials, tests, known)})
        for cell, cell_plan, trials in known
    ]


def tests_of(plan: Plan, cells: Sequence[Cell]) -> int:
    """How many tests share the error: the plan's, and those of trials that are pooled over clients."""
    return max(1, sum(role_of(plan, p) == "test" for p in expand(plan))) + len(pooled_cells(plan, cells))


def pooled_cells(plan: Plan, cells: Sequence[Cell]) -> dict[tuple[int, str, str], list[Cell]]:
    """Finished cells of recorded updates, by (round, attack, defence), where several clients faced the attack."""
    groups: dict[tuple[int, str, str], list[Cell]] = defaultdict(list)
    scenarios = {s.name: s for s in plan.scenario}
    for cell in cells:
        recorded = scenarios[cell.scenario].recorded if cell.scenario in scenarios else None
        if recorded is not None and cell.status == "done":
            groups[recorded.round, cell.attack, cell.defense].append(cell)
    return {key: group for key, group in groups.items() if len(group) > 1}


Known = Sequence[tuple[Cell, CellPlan, Trials]]


def _verdict(plan: Plan, cell: Cell, cell_plan: CellPlan, trials: Trials, tests: int, known: Known) -> Verdict:
    v, role = plan.verdict, role_of(plan, cell_plan)
    guarantee = guarantee_of(plan, cell_plan, trials.kappa, cell.privacy_spent)
    lacking = _lacking(cell, cell_plan, trials, known, v.confidence)
    evidence = Evidence(
        trials=len(trials.outcomes),
        successes=sum(trials.outcomes),
        kappa=trials.kappa,
        tolerance=v.tolerance,
        confidence=v.confidence,
        tests=tests if role == "test" else 1,
        proved=trials.proved,
        guarantee=guarantee,
        linter_errors=_linter_errors(plan, cell_plan),
        invalid=trials.invalid,
        lacking=tuple(lacking),
        recognisable=trials.recognisable,
        about=trials.about,
    )
    made = decide(evidence)
    text = made.text
    if v.tolerance < trials.kappa:
        text = f"The tolerance {v.tolerance:g} is below the chance {trials.kappa:.3g}. {text}"
    if cell.upper_bound:
        text += " Upper bound: the attacker was granted more than such a client really sends."
    return Verdict(
        verdict=made.verdict, holds=list(made.holds), text=text, role=role,
        event=event_words(plan, cell, trials.kappa), kappa=trials.kappa, tolerance=v.tolerance,
        confidence=v.confidence, tests=evidence.tests, trials=evidence.trials, successes=evidence.successes,
        lower=made.lower, upper=made.upper, proved=trials.proved,
        gamma=guarantee.observed if guarantee else None, gamma_total=guarantee.total if guarantee else None,
        basis=guarantee.basis if guarantee else None, assumptions=list(guarantee.assumptions) if guarantee else [],
        unsuccessful=made.unsuccessful, lacking=lacking,
    )  # fmt: skip


def event_words(plan: Plan, cell: Cell, kappa: float) -> str:
    """The success event in words."""
    if plan.verdict.event == "identified":
        return f"the target image is named among {round(1 / kappa)} equally likely candidates"
    target = "the target image" if cell.batch == 1 else f"the target image, one of {cell.batch} chosen by the seed,"
    if plan.verdict.event == "proved":
        return f"{target} is recovered and verified algebraically"
    return (
        f"{target} is recovered with {bar_words(plan)} and is closer than all but "
        f"{100 * plan.verdict.chance / matched_among(cell):.3g} % of other images of its class, or is verified "
        "algebraically"
    )


def _lacking(cell: Cell, own: CellPlan, trials: Trials, known: Known, confidence: float) -> list[str]:
    """What a statement that this attack does not succeed still needs."""
    found = []
    if len(trials.outcomes) < LEAST_TRIALS:
        found.append(f"It rests on {plural(len(trials.outcomes), 'trial')}, and {LEAST_TRIALS} are the least.")
    stages = stages_of(own, known)
    if len(stages) < CHECKPOINTS:
        found.append(f"It was run at {plural(len(stages), 'checkpoint')} ({', '.join(stages)}), not at {CHECKPOINTS}.")
    if not control_passed(own, known, confidence):
        found.append("No positive control passed: the attack is not shown to work without a defence.")
    if fell_short(cell.objective, cell.objective_at_truth):
        short = "a better one could recover more" if trials.recognisable else "the attack failed"
        found.append(f"The optimiser ended above the objective of the truth: {short}.")
    if cell.status != "done":
        found.append("The cell failed before all its messages were attacked.")
    return found


def stages_of(own: CellPlan, known: Known) -> list[str]:
    """Stages of training at which the same question was asked: scenarios that differ in weights, stage and name.

    The same weights are one checkpoint, whatever stages they are given.
    """
    asked = [p for c, p, _ in known if c.status == "done" and _question(p) == _question(own)]
    by_weights = {p.scenario.model.weights: _stage(p) for p in [*asked, own]}
    return sorted(set(by_weights.values()))


def _stage(p: CellPlan) -> str:
    model = p.scenario.model
    return model.stage or ("init" if model.weights is None else f"weights {'/'.join(Path(model.weights).parts[-2:])}")


def _question(p: CellPlan) -> tuple[str, ...]:
    model = p.scenario.model.model_dump(exclude={"weights", "stage"})
    parts = (p.attack, p.defense, p.scenario.client, p.scenario.data, p.threat)
    return (str(model), *(str(x.model_dump()) for x in parts))


def control_passed(own: CellPlan, known: Known, confidence: float) -> bool:
    """The same attack with the same settings does better than guessing where nothing defends."""
    return any(
        trials.works(confidence)
        for cell, p, trials in known
        if p.attack == own.attack and cell.status == "done" and (p.defense.label == "none" or p.id == own.id)
    )


def _linter_errors(plan: Plan, cell: CellPlan) -> int:
    facts = defense_facts(plan, plan.scenario[cell.index], cell.defense)
    return sum(f.severity == "error" for one in facts for f in findings(one))


def audit_verdict(cells: Sequence[Cell]) -> AuditVerdict:
    """Over all cells that are tests: what one that failed has shown counts, and with it nothing is BOUNDED."""
    tests = [(c, c.verdict) for c in cells if c.verdict is not None and c.verdict.role == "test"]
    unfinished = sum(c.status != "done" for c, _ in tests)
    kind = overall([v.verdict for _, v in tests])
    if unfinished and kind == "BOUNDED":
        kind = "INCONCLUSIVE"
    first = next(((c, v) for c, v in tests if v.verdict == kind), None)
    many = plural(len(tests), "test")
    if first is not None:
        text = f"{kind} over {many}. “{first[0].title}”: {first[1].text}"
    elif unfinished:
        text = f"{kind} over {many}: {unfinished} of them {'was' if unfinished == 1 else 'were'} not finished."
    else:
        text = f"{kind} over {many}: no cell is a test."
    return AuditVerdict(verdict=kind, text=text, exit_code=EXIT_CODES[kind], tests=len(tests))
