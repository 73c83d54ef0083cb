"""The plan of an audit: what it may say, and every sentence about what is wrong with it, before any compute."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from frostglass.auditing.plan_reading import read_values, sentences, without_errors
from frostglass.auditing.plan_verdict import Strict, VerdictPlan
from frostglass.auditing.recorded_plan import RecordedPlan, UpdatesPlan
from frostglass.core.errors import BadInput

FROM_PYTHON = "python"
"""`python:CLASS` as a model and `python` as a data source: given as objects to `frostglass.audit`, not by the plan."""


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("use one line of printable letters")
    return text


Title = Annotated[str, Field(max_length=200), AfterValidator(_one_line)]
"""What reports, tables and terminals print."""


class DataPlan(Strict):
    """Where the private images come from."""

    source: str = Field("photos", description='"photos", "digits", "folder:PATH" or "parquet:FILE"')
    size: int | None = Field(None, ge=4, le=4096, description="pixels a side, after a centre crop; none: as they are")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; none: as they are")


class ModelPlan(Strict):
    """The network that is trained."""

    name: str = Field("small_bn_cnn", description="a built-in, torchvision:NAME, or package.module:factory")
    mode: Literal["train", "eval"] = Field("train", description="mode of the client's model during its step")
    weights: str | None = Field(None, description="a .safetensors or .pt file; none: random, from the seed")
    stage: Literal["init", "early", "middle", "final"] | None = Field(
        None, description="how far the weights are trained; none: init without weights, else unknown"
    )
    classes: int | None = Field(None, ge=2, description="outputs; none: as many as the data has")
    fix: Literal["opacus"] | None = Field(None, description='"opacus" replaces layers that Opacus refuses')
    options: dict[str, Any] = Field(default_factory=dict, description="parameters of the network's maker")


class ClientPlan(Strict):
    """What each client does with its batch."""

    batch: int = Field(4, ge=1, description="images of one client")
    batches: int = Field(1, ge=1, description="independent repetitions: other images, other draws")
    update: Literal["gradient", "delta"] = Field("gradient", description="FedSGD gradient or FedAvg weight difference")
    local_steps: int = Field(1, ge=1, description="full-batch steps an epoch; more than 1 needs update = delta")
    epochs: int = Field(1, ge=1, description="repetitions of the local steps; more than 1 needs update = delta")
    lr: float = Field(0.1, gt=0, description="of the client's optimiser")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="of the client; adam needs update = delta")
    minibatch: int | None = Field(None, ge=1, description="images a step, shuffled every epoch; none: all of them")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the client's SGD")
    weight_decay: float = Field(0.0, ge=0, description="of the client, added to the gradient")
    loss: Literal["cross_entropy"] = Field("cross_entropy", description="mean over the batch")
    clients: int = Field(1, ge=1, description="clients in a repetition, each with a batch of its own")
    cohort: int = Field(1, ge=1, description="clients whose secure sum is one message; 1: every update arrives alone")
    augmentation: Literal["none", "flip"] = Field("none", description="what the client does to an image first")


class Named(BaseModel):
    """A name and the parameters of what it names."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="`frostglass list` names all; further keys are its parameters")

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters."""
        return dict(self.model_extra or {})


class DefensePlan(BaseModel):
    """One defence, or a stack of them."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(None, description="`frostglass list defenses` names all; further keys are its parameters")
    stack: list[Named] | None = Field(None, description="several at once, in this order, instead of a name")

    @property
    def parts(self) -> list[Named]:
        """The defences in order."""
        if self.stack is not None:
            return list(self.stack)
        return [Named(name=self.name or "none", **(self.model_extra or {}))]

    @property
    def label(self) -> str:
        """A name for titles."""
        return "+".join(p.name for p in self.parts) or "none"


class ThreatPlan(Strict):
    """What the attacker knows beyond the model and the update."""

    name: Title = Field("honest-but-curious server", description="for the report")
    grants: list[str] = Field(default_factory=lambda: ["examples"], description="strings of the grants enum")
    auxiliary: str | None = Field(
        None, description="a data source; the grant 'auxiliary' gives away its images that are not private ones"
    )
    gallery: int = Field(100, ge=2, description="candidates that the grant 'gallery' shows, the target among them")


class ThresholdPlan(Strict):
    """What counts as recognisable; fixed before the run."""

    metric: str = Field("ssim", description='"psnr", "ssim", or another of report.metrics')
    value: float = Field(0.5, description="score that counts as recognisable")


