"""The plan of an audit: what it may say, and every sentence about what is wrong with it, before any compute."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from frostglass.core.errors import BadInput, close_match


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataPlan(_Strict):
    """Where the private images come from."""

    source: str = Field("photos", description='"photos", "digits", "folder:PATH" or "parquet:FILE"')
    size: int | None = Field(None, ge=4, le=4096, description="pixels a side, after a centre crop; none: as they are")
    channels: Literal[1, 3] | None = Field(None, description="1 grey, 3 colour; none: as they are")


class ModelPlan(_Strict):
    """The network that is trained."""

    name: str = Field("small_bn_cnn", description="a built-in, torchvision:NAME, or package.module:factory")
    mode: Literal["train", "eval"] = Field("train", description="mode of the client's model during its step")
    weights: str | None = Field(None, description="a .safetensors or .pt file; none: random, from the seed")
    classes: int | None = Field(None, ge=2, description="outputs; none: as many as the data has")
    fix: Literal["opacus"] | None = Field(None, description='"opacus" replaces layers that Opacus refuses')
    options: dict[str, Any] = Field(default_factory=dict, description="parameters of the network's maker")


class ClientPlan(_Strict):
    """What each client does with its batch."""

    batch: int = Field(4, ge=1, description="images of one client")
    batches: int = Field(1, ge=1, description="independent repetitions: other images, other draws")
    update: Literal["gradient", "delta"] = Field("gradient", description="FedSGD gradient or FedAvg weight difference")
    local_steps: int = Field(1, ge=1, description="full-batch steps an epoch; more than 1 needs update = delta")
    epochs: int = Field(1, ge=1, description="repetitions of the local steps; more than 1 needs update = delta")
    lr: float = Field(0.1, gt=0, description="of the client's optimiser")
    optimizer: Literal["sgd"] = Field("sgd", description="of the client")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the client's SGD")
    weight_decay: float = Field(0.0, ge=0, description="of the client's SGD")
    loss: Literal["cross_entropy"] = Field("cross_entropy", description="mean over the batch")
    clients: int = Field(1, ge=1, description="clients in a repetition, each with a batch of its own")
    cohort: int = Field(1, ge=1, description="clients whose secure sum is one message; 1: every update arrives alone")
    augmentation: Literal["none", "flip"] = Field("none", description="what the client does to an image first")


class Named(BaseModel):
    """A name and the parameters of what it names."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters."""
        return dict(self.model_extra or {})


