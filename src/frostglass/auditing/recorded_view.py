"""A recorded update as an attack sees it: what a server of such an engine holds, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from frostglass.auditing.galleries import shuffled_gallery
from frostglass.auditing.plan import DefensePlan, Plan, ScenarioPlan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import Arrived, Inputs, Prepared
from frostglass.auditing.recorded_inputs import Held, Sent, Source, digest_of, read_source
from frostglass.auditing.recorded_model import Network, network_of
from frostglass.auditing.recorded_plan import UpdatesPlan
from frostglass.auditing.recorded_truth import Given, Truth, batch_of, content, read_images, read_truth
from frostglass.auditing.simulate import Round
from frostglass.auditing.simulate import Truth as RoundTruth
from frostglass.core.batch import Domain, Sealed
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.threat import Facts, Knows, ThreatModel, parse_grants
from frostglass.core.update import BNStatistics, LocalPlan, Update
from frostglass.federated.exchange import statistics_sent
from frostglass.numerics.bn import bn_layers, running_statistics
from frostglass.numerics.local_update import trainable
from frostglass.vision import networks
from frostglass.vision.datasets import ImageSet

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recording:
    """Everything that an audit of recorded updates reads, once.

    Args:
        plan: what was asked.
        source: the updates.
        network: of all of them.
        truth: private images, if given; only scoring and the candidates of a gallery are made of them.
        others: images that no client holds.
    """

    plan: UpdatesPlan
    source: Source
    network: Network
    truth: Truth | None = None
    others: ImageSet | None = None
    _models: dict[tuple[str, str, torch.device], nn.Module] = field(default_factory=dict, repr=False)

    def model(self, sent: Sent, mode: str, device: torch.device = CPU) -> nn.Module:
        """The global model that this update starts from; one on each device for all updates of a round.

        Attacks leave it unchanged, and nobody moves it.

        Raises:
            BadInput: what was sent does not fit the network.
        """
        key = sent.sent_key, mode, device
        if key not in self._models:
            self._models[key] = self.network.with_state(self.source.tensors(sent).sent, mode).to(device)
        return self._models[key]

    def by_number(self, number: int) -> Sent:
        """The update of that number.

        Raises:
            BadInput: there is none.
        """
        found = next((u for u in self.source.updates if u.header.number == number), None)
        if found is None:
            raise BadInput(f"recorded.number: {number} is not in {self.source.name}; audit the record anew.")
        return found

    @property
    def defense(self) -> Defense | None:
        """That the clients are said to apply, with its parameters; None if nobody said them."""
        return None if self.plan.defense is None else make_defense(DefensePlan(**self.plan.defense))


def load_recording(plan: UpdatesPlan, model: nn.Module | None = None, truth: Given | None = None) -> Recording:
    """Reads headers, network and private images.

    Raises:
        BadInput: something cannot be used as given.
    """
    source = read_source(plan)
    network = network_of(plan, source, model)
    clients = [u.header.client for u in source.updates]
    others = None if plan.others is None else read_images(plan.others, network.image_shape, whole=False)
    if others is None and Knows.AUXILIARY.value in plan.grants:
        raise BadInput("grants: 'auxiliary' gives away nothing without images; say where they are with others.")
    return Recording(plan, source, network, read_truth(plan.truth, clients, network.image_shape, truth), others)


def with_recording(plan: Plan, inputs: Inputs | None) -> Inputs | None:
    """`inputs` with the updates of the plan, read once for all its scenarios."""
    if plan.recorded_updates is None or (inputs is not None and inputs.recording is not None):
        return inputs
    held = inputs or Inputs()
    return replace(held, recording=load_recording(plan.recorded_updates, held.model))


def mode_of(sent: Sent, held: Held) -> str:
    """ "train" or "eval": as ordered; else by whether the running statistics moved; else "train"."""
    if sent.plan is not None and (sent.recorded or not moved_buffers(held)):
        return sent.plan.mode
    return "train" if moved_buffers(held) or not held.buffers else "eval"


def moved_buffers(held: Held) -> list[str]:
    """Buffers that came back other than they were sent."""
    return [n for n, t in held.buffers.items() if n in held.sent and not torch.equal(t.to(held.sent[n]), held.sent[n])]


def one_step(sent: Sent) -> bool:
    """Whether the update is known to be one step over all images of its client."""
    n, plan = sent.header.examples, sent.plan
    if sent.header.kind == "gradient":
        return True
    if plan is None or n is None:
        return False
    return plan.lr > 0 and plan.one_sgd_step(-(-n // sent.header.clients))


def batch_statistics(recording: Recording, sent: Sent) -> Mapping[str, BNStatistics]:
    """Of the client's only batch, from the buffers that it sent; empty where they do not give them away."""
    held = recording.source.tensors(sent)
    n, h = sent.header.examples, sent.header
    if not n or h.clients > 1 or not one_step(sent) or mode_of(sent, held) != "train" or not moved_buffers(held):
        return {}
    model = recording.model(sent, "train")
    if not bn_layers(model) or not all(getattr(m, "track_running_stats", False) for m in bn_layers(model).values()):
        return {}
    try:
        return statistics_sent(model, _full(held.sent, model), held.buffers, recording.network.image_shape, n)
    except BadInput:
        return {}