class ReportPlan(Strict):
    """What the report shows."""

    metrics: list[str] = Field(default_factory=lambda: ["psnr", "ssim"], description="names of metrics")
    show_images: bool = Field(False, description="true puts private images into the report")
    null: bool = Field(True, description="rank each score among images that were not in the batch")
    threshold: ThresholdPlan = Field(default_factory=ThresholdPlan, description="what counts as recognisable")


class ScenarioPlan(Strict):
    """One client set-up; every combination of its defences and attacks is a cell."""

    name: Title = Field("", description="for titles; its position if left out")
    data: DataPlan = Field(default_factory=DataPlan, description="the private images")
    model: ModelPlan = Field(default_factory=ModelPlan, description="the network")
    client: ClientPlan = Field(default_factory=ClientPlan, description="what a client does")
    defense: list[DefensePlan] = Field(
        default_factory=lambda: [DefensePlan(name="none")], min_length=1, description="each is tried alone"
    )
    attack: list[Named] = Field(min_length=1, description="each is run against each defence")
    threat: ThreatPlan | None = Field(None, description="replaces the plan's [threat] for this scenario")
    control: bool = Field(False, description="true: shows that the attacks work, and has no part in the verdict")

    @property
    def recorded(self) -> RecordedPlan | None:
        """The update of a real engine that is played back; None: a client is simulated."""
        return None


class Resolved(Strict):
    """A plan that a run keeps, and belongs to."""

    def to_toml(self) -> str:
        """The resolved plan: every key with its value; what is None stays out, as TOML has no such value."""
        return tomli_w.dumps(without_none(self.model_dump()))

    def digest(self) -> str:
        """SHA-256 of the resolved plan: a run belongs to it."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


class Plan(Resolved):
    """A whole audit."""

    name: Title = Field("audit", min_length=1, description="of the audit, for the report")
    seed: int = Field(0, ge=0, lt=2**63, description="of everything random; the same plan and seed, the same result")
    scenario: list[ScenarioPlan] = Field(min_length=1, description="client set-ups")
    threat: ThreatPlan = Field(default_factory=ThreatPlan, description="of every scenario without one of its own")
    report: ReportPlan = Field(default_factory=ReportPlan, description="what is measured and shown")
    verdict: VerdictPlan = Field(default_factory=VerdictPlan, description="what a verdict is about")

    def threat_of(self, scenario: ScenarioPlan) -> ThreatPlan:
        """The scenario's own threat model, or the plan's."""
        return scenario.threat or self.threat

    @property
    def recorded_updates(self) -> UpdatesPlan | None:
        """Where recorded updates come from; None: all clients are simulated."""
        return None


def without_none(value: Any) -> Any:
    """The same without entries of None, at every depth of tables and lists."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list | tuple) else value


def parse_plan(values: Mapping[str, Any]) -> Plan:
    """Checks a plan and names its scenarios.

    Raises:
        BadInput: every problem that was found, together.
    """
    from frostglass.auditing.plan_checks import semantic_problems

    try:
        plan = Plan.model_validate(values)
    except ValidationError as wrong:
        raise BadInput(sentences(wrong, Plan) + _further_problems(values, wrong)) from None
    problems = semantic_problems(_named(plan))
    if problems:
        raise BadInput(problems)
    try:
        plan.to_toml()  # a run keeps its plan, so each value must be one that TOML has
    except (TypeError, ValueError) as wrong:
        raise BadInput(f"plan: holds a value that TOML does not have ({wrong}).") from None
    return plan


def _named(plan: Plan) -> Plan:
    for i, scenario in enumerate(plan.scenario, 1):
        scenario.name = scenario.name or f"scenario {i}"
    return plan


def _further_problems(values: Mapping[str, Any], wrong: ValidationError) -> list[str]:
    """What else is wrong, judged without the parts that the schema refused."""
    from frostglass.auditing.plan_checks import semantic_problems

    kept = without_errors(values, wrong)
    try:
        found = semantic_problems(_named(Plan.model_validate(kept))) if kept is not None else []
    except ValidationError:
        return []
    # a grant may be lacking only because the table that gives it was refused
    in_threat = any("threat" in error["loc"] for error in wrong.errors())
    return [f for f in found if not (in_threat and "needs the grant" in f)]


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Reads a TOML plan; relative paths in it are taken from its own folder.

    Args:
        path: the file.
        overrides: `key=value` with dotted keys; `scenario.0.client.batch=8` or, for all scenarios,
            `scenario.client.batch=8`; values are TOML, or plain text where they are no TOML.

    Raises:
        BadInput: the file is missing or no TOML, an override does not parse, or the plan is wrong.
    """
    return parse_plan(read_values(path, overrides))
