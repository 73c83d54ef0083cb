"""From gradients to private images behind encodings: InstaHide inside federated training, end to end.

A client trains on encodings and sends gradients. Each gradient gives its encodings away (exactly, where the network's
first layer is linear and wide enough), with their soft labels, which the classifier's gradient determines. The rounds
together are an encoded set, and that is unmixed. Several rounds of one model are attacked as they are; where the server
has updated the model in between, it knows by what.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from frostglass.attacks.analytic.linear_exact import linear_exact
from frostglass.attacks.analytic.proof import prove
from frostglass.attacks.analytic.spear import spear
from frostglass.attacks.encodings.unmixing_steps import Progress, Unmix
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Attack, Scalars, drive
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import EncodingMessage, GradientMessage, Knows, Observation
from frostglass.numerics.called import copied
from frostglass.numerics.unmixing import UnmixState


@dataclass(frozen=True)
class Collected:
    """What the gradients have given so far, and the unmixing behind it.

    Args:
        encodings: [e, c, h, w]; targets: [e, classes] solved from the classifier's gradient.
        proved: encodings whose message's gradient was computed again and agrees.
        messages: attacked so far.
        unmixing: its progress; empty before all messages are done.
    """

    encodings: Tensor
    targets: Tensor
    proved: int
    messages: int
    unmixing: Progress


@dataclass(frozen=True)
class GradientThenUnmix:
    """See `gradient_then_unmix`."""

    name: str
    exact: str
    batch: int | None
    server_lr: float
    unmix: Unmix
    messages: int
    needs: frozenset[Knows] = frozenset({Knows.EXAMPLES})
    every: int = 1
    save_every: int = 1  # a message takes seconds to minutes, and a record holds far fewer of them than `messages`
    sign_free: bool = True

    @property
    def steps(self) -> int:
        """Messages, then rounds of unmixing."""
        return self.messages + self.unmix.steps

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        sent = _sent(seen)
        if len(sent) < 2:
            return [f"it reads the gradients of several rounds, and {len(sent)} arrived; see docs/unmixing.md."]
        if len(sent) > self.messages:
            return [f"{len(sent)} messages are more than messages = {self.messages}; raise it."]
        if not seen.examples:
            return ["it needs the number of private images; give --known images=N."]
        return self._inner().check(self._one(seen, 0))

    def init(self, seen: Observation, run: Runtime) -> Collected:
        """Nothing has been attacked."""
        none = torch.zeros(0, *seen.image_shape)
        flat = torch.zeros(0, 1, device=run.device)  # where a checkpoint of the unmixing goes back to
        blank = UnmixState(flat.long(), flat, none.to(run.device), flat[:, 0])
        return Collected(none, torch.zeros(0, seen.classes), 0, 0, Progress(torch.zeros(0).long(), blank, blank, 0))

    def step(self, seen: Observation, state: Collected, run: Runtime, t: int) -> tuple[Collected, Scalars]:
        """The next message; when all are done, the next round of unmixing."""
        if state.messages < len(_sent(seen)):
            new = self._invert(seen, state, run)
            return new, {"messages": new.messages, "encodings": len(new.encodings), "proved": new.proved}
        inside = self._set(seen, state)
        progress = state.unmixing
        if not len(progress.rows):
            wrong = self.unmix.check(inside)
            if wrong:
                raise AttackFailed(f"gradient_then_unmix: {len(state.encodings)} encodings were recovered; {wrong[0]}")
            progress = self.unmix.init(inside, run.at("unmix"))
        progress, told = self.unmix.step(inside, progress, run.at("unmix"), t - state.messages)
        return replace(state, unmixing=progress), told

    def _invert(self, seen: Observation, state: Collected, run: Runtime) -> Collected:
        one = self._one(seen, state.messages)
        found = drive(self._inner(), one, run.at("message", state.messages))
        encodings, targets, proved = state.encodings, state.targets, state.proved
        if len(found.images):
            proof = prove(one, found.images)
            if proof is not None and proof.holds:
                encodings = torch.cat([encodings, found.images.cpu()])
                targets = torch.cat([targets, proof.targets.cpu().float().clamp_min(0)])
                proved += len(found.images)
        return replace(state, encodings=encodings, targets=targets, proved=proved, messages=state.messages + 1)

    def done(self, state: Collected) -> bool:
        """The unmixing has settled."""
        return bool(len(state.unmixing.rows)) and self.unmix.done(state.unmixing)

    def read(self, seen: Observation, state: Collected) -> Reconstruction:
        """Private images, once there are any."""
        info: dict[str, float | int | str | bool] = {
            "messages": state.messages, "encodings_recovered": len(state.encodings), "encodings_proved": state.proved,
        }  # fmt: skip
        if not len(state.unmixing.rows):
            blank = torch.zeros(0, *seen.image_shape)
            return Reconstruction(blank, torch.zeros(0, dtype=torch.bool), float("nan"), info=info)
        found = self.unmix.read(self._set(seen, state), state.unmixing)
        return replace(found, info={**info, **found.info})

    def _inner(self) -> Attack[Any]:
        return spear() if self.exact == "spear" else linear_exact()

    def _one(self, seen: Observation, number: int) -> Observation:
        """Message `number` alone, with the model as it was then."""
        sent = _sent(seen)
        model, weights = seen.model, sent[number].weights
        if weights is not None:
            model = copied(model)
            model.load_state_dict(model.state_dict() | {n: weights[n] for n in model.state_dict() if n in weights})
        elif self.server_lr and number:
            model = copied(model)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.sub_(
                        self.server_lr * torch.stack([m.gradients[name].to(weight) for m in sent[:number]]).sum(0)
                    )
        return replace(
            seen, model=model, messages=(sent[number],), examples=self.batch or sent[number].examples, labels=None
        )

    def _set(self, seen: Observation, state: Collected) -> Observation:
        """The recovered encodings as an observation of their own; tiny masses are rounding."""
        targets = torch.where(state.targets < 1e-3, 0.0, state.targets)
        usable = (targets.sum(1) > 0) & state.encodings.flatten(1).isfinite().all(1)
        return replace(seen, messages=(EncodingMessage(state.encodings[usable], targets[usable]),))


def _sent(seen: Observation) -> list[GradientMessage]:
    return [m for m in seen.messages if isinstance(m, GradientMessage)]


@ATTACKS.register(
    paper="two stages as in Huang et al. 2021, NeurIPS (GradAttack); exact inversion: SPEAR",
    family="encodings",
    reads="rounds",
)
def gradient_then_unmix(
    *,
    exact: str = "spear",
    batch: int | None = None,
    server_lr: float = 0.0,
    starts: int = 1,
    rounds: int = 8,
    messages: int = 1000,
) -> GradientThenUnmix:
    """Recovers the encodings behind the gradients of several rounds exactly, then the private images behind those.

    Args:
        exact: attack on each gradient, "spear" or "linear_exact".
        batch: encodings in one message; None for what the messages say of themselves.
        server_lr: the server took weights - server_lr x gradient after each message; 0 if the model stayed.
        starts, rounds: of the unmixing.
        messages: at the most.
    """
    if exact not in ("spear", "linear_exact"):
        raise BadInput(f"gradient_then_unmix: exact = {exact!r} is not known; use 'spear' or 'linear_exact'.")
    if messages < 2 or not 0 <= server_lr < float("inf"):
        raise BadInput(f"gradient_then_unmix: messages {messages} and server_lr {server_lr} must be from 2 and from 0.")
    unmix = Unmix("unmix_statistical", starts, rounds, 8192)
    return GradientThenUnmix("gradient_then_unmix", exact, batch, server_lr, unmix, messages)