def _full(sent: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **sent}


def known(recording: Recording, sent: Sent) -> list[str]:
    """Grants that describe what such a server knows anyway: nothing here comes from the private images."""
    found = []
    if sent.header.examples:
        found.append(Knows.EXAMPLES.value)
    if sent.plan is not None and sent.header.kind == "delta":
        found.append(Knows.LOCAL_PLAN.value)
    held = recording.source.tensors(sent)
    running = running_statistics(recording.model(sent, mode_of(sent, held)))
    if running and all(f"{name}.running_mean" in held.sent for name in running):
        found.append(Knows.BN_RUNNING.value)
    if batch_statistics(recording, sent):
        found.append(Knows.BN_BATCH.value)
    if sent.header.clients > 1:
        found.append(Knows.COHORT.value)
    if recording.plan.defense is not None:
        found.append(Knows.DEFENCE.value)
    return found


def prepare_scenario(recording: Recording, scenario: ScenarioPlan, seed: int, device: torch.device) -> Prepared:
    """A scenario whose message was sent by a real engine.

    Raises:
        BadInput: the update cannot be read or does not fit the network.
    """
    assert scenario.recorded is not None
    assert scenario.threat is not None
    sent = recording.by_number(scenario.recorded.number)
    held = recording.source.tensors(sent)
    mode = mode_of(sent, held)
    model = recording.model(sent, mode, device)
    threat, rng = scenario.threat, Rng.from_seed(seed, "recorded update", str(sent.header.number))
    domain = _domain(recording, model)
    client = sent.header.client
    outside = None if recording.truth is None else recording.truth.outside(client, recording.others)
    data = outside or recording.others or _nothing(recording.network)
    auxiliary = _auxiliary(recording) if Knows.AUXILIARY in threat.grants else None
    truth = _truth(recording, sent, domain, rng)
    ready = Prepared(
        scenario, model, replace(data, source="recorded"), recording.network.classes, domain, threat, rng, auxiliary,
        device,
    )  # fmt: skip
    arrived = Arrived(
        _round(ready, recording, sent, mode, truth), sent.header.examples or 0, _digest(held, truth), recording
    )
    return replace(ready, arrived=arrived)


def _auxiliary(recording: Recording) -> Tensor | None:
    """Other images of the kind, without those that a client holds."""
    if recording.others is None or recording.truth is None:
        return None if recording.others is None else recording.others.images
    free = recording.truth.never_private(recording.others.images)
    if not len(free):
        raise BadInput("others: every image of it is a private one of a client; name other images for 'auxiliary'.")
    return free


def _domain(recording: Recording, model: nn.Module) -> Domain:
    found = networks.domain_of(model)
    return replace(found, low=-1.0) if _encoded(recording) else found


def _encoded(recording: Recording) -> bool:
    """Whether clients trained on encodings in [-1, 1]: the record says it, or the declared defence."""
    return recording.network.encodings or (recording.defense is not None and recording.defense.encodes)


