"""What a schema cannot see: names against the registries, grants against needs, settings against each other."""

from __future__ import annotations

import math
from typing import Any

from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.metrics.registry import ALWAYS_SCORED, METRICS
from frostglass.auditing.plan import (
    FROM_PYTHON,
    ClientPlan,
    DefensePlan,
    ModelPlan,
    Named,
    Plan,
    ScenarioPlan,
    ThreatPlan,
)
from frostglass.auditing.plan_verdict import verdict_problems
from frostglass.core.defense import Defense, stack
from frostglass.core.drive import Attack
from frostglass.core.errors import BadInput, close_match
from frostglass.core.registry import Registry
from frostglass.core.threat import ALWAYS, parse_grants
from frostglass.defenses.registry import DEFENSES
from frostglass.vision.datasets import DATASETS
from frostglass.vision.networks import MODELS


def semantic_problems(plan: Plan) -> list[str]:
    """All sentences about `plan` together."""
    found = _metric_problems(plan)
    found += verdict_problems(plan.verdict, {a.name for s in plan.scenario for a in s.attack})
    found += _threat_problems(plan.threat, "threat")
    names = [scenario.name for scenario in plan.scenario]
    for i, scenario in enumerate(plan.scenario):
        where = f"scenario.{i}"
        if scenario.name in names[:i]:
            found.append(f"{where}.name: {scenario.name!r} is taken by another scenario; give each a name of its own.")
        if scenario.threat is not None:
            found += _threat_problems(scenario.threat, f"{where}.threat")
        if scenario.recorded is None:
            found += _source_problems(scenario.data.source, f"{where}.data.source")
        found += _model_problems(scenario.model, f"{where}.model")
        found += _client_problems(scenario.client, f"{where}.client")
        found += _defense_problems(scenario, where)
        found += _attack_problems(plan, scenario, where)
        found += _game_problems(plan, scenario, where)
    return found


def make_attack(entry: Named) -> Attack[Any]:
    """The attack that a plan names.

    Raises:
        BadInput: unknown name or parameters.
    """
    return ATTACKS[entry.name].make(**entry.settings)


def make_defense(entry: DefensePlan) -> Defense:
    """The defence, or stack of defences, that a plan names.

    Raises:
        BadInput: unknown name or parameters, or defences that do not go together.
    """
    made = [DEFENSES[part.name].make(**part.settings) for part in entry.parts]
    return made[0] if len(made) == 1 else stack(*made)


def _metric_problems(plan: Plan) -> list[str]:
    known = METRICS.names()
    wrong = [m for m in plan.report.metrics if m not in known]
    found = [f"report.metrics: {m!r} is not a metric; {close_match(m, known)}." for m in wrong]
    chosen = plan.report.threshold.metric
    if chosen not in known:
        found.append(f"report.threshold.metric: {chosen!r} is not a metric; {close_match(chosen, known)}.")
    elif chosen not in (*ALWAYS_SCORED, *plan.report.metrics):
        found.append(f"report.threshold.metric: {chosen!r} is not among report.metrics; add it there.")
    return found


def _threat_problems(threat: ThreatPlan, where: str) -> list[str]:
    try:
        parse_grants(threat.grants)
    except BadInput as wrong:
        return [p.replace("threat.grants", f"{where}.grants", 1) for p in wrong.problems]
    if "auxiliary" in threat.grants and threat.auxiliary is None:
        return [f"{where}.grants: 'auxiliary' gives away nothing; set {where}.auxiliary to a data source."]
    return _source_problems(threat.auxiliary, f"{where}.auxiliary") if threat.auxiliary is not None else []


def _source_problems(source: str, where: str) -> list[str]:
    kind, colon, path = source.partition(":")
    if kind == FROM_PYTHON:
        return []
    if kind not in DATASETS:
        return [f"{where}: {source!r} is not a known source; {close_match(kind, DATASETS.names())}."]
    wants = "path" in DATASETS[kind].parameters
    if wants and not path:
        return [f"{where}: {source!r} lacks a path; write {kind + ':PATH'!r}."]
    if colon and not wants:
        return [f"{where}: {kind!r} takes no path; write {kind!r}."]
    return []


def _model_problems(model: ModelPlan, where: str) -> list[str]:
    if ":" in model.name:  # torchvision's, a factory, or given from Python: known when it is built
        return []
    if model.name not in MODELS:
        near = close_match(model.name, MODELS.names())
        others = "or torchvision:NAME, or package.module:factory"
        return [f"{where}.name: {model.name!r} is not a known model; {near}, {others}."]
    entry, shape = MODELS[model.name], {"classes": 2, "channels": 3, "size": 32}
    taken = [f"{where}.options.{k}: set by the data; leave it out of the options." for k in model.options if k in shape]
    return taken or entry.problems({**shape, **model.options}, f"{where}.options")


