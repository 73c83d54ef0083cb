"""One participant of a federation, whatever the engine: takes the global state and trains it on its own images."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from frostglass.core.batch import Batch, one_hot
from frostglass.core.defense import Defense, encoded_by, spent_by
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, OsKey, Randomness, Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.defenses.accounting import epsilon_of
from frostglass.defenses.instahide import InstaHide
from frostglass.federated.exchange import State, applied, device_of, misfits, names_of
from frostglass.numerics.called import copied
from frostglass.numerics.client_step import computed_step
from frostglass.numerics.fedavg import Order, epoch_order
from frostglass.vision.borrowed import refuse_unfit
from frostglass.vision.normalise import domain_of

NOTHING = Defense("none", claim="none")


@dataclass(frozen=True)
class Trained:
    """What local training made, before any defence of the update.

    Args:
        state: parameters and buffers.
        update: the same as W_before - W_after, with the privacy that its defence spent.
        examples: private images.
        loss: of the first step; None where a defence replaced the step.
        epsilon: spent by this client in all its rounds so far at the defence's delta; None without a proof.
        insecure: whether keys were made from a seed, so that the server could rebuild them.
    """

    state: dict[str, Tensor]
    update: Update
    examples: int
    loss: float | None
    epsilon: float | None
    insecure: bool


@dataclass
class LocalClient:
    """A client with its images, its local plan and its defence.

    The defence's `encode` and `gradient` work here, where the images are; its `protect` does not (engines do that on
    the way out: Flower's mods, NVFlare's filters, `frostglass.federated.exchange.protected`).

    Args:
        name: of the client.
        model: the network, whose weights are replaced in every round; takes images in [0, 1], or encodings. Training
            is where it lies.
        images: [n, c, h, w] in [0, 1].
        labels: [n] class indices.
        classes: outputs of the network.
        plan: of local training; always sends a difference of weights.
        defense: or a stack.
        encoder: InstaHide or Mixup in the loader: every local epoch trains on fresh encodings (`rounds` and `reuse` of
            the encoder limit them), counted in its ledger. Give the network `takes_encodings`.
        seed: makes training repeat, for simulations and tests; None draws every key from the operating system.

    Raises:
        BadInput: images, labels and settings that do not go together.
    """

    name: str
    model: nn.Module
    images: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    classes: int
    plan: LocalPlan
    defense: Defense = NOTHING
    encoder: InstaHide | None = None
    seed: int | None = None
    _steps: dict[tuple[float, float, float], int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise BadInput(f"client {self.name}: {len(self.images)} images and {len(self.labels)} labels.")
        if self.plan.kind != "delta":
            raise BadInput(f"client {self.name}: engines send weights; set the local plan's kind to 'delta'.")
        if self.encoder is not None and any(d.encodes for d in (self.defense.parts or (self.defense,))):
            raise BadInput(f"client {self.name}: give the encoding as `encoder` or as a defence, not both.")
        if self.encoder is not None and self.defense.gradient is not None and self.defense.per_example:
            raise BadInput(
                f"client {self.name}: an encoder mixes images, so the per-example sensitivity of "
                f"{self.defense.name!r} and its epsilon would be false; use one of them."
            )
        refuse_unfit(self.model, type(self.model).__name__)
        self.model = copied(self.model)
        self._stored = like_pool(self.images, self.encoder)

    def begin(self) -> None:
        """Opens the encoder's ledger of this client's images, without encoding anything.

        Raises:
            BadInput: images that the encoder refuses.
        """
        if self.encoder is not None:
            self.encoder.begin(self._stored, self.labels, self.classes)

    def train(self, state: State, round: int) -> Trained:
        """One round from the global state.

        Args:
            state: parameters and buffers as sent; not changed.
            round: of the server, from 1; a seeded client draws anew in each.

        Raises:
            BadInput: no images, a state of another network, a defence that cannot handle it, or a diverged run.
        """
        if not len(self.images):
            raise BadInput(f"client {self.name}: has no images, so there is nothing to train on.")
        wrong = misfits(state, self.model)
        if wrong:
            raise BadInput(f"client {self.name}: what was sent does not fit the model: {'; '.join(wrong[:3])}.")
        self.model.load_state_dict(dict(state))
        device = device_of(self.model)
        state = {n: t.to(device) for n, t in state.items()}  # engines send them on the CPU
        key = self.randomness(round, "train").rng()
        batch, order = self._held(key)
        batch = batch.to(device)
        done = computed_step(self.model, batch, self.plan, self.defense, key, order)
        if self.defense.account is not None:
            done = replace(done, update=replace(done.update, spent=spent_by(self.defense, batch)))
        epsilon = self._account(done.update)  # also of a round that fails below: its reply tells that it did
        if not all(bool(g.isfinite().all()) for g in done.update.gradients.values()):
            raise BadInput(f"client {self.name}: training diverged (lr = {self.plan.lr}); lower client.lr.")
        names = names_of(self.model)
        carried = {n: done.buffers.get(n, state[n]) for n in names.carried}
        insecure = self.seed is not None or (self.encoder is not None and self.encoder.insecure)
        return Trained(
            applied(state, done.update.gradients, carried, names.tied), done.update, len(self.images), done.loss,
            epsilon, insecure,
        )  # fmt: skip

    def randomness(self, round: int, purpose: str) -> Randomness:
        """Of this client, round and purpose: from the operating system, or from the seed."""
        if self.seed is None:
            return OsKey()
        return Insecure(Rng.from_seed(self.seed, "federated client", self.name).at(purpose, round))

    @property
    def steps_spent(self) -> dict[tuple[float, float, float], int]:
        """{(noise multiplier, delta, sampling rate): private releases so far}, for an engine that keeps it."""
        return dict(self._steps)

    def goes_on_from(self, steps: Mapping[tuple[float, float, float], int]) -> None:
        """Takes up the account of an earlier process of this client; replaces what it has."""
        self._steps = dict(steps)

    def _held(self, key: Rng) -> tuple[Batch, Order | None]:
        """What is trained on, and the rows of each step; None to draw them as the plan says."""
        domain = domain_of(self.model)
        if self.encoder is None:
            names = tuple(f"image {i}" for i in range(len(self.images)))
            held = Batch(self.images, one_hot(self.labels, self.classes), domain, names)
            return encoded_by(self.defense, held, Insecure(key.at("encode"))), None
        size = self.plan.minibatch or len(self.images)
        epochs = self.plan.epochs if self.plan.minibatch is not None else 1
        made = [
            part
            for _ in range(epochs)
            for part in self.encoder.epoch((self._stored, self.labels), min(size, len(self.images)), self.classes)
        ]
        images, targets = torch.cat([p.images for p in made]), torch.cat([p.targets for p in made])
        names = tuple(f"encoding {i}" for i in range(len(images)))
        order = epoch_order(self.plan, len(self.images)) if self.plan.minibatch is not None else None
        return Batch(images.float(), targets, domain, names), order

    def _account(self, update: Update) -> float | None:
        """Epsilon of all rounds so far; each one's steps are as many draws at the same rate.

        Noisy encodings are made anew in every round, of all images: one release, however many steps see them.
        """
        spent = update.spent
        if spent is None:
            return None
        n = len(self.images)
        rate, steps = (1.0, 1) if self.defense.encodes else (self.plan.sampling_rate(n), self.plan.steps_for(n))
        setting = (spent.noise_multiplier, spent.delta, rate)
        self._steps[setting] = self._steps.get(setting, 0) + steps
        if spent.delta == 0:  # Laplace noise: the epsilons of its releases add up
            return spent.epsilon * self._steps[setting]
        kind = "prv" if "PRV" in spent.accountant else "rdp"
        total = epsilon_of(spent.noise_multiplier, spent.delta, self._steps[setting], kind, rate)  # type: ignore[arg-type]
        return total if math.isfinite(total) else None


def like_pool(images: Float[Tensor, "n c h w"], encoder: InstaHide | None) -> Any:
    """Images in [0, 1] as the encoder wants them: bytes beside a public pool of bytes, else as they are.

    An array, not a tensor, as the pool may be a memory map, which mixes with arrays alone.
    """
    pool = None if encoder is None else encoder.public
    if pool is None or str(pool.images.dtype).removeprefix("torch.") != "uint8":
        return images
    return (images * 255).round().to(torch.uint8).cpu().numpy()


def dirichlet_split(labels: Int64[Tensor, " n"], clients: int, alpha: float, rng: Rng, least: int = 2) -> list[Tensor]:
    """Rows of each client: of every class, shares drawn from a symmetric Dirichlet (Hsu et al. 2019).

    Args:
        labels: of all images.
        clients: how many.
        alpha: small for clients of few classes, large (100) for near equal ones.
        rng: of shares and order.
        least: images that every client holds; the richest gives what is lacking.

    Raises:
        BadInput: more clients than images allow, or alpha not above 0.
    """
    if not alpha > 0 or not math.isfinite(alpha):
        raise BadInput(f"split.alpha: {alpha} must be above 0.")
    if clients < 1 or clients * least > len(labels):
        raise BadInput(
            f"split.clients: {clients} with {least} images each are more than the {len(labels)} images; lower it."
        )
    labels, draws = labels.cpu(), rng.at("shares").numpy()
    held: list[list[int]] = [[] for _ in range(clients)]
    for c in sorted(set(labels.tolist())):
        rows = (labels == c).nonzero().flatten()
        rows = rows[rng.at("order", int(c)).permutation(len(rows))]
        cuts = (np.cumsum(draws.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)).round().astype(int)
        for client, part in enumerate(np.split(rows.numpy(), cuts)):
            held[client] += part.tolist()
    for poor in held:
        while len(poor) < least:
            poor.append(max(held, key=len).pop())
    return [torch.tensor(sorted(rows), dtype=torch.long) for rows in held]


def mean_state(states: list[Mapping[str, Tensor]], examples: list[int]) -> dict[str, Tensor]:
    """FedAvg: the mean weighted by images, summed in the order given (McMahan et al. 2017, Alg. 1).

    Sums are made in single precision at least; what some clients send in half precision does not round the others.
    """
    total = sum(examples)
    out: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            out[name] = first.clone()
            continue
        kind = functools.reduce(torch.promote_types, (state[name].dtype for state in states))
        value = torch.zeros_like(first, dtype=torch.promote_types(kind, torch.float32))
        for state, n in zip(states, examples, strict=True):
            value += state[name].to(value.dtype) * (n / total)
        out[name] = value.to(kind)
    return out
