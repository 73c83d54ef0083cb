"""The plan of a federation: what `frostglass federate` reads, and what every process of it builds its part from."""

from __future__ import annotations

import tomllib
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from frostglass.core.errors import BadInput, close_match
from frostglass.core.registry import Entry
from frostglass.core.update import LocalPlan
from frostglass.defenses.registry import DEFENSES
from frostglass.federated.recording import DEFAULT_BYTES
from frostglass.federated.train_plan import DataPlan, MethodPlan, ModelPlan, _Strict, _without_none
from frostglass.numerics.key_rows import MixLaw

ENCODERS = ("instahide", "mixup")
"""Defences that work in the loader, as an encoder with a ledger, instead of batch by batch."""

CHANNELS = ("secure_sum",)
"""What stands between clients and server, and is no client's to apply."""

OWN_FILES = ("plan.toml", "history.json", "model.safetensors", "gate.jsonl", "unfinished")
"""Of the run folder, which a record lies beside."""


class SplitPlan(_Strict):
    """Who holds what."""

    clients: int = Field(4, ge=1, le=10_000, description="how many hold a part of the training images")
    alpha: float | None = Field(None, gt=0, description="of the Dirichlet split by class; none: even parts at random")


class FederatedModelPlan(ModelPlan):
    """The network that all of them train."""

    fix: Literal["none", "opacus"] = Field("none", description='"opacus" replaces BatchNorm, which dp_sgd cannot bear')


class ClientPlan(_Strict):
    """What a client does with its images in a round; fields of `LocalPlan`."""

    epochs: int = Field(1, ge=1, description="passes over its images")
    minibatch: int = Field(32, ge=1, description="images a step")
    local_steps: int = Field(1, ge=1, description="full-batch steps an epoch, without minibatches")
    lr: float = Field(0.1, gt=0, description="learning rate")
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD, anew in every round")
    weight_decay: float = Field(0.0, ge=0, description="added to the gradient")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="of the client")
    mode: Literal["train", "eval"] = Field("train", description="of the network while it trains")
    whole_batch: bool = Field(False, description="every step sees all images: no minibatches")

    def local_plan(self) -> LocalPlan:
        """The same for the core."""
        return LocalPlan(
            kind="delta", mode=self.mode, local_steps=self.local_steps, epochs=self.epochs, lr=self.lr,
            momentum=self.momentum, weight_decay=self.weight_decay, optimizer=self.optimizer,
            minibatch=None if self.whole_batch else self.minibatch,
        )  # fmt: skip


