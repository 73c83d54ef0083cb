"""The last word on every cell: its verdict, the pitfalls it walks into, and the warnings that follow."""

from __future__ import annotations

from collections.abc import Sequence

from frostglass.auditing.cells import CellPlan, expand
from frostglass.auditing.pitfalls import Context, checked, warnings_of
from frostglass.auditing.plan import Plan
from frostglass.auditing.scorecard import Cell
from frostglass.auditing.verdict import Known, control_passed, stages_of, trials_of, with_verdicts


def judge(plan: Plan, rows: Sequence[Cell]) -> list[Cell]:
    """The cells with verdicts, checked pitfalls, and their warnings."""
    judged = with_verdicts(plan, rows)
    plans = {c.id: c for c in expand(plan)}
    known = [(cell, plans[cell.id], trials_of(plan, cell)) for cell in judged]
    return [_checked(plan, cell, own, known) for cell, own, _ in known]


def _checked(plan: Plan, cell: Cell, own: CellPlan, known: Known) -> Cell:
    others = [p.attack.name for _, p, _ in known if (p.index, p.defense) == (own.index, own.defense)]
    control = control_passed(own, known, plan.verdict.confidence)
    checks = checked(Context(plan, cell, own, others, stages_of(own, known), control))
    return cell.model_copy(update={"pitfalls": checks, "warnings": [*cell.warnings, *warnings_of(checks)]})
