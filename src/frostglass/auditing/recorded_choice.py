"""Which recorded updates are audited, and by which attacks: chosen by what fits, before anything is attacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from frostglass.attacks.analytic.spear import Spear
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.plan import (
    ClientPlan,
    DataPlan,
    DefensePlan,
    ModelPlan,
    Named,
    Plan,
    ReportPlan,
    ScenarioPlan,
    ThreatPlan,
)
from frostglass.auditing.plan_checks import semantic_problems
from frostglass.auditing.plan_verdict import VerdictPlan
from frostglass.auditing.recorded_head import QUIET, noise_share
from frostglass.auditing.recorded_inputs import Sent
from frostglass.auditing.recorded_plan import RecordedPlan, UpdatesPlan
from frostglass.auditing.recorded_selection import chosen, unreadable
from frostglass.auditing.recorded_view import Recording, known, mode_of, one_step, prepare_scenario
from frostglass.core.drive import problems_of
from frostglass.core.errors import AttackFailed, BadInput, close_match
from frostglass.core.threat import Knows, Observation

LEAST_CANDIDATES = 5
"""Of an identification game; with fewer, a right answer says little."""

PROVABLE = 1e-2
"""Noise over the size of the classifier's gradient, up to which spear may prove: float16 leaves about 3e-4, bfloat16
2e-3. Noise itself ends the proof earlier, so that beyond `QUIET` a search stands beside it."""

PLACEHOLDER = Named(name="thaw")


@dataclass(frozen=True)
class Budget:
    """Limits of the attacks that are chosen.

    Args:
        images: in a message, up to which pixels are searched for.
        local_steps: of the client, up to which its steps are simulated.
        settings: of the attacks by name.
    """

    images: int
    local_steps: int
    settings: Mapping[str, dict[str, Any]]


BUDGETS = {
    "small": Budget(
        8, 8, {"thaw": {"steps": 300}, "peel": {"steps": 300}, "peel_residual": {"steps": 600}, "spear": {"steps": 10}}
    ),
    "full": Budget(32, 64, {"thaw": {"steps": 1200, "seeds": 4}, "peel": {"steps": 1000}}),
}


class RecordedScenario(ScenarioPlan):
    """A scenario whose message a real engine sent."""

    update: RecordedPlan = Field(description="which one")

    @property
    def recorded(self) -> RecordedPlan:
        """The update."""
        return self.update


class UpdatesAudit(Plan):
    """A plan whose scenarios are recorded updates; none may be left to attack, and the checks still report."""

    scenario: list[RecordedScenario] = Field(  # type: ignore[assignment]
        default_factory=list, description="the updates that are attacked"
    )
    updates: UpdatesPlan = Field(description="where they come from")

    @property
    def recorded_updates(self) -> UpdatesPlan:
        """Where they come from."""
        return self.updates


def scenario_of(recording: Recording, sent: Sent, attacks: list[Named], name: str = "") -> RecordedScenario:
    """One update as a scenario of an ordinary plan."""
    h, net = sent.header, recording.network
    held = recording.source.tensors(sent)
    mode = mode_of(sent, held)
    grants = known(recording, sent)
    beyond = [g for g in recording.plan.grants if g not in grants]
    beyond += [Knows.EXAMPLES.value] if sent.guessed else []
    return RecordedScenario(
        name=name or titled(sent),
        data=DataPlan(source="recorded"),
        model=ModelPlan(
            name=net.name, options=dict(net.options), classes=net.classes, mode="train" if mode == "train" else "eval",
            weights=f"sent in round {h.round}",
        ),
        client=_client(sent),
        defense=[DefensePlan(**(recording.plan.defense or {"name": "none"}))],
        attack=attacks,
        threat=ThreatPlan(
            name=f"server of {_plain(recording.source.engine)}"[:200], grants=sorted({*grants, *beyond}),
            auxiliary=recording.plan.others if Knows.AUXILIARY.value in beyond else None,
        ),
        update=RecordedPlan(
            number=h.number, round=h.round, client=_plain(h.client), declared=h.defence, beyond=beyond
        ),
    )  # fmt: skip


def titled(sent: Sent) -> str:
    """A name that a terminal and a report can print."""
    return f"round {sent.header.round}, client {_plain(sent.header.client)}"[:180]


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:120]


def _client(sent: Sent) -> ClientPlan:
    h, plan = sent.header, sent.plan
    batch = max(1, -(-(h.examples or 1) // h.clients))
    made = ClientPlan(batch=batch, clients=h.clients, cohort=h.clients, update=h.kind)
    if plan is None or h.kind == "gradient":
        return made
    return made.model_copy(
        update={
            "local_steps": plan.local_steps, "epochs": plan.epochs, "lr": plan.lr, "optimizer": plan.optimizer,
            "momentum": plan.momentum, "weight_decay": plan.weight_decay,
            "minibatch": None if plan.minibatch is None else min(plan.minibatch, batch),
        }
    )  # fmt: skip


def audit_plan(
    recording: Recording, *, name: str, seed: int, report: ReportPlan, verdict: VerdictPlan, device: torch.device
) -> UpdatesAudit:
    """The ordinary plan that plays the chosen updates.

    Raises:
        BadInput: no update of the record can be looked at, or an attack that was asked for fits none of them.
    """
    picked, left = chosen(recording)
    scenarios: list[RecordedScenario] = []
    reasons: dict[str, str] = {}
    for sent in picked:
        wrong = unreadable(recording, sent)
        if wrong:
            left[sent.header.number] = wrong
            continue
        made, why = _with_attacks(recording, sent, seed, device)
        reasons |= why
        scenarios += made
    readable = [s for s in picked if s.header.number not in left]
    if not recording.source.updates and not recording.source.problems:
        raise BadInput(f"{recording.source.name}: it holds no update yet; audit it when a round has ended.")
    if not readable:
        told = [f"{s.title}: {left[s.header.number]}." for s in recording.source.updates if s.header.number in left]
        raise BadInput([f"{recording.source.name}: no update can be audited.", *recording.source.problems, *told[:5]])
    asked = {a["name"] for a in recording.plan.attacks}
    lost = asked - {a.name for s in scenarios for a in s.attack}
    if lost:
        raise BadInput([f"--attack {n}: fits no update ({reasons.get(n, 'it was not tried')})." for n in sorted(lost)])
    plan = UpdatesAudit(
        name=name, seed=seed, scenario=_distinct(scenarios), report=report, verdict=verdict, updates=recording.plan
    )
    problems = semantic_problems(plan)
    if problems:
        raise BadInput(problems)
    return plan


def _distinct(scenarios: list[RecordedScenario]) -> list[RecordedScenario]:
    """A client may have sent twice in a round."""
    seen: set[str] = set()
    for scenario in scenarios:
        if scenario.name in seen:
            scenario.name = f"{scenario.name}, update {scenario.recorded.number}"
        seen.add(scenario.name)
    return scenarios


def _with_attacks(
    recording: Recording, sent: Sent, seed: int, device: torch.device
) -> tuple[list[RecordedScenario], dict[str, str]]:
    """(scenarios with the attacks that fit, why others do not, by attack).

    The identification game is a scenario of its own: its attacker is told more, and nobody else is to know it.
    """
    bare = scenario_of(recording, sent, [PLACEHOLDER])
    game = _with_gallery(recording, sent, bare)
    made: list[RecordedScenario] = []
    why: dict[str, str] = {}
    for scenario in (bare, game):
        if scenario is None:
            continue
        seen = seen_of(recording, scenario, seed, device)
        chosen_here = _game if scenario is game else _fitting
        entries = [Named(**a) for a in recording.plan.attacks] or chosen_here(recording, sent, seen)
        fits = []
        for entry in entries:
            wrong = _refusals(entry, seen, set(scenario.threat.grants if scenario.threat else ()))
            if wrong:
                why.setdefault(entry.name, f"{sent.title}: {wrong[0].rstrip('.')}")
            elif scenario is not game or _needs_gallery(entry):
                fits.append(entry)
        if fits:
            made.append(scenario.model_copy(update={"attack": fits}))
    return made, why


def _needs_gallery(entry: Named) -> bool:
    return Knows.GALLERY in ATTACKS[entry.name].make(**entry.settings).needs


def _game(recording: Recording, sent: Sent, seen: Observation) -> list[Named]:  # noqa: ARG001
    return [Named(name="gallery")]


def seen_of(recording: Recording, scenario: RecordedScenario, seed: int, device: torch.device) -> Observation:
    """What an attack would see in this scenario."""
    arrived = prepare_scenario(recording, scenario, seed, device).arrived
    assert arrived is not None
    return arrived.round.seen


def _refusals(entry: Named, seen: Observation, grants: set[str]) -> list[str]:
    if entry.name not in ATTACKS:
        return [f"{entry.name!r} is not a known attack; {close_match(entry.name, ATTACKS.names())}."]
    wrong = ATTACKS[entry.name].problems(entry.settings, "attack")
    if wrong:
        return wrong
    attack = ATTACKS[entry.name].make(**entry.settings)
    lacking = sorted(k.value for k in attack.needs if k.value not in grants and k.value not in ("model", "messages"))
    if lacking:
        return [f"it needs {', '.join(map(repr, lacking))}, which this server does not know"]
    return problems_of(attack, seen)


def _fitting(recording: Recording, sent: Sent, seen: Observation) -> list[Named]:
    """By what the update is: algebra where it applies, a search where the message is small, a game where truth is."""
    budget = BUDGETS[recording.plan.budget]

    def named(name: str) -> Named:
        return Named(name=name, **budget.settings.get(name, {}))

    grants = set(known(recording, sent))
    found = []
    single = sent.header.kind == "gradient" or one_step(sent)
    noise = noise_share(seen)
    if single and noise <= PROVABLE and not _refusals(named("spear"), seen, grants):
        found += [named("spear")] if _rows(named("spear"), seen) <= 4 * budget.images else []
    if single:
        found += [named(x) for x in ("peel", "peel_residual", "imprint") if not _refusals(named(x), seen, grants)][:1]
    settled = {"peel", "peel_residual"} | ({"spear"} if noise <= QUIET else set())
    if not any(a.name in settled for a in found) or recording.plan.budget == "full":
        found += [named("thaw")] if not too_long(recording, sent) else []
    return found


def _rows(entry: Named, seen: Observation) -> float:
    """Images that spear would look for: those that were told, else the rank of what it reads."""
    if seen.examples is not None:
        return seen.examples
    attack = ATTACKS[entry.name].make(**entry.settings)
    assert isinstance(attack, Spear)
    try:
        return attack.rows(seen)
    except AttackFailed:
        return float("inf")


def too_long(recording: Recording, sent: Sent) -> str:
    """Why pixels are not searched for within the budget; empty if they are."""
    budget, h = BUDGETS[recording.plan.budget], sent.header
    if h.examples is None:
        return "the client does not say how many images it used; give --examples"
    if h.examples > budget.images:
        return f"{h.examples} images in one message are more than the budget's {budget.images}; see --budget, --attack"
    if h.kind == "delta" and sent.plan is None:
        fix = "" if recording.plan.record else "; give --lr, and the steps where there were several"
        return f"the client's steps are unknown, so they cannot be simulated{fix}"
    steps = sent.plan.steps_for(h.examples) if sent.plan is not None and h.kind == "delta" else 1
    if steps > budget.local_steps:
        return f"{steps} local steps are more than the budget's {budget.local_steps}; see --budget, --attack"
    return ""


def _with_gallery(recording: Recording, sent: Sent, scenario: RecordedScenario) -> RecordedScenario | None:
    """The identification game, where the truth is exactly this message's, and others of its class are there."""
    truth, client = recording.truth, sent.header.client
    pool = None if truth is None else truth.of(client)
    assert scenario.threat is not None
    if truth is None or pool is None or not truth.labelled or not truth.exactly(client, sent.header.examples):
        return None
    if sent.header.kind == "delta" and sent.plan is None:
        return None
    outside = truth.outside(client, recording.others)
    counts = torch.bincount(outside.labels, minlength=int(pool.labels.max()) + 1) if outside is not None else None
    least = 0 if counts is None else min(int(counts[k]) for k in pool.labels.tolist())
    wanted = min(recording.plan.gallery, least + 1)
    if wanted < LEAST_CANDIDATES:
        return None
    grants = sorted({*scenario.threat.grants, Knows.GALLERY.value})
    threat = scenario.threat.model_copy(update={"grants": grants, "gallery": wanted})
    return scenario.model_copy(update={"name": f"{scenario.name}, identification", "threat": threat})
