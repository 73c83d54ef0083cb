"""What an audit of recorded updates may say: where they come from, which of them, and what is known about them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from frostglass.auditing.plan_verdict import Strict
from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan


class LocalTable(Strict):
    """What a client does with its images, where no record says it."""

    mode: Literal["train", "eval"] | None = Field(
        None, description="of the client's model; none: told from the buffers"
    )
    lr: float | None = Field(None, gt=0, description="of the client's optimiser")
    local_steps: int = Field(1, ge=1, description="full-batch steps an epoch")
    epochs: int = Field(1, ge=1, description="repetitions")
    minibatch: int | None = Field(None, ge=1, description="images a step; none: all of them")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="of the client")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the client's SGD")
    weight_decay: float = Field(0.0, ge=0, description="of the client")

    def local_plan(self, kind: Literal["gradient", "delta"]) -> LocalPlan | None:
        """The plan; None if the learning rate of a weight difference is unknown."""
        if self.lr is None and kind == "delta":
            return None
        return LocalPlan(
            kind=kind, mode=self.mode or "train", local_steps=self.local_steps, epochs=self.epochs, lr=self.lr or 0.1,
            momentum=self.momentum, weight_decay=self.weight_decay, optimizer=self.optimizer, minibatch=self.minibatch,
        )  # fmt: skip


class UpdatesPlan(Strict):
    """Updates that a federated engine sent, and what is known beside them."""

    record: str | None = Field(None, description="folder of recorded updates")
    before: str | None = Field(None, description="weights that a client was sent (.safetensors, .pt)")
    after: str | None = Field(None, description="weights that it returned")
    gradients: str | None = Field(None, description="raw gradients by parameter name (.safetensors, .pt)")
    weights: str | None = Field(None, description="of the network that the gradients were taken at")
    model: str | None = Field(
        None, description="a built-in, torchvision:NAME or package.module:factory; none: the record's"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="parameters of the network's maker")
    classes: int | None = Field(None, ge=2, description="outputs of the network; none: the record's")
    channels: int | None = Field(None, ge=1, description="of the images; none: the record's")
    size: int | None = Field(None, ge=1, description="pixels a side; none: the record's")
    examples: int | None = Field(None, ge=1, description="images in the update, where the client does not say it")
    loss_scale: float = Field(
        1.0, gt=0, description="of raw gradients: what the loss, a mean over images, was multiplied by"
    )
    local: LocalTable = Field(default_factory=LocalTable, description="the client's steps, where no record says them")
    rounds: list[int] = Field(default_factory=list, description="to be audited; none: first, middle and last")
    clients: list[str] = Field(default_factory=list, description="to be audited; none: all")
    most: int = Field(12, ge=1, description="updates that are attacked at the most; the others are named")
    truth: str | None = Field(None, description="the private images, for scoring alone")
    others: str | None = Field(None, description="a source of images that no client holds: nulls and candidates")
    gallery: int = Field(20, ge=2, description="candidates of the identification game, at the most")
    grants: list[str] = Field(default_factory=list, description="beyond what such a server knows: an upper bound")
    defense: dict[str, Any] | None = Field(None, description="that the clients are said to apply: name and parameters")
    attacks: list[dict[str, Any]] = Field(
        default_factory=list, description="names and parameters; none: those that fit"
    )
    budget: Literal["small", "full"] = Field("small", description="how long the attacks that are chosen may run")

    def problems(self) -> list[str]:
        """What cannot be meant, a sentence each."""
        ways = [
            w
            for w, given in (
                ("record", self.record), ("before and after", self.before or self.after), ("gradients", self.gradients)
            )
            if given
        ]  # fmt: skip
        found = []
        if len(ways) != 1:
            told = "none was given" if not ways else f"{' and '.join(ways)} were given"
            found.append(f"updates: {told}; give one of record, before and after, or gradients.")
        if bool(self.before) != bool(self.after):
            found.append("updates: before and after go together; give both states.")
        if self.gradients and not self.weights:
            found.append("updates.weights: missing; gradients need the weights that they were taken at.")
        if self.loss_scale != 1 and not self.gradients:
            found.append(
                f"updates.loss_scale: {self.loss_scale:g} is of raw gradients; of two states multiply lr by it, and "
                "for a record give it to the taps."
            )
        if not self.record and self.model is None:
            found.append("updates.model: missing; states and gradients do not name their network: give --model.")
        if self.record and self.local != LocalTable():
            found.append("updates.local: a record says what the clients did; leave it out.")
        for entry in (*self.attacks, *([self.defense] if self.defense is not None else [])):
            if not isinstance(entry.get("name"), str):
                found.append(f"updates: {entry!r} lacks a name.")
        return found

    def check(self) -> UpdatesPlan:
        """Itself.

        Raises:
            BadInput: what cannot be meant.
        """
        found = self.problems()
        if found:
            raise BadInput(found)
        return self


class RecordedPlan(Strict):
    """Which recorded update a scenario is about; written by `frostglass audit-updates`."""

    number: int = Field(ge=1, description="of the update in its record")
    round: int = Field(ge=0, description="of the server")
    client: str = Field(description="who sent it")
    declared: str | None = Field(None, description="defence as the client or the job names it")
    beyond: list[str] = Field(default_factory=list, description="grants that such a server does not have")
