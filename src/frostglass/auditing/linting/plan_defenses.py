"""The defences of a Frostglass plan that claim a proof, and what the plan says is claimed of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frostglass.auditing.linting.facts import Facts
from frostglass.auditing.linting.lines import line_of, lines_of_keys
from frostglass.auditing.plan import DefensePlan, Plan, ScenarioPlan, load_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.plan_verdict import ClaimPlan
from frostglass.core.defense import Defense
from frostglass.core.errors import FrostglassError
from frostglass.core.randomness import Rng
from frostglass.numerics.bn import bn_layers
from frostglass.vision import networks

FACT = {"clipping_norm": "clip"}


def plan_facts(path: Path, text: str, values: Any) -> list[Facts] | None:
    """One entry for each defence with noise, or with a proof; None if the file is no plan.

    Raises:
        BadInput: it is a plan, and what is wrong with it.
    """
    if not isinstance(values, Mapping) or "scenario" not in values:
        return None
    plan = load_plan(path)
    found, start = [], 0
    for scenario in plan.scenario:
        for entry in scenario.defense:
            for facts in defense_facts(plan, scenario, entry):
                start = line_of(text, rf'name\s*=\s*"{facts.name}"', start + 1) or start or 1
                keys = lines_of_keys(
                    text, ("clipping_norm", "noise_multiplier", "delta", "epsilon", "sensitivity"), start
                )
                lines = {"name": start, **{FACT.get(k, k): v for k, v in keys.items()}}
                claimed = line_of(text, r"^\s*\[verdict\.claim\]")
                if claimed:
                    held = lines_of_keys(text, ("unit", "noise_multiplier"), claimed)
                    lines["claim_unit"] = held.get("unit", claimed)
                    lines["claimed_multiplier"] = held.get("noise_multiplier", claimed)
                found.append(_lined(facts, lines))
    return found


def _lined(facts: Facts, lines: Mapping[str, int]) -> Facts:
    from dataclasses import replace

    return replace(facts, lines=lines)


def defense_facts(plan: Plan, scenario: ScenarioPlan, entry: DefensePlan) -> list[Facts]:
    """Of each part of a defence that clips, adds noise, or claims a proof."""
    defense = make_defense(entry)
    parts = defense.parts or (defense,)
    claim = plan.verdict.claim
    if claim is not None and claim.defense not in (None, entry.label):
        claim = None
    return [_facts(scenario, part, claim) for part in parts if _about_noise(part)]


def _about_noise(part: Defense) -> bool:
    return part.claim == "proof" or "noise_multiplier" in part.settings


def _facts(scenario: ScenarioPlan, part: Defense, claim: ClaimPlan | None) -> Facts:
    from frostglass.auditing.simulate import local_plan

    def number(key: str) -> float | None:
        value = part.settings.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    per_example = part.gradient is not None
    replaced = part.settings.get("adjacency") == "replace" or bool(claim and claim.adjacency == "replace_one")
    client = scenario.client
    plan = local_plan(client, scenario.model.mode)
    steps = plan.steps_for(client.batch) if client.update == "delta" and per_example else 1
    rate = plan.sampling_rate(client.batch) if per_example else 1.0
    releases = (claim.releases if claim else None) or 1
    size, channels = scenario.data.size, scenario.data.channels or 3
    return Facts(
        framework="Frostglass",
        name=part.name,
        called_dp=part.claim == "proof",
        where=f"{part.name} in {scenario.name}",
        clip=number("clipping_norm"),
        sensitivity=number("sensitivity"),
        noise_multiplier=number("noise_multiplier"),
        epsilon=number("epsilon"),
        delta=number("delta"),
        adjacency="replace_one" if replaced else "add_remove",
        clip_unit="image" if per_example or part.encodes else "client",
        noise_std=number("std"),
        uncovered=("labels",) if part.encodes else (),
        claim_unit=claim.unit if claim else None,
        claimed_multiplier=claim.noise_multiplier if claim else None,
        steps=steps * releases,
        rate=rate,
        accounted=True,
        batchnorm=_has_batchnorm(scenario) if per_example else None,
        dimensions=None if size is None else channels * size * size,
    )


def _has_batchnorm(scenario: ScenarioPlan) -> bool | None:
    """Whether the network trains BatchNorm; None if it cannot be built without the data, or without running code."""
    if scenario.model.fix == "opacus":
        return False
    if ":" in scenario.model.name and not scenario.model.name.startswith("torchvision:"):
        return None  # package.module:factory is the user's own code, and a linter runs none
    try:
        model = networks.build(
            scenario.model.name, classes=scenario.model.classes or 10, channels=scenario.data.channels or 3,
            size=scenario.data.size or 32, options=scenario.model.options, rng=Rng.from_seed(0),
        )  # fmt: skip
    except FrostglassError:
        return None
    return bool(bn_layers(model))
