"""A cell is one scenario x defence x attack; its warnings are the pitfalls that its set-up walks into."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from frostglass.auditing.metrics.registry import METRICS
from frostglass.auditing.plan import ClientPlan, DefensePlan, Named, Plan, ScenarioPlan, ThreatPlan
from frostglass.auditing.recorded_plan import RecordedPlan
from frostglass.auditing.scorecard import Cell, ImageScore, Summary
from frostglass.auditing.verdict_rules import shared_level
from frostglass.guarantees.interval import clopper_pearson


@dataclass(frozen=True)
class CellPlan:
    """What one cell runs."""

    id: str
    index: int
    scenario: ScenarioPlan
    threat: ThreatPlan
    defense: DefensePlan
    attack: Named
    title: str

    @property
    def upper_bound(self) -> bool:
        """True where the grants exceed what such a client really sends."""
        return _beyond_reality(self.threat, self.scenario)


def _beyond_reality(threat: ThreatPlan, scenario: ScenarioPlan) -> bool:
    """Batch statistics leave a client only in the buffers of a model that it trains in train mode, for one step, alone
    in a message.

    From anyone else they are a gift to the attacker.
    """
    if scenario.recorded is not None:
        return bool(scenario.recorded.beyond)
    client = scenario.client
    realistic = scenario.model.mode == "train" and client.cohort == 1 and _one_step(client)
    return "bn_batch" in threat.grants and not realistic


def _one_step(client: ClientPlan) -> bool:
    """Whether a client takes one step, over all its images."""
    return client.local_steps * client.epochs == 1 and client.minibatch in (None, client.batch)


def expand(plan: Plan) -> Iterator[CellPlan]:
    """All cells of a plan, in its order."""
    number = 0
    for index, scenario in enumerate(plan.scenario):
        threat = plan.threat_of(scenario)
        defenses = _told_apart(
            [_defended(d, scenario.recorded) for d in scenario.defense], [_told(*d.parts) for d in scenario.defense]
        )
        attacks = _told_apart([a.name for a in scenario.attack], [_told(a) for a in scenario.attack])
        bound = " (upper bound)" if _beyond_reality(threat, scenario) else ""
        if "modified_model" in threat.grants:
            bound += " (malicious ceiling)"
        for defense, against in zip(scenario.defense, defenses, strict=True):
            for attack, name in zip(scenario.attack, attacks, strict=True):
                number += 1
                slug = re.sub(r"[^a-z0-9]+", "-", f"{scenario.name} {defense.label} {attack.name}".lower())
                key = f"{number:02d}-{slug.strip('-')[:60]}".strip("-")
                title = f"{scenario.name}: {name} against {against}{bound}"
                yield CellPlan(key, index, scenario, threat, defense, attack, title)


def _told_apart(names: list[str], settings: list[str]) -> list[str]:
    """Names; those that occur more than once with their settings."""
    return [
        f"{name} ({more})" if names.count(name) > 1 and more else name
        for name, more in zip(names, settings, strict=True)
    ]


def _told(*entries: Named) -> str:
    return ", ".join(f"{k} = {v}" for entry in entries for k, v in entry.settings.items())


def _defended(defense: DefensePlan, recorded: RecordedPlan | None) -> str:
    if recorded is not None and defense.label == "none":
        return "no declared defence" if recorded.declared in (None, "none") else f"{recorded.declared}, as declared"
    return "no defence" if defense.label == "none" else defense.label


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
    if model.weights is None and cell.scenario.recorded is None:
        found.append("The network is randomly initialised: early, middle and final checkpoints leak differently.")
    if _one_step(client):
        found.append("One local step: a client that takes more steps between messages was not tested here.")
    if client.augmentation == "none" and cell.scenario.recorded is None:
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


def beyond_chance(cell: Cell) -> bool:
    """An identification game was won more often than guessing explains, by the rule and at the level of the verdict.

    At 95 % where there is no verdict.
    """
    summary, verdict = cell.summary, cell.verdict
    if summary is None or not summary.asked or summary.identified is None or not summary.candidates:
        return False
    if uncounted_game(cell):
        return False
    level = 0.95 if verdict is None else shared_level(verdict.confidence, verdict.tests)
    return clopper_pearson(summary.identified, summary.asked, level)[0] > 1 / summary.candidates


def messages_of(cell: Cell) -> list[list[ImageScore]]:
    """The rows of each message."""
    size = len(cell.images) if cell.batches == 1 else cell.batch  # one message may hold more than is known of it
    return [cell.images[i : i + size] for i in range(0, len(cell.images), max(1, size))]


def uncounted_game(cell: Cell) -> list[str]:
    """Why the successes of an identification game are no trials of one chance, a sentence each."""
    asked = [row for row in cell.images if row.identified is not None]
    found = []
    if repeated(asked):
        found.append("The same image is in several messages: trials are not independent.")
    if len({row.candidates for row in asked if row.candidates}) > 1:
        found.append("Messages have different numbers of candidates, so they have no common chance.")
    copies = [
        sum(other.sha256 == row.sha256 for other in message)
        for message in messages_of(cell)
        for row in message
        if row.identified is not None
    ]
    if any(n > 1 for n in copies):
        found.append(
            "An image that was to be named stands twice in its message: whoever knows the others needs no update to "
            "name it."
        )
    return found


def repeated(rows: Sequence[ImageScore]) -> bool:
    """Whether one image stands in several messages; an augmented one keeps its name alone."""
    contents, names = {r.sha256 for r in rows}, {r.id for r in rows}
    return len(contents) < len(rows) or (all(r.target == "private" for r in rows) and len(names) < len(rows))


def outcome(attack: str, summary: Summary | None, encoding: Summary | None) -> str:
    """What was recovered, as half a sentence."""
    if summary is None:
        return "the run failed"
    total = summary.images
    over = summary.over_threshold
    if summary.asked:
        return (
            f"the right one of {summary.candidates} candidates named in {summary.identified} of {summary.asked} "
            f"messages (chance {1 / (summary.candidates or 1):.2g})"
        )
    if encoding is not None and encoding.proved:
        private = f"{over.count} of the private images recognisable" if over.count else "no private image directly"
        return f"{encoding.proved} of {total} encodings recovered exactly, {private}"
    if summary.proved:
        return f"{summary.proved} of {total} images recovered exactly"
    if over.count:
        lower = over.metric in METRICS and not METRICS[over.metric].make().higher_is_closer
        bar = f"{over.metric.upper()} at {'most' if lower else 'least'} {over.value:g}"
        return f"{over.count} of {total} images recognisable ({bar})"
    return f"nothing shown by {attack} on {total} images"
