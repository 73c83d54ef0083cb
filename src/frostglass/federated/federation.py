"""From a plan to the parts of a federation, whatever the engine: who holds what, the network, clients, the test."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from frostglass.core.batch import Batch, one_hot
from frostglass.core.defense import Defense, encoded_by, stack
from frostglass.core.errors import BadInput, close_match
from frostglass.core.randomness import Insecure, OsKey, Randomness, Rng
from frostglass.core.update import LocalPlan
from frostglass.defenses.encoder import encoded_domain
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.registry import DEFENSES
from frostglass.federated.federate_plan import FederatePlan, plan_of
from frostglass.federated.feeds import encoder_of, takes_encodings
from frostglass.federated.held_out import digest_of_both, images_of
from frostglass.federated.local_client import NOTHING, LocalClient, dirichlet_split
from frostglass.federated.lone_images import refuse_lone_images
from frostglass.federated.named import named
from frostglass.federated.outgoing import Decide
from frostglass.federated.train_plan import TrainingPlan
from frostglass.numerics.bn import bn_layers
from frostglass.numerics.client_step import computed_step
from frostglass.vision.byte_images import ByteImages
from frostglass.vision.networks import build, fix_for_opacus
from frostglass.vision.normalise import domain_of

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Federation:
    """What every process of a federation can build from the plan alone.

    Args:
        plan: checked.
        train, test: all images; a simulation holds them all, a real client would hold its own.
        rows: of the training images, by client.
        model: the network before the first round; never changed.
        inside: defences that work in local training (`encode`, `gradient`).
        outside: defences of the finished update (`protect`).
    """

    plan: FederatePlan
    train: ByteImages
    test: ByteImages
    rows: tuple[Tensor, ...]
    model: nn.Module
    inside: Defense
    outside: Defense

    @property
    def protects(self) -> bool:
        """Whether updates are changed on their way out."""
        return self.outside is not NOTHING

    @property
    def defended(self) -> bool:
        """Whether any defence beside an encoder acts."""
        return self.inside is not NOTHING or self.outside is not NOTHING

    @property
    def record_folder(self) -> str | None:
        """Where updates are recorded, in the run folder; None if they are not."""
        return self.plan.record.folder if self.plan.record.on else None

    def digest(self) -> str:
        """SHA-256 of all images and labels, and of what tells a public pool from others."""
        encoding = self.plan.encoding
        return digest_of_both(self.train, self.test, [None if encoding is None else encoding.public])

    @property
    def has_batch_norm(self) -> bool:
        """Whether the network keeps running statistics."""
        return bool(bn_layers(self.model))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.train.images.shape[1:]
        return c, h, w

    @property
    def steps(self) -> tuple[nn.Module, LocalPlan, list[int]]:
        """(the network, how clients train it, on how many images each)."""
        return self.model, self.plan.client.local_plan(), [len(rows) for rows in self.rows]

    def described(self) -> dict[str, Any]:
        """The network for a record: enough to build it again."""
        plan, encoding = self.plan, self.plan.encoding
        channels, _, size = self.image_shape
        about = {"name": plan.model.name, "options": dict(plan.model.options), "classes": self.train.classes,
                 "channels": channels, "size": size, "fix": plan.model.fix}  # fmt: skip
        encodes = encoding is not None or self.inside.encodes
        return about | ({"takes": "encodings", "sees": encoding.sees if encoding else "pixels"} if encodes else {})

    def client(self, number: int) -> LocalClient:
        """The client with this part of the images, as new; where it stands in its ledgers is the engine's to keep.

        Raises:
            BadInput: no such part, or settings that cannot be met.
        """
        if not 0 <= number < len(self.rows):
            raise BadInput(f"partition-id: {number} is not one of the plan's {len(self.rows)} clients, from 0.")
        rows, plan = self.rows[number], self.plan
        images, labels = self.train.images[rows].float() / 255, self.train.labels[rows]
        return LocalClient(
            str(number), self.model, images, labels, self.train.classes, plan.client.local_plan(), self.inside,
            encoder=self.encoder(number), seed=self._seed(),
        )  # fmt: skip

    def protection(self, number: int, round: int) -> Randomness:
        """Of a client's defence of the update in this round: from the operating system, unless the plan is insecure."""
        if self.plan.insecure_seed is None:
            return OsKey()
        return Insecure(Rng.from_seed(self.plan.insecure_seed, "federated client", str(number)).at("protect", round))

    def private(self, number: int) -> Batch:
        """The images of a client in the range that its network sees, for its own gate."""
        rows = self.rows[number]
        targets = one_hot(self.train.labels[rows], self.train.classes)
        names = tuple(self.train.names[i] for i in rows.tolist())
        domain = encoded_domain(self.image_shape[0]) if self.on_encodings else domain_of(self.model)
        return Batch(self.in_range(self.train.images[rows].float() / 255), targets, domain, names)

    @property
    def on_encodings(self) -> bool:
        """Whether clients train on what an encoder makes of their images."""
        return self.plan.encoding is not None

    def in_range(self, images: Tensor) -> Tensor:
        """Plain images in [0, 1] in the range that the network sees: [-1, 1] where clients train on encodings."""
        return images * 2 - 1 if self.on_encodings else images

    def gate_checks(self) -> Decide | None:
        """The checks of the plan's gate, made anew; None without a gate.

        Raises:
            BadInput: no such checks, or settings that they refuse.
        """
        gate = self.plan.gate
        if gate is None:
            return None
        settings = dict(gate.settings)
        if gate.decoys:
            settings["decoys"] = self.in_range(self.test.images.float() / 255), self.test.labels
        maker = named(gate.checks, "gate.checks")
        known = [p.name for p in inspect.signature(maker).parameters.values() if p.kind in _BY_NAME]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(maker).parameters.values())
        wrong = [k for k in gate.settings if k not in known and not takes_any]
        if wrong:
            raise BadInput([f"gate.settings.{k}: unknown setting; {close_match(k, known)}." for k in wrong])
        try:
            made: Decide = maker(**settings)
        except TypeError as problem:
            given = ", ".join(f"{k} = {v!r}" for k, v in gate.settings.items())
            raise BadInput(f"gate.settings: {given} is not what {gate.checks} takes ({problem}); correct it.") from None
        if not callable(made):
            raise BadInput(
                f"gate.checks: {gate.checks} returned {type(made).__name__}; name a function that returns the checks."
            )
        return made

    def insecure(self) -> bool:
        """Whether secrets were made from a number in the plan."""
        encoding = self.plan.encoding
        seeded = self.plan.insecure_seed is not None or (encoding is not None and encoding.insecure_seed is not None)
        return seeded and bool(self.plan.called != "none")

    def encoder(self, number: int | None) -> InstaHide | None:
        """Of a client; None for the server's own, which encodes test images."""
        method = self.plan.encoding
        if method is None:
            return None
        if method.insecure_seed is not None:
            key = Rng.from_seed(method.insecure_seed, "federated encoder", str(number)).key
            method = method.model_copy(update={"insecure_seed": int.from_bytes(key[:6], "big")})
        return encoder_of(method, TrainingPlan(), self.image_shape[-1])

    # ---- inside

    def _seed(self) -> int | None:
        """The order of plain batches may follow from the plan's seed; what a defence draws may not."""
        if self.plan.insecure_seed is not None:
            return self.plan.insecure_seed
        draws = self.inside.gradient is not None or self.inside.encodes or self.plan.encoding is not None
        return None if draws else self.plan.seed


