"""Before a round: the private images and the global model of a scenario, and what is wrong with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from frostglass.auditing.plan import FROM_PYTHON, Plan, ScenarioPlan, ThreatPlan
from frostglass.core.batch import Domain
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.called import copied
from frostglass.numerics.local_update import trainable
from frostglass.vision import datasets, networks, weights
from frostglass.vision.borrowed import refuse_unfit, unwrapped

if TYPE_CHECKING:
    from frostglass.auditing.recorded_view import Recording
    from frostglass.auditing.simulate import Round


@dataclass(frozen=True)
class Inputs:
    """The user's own objects, instead of what a plan names; none of them is changed.

    Args:
        model: takes images in [0, 1] and normalises inside.
        images: [n, c, h, w] in [0, 1].
        labels: [n] class indices; arbitrary ones if None.
        recording: updates that were really sent, read already.
    """

    model: nn.Module | None = None
    images: Tensor | None = None
    labels: Tensor | Sequence[int] | None = None
    recording: Recording | None = None


@dataclass(frozen=True)
class Arrived:
    """A message that is played back instead of being computed.

    Args:
        round: as the server saw it, with the sealed truth if there is one.
        examples: images in it, 0 if unknown.
        digest: SHA-256 of its tensors and of the truth.
        recording: that it is from.
    """

    round: Round
    examples: int
    digest: bytes
    recording: Recording


@dataclass(frozen=True)
class Prepared:
    """A scenario, ready to be played.

    Args:
        scenario: its plan.
        model: the global model, on `device`, in the client's mode.
        data: all private images, [0, 1], with labels, names and notes on what was converted.
        classes: outputs of the model.
        domain: pixel bounds and the model's own normalisation.
        threat: what the attacker knows.
        rng: root of the client side; attacks cannot reach it.
        auxiliary: images that the threat model gives away, or None.
        device: where the client computes.
        arrived: the message, where it was recorded; None: clients are simulated.
    """

    scenario: ScenarioPlan
    model: nn.Module
    data: datasets.ImageSet
    classes: int
    domain: Domain
    threat: ThreatPlan
    rng: Rng
    auxiliary: Tensor | None
    device: torch.device
    arrived: Arrived | None = None

    @property
    def units(self) -> int:
        """Messages that are attacked: repetitions x cohorts in each."""
        client = self.scenario.client
        return 1 if self.arrived else client.batches * (client.clients // client.cohort)

    @property
    def per_message(self) -> int:
        """Images in one message."""
        if self.arrived is not None:
            return max(1, self.arrived.examples)
        return self.scenario.client.batch * self.scenario.client.cohort

    @property
    def probe(self) -> Tensor:
        """[1, c, h, w] an image of the right shape; black where the scenario holds none."""
        if len(self.data.images) or self.arrived is None:
            return self.data.images[:1]
        return torch.zeros(1, *self.arrived.round.seen.image_shape)

    @property
    def repeats_images(self) -> bool:
        """True if there are too few images for batches without common images."""
        return self.arrived is None and self.units * self.per_message > len(self.data.images)

    def digest(self) -> bytes:
        """SHA-256 of images, labels and weights: what a plan names, but does not hold."""
        h = hashlib.sha256(b"" if self.arrived is None else self.arrived.digest)
        held = [t for t in self.model.state_dict().values() if isinstance(t, Tensor)]  # extra state may be anything
        for t in (self.data.images, self.data.labels, *held):
            plain = t.detach().cpu().to_dense() if t.layout != torch.strided else t.detach().cpu()
            h.update(plain.contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b"-")
        return h.digest()


def prepare(plan: Plan, index: int, device: torch.device, inputs: Inputs | None = None) -> Prepared:
    """Loads the images and builds the model of scenario `index`.

    Raises:
        BadInput: images, model or weights cannot be used as the plan says.
    """
    scenario = plan.scenario[index]
    inputs = inputs or Inputs()
    if scenario.recorded is not None:
        from frostglass.auditing.recorded_view import load_recording, prepare_scenario

        assert plan.recorded_updates is not None
        recording = inputs.recording or load_recording(plan.recorded_updates, inputs.model)
        return prepare_scenario(recording, scenario, plan.seed, device)
    rng = Rng.from_seed(plan.seed, "client side", str(index))
    threat = plan.threat_of(scenario)
    data = _data(scenario, inputs, rng, whole="gallery" in threat.grants)
    client = scenario.client
    needed = client.batch * client.cohort
    if needed > len(data.images):
        raise BadInput(
            f"{scenario.name}: client.batch = {client.batch} x cohort = {client.cohort} is more than the "
            f"{len(data.images)} images of {data.source}; lower it or add images."
        )
    model = _model(scenario, inputs, data, rng).to(device)
    classes = _outputs(scenario, model, data.images[:2].to(device))
    data = _labelled(scenario, inputs, data, classes)
    domain = networks.domain_of(model)
    ready = Prepared(scenario, model, data, classes, domain, threat, rng, None, device)
    if threat.auxiliary is None or "auxiliary" not in threat.grants:
        return ready
    others, left_out = _auxiliary(ready, threat.auxiliary)
    if left_out:
        note = f"{left_out} images of threat.auxiliary are private ones here and were not given to the attacker."
        ready = replace(ready, data=replace(data, notes=(*data.notes, note)))
    return replace(ready, auxiliary=others)


def _auxiliary(ready: Prepared, source: str) -> tuple[Tensor, int]:
    """(other images of the kind, how many were left out as they are private ones of this scenario)."""
    channels, height, width = (int(s) for s in ready.data.images.shape[1:])
    found = datasets.load(source, size=(height, width), channels=channels).images
    n = len(ready.data.images)
    used = range(n) if ready.repeats_images else ready.rng.at("draw").permutation(n)[: ready.units * ready.per_message]
    private = {_content(ready.data.images[int(row)]) for row in used}
    kept = [i for i, image in enumerate(found) if _content(image) not in private]
    if not kept:
        raise BadInput(
            f"{ready.scenario.name}: every image of threat.auxiliary = {source} is a private one of this scenario; "
            "name other images, or lower client.batches."
        )
    return found[kept], len(found) - len(kept)


def _content(image: Tensor) -> bytes:
    return hashlib.sha256(image.float().contiguous().numpy().tobytes()).digest()


GALLERY_ROWS = 20_000
"""Images of a large source that galleries are drawn from."""


def _data(scenario: ScenarioPlan, inputs: Inputs, rng: Rng, *, whole: bool = False) -> datasets.ImageSet:
    if inputs.images is not None:
        return _given(inputs.images, inputs.labels)
    where = scenario.data
    if where.source == FROM_PYTHON:
        raise BadInput(f"{scenario.name}: its images were given from Python; run frostglass.audit with them again.")
    total = datasets.count(where.source)
    client = scenario.client
    wanted = client.batch * client.cohort * client.batches * (client.clients // client.cohort)
    rows = None
    if whole:
        wanted = max(wanted, GALLERY_ROWS)
    if total > (wanted if whole else 4 * wanted + 64):  # a large set: decode only the images that will be used
        rows = sorted(rng.at("rows").permutation(total)[:wanted].tolist())
    return datasets.load(where.source, size=where.size, channels=where.channels, rows=rows)


def _given(images: Any, labels: Any) -> datasets.ImageSet:
    """The user's own tensors. Missing labels are zeros here, see `_labelled`."""
    try:
        x = torch.as_tensor(images).detach().cpu().clone()  # the user's stay as they are, whatever a model does
        y = torch.zeros(len(x)) if labels is None else torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as wrong:
        raise BadInput(f"images, labels: give tensors ({wrong}).") from None
    if x.ndim != 4 or not x.numel():
        raise BadInput(f"images: shape {tuple(x.shape)} must be [n, c, h, w], none of them 0.")
    if not x.is_floating_point() or not bool(x.isfinite().all()) or float(x.min()) < 0 or float(x.max()) > 1:
        raise BadInput(
            f"images: {x.dtype} values from {float(x.min()):g} to {float(x.max()):g} must be floating point, finite "
            "and in [0, 1]; divide bytes by 255, and leave normalisation to the model."
        )
    if y.shape != (len(x),) or not bool((y == y.long()).all()):
        raise BadInput(f"labels: shape {tuple(y.shape)}, {y.dtype} must be {len(x)} class indices, one an image.")
    classes = max(2, int(y.max()) + 1)
    names = tuple(f"image {i}" for i in range(len(x)))
    return datasets.ImageSet(x.float(), y.long(), names, classes, (), "the tensors given from Python")


