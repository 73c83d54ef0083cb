"""A cell is one scenario x defence x attack; its warnings are the pitfalls that its set-up walks into."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from frostglass.auditing.plan import DefensePlan, Named, Plan, ScenarioPlan, ThreatPlan
from frostglass.auditing.scorecard import Summary


@dataclass(frozen=True)
class CellPlan:
    """What one cell runs."""

    id: str
    index: int
    scenario: ScenarioPlan
    threat: ThreatPlan
    defense: DefensePlan
    attack: Named

    @property
    def upper_bound(self) -> bool:
        """True where the grants exceed what such a client really sends.

        Batch statistics leave a client only in the buffers of a model that it trains in train mode, alone in its
        message; from anyone else they are a gift to the attacker.
        """
        realistic = self.scenario.model.mode == "train" and self.scenario.client.cohort == 1
        return "bn_batch" in self.threat.grants and not realistic

    @property
    def title(self) -> str:
        """For a person."""
        told = f"{self.scenario.name}: {self.attack.name} against {_defended(self.defense)}"
        return f"{told} (upper bound)" if self.upper_bound else told


def _defended(defense: DefensePlan) -> str:
    return "no defence" if defense.label == "none" else defense.label


def expand(plan: Plan) -> Iterator[CellPlan]:
    """All cells of a plan, in its order."""
    number = 0
    for index, scenario in enumerate(plan.scenario):
        for defense in scenario.defense:
            for attack in scenario.attack:
                number += 1
                slug = re.sub(r"[^a-z0-9]+", "-", f"{scenario.name} {defense.label} {attack.name}".lower()).strip("-")
                yield CellPlan(f"{number:02d}-{slug[:60]}", index, scenario, plan.threat_of(scenario), defense, attack)


def pitfalls(cell: CellPlan, *, units: int, repeats_images: bool, batchnorm: bool) -> list[str]:
    """Warnings on how this set-up can mislead (evaluation pitfalls 1 to 5 and 13), a sentence each."""
    found = []
    grants, client, model = set(cell.threat.grants), cell.scenario.client, cell.scenario.model
    if "labels" in grants:
        found.append("Labels were granted: a real server restores them first. Run again without the grant.")
    if "bn_batch" in grants and batchnorm:
        if cell.upper_bound:
            found.append("Upper bound: batch statistics were granted that such a client does not send.")
        else:
            found.append(
                "Batch statistics were granted: a train-mode client sends them with its BatchNorm buffers if the "
                "server asks for buffers after one step. Run again without the grant."
            )
    if model.mode == "eval" and batchnorm:
        found.append("The gradient was taken in eval mode; clients with BatchNorm usually send train-mode gradients.")
    if model.weights is None:
        found.append("The network is randomly initialised: early, middle and final checkpoints leak differently.")
    if client.local_steps * client.epochs == 1:
        found.append("One local step: a client that takes more steps between messages was not tested here.")
    if client.augmentation == "none":
        found.append("No augmentation: a client that augments its images was not tested here.")
    if units < 30:
        images = client.batch * client.cohort * units
        found.append(
            f"{units} batch{'es' if units > 1 else ''}, {images} image{'s' if images > 1 else ''}: too few to say that "
            "an attack does not succeed (30 independent batches at three checkpoints are the least)."
        )
    if repeats_images:
        found.append("There were too few images for batches without common images: repetitions are not independent.")
    return found


def outcome(attack: str, summary: Summary | None, encoding: Summary | None) -> str:
    """What was recovered, as half a sentence."""
    if summary is None:
        return "the run failed"
    total = summary.images
    if encoding is not None and encoding.proved:
        return f"{encoding.proved} of {total} encodings recovered exactly, no private image directly"
    if summary.proved:
        return f"{summary.proved} of {total} images recovered exactly"
    over = summary.over_threshold
    if over.count:
        return f"{over.count} of {total} images recognisable ({over.metric.upper()} at least {over.value:g})"
    return f"nothing shown by {attack} on {total} images"
