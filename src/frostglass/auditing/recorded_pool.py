"""Trials pooled over the clients of one round: one client is one trial, and one trial shows little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frostglass.auditing.plan import Plan
from frostglass.auditing.scorecard import AuditVerdict, Cell, Scorecard
from frostglass.auditing.verdict import pooled_cells, tests_of, trials_of
from frostglass.auditing.verdict_rules import EXIT_CODES, ORDER, Evidence, decide
from frostglass.auditing.wording import plural


def pooled(plan: Plan, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row for each attack in each round that several clients faced: successes, interval, verdict.

    Clients hold different images, so their trials are independent; rounds are not pooled, as a client trains on the
    same images in all of them. The error is shared by all rows and all cells.
    """
    tests = tests_of(plan, cells)
    return [_row(plan, key, group, tests) for key, group in pooled_cells(plan, cells).items()]


def _row(plan: Plan, key: tuple[int, str, str], cells: Sequence[Cell], tests: int) -> dict[str, Any]:
    game = all(c.summary is not None and c.summary.asked for c in cells)
    if game and plan.verdict.event != "identified":  # such an attack draws no picture: what it can do is name one
        plan = plan.model_copy(update={"verdict": plan.verdict.model_copy(update={"event": "identified"})})
    found = [trials_of(plan, c) for c in cells]
    empty = [c for c in cells if c.summary is None and c.pool is not None]  # nothing that could be right came back
    outcomes = [o for t in found for o in t.outcomes] + [False] * len(empty)
    invalid = list(dict.fromkeys(x for t in found for x in t.invalid))
    hashes = [i.sha256 for c in cells for i in c.images]
    if len(set(hashes)) < len(hashes):
        invalid.append("The same image is in several messages: trials are not independent.")
    if any((c.summary is None and c.pool is None) or any(i.target == "recovered" for i in c.images) for c in cells):
        invalid.append("No truth was given, so that only proved images are known to be right.")
    kappa = max((t.kappa for t in found), default=plan.verdict.chance)
    made = decide(
        Evidence(
            trials=len(outcomes), successes=sum(outcomes), kappa=kappa, tolerance=plan.verdict.tolerance,
            confidence=plan.verdict.confidence, tests=tests, proved=sum(t.proved for t in found),
            invalid=tuple(invalid), lacking=("single rounds of a record are no test of three checkpoints.",),
        )
    )  # fmt: skip
    return {
        "event": plan.verdict.event, "round": key[0], "attack": key[1], "defence": key[2], "clients": len(cells),
        "trials": len(outcomes), "successes": sum(outcomes), "kappa": kappa, "lower": made.lower, "upper": made.upper,
        "verdict": made.verdict, "text": made.text,
    }  # fmt: skip


def total(verdict: AuditVerdict, trials: Sequence[Mapping[str, Any]]) -> AuditVerdict:
    """The verdict on the audit, with what pooled trials add: a violation that no single client shows."""
    worst = min(trials, key=lambda t: ORDER.index(t["verdict"]), default=None)
    if worst is None or ORDER.index(worst["verdict"]) >= ORDER.index(verdict.verdict):
        return verdict
    kind = worst["verdict"]
    about = f"{plural(worst['clients'], 'client')} of round {worst['round']}, {worst['attack']}"
    text = f"{kind} over {about}: {worst['text']}"
    return AuditVerdict(verdict=kind, text=text, exit_code=EXIT_CODES[kind], tests=verdict.tests)


def headline_of(card: Scorecard, rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: how many updates, and the worst that was shown."""
    looked = [r for r in rows if r["status"] != "passed over"]
    attacked = sum(r["status"] == "attacked" for r in rows)
    start = f"{len(looked)} of {plural(len(rows), 'recorded update')} examined, {attacked} attacked. "
    shown = [c for c in card.cells if c.summary is not None]
    if shown:
        return start + card.headline
    if attacked:
        truth = any(c.pool is not None for c in card.cells)
        rest = (
            "the attacks returned none to compare with the truth" if truth else "no truth was given to score the rest"
        )
        return f"{start}No image was proved, and {rest}: nothing is shown either way."
    known = [r for r in looked if r["labels"] and r["labels"].get("confidence") in ("high", "low")]
    why = list(dict.fromkeys(r["reason"] for r in looked if r["reason"] and r["reason"] != "no attack fits"))
    more = f" (so the first; {len(why) - 1} more below)" if len(why) > 1 else ""
    told = f"No attack fits: {why[0]}{more}" if why else "No attack fits"
    return start + f"{told}. Labels were restored from {len(known)}."