def _labelled(scenario: ScenarioPlan, inputs: Inputs, data: datasets.ImageSet, classes: int) -> datasets.ImageSet:
    if inputs.images is not None and inputs.labels is None:
        note = "No labels were given, so they are arbitrary: the position of an image modulo the number of classes."
        return replace(data, labels=torch.arange(len(data.images)) % classes, notes=(*data.notes, note))
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= classes:
        raise BadInput(
            f"{scenario.name}: labels from {low} to {high} do not fit the model's {classes} outputs; set model.classes."
        )
    return data


def _model(scenario: ScenarioPlan, inputs: Inputs, data: datasets.ImageSet, rng: Rng) -> nn.Module:
    spec = scenario.model
    if inputs.model is not None:
        model = _copied(inputs.model)
        refuse_unfit(model, type(model).__name__)
    elif spec.name.partition(":")[0] == FROM_PYTHON:
        raise BadInput(f"{scenario.name}: its model was given from Python; run frostglass.audit with it again.")
    else:
        channels, height, width = (int(s) for s in data.images.shape[1:])
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
    others = {p.dtype for p in model.parameters() if p.dtype != torch.float32}
    if others:
        fix = "convert it with .float()"
        if not all(dtype.is_floating_point for dtype in others):  # which .float() leaves as they are
            fix = "keep whole numbers in buffers, and complex ones by torch.view_as_real"
        named = ", ".join(sorted(map(str, others)))
        raise BadInput(f"{scenario.name}: the model has {named} parameters; {fix}.")
    packed = next((n for n, layer in model.named_modules() if hasattr(layer, "_packed_params")), None)
    if packed is not None:  # an attack would go on without the layers before it, and look as if it had failed
        raise BadInput(
            f"{scenario.name}: layer {packed!r} of the model is quantised, and no gradient passes it; give the network "
            "that it was made from."
        )
    broken = next((n for n, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if broken is not None:
        raise BadInput(f"{scenario.name}: {broken!r} of the model has values that are not finite; give a trained one.")
    if not trainable(model):
        raise BadInput(f"{scenario.name}: no parameter of the model requires a gradient, so a client sends nothing.")
    return model.train(spec.mode == "train")


def _copied(model: Any) -> nn.Module:
    """An audit sets modes and loads weights: never in the user's own object."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"model: {type(model).__name__} is no torch.nn.Module.")
    try:
        return copied(unwrapped(model))
    except Exception as wrong:
        text = f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        raise BadInput(f"model: {type(model).__name__} cannot be copied ({text}).") from wrong


def _outputs(scenario: ScenarioPlan, model: nn.Module, probe: Tensor) -> int:
    """Number of classes, from a pass in eval mode, which changes no buffer."""
    model.eval()
    given = probe.clone()
    try:
        with torch.no_grad():
            out = model(given)
    except Exception as wrong:
        text = f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        raise BadInput(
            f"{scenario.name}: the model does not take images of shape {tuple(probe.shape[1:])} ({text}); set "
            "data.size or data.channels."
        ) from wrong
    finally:
        model.train(scenario.model.mode == "train")
    if not torch.equal(given, probe):  # truth would be scored against what the model made of it
        raise BadInput(
            f"{scenario.name}: the model changes its input in place; let its forward make a copy (x = x - mean, not "
            "x.sub_(mean))."
        )
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(probe) or out.shape[1] < 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise BadInput(
            f"{scenario.name}: the model answers {len(probe)} images with {got}; it must return logits "
            "[batch, classes], two classes at the least."
        )
    return int(out.shape[1])
