"""Candidates for the identification game: the target among other images of its class, in an order that says nothing."""

from __future__ import annotations

import hashlib

import torch

from frostglass.auditing.prepare import Prepared
from frostglass.core.batch import Batch, one_hot
from frostglass.core.errors import BadInput
from frostglass.core.threat import Gallery, Knows


def shuffled_gallery(prepared: Prepared, private: Batch, unit: int) -> tuple[Gallery | None, int | None]:
    """(candidates, place of the target among them), or (None, None) where the threat model grants no gallery.

    The target is the first image of the message, which was drawn uniformly; the others are drawn uniformly from the
    rest of its class, so that all candidates are equally likely to whoever has not seen the message. Images equal to
    one of the message, pixel by pixel, are left out. Candidates are as they were before augmentation.

    Args:
        prepared: the scenario.
        private: all images of the message, before augmentation and encoding.
        unit: number of the repetition.

    Raises:
        BadInput: the source holds too few images of that class.
    """
    if Knows.GALLERY not in prepared.threat.grants:
        return None, None
    wanted, data = prepared.threat.gallery, prepared.data
    target, kind = private.images[0].cpu(), int(private.targets[0].argmax())
    inside = {_digest(image) for image in private.images}
    names = set(private.ids)
    # the order of draws and of places hang on the private pixels: a plan's seed is no secret
    key = prepared.rng.at("gallery", unit, hashlib.sha256(target.numpy().tobytes()).digest())
    rows = [
        i
        for i in key.at("rows").permutation(len(data.images)).tolist()
        if int(data.labels[i]) == kind and data.names[i] not in names
    ]
    chosen: list[int] = []
    for i in rows:
        digest = _digest(data.images[i])
        if len(chosen) < wanted - 1 and digest not in inside:
            chosen.append(i)
            inside.add(digest)
    if len(chosen) < wanted - 1:
        raise BadInput(
            f"threat.gallery: {wanted} candidates of class {kind} are more than the {len(chosen) + 1} that "
            f"{data.source} has outside the batch; lower it."
        )
    place = int(key.at("place").integers(wanted, (1,)))
    images = torch.cat([data.images[chosen[:place]], target[None], data.images[chosen[place:]]]).to(prepared.device)
    targets = one_hot(torch.full((wanted,), kind), prepared.classes).to(prepared.device)
    clients = prepared.scenario.client.cohort
    return Gallery(images, targets, private.images[1:], private.targets[1:], clients), place


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).digest()
