"""What an attack on encodings reads of an observation, laid out once.

The grants of an audit of encodings are those of any audit:

    messages    the encodings, with the targets that were published beside them (None if none were)
    examples    how many private images there are
    labels      [N, classes] labels of the private images in no order: how many images each class has
    defence     the encoder's settings (k, private, c1, c2, law, mask, labels), and its public pool where that is known
    auxiliary   other images of the same kind

All of it lies on the CPU, where it was read; attacks move what they compute with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.core.threat import EncodingMessage, Observation
from frostglass.numerics.key_rows import MixLaw

NO_ENCODINGS = "it reads encodings, and the clients sent updates; run it with `frostglass unmix`."


@dataclass(frozen=True)
class Mixing:
    """The encoder's settings as a grant, never its keys.

    Args:
        law: k, private slots and bounds.
        mask: "sign", "abs" or "none".
        public: [M, c, h, w] the pool in [-1, 1], or None if it is not known.
        public_images: its size, 0 if there is none or nobody said.
        shards: rows of each part of the set that has keys of its own; empty if nobody said.
        challenge_rounds: of a challenge, whose keys are drawn in rounds; 0 for a set, or if nobody said.
    """

    law: MixLaw
    mask: str
    public: Tensor | None = field(default=None, repr=False)
    public_images: int = 0
    shards: tuple[int, ...] = ()
    challenge_rounds: int = 0


def messages_of(seen: Observation) -> list[EncodingMessage]:
    """The messages that hold encodings; each holds those that are known to belong together."""
    return [m for m in seen.messages if isinstance(m, EncodingMessage)]


def encodings_of(seen: Observation) -> Float[Tensor, "e c h w"]:
    """All encodings in the order in which they were sent, also where messages put those of one image together."""
    found = messages_of(seen)
    return found[0].images if len(found) == 1 else _in_order(found, torch.cat([m.images for m in found]))


def targets_of(seen: Observation) -> Float[Tensor, "e k"] | None:
    """The published label of each encoding, None unless every message has them."""
    found = [m.targets for m in messages_of(seen)]
    if not found or any(t is None for t in found):
        return None
    return _in_order(messages_of(seen), torch.cat([t for t in found if t is not None]))


def _in_order(messages: list[EncodingMessage], joined: Tensor) -> Tensor:
    places = [m.rows for m in messages if m.rows is not None]
    return joined if len(places) < len(messages) else joined[torch.cat(places).argsort()]


def per_class_of(seen: Observation) -> Tensor | None:
    """[classes] private images of each class, None if not granted."""
    return None if seen.labels is None else seen.labels.sum(0).round().long()


def mixing_of(seen: Observation) -> Mixing | None:
    """The encoder's settings, None if not granted or not those of an encoder."""
    if seen.defence is None or "k" not in seen.defence.settings:
        return None
    s: dict[str, Any] = seen.defence.settings
    law = MixLaw(s["k"], s.get("private") or s["k"], s.get("c1", 0.65), s.get("c2", 0.3), s.get("law", "folded_normal"))
    return Mixing(
        law, s.get("mask", "sign"), s.get("public"), int(s.get("public_images") or 0), tuple(s.get("shards") or ()),
        int(s.get("challenge_rounds") or 0),
    )  # fmt: skip


def nothing(seen: Observation, **info: float | int | str | bool) -> Any:
    """The result of an attack that found no image."""
    from frostglass.core.reconstruction import Reconstruction

    return Reconstruction(torch.zeros(0, *seen.image_shape), torch.zeros(0, dtype=torch.bool), float("nan"), info=info)
