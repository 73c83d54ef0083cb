"""Identification games on one update: one of the client's images among others of its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from frostglass.core.batch import Batch
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.threat import Gallery
from frostglass.federated.gate import Finding


def check_decoys(decoys: Any) -> None:
    """Refused at once: the gate would find it out at every update, and lets updates out that fail open.

    Raises:
        BadInput: they are no images in [0, 1] with a class each.
    """
    if not (isinstance(decoys, tuple | list) and len(decoys) == 2 and all(isinstance(d, Tensor) for d in decoys)):
        raise BadInput("outgoing_checks.decoys: give two tensors, images and their class indices.")
    images, labels = decoys
    fits = images.ndim == 4 and images.is_floating_point() and labels.shape == images.shape[:1]
    if not fits or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise BadInput(
            f"outgoing_checks.decoys: images {tuple(images.shape)}, {images.dtype} and labels {tuple(labels.shape)}, "
            f"{labels.dtype} must be floating point [n, c, h, w] and whole numbers [n]."
        )
    if len(images) and not (float(images.min()) >= -1 and float(images.max()) <= 1):  # false for nan, too
        raise BadInput(
            f"outgoing_checks.decoys: images from {float(images.min()):g} to {float(images.max()):g} must be in "
            "[0, 1] (in the range of encodings [-1, 1]); divide bytes by 255, and leave normalisation to the model."
        )


def candidates_for(own: Batch, decoys: tuple[Tensor, Tensor], count: int, rng: Rng) -> tuple[Gallery, int] | None:
    """(the first image of `own` among others of its class, its place); None if there are too few others.

    None, too, if that image stands twice in the message: as decoys equal to one of its images are left out, whoever
    knows the others would name it without the update.

    Args:
        own: the message, the image that is asked for first.
        decoys: images in [0, 1] and their classes; those equal to an image of the message are left out.
        count: of all candidates.
        rng: of the choice and the place, fresh for every game.
    """
    images, labels = decoys
    if bool((own.images[1:] == own.images[:1]).flatten(1).all(1).any()):
        return None
    kind = int(own.targets[0].argmax())
    rows = (labels == kind).nonzero().flatten()
    others = images[rows[rng.at("rows").permutation(len(rows))]].to(own.images)
    inside = (others[:, None] == own.images[None]).flatten(2).all(2).any(1) if len(others) else rows.bool()
    others = others[~inside][: count - 1]
    if len(others) < count - 1:
        return None
    place = int(rng.at("place").integers(count, (1,)))
    held = torch.cat([others[:place], own.images[:1], others[place:]])
    return Gallery(held, own.targets[:1].expand(count, -1), own.images[1:], own.targets[1:]), place


def named(hits: int, asked: int, candidates: int, tolerance: float) -> Finding:
    """What so many games on one update can say.

    Without any leakage each game is won with probability 1/N, so by Markov's inequality a share of at least r comes up
    with probability at most 1/(N r), however the games depend on each other.
    """
    share, chance = hits / asked, 1 / candidates
    text = (
        f"{hits} of {asked} images were named among {candidates} of their class (chance {chance:.2g}) by an attack "
        "that knew all other images of the update."
    )
    if hits:
        bound = min(1, chance / share)
        text += f" An update that says nothing would give so many with a probability of at most {bound:.2g}."
    if asked == 1:
        text += " One game is one trial: it tells no rate."
    else:
        text += " All games are about one update and depend on each other: they are no independent trials."
    return Finding("gallery", share > tolerance, share, tolerance, text)