class DefensePart(BaseModel):
    """A defence by name with its parameters beside it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    name: str = Field(description="as in `frostglass list defenses`")

    @property
    def settings(self) -> dict[str, Any]:
        """Its parameters."""
        return dict(self.model_extra or {})


class ServerPlan(_Strict):
    """FedAvg."""

    rounds: int = Field(5, ge=1, description="of training")
    clients: int | None = Field(None, ge=1, description="drawn for each round, by the seed; none: all")
    timeout: float = Field(3600, gt=0, description="seconds to wait for the replies of a round")
    wait: float = Field(600, gt=0, description="seconds to wait for clients to connect")
    folder: str | None = Field(None, description="the run folder on the server's machine; `--out` sets it")
    largest: float = Field(100, gt=0, description="an update longer than this times the weights is left out")


class EvaluationPlan(_Strict):
    """The global network on test images, after every round."""

    encodings: int = Field(10, ge=0, description="of a test image, averaged, where clients train on encodings; 0: none")
    min_private: float = Field(0.5, ge=0, le=1, description="least coefficient of the test image in its encodings")


class RecordPlan(_Strict):
    """What the server keeps of the updates that it receives."""

    on: bool = Field(True, description="whether updates are recorded")
    folder: str = Field("recorded", min_length=1, pattern=r"^[\w-][\w.-]*$", description="in the run folder")
    max_bytes: int = Field(DEFAULT_BYTES, ge=1, description="of all tensors; later ones are dropped and named")


class GatePlan(_Strict):
    """A look at every update before it leaves a client; see docs/gate.md."""

    action: Literal["block", "warn", "record"] = Field("block", description="on an exceeded tolerance")
    on_failure: Literal["open", "closed"] = Field("open", description="where checks broke or had no time")
    budget: float = Field(30.0, gt=0, description="seconds that an update waits at the most")
    checks: str = Field("frostglass.auditing.outgoing:outgoing_checks", description="package.module:function")
    settings: dict[str, Any] = Field(default_factory=dict, description="of the checks, as label_leakage, gallery")
    decoys: bool = Field(False, description="give the checks the test images as images that no client trains on")


class FederatePlan(_Strict):
    """One federation."""

    name: str = Field("federation", min_length=1, max_length=200, description="for logs")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the network, the split, who takes part, and the order of plain batches"
    )
    insecure_seed: int | None = Field(None, description="keys and noise that repeat, for tests; outputs are marked")
    buffers: Literal["send", "keep"] = Field("send", description="whether clients send BatchNorm's running statistics")
    data: DataPlan = Field(default_factory=DataPlan, description="the images")
    split: SplitPlan = Field(default_factory=SplitPlan, description="who holds them")
    model: FederatedModelPlan = Field(default_factory=FederatedModelPlan, description="the network")
    client: ClientPlan = Field(default_factory=ClientPlan, description="local training")
    defense: list[DefensePart] = Field(default_factory=list, description="a stack, in order")
    server: ServerPlan = Field(default_factory=ServerPlan, description="rounds and sampling")
    evaluation: EvaluationPlan = Field(default_factory=EvaluationPlan, description="how it is tested")
    record: RecordPlan = Field(default_factory=RecordPlan, description="the audit tap")
    gate: GatePlan | None = Field(None, description="of every client; none: updates leave unchecked")

    @property
    def encoding(self) -> MethodPlan | None:
        """The defence that works in the loader, if there is one."""
        for part in self.defense:
            if part.name in ENCODERS:
                given: dict[str, Any] = {"insecure_seed": self.insecure_seed} | part.settings
                return MethodPlan.model_validate({"kind": part.name, **given})
        return None

    @property
    def others(self) -> list[DefensePart]:
        """Defences beside the encoder."""
        return [p for p in self.defense if p.name not in (*ENCODERS, "none")]

    @property
    def called(self) -> str:
        """The stack in a word."""
        return "+".join(p.name for p in self.defense if p.name != "none") or "none"

    def check(self) -> None:
        """Raises BadInput with every sentence on what cannot be run."""
        found = [*self._numbers(), *(s for i, part in enumerate(self.defense) for s in _part_problems(i, part))]
        if sum(p.name in ENCODERS for p in self.defense) > 1:
            found.append("defense: two encoders; a client trains on the encodings of one.")
        if found:
            raise BadInput(found)

    def _numbers(self) -> list[str]:
        found = []
        c, s = self.client, self.server
        if s.clients is not None and s.clients > self.split.clients:
            found.append(f"server.clients: {s.clients} a round are more than split.clients = {self.split.clients}.")
        if c.local_steps > 1 and not c.whole_batch:
            found.append(
                f"client.local_steps: {c.local_steps} full-batch steps and minibatches; set client.whole_batch = true, "
                "or client.epochs instead."
            )
        if self.record.folder in OWN_FILES:
            found.append(f"record.folder: {self.record.folder!r} belongs to the run folder itself; name another.")
        everybody = s.clients is None or s.clients == self.split.clients
        encoding = None if any(_part_problems(0, p) for p in self.defense) else self.encoding
        fresh = None if encoding is None or encoding.reuse else encoding.rounds
        epochs = 1 if c.whole_batch else c.epochs  # steps over all images are steps on one encoding of them
        if everybody and fresh is not None and fresh < s.rounds * epochs:
            found.append(
                f"defense.rounds: {fresh} fresh encodings do not last {s.rounds} rounds of {epochs} epochs; set "
                "reuse = true."
            )
        if encoding is not None and self.evaluation.encodings:  # seen now, and not when the run folder is there
            try:
                MixLaw(encoding.k, 1, encoding.c1, 0.0, encoding.law, self.evaluation.min_private).check()
            except BadInput as wrong:
                found += [f"evaluation.{x}" if x.startswith("min_private") else x for x in wrong.problems]
        if c.optimizer == "adam" and c.momentum:
            found.append(f'client.momentum: {c.momentum} belongs to optimizer = "sgd"; leave it out for "adam".')
        return found

    def to_toml(self) -> str:
        """The resolved plan."""
        return tomli_w.dumps(_without_none(self.model_dump()))


def plan_of(text: str) -> FederatePlan:
    """The plan in a text, as it reaches the other processes of a federation.

    Raises:
        BadInput: no TOML, or a plan with problems; all of them together.
    """
    try:
        plan = FederatePlan.model_validate(tomllib.loads(text))
    except ValidationError as wrong:
        raise BadInput([_sentence("", e) for e in wrong.errors()]) from None
    except ValueError as wrong:
        raise BadInput(f"plan: not valid TOML ({wrong}).") from None
    plan.check()
    return plan


def _part_problems(number: int, part: DefensePart) -> list[str]:
    where = f"defense.{number}"
    if part.name in CHANNELS:
        return [
            f"{where}.name: {part.name!r} is a channel between clients and server, which these engines do not carry; "
            "use Flower's SecAgg+ in your own app, and audit its sums with client.cohort of `frostglass audit`."
        ]
    if part.name not in DEFENSES:
        return [f"{where}.name: {part.name!r} is not a known defense; {close_match(part.name, DEFENSES.names())}."]
    if part.name not in ENCODERS:
        entry: Entry[Any] = DEFENSES[part.name]
        return entry.problems(part.settings, where)
    if "kind" in part.settings:  # of a method of `frostglass train`; here it would overrule the name
        return [f"{where}.kind: unknown key; name = {part.name!r} says which defence it is. Leave it out."]
    try:
        MethodPlan.model_validate({"kind": part.name, **part.settings})
    except ValidationError as wrong:
        return [_sentence(where, e) for e in wrong.errors()]
    return []


def _sentence(where: str, error: Any) -> str:
    loc = ".".join(map(str, [where, *error["loc"]] if where else error["loc"])) or "plan"
    if error["type"] == "extra_forbidden":
        return f"{loc}: unknown key; see docs/federation.md for those that there are."
    message = error["msg"].removeprefix("Value error, ")
    return f"{loc}: {error.get('input')!r} is not valid: {message[0].lower()}{message[1:]}."
