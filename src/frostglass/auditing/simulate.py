"""The client side of an audit: private batches, defences, updates, and the view that a threat model leaves of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from frostglass.auditing.plan import ClientPlan, Plan, ScenarioPlan, ThreatPlan
from frostglass.core.batch import Batch, Domain, Sealed, one_hot
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.threat import Facts, Observation, ThreatModel, parse_grants
from frostglass.core.update import LocalPlan, PrivacySpent, Update
from frostglass.defenses.channels import direct, secure_sum
from frostglass.numerics.bn import running_statistics
from frostglass.numerics.local_update import local_update
from frostglass.vision import datasets, networks, weights


@dataclass(frozen=True)
class Inputs:
    """The user's own objects, instead of what a plan names.

    Args:
        model: takes images in [0, 1] and normalises inside.
        images: [n, c, h, w] in [0, 1].
        labels: [n] class indices.
    """

    model: nn.Module | None = None
    images: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Truth:
    """What only scoring may see.

    Args:
        private: the private images of the message, all clients of its cohort.
        trained: what was trained on: the encodings where a defence encodes, else the private images.
    """

    private: Batch
    trained: Batch


@dataclass(frozen=True)
class Round:
    """One message with everything around it; `seen` is all that an attack gets."""

    seen: Observation
    truth: Sealed[Truth]
    spent: PrivacySpent | None
    plan: LocalPlan


@dataclass(frozen=True)
class Prepared:
    """A scenario, ready to be played.

    Args:
        scenario: its plan.
        model: the global model.
        images: all private images, [0, 1].
        names: one an image.
        notes: what was converted on the way.
        rng: root of the client side; attacks cannot reach it.
        auxiliary: images that the threat model gives away, or None.
    """

    scenario: ScenarioPlan
    model: nn.Module
    data: datasets.ImageSet
    classes: int
    threat: ThreatPlan
    rng: Rng
    auxiliary: Tensor | None
    device: torch.device

    @property
    def units(self) -> int:
        """Messages that are attacked: repetitions x cohorts in each."""
        client = self.scenario.client
        return client.batches * (client.clients // client.cohort)

    @property
    def per_message(self) -> int:
        """Images in one message."""
        return self.scenario.client.batch * self.scenario.client.cohort

    @property
    def repeats_images(self) -> bool:
        """True if there are too few images for batches without common images."""
        return self.units * self.per_message > len(self.data.images)


def prepare(plan: Plan, index: int, device: torch.device, inputs: Inputs | None = None) -> Prepared:
    """Loads the images and builds the model of scenario `index`.

    Raises:
        BadInput: images, model or weights cannot be used as the plan says.
    """
    scenario = plan.scenario[index]
    inputs = inputs or Inputs()
    rng = Rng.from_seed(plan.seed, "client side", str(index))
    data = _data(scenario, inputs, rng)
    client = scenario.client
    needed = client.batch * client.cohort
    if needed > len(data.images):
        raise BadInput(
            f"{scenario.name}: client.batch = {client.batch} x cohort = {client.cohort} is more than the "
            f"{len(data.images)} images of {data.source}; lower it or add images."
        )
    model, classes = _model(scenario, inputs, data, rng)
    threat = plan.threat_of(scenario)
    size = int(data.images.shape[-1])
    auxiliary = None
    if threat.auxiliary is not None and "auxiliary" in threat.grants:
        auxiliary = datasets.load(threat.auxiliary, size=size, channels=int(data.images.shape[1])).images
    return Prepared(scenario, model.to(device), data, classes, threat, rng, auxiliary, device)


def _data(scenario: ScenarioPlan, inputs: Inputs, rng: Rng) -> datasets.ImageSet:
    if inputs.images is not None:
        x = inputs.images
        if x.ndim != 4 or not bool(x.isfinite().all()) or float(x.min()) < 0 or float(x.max()) > 1:
            raise BadInput(f"images: shape {tuple(x.shape)} must be [n, c, h, w], values finite and in [0, 1].")
        y = inputs.labels if inputs.labels is not None else torch.arange(len(x)) % 10
        names = tuple(f"image {i}" for i in range(len(x)))
        classes = int(y.max()) + 1 if len(y) else 0
        return datasets.ImageSet(x.float(), y.long(), names, classes, (), "memory")
    where = scenario.data
    total = datasets.count(where.source)
    client = scenario.client
    wanted = client.batch * client.cohort * client.batches * (client.clients // client.cohort)
    rows = None
    if total > 4 * wanted + 64:  # a large set: decode only the images that the repetitions will use
        rows = sorted(rng.at("rows").permutation(total)[: max(wanted, client.batch)].tolist())
    return datasets.load(where.source, size=where.size, channels=where.channels, rows=rows)


def _model(scenario: ScenarioPlan, inputs: Inputs, data: datasets.ImageSet, rng: Rng) -> tuple[nn.Module, int]:
    spec = scenario.model
    channels, height, width = (int(s) for s in data.images.shape[1:])
    if inputs.model is not None:
        model: nn.Module = inputs.model
    else:
        if height != width:
            raise BadInput(f"{scenario.name}: images are {height} x {width}; set data.size for a square crop.")
        classes = spec.classes or data.classes
        model = networks.build(
            spec.name, classes=classes, channels=channels, size=height, options=spec.options, rng=rng.at("model")
        )
    if spec.fix == "opacus":
        model = networks.fix_for_opacus(model)
    if spec.weights:
        weights.load_weights(model, Path(spec.weights))
    model.train(spec.mode == "train")
    outputs = _outputs(scenario, model, data.images[: max(2, min(2, len(data.images)))])
    if len(data.labels) and int(data.labels.max()) >= outputs:
        raise BadInput(
            f"{scenario.name}: labels reach {int(data.labels.max())} and the model has {outputs} outputs; set "
            "model.classes."
        )
    return model, outputs


def _outputs(scenario: ScenarioPlan, model: nn.Module, probe: Tensor) -> int:
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(probe)
    except Exception as wrong:
        raise BadInput(
            f"{scenario.name}: the model does not take images of shape {tuple(probe.shape[1:])} "
            f"({type(wrong).__name__}: {str(wrong).splitlines()[0]}); set data.size or data.channels."
        ) from wrong
    finally:
        model.train(was)
    if not isinstance(out, Tensor) or out.ndim != 2:
        raise BadInput(f"{scenario.name}: the model must return logits [batch, classes].")
    return int(out.shape[1])


def play(prepared: Prepared, defense: Defense, unit: int) -> Round:
    """One repetition: its clients draw their images, defend, compute and send; the threat model looks.

    The keys of augmentation and defence mix in a digest of the private images, so that an attack, which may know the
    plan's seed, cannot rebuild them.
    """
    client = prepared.scenario.client
    plan = local_plan(client, prepared.scenario.model.mode)
    private, trained, updates = [], [], []
    for member in range(client.cohort):
        raw = _draw(prepared, unit, member)
        key = prepared.rng.at("keys", unit, member, defense.name, _digest(raw.images))
        batch = _augmented(raw, client, key.at("augmentation"))
        encoded = defense.encode(batch, Insecure(key.at("encode")))
        if defense.gradient is not None:
            update = defense.gradient(prepared.model, encoded, plan, Insecure(key.at("gradient")))
        else:
            trace = local_update(prepared.model, encoded.images, encoded.targets, plan)
            update = Update(trace.gradients, trace.bn, len(encoded), plan)
        private.append(batch)
        trained.append(encoded)
        updates.append(defense.protect(update, Insecure(key.at("protect"))))
    sent = (secure_sum(client.cohort) if client.cohort > 1 else direct())(updates)
    truth = Truth(_joined(private), _joined(trained))
    facts = _facts(prepared, defense, plan, truth.trained, unit)
    threat = ThreatModel(prepared.threat.name, parse_grants(prepared.threat.grants))
    return Round(threat.observe(prepared.model, sent, facts), Sealed(truth), sent[0].spent, plan)


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
        domain_of(prepared),
        tuple(prepared.data.names[i] for i in index),
    ).to(prepared.device)


def domain_of(prepared: Prepared) -> Domain:
    """Pixel bounds and the model's own normalisation."""
    return networks.domain_of(prepared.model)


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
