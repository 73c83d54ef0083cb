"""The client side of an audit: private batches, defences, updates, and the view that a threat model leaves of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frostglass.auditing.galleries import shuffled_gallery
from frostglass.auditing.plan import ClientPlan
from frostglass.auditing.prepare import Prepared
from frostglass.core.batch import Batch, Sealed, one_hot
from frostglass.core.defense import Defense
from frostglass.core.randomness import Rng
from frostglass.core.threat import Facts, Observation, ThreatModel, parse_grants
from frostglass.core.update import LocalPlan, PrivacySpent
from frostglass.defenses.channels import direct, secure_sum
from frostglass.numerics.bn import running_statistics
from frostglass.numerics.called import copied
from frostglass.numerics.client_step import defended_step


@dataclass(frozen=True)
class Truth:
    """What only scoring may see.

    Args:
        private: the private images of the message, all clients of its cohort.
        trained: what was trained on: the encodings where a defence encodes, else the private images.
        place: where the first private image is in the gallery; None where no gallery was granted.
        exact: False where the message holds some of these images, and nobody said which.
        labelled: False where the labels mean nothing.
        encoded: a client of a real engine trained on encodings that were not kept.
        pool: images that reconstructions were matched to, if more than are left here.
    """

    private: Batch
    trained: Batch
    place: int | None = None
    exact: bool = True
    labelled: bool = True
    encoded: bool = False
    pool: int | None = None


@dataclass(frozen=True)
class Round:
    """One message with everything around it; `seen` is all that an attack gets.

    A message that was recorded may have no truth: then nothing is scored.
    """

    seen: Observation
    truth: Sealed[Truth] | None
    spent: PrivacySpent | None
    plan: LocalPlan


def play(prepared: Prepared, defense: Defense, unit: int) -> Round:
    """One repetition: its clients draw their images, defend, compute and send; the threat model looks.

    The keys of augmentation and defence mix in a digest of the private images, so that an attack, which may know the
    plan's seed, cannot rebuild them. A message that was recorded is played back.
    """
    if prepared.arrived is not None:
        held = prepared.arrived.round
        return replace(held, seen=replace(held.seen, model=copied(held.seen.model)))  # as below
    client = prepared.scenario.client
    plan = local_plan(client, prepared.scenario.model.mode)
    raws, private, trained, updates = [], [], [], []
    for member in range(client.cohort):
        raw = _draw(prepared, unit, member)
        key = prepared.rng.at("keys", unit, member, defense.name, _digest(raw.images))
        batch = _augmented(raw, client, key.at("augmentation"))
        own = replace(batch, images=batch.images.clone(), targets=batch.targets.clone())  # scored is what was drawn
        encoded, update = defended_step(prepared.model, own, plan, defense, key)
        raws.append(raw)
        private.append(batch)
        trained.append(encoded)
        updates.append(update)
    sent = (secure_sum(client.cohort) if client.cohort > 1 else direct())(updates)
    gallery, place = shuffled_gallery(prepared, _joined(raws), unit)
    truth = Truth(_joined(private), _joined(trained), place)
    facts = replace(_facts(prepared, defense, plan, truth.trained, unit), gallery=gallery)
    threat = ThreatModel(prepared.threat.name, parse_grants(prepared.threat.grants))
    # a copy: whatever an attack does to its model, the next one meets the network that the plan names
    return Round(threat.observe(copied(prepared.model), sent, facts), Sealed(truth), sent[0].spent, plan)


def local_plan(client: ClientPlan, mode: str) -> LocalPlan:
    """The client's step as its plan says."""
    return LocalPlan(
        kind=client.update,
        mode="train" if mode == "train" else "eval",
        local_steps=client.local_steps,
        epochs=client.epochs,
        lr=client.lr,
        momentum=client.momentum,
        weight_decay=client.weight_decay,
        loss=client.loss,
        optimizer=client.optimizer,
        minibatch=client.minibatch,
    )


def _draw(prepared: Prepared, unit: int, member: int) -> Batch:
    n, k = len(prepared.data.images), prepared.scenario.client.batch
    place = unit * prepared.scenario.client.cohort + member
    if prepared.repeats_images:
        order = prepared.rng.at("draw", unit).permutation(n)
        rows = order[member * k : (member + 1) * k]
    else:
        rows = prepared.rng.at("draw").permutation(n)[place * k : (place + 1) * k]
    rows = rows.sort().values if n == k else rows
    index = rows.tolist()
    return Batch(
        prepared.data.images[rows],
        one_hot(prepared.data.labels[rows], prepared.classes),
        prepared.domain,
        tuple(prepared.data.names[i] for i in index),
    ).to(prepared.device)


def _augmented(batch: Batch, client: ClientPlan, rng: Rng) -> Batch:
    if client.augmentation == "none":
        return batch
    flip = (rng.uniform((len(batch),)) < 0.5).to(batch.images.device)
    return replace(batch, images=torch.where(flip[:, None, None, None], batch.images.flip(-1), batch.images))


def _digest(images: Tensor) -> bytes:
    return hashlib.sha256(images.detach().cpu().contiguous().numpy().tobytes()).digest()


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(
        torch.cat([b.images for b in batches]),
        torch.cat([b.targets for b in batches]),
        batches[0].domain,
        tuple(i for b in batches for i in b.ids),
    )


def _facts(prepared: Prepared, defense: Defense, plan: LocalPlan, trained: Batch, unit: int) -> Facts:
    order = prepared.rng.at("label order", unit, _digest(trained.images)).permutation(len(trained))
    return Facts(
        domain=trained.domain,
        mode=plan.mode,
        image_shape=trained.image_shape,
        classes=prepared.classes,
        labels=trained.targets[order.to(trained.targets.device)],  # a grant of labels says nothing about their order
        local_plan=plan,
        bn_running=running_statistics(prepared.model),
        augmentation=prepared.scenario.client.augmentation,
        auxiliary=prepared.auxiliary,
        defence=defense,
    )
