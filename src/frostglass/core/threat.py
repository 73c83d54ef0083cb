"""Who knows what. The wall: an attack reads an Observation, and an Observation holds only what was granted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from frostglass.core.batch import Domain
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput, close_match
from frostglass.core.update import BNStatistics, Gradients, LocalPlan, Update

if TYPE_CHECKING:
    from torch import nn


class Knows(StrEnum):
    """The one enum of grants: each value is a plan's string and names one field of Observation."""

    MODEL = "model"
    MESSAGES = "messages"
    DOMAIN = "domain"
    MODE = "mode"
    EXAMPLES = "examples"
    LABELS = "labels"
    LABELS_DISTINCT = "labels_distinct"
    LOCAL_PLAN = "local_plan"
    BN_RUNNING = "bn_running"
    BN_BATCH = "bn_batch"
    AUGMENTATION = "augmentation"
    AUXILIARY = "auxiliary"
    COHORT = "cohort"
    DEFENCE = "defence"
    GALLERY = "gallery"
    MODIFIED_MODEL = "modified_model"


ALWAYS = frozenset({Knows.MODEL, Knows.MESSAGES, Knows.DOMAIN, Knows.MODE})
"""What every server holds: the model it sent out (with its normalisation), what came back, and the mode it ordered."""

MEANING: dict[Knows, str] = {
    Knows.MODEL: "the global model that the server sent, with its buffers",
    Knows.MESSAGES: "what the clients sent",
    Knows.DOMAIN: "the range of a pixel and the normalisation inside the model",
    Knows.MODE: "whether the client's model was in train or eval mode",
    Knows.EXAMPLES: "how many images are in the batch",
    Knows.LABELS: "the labels of the batch, in no particular order",
    Knows.LABELS_DISTINCT: "that no label occurs twice",
    Knows.LOCAL_PLAN: "local steps, learning rate and optimiser of the client",
    Knows.BN_RUNNING: "use of the model's running BatchNorm statistics as a prior",
    Knows.BN_BATCH: "the BatchNorm statistics of the target batch",
    Knows.AUGMENTATION: "which augmentation the client applies",
    Knows.AUXILIARY: "other images of the same kind",
    Knows.COHORT: "how many clients are summed in a message",
    Knows.DEFENCE: "which defence the client applies, with its parameters (not its keys)",
    Knows.GALLERY: "candidates for one image of the message, of its class, and all other images of the message",
    Knows.MODIFIED_MODEL: "the right to change the model before it is sent out (a malicious server)",
}


@dataclass(frozen=True, eq=False)
class Gallery:
    """The identification game: one of the candidates is in the message, in an order that says nothing.

    A strong attacker: it holds everything else that went into the message.

    Args:
        images: [n, c, h, w] candidates in [0, 1], as clients hold them, equally likely before the message is seen.
        targets: [n, k] theirs, of one class.
        other_images: [b - 1, c, h, w] the other images of the message, before any encoding.
        other_targets: [b - 1, k] theirs.
        clients: how many clients of equal size the images of the message are from.
    """

    images: Float[Tensor, "n c h w"]
    targets: Float[Tensor, "n k"]
    other_images: Float[Tensor, "o c h w"]
    other_targets: Float[Tensor, "o k"]
    clients: int = 1

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class GradientMessage:
    """One update as the server sees it: one per client and round; a cohort's sum is one message.

    Args:
        gradients: by parameter name.
        kind: "gradient" or "delta".
        weights: the state that this client had been sent, where it is not that of the observation's model.
        examples: rows that this message was made of, where the client reports it for every message.
    """

    gradients: Gradients
    kind: str
    weights: Mapping[str, Tensor] | None = None
    examples: int | None = None


@dataclass(frozen=True)
class EncodingMessage:
    """Instance encodings as an eavesdropper sees them.

    Args:
        images, targets: encodings, and the labels that were published with them.
        rows: places in the set, where the encodings of one image were put together; None for the order of the set.
    """

    images: Float[Tensor, "b c h w"]
    targets: Float[Tensor, "b k"] | None
    rows: Int[Tensor, " b"] | None = None


Message = GradientMessage | EncodingMessage


