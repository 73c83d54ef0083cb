"""Federated training in which every client's message goes through its defence: what a defence costs."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from frostglass.core.batch import Batch, one_hot
from frostglass.core.defense import Defense, encoded_by
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Rng, global_draws
from frostglass.core.update import LocalPlan
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.inference import average_predictions
from frostglass.defenses.instahide import InstaHide
from frostglass.federated.feeds import takes_encodings
from frostglass.numerics.called import copied
from frostglass.numerics.client_step import defended_step
from frostglass.numerics.local_update import in_mode, trainable
from frostglass.vision.normalise import domain_of

ENCODINGS = 10
"""Of a test image, whose predictions are averaged where networks are trained on masked encodings."""


@dataclass(frozen=True)
class Budget:
    """The same for every defence.

    Args:
        rounds: messages of each client slot.
        clients: messages averaged in a round.
        batch: images of a client.
        lr, momentum: of the server's SGD on mean gradients; mean differences are applied as they are.
        poisson: every image takes part in a round by its own coin, as DP accounting assumes, so that batches differ in
            size and may be empty.
    """

    rounds: int
    clients: int
    batch: int
    lr: float
    momentum: float
    poisson: bool

    def rate(self, images: int) -> float:
        """Probability with which an image takes part in a round."""
        return min(1.0, self.clients * self.batch / images)


@dataclass(frozen=True)
class Images:
    """[n, c, h, w] in [0, 1] with labels."""

    images: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    classes: int


def train(model: nn.Module, held: Images, defense: Defense, plan: LocalPlan, budget: Budget, rng: Rng) -> nn.Module:
    """A copy of `model` after `budget.rounds` rounds of clients that draw their images from `held`.

    The learning rate rises over the first tenth of the rounds and falls to 0 along a cosine. Networks that are trained
    on encodings take them as they are, without the normalisation of photographs.

    Raises:
        BadInput: too few images, a defence that cannot handle the model, or a diverged run.
    """
    if budget.batch * budget.clients > len(held.images):
        raise BadInput(
            f"training: {budget.clients} clients of {budget.batch} images are more than the {len(held.images)} of the "
            "training set; lower training.clients or client.batch."
        )
    made = copied(model)
    if any(d.encodes for d in (defense.parts or (defense,))):
        made = takes_encodings(made)
    weights = trainable(made)
    domain, targets = domain_of(made), one_hot(held.labels, held.classes)
    speed = {n: torch.zeros_like(p) for n, p in weights.items()}
    for r in range(budget.rounds):
        key = rng.at("round", r)
        updates = []
        for member, rows in enumerate(_members(len(held.images), budget, key)):
            batch = Batch(held.images[rows], targets[rows], domain, tuple(map(str, rows.tolist())))
            updates.append(defended_step(made, batch, plan, defense, key.at("client", member))[1])
        rate = 1.0 if plan.kind == "delta" else _rate(r, budget)
        with torch.no_grad():
            for n, p in weights.items():
                step = torch.stack([u.gradients[n] for u in updates]).mean(0)
                if plan.kind == "gradient":
                    speed[n] = budget.momentum * speed[n] + step
                    step = speed[n]
                p.sub_(rate * step)
        _run_buffers(made, held, defense, key)
    if not all(bool(p.isfinite().all()) for p in weights.values()):
        raise BadInput(f"training.lr: {budget.lr} made the weights infinite; lower it.")
    return made


def _members(images: int, budget: Budget, key: Rng) -> list[Tensor]:
    """Rows of every client of a round."""
    if not budget.poisson:
        rows = key.at("rows").permutation(images)[: budget.clients * budget.batch]
        return list(rows.split(budget.batch))
    taken = (key.at("coins").uniform((images,)) < budget.rate(images)).nonzero().flatten()
    slots = key.at("slots").integers(budget.clients, (len(taken),))
    return [taken[slots == c] for c in range(budget.clients)]


def _rate(r: int, budget: Budget) -> float:
    warm = max(1, budget.rounds // 10)
    if r < warm:
        return budget.lr * (r + 1) / warm
    return budget.lr * 0.5 * (1 + math.cos(math.pi * (r - warm) / max(1, budget.rounds - warm)))


def _run_buffers(model: nn.Module, held: Images, defense: Defense, key: Rng) -> None:
    """Running statistics of BatchNorm, which gradients do not carry, from a batch that the server is sent as it is
    trained on."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    rows = key.at("buffers").permutation(len(held.images))[:64]
    targets = one_hot(held.labels[rows], held.classes)
    batch = Batch(held.images[rows], targets, domain_of(model), tuple(map(str, rows.tolist())))
    encoded = encoded_by(defense, batch, Insecure(key.at("buffers", "encode")))
    with torch.no_grad(), in_mode(model, "train"), global_draws(key.at("buffers", "model"), encoded.images.device):
        model(encoded.images)


@torch.no_grad()
def correct(model: nn.Module, test: Images, partners: Images, defense: Defense, seed: int) -> int:
    """How many test images are classified right, seen the way that the defence's training saw images.

    Without an encoder as they are; after Mixup in [-1, 1]; after InstaHide by the mean over encodings of them.
    """
    mixer = next((d for d in (defense.parts or (defense,)) if d.encodes), None)
    with in_mode(model, "eval"):
        if mixer is None:
            logits = model(test.images)
        elif mixer.settings.get("mask", "none") == "none":
            logits = model(2 * test.images - 1)
        else:
            logits = _encoded_predictions(model, test, partners, mixer, seed)
    return int((logits.argmax(1) == test.labels).sum())


def _encoded_predictions(model: nn.Module, test: Images, partners: Images, mixer: Defense, seed: int) -> Tensor:
    s = mixer.settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyCaution)
        encoder = InstaHide(
            k=s["k"], private=s["k"], c1=s["c1"], law=s["law"], mask=s["mask"], labels=s["labels"], insecure_seed=seed
        )
        encoder.begin(partners.images, partners.labels, partners.classes)
        made = encoder.encode_for_inference(test.images, ENCODINGS, 0.5, partners.images)
    return average_predictions(model(made.images), ENCODINGS)