class DefensePlan(BaseModel):
    """One defence, or a stack of them."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    stack: list[Named] | None = None

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


class ThreatPlan(_Strict):
    """What the attacker knows beyond the model and the update."""

    name: str = Field("honest-but-curious server", description="for the report")
    grants: list[str] = Field(default_factory=lambda: ["examples"], description="strings of the grants enum")
    auxiliary: str | None = Field(None, description="a data source whose images the grant 'auxiliary' gives away")


class ThresholdPlan(_Strict):
    """What counts as recognisable; fixed before the run."""

    metric: str = "ssim"
    value: float = 0.5


class ReportPlan(_Strict):
    """What the report shows."""

    metrics: list[str] = Field(default_factory=lambda: ["psnr", "ssim"], description="names of metrics")
    show_images: bool = Field(False, description="true puts private images into the report")
    threshold: ThresholdPlan = Field(default_factory=ThresholdPlan)


class ScenarioPlan(_Strict):
    """One client set-up; every combination of its defences and attacks is a cell."""

    name: str = ""
    data: DataPlan = Field(default_factory=DataPlan)
    model: ModelPlan = Field(default_factory=ModelPlan)
    client: ClientPlan = Field(default_factory=ClientPlan)
    defense: list[DefensePlan] = Field(default_factory=lambda: [DefensePlan(name="none")], min_length=1)
    attack: list[Named] = Field(min_length=1)
    threat: ThreatPlan | None = Field(None, description="replaces the plan's [threat] for this scenario")


class Plan(_Strict):
    """A whole audit."""

    name: str = Field("audit", min_length=1, max_length=200)
    seed: int = Field(0, ge=0)
    scenario: list[ScenarioPlan] = Field(min_length=1)
    threat: ThreatPlan = Field(default_factory=ThreatPlan)
    report: ReportPlan = Field(default_factory=ReportPlan)

    def threat_of(self, scenario: ScenarioPlan) -> ThreatPlan:
        """The scenario's own threat model, or the plan's."""
        return scenario.threat or self.threat

    def to_toml(self) -> str:
        """The resolved plan: every key with its value."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    def digest(self) -> str:
        """SHA-256 of the resolved plan: a run belongs to it."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


def parse_plan(values: Mapping[str, Any]) -> Plan:
    """Checks a plan and names its scenarios.

    Raises:
        BadInput: every problem that was found, together.
    """
    from frostglass.auditing.plan_checks import semantic_problems

    try:
        plan = Plan.model_validate(values)
    except ValidationError as wrong:
        raise BadInput(_sentences(wrong)) from None
    for i, scenario in enumerate(plan.scenario, 1):
        scenario.name = scenario.name or f"scenario {i}"
    problems = semantic_problems(plan)
    if problems:
        raise BadInput(problems)
    return plan


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Reads a TOML plan; relative paths in it are taken from its own folder.

    Args:
        path: the file.
        overrides: `key=value` with dotted keys; `scenario.0.client.batch=8` or, for all scenarios,
            `scenario.client.batch=8`; values are TOML, or plain text where they are no TOML.

    Raises:
        BadInput: the file is missing or no TOML, an override does not parse, or the plan is wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"plan: {path} does not exist; `frostglass init` writes one.") from None
    except (OSError, UnicodeDecodeError) as wrong:
        raise BadInput(f"plan: {path} cannot be read ({wrong}).") from None
    except tomllib.TOMLDecodeError as wrong:
        raise BadInput(f"plan: {path} is not valid TOML ({wrong}).") from None
    for override in overrides:
        _override(values, override)
    _anchor_paths(values, path.parent)
    return parse_plan(values)


def _anchor_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes `folder:`, `parquet:` and weights paths relative to the plan, so that a plan works from anywhere."""

    def anchored(text: str) -> str:
        kind, colon, rest = text.partition(":")
        if colon and kind in ("folder", "parquet") and not Path(rest).is_absolute():
            return f"{kind}:{(folder / rest).resolve().as_posix()}"
        return text

    tables = [s for s in values.get("scenario", []) if isinstance(s, dict)]
    for scenario in tables:
        data, model = scenario.get("data"), scenario.get("model")
        if isinstance(data, dict) and isinstance(data.get("source"), str):
            data["source"] = anchored(data["source"])
        if isinstance(model, dict) and isinstance(model.get("weights"), str):
            model["weights"] = (folder / model["weights"]).resolve().as_posix()
    for threat in [values.get("threat"), *(s.get("threat") for s in tables)]:
        if isinstance(threat, dict) and isinstance(threat.get("auxiliary"), str):
            threat["auxiliary"] = anchored(threat["auxiliary"])


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"--set: {text!r} must read key=value, as in scenario.client.batch=8.")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    _assign(values, key.strip().split("."), value, text)


def _assign(node: Any, path: list[str], value: Any, text: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        if head.isdigit():
            if int(head) >= len(node):
                raise BadInput(f"--set: {text!r} names entry {head} of {len(node)}; count from 0.")
            targets, rest_path = [node[int(head)]], rest
        else:
            targets, rest_path = node, path
        for target in targets:
            _assign(target, rest_path, value, text)
        return
    if not isinstance(node, dict):
        raise BadInput(f"--set: {text!r} goes into a value that is no table.")
    if rest:
        _assign(node.setdefault(head, {}), rest, value, text)
    else:
        node[head] = value


def _sentences(wrong: ValidationError) -> list[str]:
    return [_sentence(e["loc"], e["type"], e["msg"], e.get("input")) for e in wrong.errors()]


def _sentence(loc: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    where = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {close_match(str(loc[-1]), _siblings(loc))}."
    if kind == "missing":
        return f"{where}: missing; give it a value."
    if kind == "too_short" and value == []:
        return f"{where}: empty; give at least one."
    words = message[0].lower() + message[1:]
    return f"{where}: {value!r} is not valid: {words}."


def _siblings(loc: tuple[int | str, ...]) -> Iterator[str]:
    model: type[BaseModel] = Plan
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = next((a for a in _models_in(annotation)), model)
    yield from model.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
