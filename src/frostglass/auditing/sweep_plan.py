"""The plan of a sweep: a defence's knob, what is attacked and what is trained at each of its values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from frostglass.auditing.plan import (
    ClientPlan,
    DataPlan,
    DefensePlan,
    ModelPlan,
    Named,
    Plan,
    Resolved,
    ThreatPlan,
    ThresholdPlan,
    Title,
    parse_plan,
    without_none,
)
from frostglass.auditing.plan_reading import read_values, sentences
from frostglass.auditing.plan_verdict import Strict
from frostglass.core.errors import BadInput
from frostglass.federated.train_plan import Seed

CLIENT_KNOBS = ("client.batch", "client.local_steps", "client.epochs", "client.lr")


class VaryPlan(Strict):
    """One defence, at one or more values of a knob."""

    name: str = Field("", description="for titles; that of the defence if left out")
    defense: DefensePlan = Field(default_factory=lambda: DefensePlan(name="none"), description="as in an audit's plan")
    knob: str | None = Field(None, description="a parameter of the defence, or client.batch, client.local_steps, ...")
    values: list[int | float] = Field(default_factory=list, description="of the knob, a point each")


class TrainingPlan(Strict):
    """Federated training that measures what a defence costs; the same for all points."""

    rounds: int = Field(300, ge=1, description="of the server")
    clients: int = Field(8, ge=1, description="messages averaged in a round; each of client.batch images")
    lr: float = Field(0.1, gt=0, description="greatest learning rate of the server, on mean gradients")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the server")
    seeds: list[Seed] = Field(
        default_factory=lambda: [0, 1], min_length=1, description="a run each: split, draws, keys"
    )
    test: str | None = Field(None, description="another source to test with; none: a fifth of the images")
    images: int = Field(20_000, ge=10, description="of the source, at the most")


class SweepPlan(Resolved):
    """A whole sweep."""

    name: Title = Field("sweep", min_length=1, description="for the picture")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random")
    trials: int = Field(100, ge=1, description="messages that are attacked at each point, each with its own images")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval")
    data: DataPlan = Field(default_factory=lambda: DataPlan(source="digits"), description="the private images")
    model: ModelPlan = Field(default_factory=ModelPlan, description="the network")
    client: ClientPlan = Field(default_factory=ClientPlan, description="what a client does")
    attack: Named = Field(default_factory=lambda: Named(name="gallery"), description="what success is measured by")
    event: ThresholdPlan = Field(
        default_factory=ThresholdPlan, description="success of an attack that draws images: its first one reaches this"
    )
    threat: ThreatPlan = Field(
        default_factory=lambda: ThreatPlan(grants=["examples", "gallery", "defence", "local_plan"]),
        description="what the attacker knows",
    )
    training: TrainingPlan = Field(default_factory=TrainingPlan, description="what accuracy is measured by")
    vary: list[VaryPlan] = Field(min_length=1, description="the points")


@dataclass(frozen=True)
class Point:
    """One point of the frontier.

    Args:
        id: of its file.
        title: for people.
        family: of the line that it is on.
        knob, value: what was varied; None for a single point.
        plan: the audit of this point, of one scenario and one attack.
    """

    id: str
    title: str
    family: str
    knob: str | None
    value: float | None
    plan: Plan


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """Reads a TOML plan; paths in it start at its folder.

    Raises:
        BadInput: every problem that was found, together.
    """
    return parse_sweep(read_values(path, overrides))


def parse_sweep(values: Mapping[str, Any]) -> SweepPlan:
    """Checks a sweep with all its points before any compute.

    Raises:
        BadInput: every problem that was found, together.
    """
    try:
        plan = SweepPlan.model_validate(values)
    except ValidationError as wrong:
        raise BadInput(sentences(wrong, SweepPlan)) from None
    points(plan)
    return plan


def points(plan: SweepPlan) -> list[Point]:
    """All points, in order.

    Raises:
        BadInput: what is wrong with any of them, together.
    """
    found: list[Point] = []
    problems: list[str] = []
    for place, vary in enumerate(plan.vary):
        if (vary.knob is None) != (not vary.values):
            problems.append(f"vary.{place}: knob and values belong together; give both or neither.")
            continue
        values: list[float | None] = [*vary.values] or [None]
        for value in values:
            try:
                found.append(_point(plan, vary, value, len(found) + 1))
            except BadInput as wrong:
                problems += [_placed(p, place, vary) for p in wrong.problems]
    if problems:
        raise BadInput(list(dict.fromkeys(problems)))
    return found


def _placed(problem: str, place: int, vary: VaryPlan) -> str:
    """Where the sentence belongs in the sweep's plan: only a defence and what is varied are an entry's own."""
    text = problem.replace("scenario.0.", "").replace("attack.0", "attack", 1).replace("report.threshold", "event", 1)
    own = text.startswith(("defense", "knob")) or (vary.knob is not None and text.startswith(vary.knob))
    shared = text.startswith(("attack", "client", "data", "event", "model", "name", "seed", "threat"))
    return text if shared and not own else f"vary.{place}: {text}"


def _point(plan: SweepPlan, vary: VaryPlan, value: float | None, number: int) -> Point:
    client = without_none(plan.client.model_dump()) | {"batches": plan.trials}
    defense = without_none(vary.defense.model_dump())
    if vary.knob is not None and value is not None:
        section, dot, key = vary.knob.rpartition(".")
        if dot and vary.knob not in CLIENT_KNOBS:
            raise BadInput(f"knob: {vary.knob!r} is not known; use a parameter of the defence or {CLIENT_KNOBS}.")
        if not dot and "stack" in defense:
            raise BadInput(f"knob: {vary.knob!r} is of which defence of the stack? Vary a single one, or the client.")
        (client if section == "client" else defense)[key] = value
    family = vary.name or vary.defense.label
    title = family if vary.knob is None else f"{family}, {vary.knob.rpartition('.')[2]} = {value:g}"
    scenario = {
        "name": title,
        "data": without_none(plan.data.model_dump()),
        "model": without_none(plan.model.model_dump()),
        "client": client,
        "defense": [defense],
        "attack": [plan.attack.model_dump()],
    }
    audit = parse_plan({
        "name": plan.name,
        "seed": plan.seed,
        "scenario": [scenario],
        "threat": without_none(plan.threat.model_dump()),
        "report": {"metrics": list({"psnr", "ssim", plan.event.metric}), "threshold": plan.event.model_dump()},
    })  # fmt: skip
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
    return Point(f"{number:02d}-{slug}", title, family, vary.knob, value, audit)