def _client_problems(client: ClientPlan, where: str) -> list[str]:
    found = []
    if client.update == "gradient" and client.local_steps * client.epochs > 1:
        found.append(
            f'{where}.local_steps: {client.local_steps} steps x {client.epochs} epochs need update = "delta"; '
            "a gradient is sent after one step."
        )
    if client.optimizer == "adam" and client.update == "gradient":
        found.append(f'{where}.optimizer: "adam" needs update = "delta"; a gradient is sent before any optimiser.')
    if client.optimizer == "adam" and client.momentum:
        found.append(f'{where}.momentum: {client.momentum} belongs to optimizer = "sgd"; leave it out for "adam".')
    if client.minibatch is not None:
        found += _minibatch_problems(client, client.minibatch, where)
    if client.clients % client.cohort:
        found.append(f"{where}.cohort: {client.cohort} does not divide clients = {client.clients}.")
    return found


def _minibatch_problems(client: ClientPlan, minibatch: int, where: str) -> list[str]:
    found = []
    if client.update == "gradient":
        found.append(f'{where}.minibatch: {minibatch} needs update = "delta"; a gradient is of the whole batch.')
    if client.local_steps > 1:
        found.append(f"{where}.local_steps: {client.local_steps} full-batch steps and minibatches; set epochs instead.")
    if minibatch > client.batch:
        found.append(f"{where}.minibatch: {minibatch} exceeds batch = {client.batch}; lower it or leave it out.")
    return found


def _defense_problems(scenario: ScenarioPlan, where: str) -> list[str]:
    found: list[str] = []
    for i, entry in enumerate(scenario.defense):
        here = f"{where}.defense.{i}"
        if entry.name is None and entry.stack is None:
            found.append(f"{here}: give a name, or stack = [ {{ name = ... }}, ... ].")
            continue
        if entry.stack is not None and (entry.name is not None or entry.model_extra):
            found.append(f"{here}: has both a stack and a name or parameters; put the parameters inside the stack.")
            continue
        wrong = [p for part in entry.parts for p in _entry_problems(DEFENSES, part, here)]
        found += wrong
        if not wrong:
            try:
                make_defense(entry)
            except BadInput as refused:
                found += [f"{here}: {p}" for p in refused.problems]
    return found


def _attack_problems(plan: Plan, scenario: ScenarioPlan, where: str) -> list[str]:
    found: list[str] = []
    grants = set(plan.threat_of(scenario).grants)
    for i, entry in enumerate(scenario.attack):
        here = f"{where}.attack.{i}"
        wrong = _entry_problems(ATTACKS, entry, here)
        found += wrong
        if wrong:
            continue
        try:
            attack = make_attack(entry)
        except BadInput as refused:
            found += [f"{here}: {p}" for p in refused.problems]
            continue
        lacking = sorted(k.value for k in attack.needs - ALWAYS if k.value not in grants)
        if lacking:
            found.append(
                f"{here}: {entry.name!r} needs the grant{'s' if len(lacking) > 1 else ''} "
                f"{', '.join(map(repr, lacking))}; add to threat.grants, or choose another attack."
            )
    return found


def _game_problems(plan: Plan, scenario: ScenarioPlan, where: str) -> list[str]:
    """Guessing among few candidates must not exceed what is tolerated."""
    threat, v = plan.threat_of(scenario), plan.verdict
    if v.event != "identified" or "gallery" not in threat.grants or v.tolerance >= 1 / threat.gallery:
        return []
    least = math.ceil(1 / v.tolerance - 1e-9) if v.tolerance > 0 else None
    raise_it = "" if least is None else f" to {least} at least"
    at = f"{where}.threat" if scenario.threat is not None else "threat"
    return [
        f"{at}.gallery: guessing among {threat.gallery} candidates succeeds more often than verdict.tolerance = "
        f"{v.tolerance:g}; raise it{raise_it}, or the tolerance."
    ]


def _entry_problems(registry: Registry[Any], entry: Named, where: str) -> list[str]:
    if entry.name not in registry:
        near = close_match(entry.name, registry.names())
        return [f"{where}.name: {entry.name!r} is not a known {registry.noun}; {near}."]
    return registry[entry.name].problems(entry.settings, where)