def _nothing(network: Network) -> ImageSet:
    none = torch.zeros(0, *network.image_shape)
    return ImageSet(none, torch.zeros(0, dtype=torch.long), (), network.classes, (), "recorded")


def _truth(recording: Recording, sent: Sent, domain: Domain, rng: Rng) -> RoundTruth | None:
    """What scoring opens: the client's images, whose order here says nothing."""
    if recording.truth is None:
        return None
    pool = recording.truth.of(sent.header.client)
    if pool is None:
        return None
    if recording.truth.labelled and int(pool.labels.max()) >= recording.network.classes:
        raise BadInput(
            f"truth: label {int(pool.labels.max())} does not fit the network's {recording.network.classes} outputs."
        )
    private = batch_of(pool, recording.network.classes, labelled=recording.truth.labelled)
    order = rng.at("truth", hashlib.sha256(content(private.images)).digest()).permutation(len(private)).tolist()
    private = private.take(order)
    exact = recording.truth.exactly(sent.header.client, sent.header.examples)
    return RoundTruth(private, replace(private, domain=domain), exact=exact, labelled=recording.truth.labelled,
                      encoded=_encoded(recording))  # fmt: skip


def _digest(held: Held, truth: RoundTruth | None) -> bytes:
    shown = b"" if truth is None else hashlib.sha256(content(truth.private.images)).digest()
    return hashlib.sha256(digest_of(held) + shown).digest()


def _round(ready: Prepared, recording: Recording, sent: Sent, mode: str, truth: RoundTruth | None) -> Round:
    update = as_update(recording, sent, ready.model, mode)
    gallery, place = None, None
    labels = None
    wanted = set(ready.threat.grants) & {Knows.GALLERY.value, Knows.LABELS.value, Knows.LABELS_DISTINCT.value}
    if wanted and (truth is None or not truth.exact or not truth.labelled):
        raise BadInput(
            f"grants: {', '.join(sorted(wanted))} of {sent.title} cannot be given; they need --truth with exactly the "
            "labelled images of this update."
        )
    if truth is not None and wanted:
        moved = truth.private.to(ready.device)
        gallery, place = shuffled_gallery(ready, moved, 0)
        labels = moved.targets[ready.rng.at("label order", hashlib.sha256(content(moved.images)).digest())
                               .permutation(len(moved)).to(ready.device)]  # fmt: skip
        truth = replace(truth, place=place)
    facts = Facts(
        domain=ready.domain,
        mode=mode,
        image_shape=recording.network.image_shape,
        classes=ready.classes,
        labels=labels,
        local_plan=update.plan,
        bn_running=running_statistics(ready.model),
        augmentation="unknown",
        auxiliary=ready.auxiliary,
        defence=recording.defense,
        gallery=gallery,
    )
    threat = ThreatModel(ready.threat.name, parse_grants(ready.threat.grants))
    seen = threat.observe(ready.model, [update], facts)
    return Round(seen, None if truth is None else Sealed(truth), None, update.plan)


def as_update(recording: Recording, sent: Sent, model: nn.Module, mode: str) -> Update:
    """The message; the difference of one SGD step becomes its gradient, (W_0 - W_1) / lr - decay W_0."""
    held = recording.source.tensors(sent)
    weights = trainable(model)
    like = next(iter(weights.values()))
    given = {n: t.detach().to(like.device, torch.float32) for n, t in held.update.items() if n in weights}
    plan = sent.plan or LocalPlan()
    plan = replace(plan, kind=sent.header.kind, mode="train" if mode == "train" else "eval")
    if plan.kind == "delta" and one_step(sent):
        given = {
            n: (t.double() / plan.lr - plan.weight_decay * weights[n].detach().double()).float()
            for n, t in given.items()
        }
        plan = replace(plan, kind="gradient", local_steps=1, epochs=1, minibatch=None)
    bn = {
        n: BNStatistics(s.mean.to(like), s.var.to(like), s.count) for n, s in batch_statistics(recording, sent).items()
    }
    return Update(given, bn, sent.header.examples or 0, plan, clients=sent.header.clients)
