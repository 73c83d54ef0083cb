"""Fields that standards and guidance ask of such a report. A mapping for the reader, not legal advice.

Threat letters: Carletti et al., USENIX Security 2025 (SoK on gradient inversion). Classes: NIST AI 100-2 E2025.
Checklist: NIST SP 800-226 (2025). Order of sections: ISO/IEC 27559:2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from frostglass.auditing.plan import Plan
from frostglass.auditing.scorecard import Cell, Scorecard

LETTERS = {
    "A": "eavesdropper", "B": "informed eavesdropper", "C": "parameter-aware", "D": "data-enhanced",
    "E": "statistically informed", "F": "active manipulator", "G": "data-enhanced manipulator",
    "H": "active client manipulator",
}  # fmt: skip

REAUDIT = (
    "Audit again when the model, the client's steps, the defence or its parameters, the number of releases, or the "
    "kind of images changes, when a stronger attack is published, and after a year at the latest."
)


def threat_letter(grants: Sequence[str]) -> str:
    """A to H: the weakest attacker that holds these grants. H, who also selects clients, is not simulated."""
    held = set(grants)
    if "modified_model" in held:
        return "G" if held & {"auxiliary", "gallery"} else "F"
    if held & {"bn_batch", "gallery"}:
        return "E"
    if "auxiliary" in held:
        return "D"
    if held & {"local_plan", "augmentation", "defence", "cohort"}:
        return "C"
    return "B" if held - {"messages", "domain", "mode", "model"} else "A"


def beyond_letter(grants: Sequence[str]) -> list[str]:
    """Grants that no letter covers: an attacker who holds them is stronger than its letter says."""
    return sorted(set(grants) & {"labels", "labels_distinct", "gallery"})


def nist_class(cell: Cell) -> dict[str, Any]:
    """NIST AI 100-2: goal, attack, knowledge and capabilities."""
    active = "modified_model" in cell.grants
    return {
        "system": "predictive AI, federated training",
        "goal": "privacy compromise",
        "attack": "data reconstruction",
        "knowledge": "white box",
        "capabilities": ["model control", "gradient access"] if active else ["gradient access"],
        "adversary": "malicious" if active else "honest-but-curious",
    }


def dp_checklist(plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """SP 800-226: what a claim of differential privacy must state; None where none is made.

    epsilon means nothing without its adjacency and delta, so all three are those of the claim or those of the account.
    """
    claim = plan.verdict.claim
    if claim is not None and claim.defense not in (None, cell.defense):
        claim = None
    spent = cell.privacy_spent or {}
    if cell.defense == "none" or (cell.defense_claim != "proof" and claim is None):
        return None
    unit = (claim.unit if claim else None) or spent.get("unit")
    claimed = claim is not None and (claim.epsilon is not None or "epsilon" not in spent)
    stated = claim.model_dump() if claim is not None and claimed else spent
    return {
        "unit": unit or "not stated",
        **{name: stated.get(name) for name in ("adjacency", "epsilon", "delta")},
        "trust_model": "local: each client protects its own update" if plan_is_local(cell) else "of the secure sum",
        "accounting": spent.get("accountant", "not accounted by this run"),
        "sampling": f"Poisson at rate {claim.sampling_rate:g}" if claim and claim.sampling_rate < 1 else "none assumed",
        "rng": "from the plan's seed, for repetition: an audit's, not the one of a deployment",
        "floating_point": "ordinary floating point; attacks on low bits are not covered",
        "data_collection": "outside this report",
    }


def plan_is_local(cell: Cell) -> bool:
    """Whether every update is protected before it leaves its client."""
    return "cohort" not in cell.grants


def risk(cells: Sequence[Cell]) -> dict[str, Any]:
    """Maximum and average success rate over the tests, as measured, with the largest upper and lower limits."""
    verdicts = [c.verdict for c in cells if c.verdict is not None and c.verdict.role == "test" and c.verdict.trials]
    rates = [v.successes / v.trials for v in verdicts]
    if not rates:
        return {"max": None, "avg": None, "tests": 0}
    worst = max(verdicts, key=lambda v: v.successes / v.trials)
    bounds = [v.gamma for v in verdicts]
    return {
        "max": max(rates),
        "max_interval": [worst.lower, worst.upper],
        "avg": sum(rates) / len(rates),
        "bound_max": None if any(b is None for b in bounds) else max(b for b in bounds if b is not None),
        "tests": len(rates),
        "trials": [v.trials for v in verdicts],
    }


def standards(plan: Plan, card: Scorecard, data_sha256: str | None) -> dict[str, Any]:
    """All fields, for a scorecard whose cells have their verdicts."""
    cells = card.cells
    assumptions = dict.fromkeys(a for c in cells if c.verdict for a in c.verdict.assumptions)
    return {
        "tests": [
            {
                "cell": c.id,
                "sok_letter": threat_letter(c.grants),
                "sok_name": LETTERS[threat_letter(c.grants)],
                "beyond_letter": beyond_letter(c.grants),
                "nist_class": nist_class(c),
                "dp": dp_checklist(plan, c),
            }
            for c in cells
        ],
        "risk": risk(cells),
        "iso_27559": _sections(card, cells),
        "reaudit_trigger": REAUDIT,
        "evidence": {
            "date": datetime.now(UTC).date().isoformat(),
            "plan_sha256": card.plan_sha256,
            "data_sha256": data_sha256,
            "seed": card.seed,
            "versions": {"frostglass": card.frostglass, **card.environment},
            "sample_sizes": {c.id: c.verdict.trials if c.verdict else 0 for c in cells},
            "attacks": sorted({c.attack for c in cells}),
            "positive_controls": [c.id for c in cells if c.verdict is not None and c.verdict.role == "control"],
            "assumptions": list(assumptions),
            "limits": card.limits,
        },
    }


def _sections(card: Scorecard, cells: Sequence[Cell]) -> list[dict[str, str]]:
    """ISO/IEC 27559 in its order, with what this report has to say under each heading."""
    letters = sorted({threat_letter(c.grants) for c in cells})
    attackers = ", ".join(f"{x} ({LETTERS[x]})" for x in letters)
    found = risk(cells)
    measured = "no test has a trial"
    if found["tests"]:
        low, high = found["max_interval"]
        measured = (
            f"maximum {found['max']:.3g} [{low:.3g}, {high:.3g}], average {found['avg']:.3g}, {found['tests']} tests"
        )
    said = card.verdict.verdict if card.verdict else "none"
    defences = ", ".join(sorted({c.defense for c in cells})) or "none"
    return [
        {"section": "6.2", "title": "Threat modelling", "says": f"Attackers: {attackers}; grants are listed by cell."},
        {"section": "7.3", "title": "Attack modelling", "says": f"Success rate: {measured}."},
        {
            "section": "8.2.3", "title": "Adversarial testing",
            "says": f"Attacks run: {', '.join(sorted({c.attack for c in cells}))}.",
        },
        {"section": "8.3", "title": "Mitigation and re-evaluation", "says": f"Defences: {defences}. {REAUDIT}"},
        {"section": "9", "title": "Governance", "says": f"Verdict: {said}; what follows from it is not decided here."},
    ]  # fmt: skip
