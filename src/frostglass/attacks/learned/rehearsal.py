"""What an attacker's own images look like after the user's own defence: pairs of update and images to learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.attacks.inversion.restore import by_counts, targets_of
from frostglass.core.batch import Batch, Domain
from frostglass.core.defense import Defense
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.called import copied
from frostglass.numerics.client_step import defended_step
from frostglass.numerics.local_update import trainable

SKETCH = 2048
"""Entries of an update that an inverter reads; larger updates are hashed down to so many."""


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """The client's side, as far as the attacker knows it, on the attacker's images.

    Args:
        model: a copy of the global model.
        images: [m, c, h, w] auxiliary images in [0, 1].
        targets: [b, k] of the message, granted or restored; None if rows are encodings, whose images' labels differ.
        plan: of the client.
        defence: granted, or none.
        names: parameters that were observed.
        bucket: [p] where each entry of an update goes; None if all are read.
        turn: [p] +1 or -1, as in a count sketch.
        examples: images of a message.
        classes: of the model.
        domain: bounds and normalisation of the observed message.
    """

    model: nn.Module
    images: Float[Tensor, "m c h w"]
    targets: Float[Tensor, "b k"] | None
    plan: LocalPlan
    defence: Defense
    names: tuple[str, ...]
    bucket: Tensor | None
    turn: Tensor | None
    examples: int
    classes: int
    domain: Domain

    @property
    def width(self) -> int:
        """Entries of `features`."""
        if self.bucket is not None:
            return SKETCH
        sizes = dict(trainable(self.model))
        return sum(sizes[n].numel() for n in self.names)

    def features(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, " d"]:
        """An update as the inverter reads it: hashed, if it is large, and of length sqrt(d)."""
        flat = torch.cat([gradients[n].flatten() for n in self.names])
        if self.bucket is not None and self.turn is not None:
            flat = torch.zeros(SKETCH, dtype=flat.dtype, device=flat.device).index_add_(
                0, self.bucket, self.turn.to(flat) * flat
            )
        return flat * (len(flat) ** 0.5 / flat.norm().clamp_min(torch.finfo(flat.dtype).tiny))

    def pair(self, rng: Rng) -> tuple[Float[Tensor, " d"], Float[Tensor, "b c h w"]]:
        """(features of an update, the images that made it), with keys of the attacker's own."""
        rows = rng.at("rows").permutation(len(self.images))[: self.examples].to(self.images.device)
        images = self.images[rows]
        if self.targets is None:
            kinds = rng.at("labels").integers(self.classes, (self.examples,))
            targets = torch.nn.functional.one_hot(kinds, self.classes).to(images)
        else:
            targets = self.targets
        batch = Batch(images, targets, self.domain, tuple(map(str, rows.tolist())))
        _, update = defended_step(self.model, batch, self.plan, self.defence, rng.at("client"))
        return self.features(update.gradients), images


def rehearsal_of(seen: Observation, run: Runtime) -> Rehearsal:
    """Lays out what was granted.

    Raises:
        BadInput: `problems_of` is not empty.
        AttackFailed: the defence cannot be run on the auxiliary images.
    """
    problems = problems_of(seen)
    if problems:
        raise BadInput(problems)
    assert seen.auxiliary is not None
    assert seen.examples is not None
    model = copied(seen.model).to(run.device, run.dtype)
    model.train(seen.mode == "train")
    weights = trainable(model)
    names = tuple(n for n in weights if n in seen.gradients)
    size = sum(weights[n].numel() for n in names)
    bucket, turn = None, None
    if size > SKETCH:
        rng = run.rng.at("sketch")
        bucket = rng.at("bucket").integers(SKETCH, (size,)).to(run.device)
        turn = (2 * rng.at("turn").integers(2, (size,)) - 1).to(run.device, torch.int8)
    kind = next(m.kind for m in seen.messages if isinstance(m, GradientMessage))
    plan = seen.local_plan or LocalPlan(kind="gradient" if kind == "gradient" else "delta")
    plan = replace(plan, mode="train" if seen.mode == "train" else "eval")
    defence = seen.defence or Defense("none", claim="none")
    targets = None if defence.encodes else targets_of(seen, by_counts())[0].to(run.device, run.dtype)
    private = replace(seen.domain, low=0.0, high=1.0)
    images = seen.auxiliary.to(run.device, run.dtype)
    made = Rehearsal(
        model, images, targets, plan, defence, names, bucket, turn, seen.examples, seen.classes, private
    )  # fmt: skip
    try:
        made.pair(run.rng.at("trial"))
    except BadInput as wrong:
        raise AttackFailed(f"learned_inverter: the defence cannot be rehearsed ({wrong.problems[0]})") from wrong
    return made


def problems_of(seen: Observation) -> list[str]:
    """Why nothing can be rehearsed, a sentence each."""
    found = []
    if seen.auxiliary is None:
        found.append("attack learned_inverter: it learns on other images; grant 'auxiliary'.")
    elif seen.examples is not None and len(seen.auxiliary) < (least := max(2, seen.examples)):
        found.append(
            f"attack learned_inverter: auxiliary images are too few ({len(seen.auxiliary)}); give {least} at least, a "
            "batch to learn from and more than one image."
        )
    elif tuple(seen.auxiliary.shape[1:]) != tuple(seen.image_shape):
        found.append(
            f"attack learned_inverter: auxiliary images of shape {tuple(seen.auxiliary.shape[1:])} against "
            f"{seen.image_shape} of the private ones; give images of that shape."
        )
    if seen.examples is None:
        found.append("attack: the number of images must be known; grant 'examples'.")
    if not found and not (seen.defence is not None and seen.defence.encodes):
        try:
            targets_of(seen, by_counts())  # kept for the rehearsals
        except BadInput as wrong:
            found += wrong.problems
    return found