@dataclass(frozen=True, eq=False)
class Observation:
    """All that an attack may read. A field that was not granted is None.

    Args:
        model: the global model, in the client's mode; an attack leaves it unchanged.
        messages: what was sent.
        domain: pixel bounds and normalisation.
        mode: "train" or "eval".
        image_shape: (channels, height, width) that the model takes.
        classes: outputs of the model.
        examples: images in the message.
        labels: [examples, classes] targets in an order that says nothing about the batch.
        labels_distinct: True if granted that no label repeats.
        local_plan: how the client works.
        bn_running, bn_batch: statistics per BatchNorm layer.
        augmentation: its name.
        auxiliary: [n, c, h, w] other images of the same kind.
        cohort: clients summed in a message.
        defence: the defence as a value.
        gallery: candidates for one image of the message.
        modified_model: True if the server may have built the model for the attack.
    """

    model: nn.Module
    messages: tuple[Message, ...]
    domain: Domain
    mode: str
    image_shape: tuple[int, int, int]
    classes: int
    examples: int | None = None
    labels: Tensor | None = None
    labels_distinct: bool | None = None
    local_plan: LocalPlan | None = None
    bn_running: Mapping[str, BNStatistics] | None = None
    bn_batch: Mapping[str, BNStatistics] | None = None
    augmentation: str | None = None
    auxiliary: Tensor | None = None
    cohort: int | None = None
    defence: Defense | None = None
    gallery: Gallery | None = None
    modified_model: bool | None = None

    @property
    def gradients(self) -> Gradients:
        """Of the only gradient message.

        Raises:
            BadInput: there is none, or more than one.
        """
        found = [m for m in self.messages if isinstance(m, GradientMessage)]
        if len(found) != 1:
            raise BadInput(f"observation: this attack reads one update and {len(found)} were sent.")
        return found[0].gradients


@dataclass(frozen=True)
class Facts:
    """Everything about a round that a threat model chooses from; built by the simulation, never given to an attack."""

    domain: Domain
    mode: str
    image_shape: tuple[int, int, int]
    classes: int
    labels: Tensor | None = None
    local_plan: LocalPlan = field(default_factory=LocalPlan)
    bn_running: Mapping[str, BNStatistics] = field(default_factory=dict)
    augmentation: str = "none"
    auxiliary: Tensor | None = None
    defence: Defense | None = None
    gallery: Gallery | None = None


def parse_grants(names: Iterable[str]) -> frozenset[Knows]:
    """Plan strings -> grants.

    Raises:
        BadInput: an unknown string.
    """
    known = {k.value for k in Knows}
    wrong = [n for n in names if n not in known]
    if wrong:
        raise BadInput([f"threat.grants: {n!r} is not a grant; {close_match(n, known)}." for n in wrong])
    return frozenset(Knows(n) for n in names)


@dataclass(frozen=True)
class ThreatModel:
    """An honest-but-curious server and what it knows beyond `ALWAYS`."""

    name: str
    knows: frozenset[Knows]

    @property
    def grants(self) -> tuple[str, ...]:
        """Plan strings, sorted."""
        return tuple(sorted(k.value for k in self.knows | ALWAYS))

    def missing(self, needs: Iterable[Knows]) -> tuple[Knows, ...]:
        """What an attack needs and is not granted."""
        return tuple(sorted(set(needs) - self.knows - ALWAYS))

    def observe(self, model: nn.Module, updates: Sequence[Update], facts: Facts) -> Observation:
        """The view of the server: drops whatever is not granted."""
        has = self.knows | ALWAYS
        update = updates[0] if updates else None

        def grant(k: Knows, value: object) -> object:
            return value if k in has else None

        labels = facts.labels
        distinct = labels is not None and bool((labels.sum(0) <= 1).all())
        fields: dict[str, object] = {
            "examples": grant(Knows.EXAMPLES, sum(u.examples for u in updates) if updates else None),
            "labels": grant(Knows.LABELS, labels),
            "labels_distinct": grant(Knows.LABELS_DISTINCT, distinct if labels is not None else None),
            "local_plan": grant(Knows.LOCAL_PLAN, facts.local_plan),
            "bn_running": grant(Knows.BN_RUNNING, facts.bn_running),
            "bn_batch": grant(Knows.BN_BATCH, update.bn if update else None),
            "augmentation": grant(Knows.AUGMENTATION, facts.augmentation),
            "auxiliary": grant(Knows.AUXILIARY, facts.auxiliary),
            "cohort": grant(Knows.COHORT, update.clients if update else None),
            "defence": grant(Knows.DEFENCE, facts.defence),
            "gallery": grant(Knows.GALLERY, facts.gallery),
            "modified_model": grant(Knows.MODIFIED_MODEL, True),
        }
        return Observation(
            model=model,
            messages=tuple(GradientMessage(dict(u.gradients), u.plan.kind) for u in updates),
            domain=facts.domain,
            mode=facts.mode,
            image_shape=facts.image_shape,
            classes=facts.classes,
            **fields,  # type: ignore[arg-type]
        )