@functools.lru_cache(maxsize=2)
def federation_of(text: str) -> Federation:
    """From the text of a plan; the same in every process, and built once in each.

    Raises:
        BadInput: every problem that was found, together.
    """
    return prepared(plan_of(text))


def prepared(plan: FederatePlan) -> Federation:
    """Loads the images, splits them and builds network and defences; trains nothing.

    Raises:
        BadInput: every problem that was found, together.
    """
    plan.check()
    train, test = images_of(plan.data, plan.seed)
    rng = Rng.from_seed(plan.seed, "federation")
    rows = _rows(plan, train, rng)
    model = _network(plan, train, rng)
    inside, outside = _defenses(plan)
    if plan.encoding is not None or inside.encodes:
        model = takes_encodings(model, plan.encoding.sees if plan.encoding is not None else "pixels")
    made = Federation(plan, train, test, rows, model, inside, outside)
    _refuse(made)
    return made


def _rows(plan: FederatePlan, train: ByteImages, rng: Rng) -> tuple[Tensor, ...]:
    clients = plan.split.clients
    if plan.split.alpha is not None:
        return tuple(dirichlet_split(train.labels, clients, plan.split.alpha, rng.at("split")))
    if clients > len(train):
        raise BadInput(f"split.clients: {clients} are more than the {len(train)} training images; lower it.")
    parts = rng.at("split").permutation(len(train)).tensor_split(clients)
    return tuple(part.sort().values for part in parts)


def _network(plan: FederatePlan, train: ByteImages, rng: Rng) -> nn.Module:
    _, channels, _, size = train.images.shape
    model = build(
        plan.model.name, classes=train.classes, channels=channels, size=size, options=plan.model.options,
        rng=rng.at("model"),
    )  # fmt: skip
    return fix_for_opacus(model) if plan.model.fix == "opacus" else model


def _defenses(plan: FederatePlan) -> tuple[Defense, Defense]:
    """(what works in local training, what works on the finished update)."""
    made = [DEFENSES[p.name].make(**p.settings) for p in plan.others]
    inner = [d for d in made if d.gradient is not None or d.encodes]
    outer = [d for d in made if d.gradient is None and not d.encodes]
    stack(*made)  # refuses what does not go together
    return (stack(*inner) if inner else NOTHING), (stack(*outer) if outer else NOTHING)


def _refuse(made: Federation) -> None:
    """Whatever a client would refuse in the first round, before anything starts."""
    plan, found = made.plan, []
    mixes = plan.encoding is not None or made.inside.encodes
    if plan.encoding is not None and made.inside.encodes:
        found.append(f"defense: {plan.called!r} encodes twice; leave one of the encodings out.")
    if made.outside.claim == "proof" and made.has_batch_norm and plan.buffers == "send":
        found.append(
            f"buffers: clients would send BatchNorm statistics that {plan.called!r} does not cover, so its epsilon "
            'would be false; set buffers = "keep", or model.fix = "opacus".'
        )
    if made.inside.gradient is not None and made.inside.per_example and mixes:
        found.append(
            f"defense: an encoder mixes images, so the per-example sensitivity of {made.inside.name!r} and its epsilon "
            "would be false; use one of them."
        )
    if plan.buffers == "keep" and made.has_batch_norm and len(made.test) == 1:
        found.append(
            'data.test_limit: buffers = "keep" tests with batch statistics, and one image has none; test more.'
        )
    for looked_at in (lambda: refuse_lone_images(*made.steps, made.image_shape), made.gate_checks):
        try:
            looked_at()
        except BadInput as wrong:
            found += wrong.problems
    if found:
        raise BadInput(found)
    _first_step(made)


def _first_step(made: Federation) -> None:
    """One step of the smallest client, and one update protected: what does not fit shows here."""
    sizes: Mapping[int, int] = {i: len(rows) for i, rows in enumerate(made.rows)}
    smallest = min(sizes, key=lambda i: sizes[i])
    client = made.client(smallest)
    client.begin()
    if made.inside.encodes:
        encoded_by(made.inside, made.private(smallest), Insecure(Rng.from_seed(0, "first step")))
    if made.inside.gradient is not None:
        few = Batch(client.images[:2], one_hot(client.labels[:2], client.classes), domain_of(made.model), ("a", "b"))
        plan = replace(client.plan, epochs=1, minibatch=None, local_steps=1)
        computed_step(made.model, few, plan, made.inside, Rng.from_seed(0, "first step"))
