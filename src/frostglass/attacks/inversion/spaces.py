"""Where an inversion searches: pixels, pixels with labels, or whatever decodes to images (a generator's latents)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from frostglass.attacks.inversion.target import Target
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.image import blocks, shifted

Jitter: TypeAlias = Callable[[Rng], Callable[[Tensor], Tensor]]
"""Draws of one seed and step -> what is done to its images [b, c, h, w] before the network sees them."""


@dataclass(frozen=True)
class Space:
    """A variable of the search and how it becomes images.

    Args:
        start: (target, rows, rng, like) -> the variable of one seed, [rows, ...], with dtype and device of `like`.
        images: (variable of one seed, target) -> [rows, c, h, w] in the victim's normalised space, on the graph.
        labels: (variable of one seed, target) -> [rows, k] targets on the graph, None if they are no part of it.
        box: (variables of all seeds, target) -> the same, limited to what is allowed.
        holds_labels: whether `labels` returns something.
        per_row: rows are independent and `start` makes any number of them.
    """

    start: Callable[[Target, int, Rng, Tensor], Tensor]
    images: Callable[[Tensor, Target], Tensor]
    labels: Callable[[Tensor, Target], Tensor | None] = lambda z, target: None
    box: Callable[[Tensor, Target], Tensor] = lambda z, target: z
    holds_labels: bool = False
    per_row: bool = False


def pixels(start: float = 1.0, *, box: bool = True, coarse: int = 1) -> Space:
    """The pixels themselves, in the victim's normalised space.

    Args:
        start: standard deviation of the normal start.
        box: limit the pixels to the domain's bounds after every step.
        coarse: start with blocks of so many pixels of one value (see `rules.coarse_to_fine`).
    """

    def begin(target: Target, rows: int, rng: Rng, like: Tensor) -> Tensor:
        z = start * rng.normal((rows, *target.seen.image_shape), like=like)
        return blocks(z, coarse) * coarse if coarse > 1 else z  # the mean of n pixels has 1/sqrt(n) of their spread

    def limit(z: Tensor, target: Target) -> Tensor:
        return torch.minimum(torch.maximum(z, target.low), target.high)

    made = Space(begin, lambda z, target: z, per_row=True)
    return replace(made, box=limit) if box else made


def with_labels(space: Space) -> Space:
    """`space` with label logits appended to every row: labels are found with the images (Zhu et al. 2019).

    The images of `space` must be its variable, as in `pixels`.
    """

    def begin(target: Target, rows: int, rng: Rng, like: Tensor) -> Tensor:
        images = space.start(target, rows, rng.at("images"), like).flatten(1)
        return torch.cat([images, rng.at("labels").normal((rows, target.seen.classes), like=like)], 1)

    def images(z: Tensor, target: Target) -> Tensor:
        flat = z[..., : -target.seen.classes]
        return space.images(flat.reshape(*flat.shape[:-1], *target.seen.image_shape), target)

    def limit(z: Tensor, target: Target) -> Tensor:
        limited = space.box(images(z, target), target).flatten(-3)
        return torch.cat([limited, z[..., -target.seen.classes :]], -1)

    def labels(z: Tensor, target: Target) -> Tensor:
        return torch.softmax(z[..., -target.seen.classes :], -1)

    return Space(begin, images, labels, limit, holds_labels=True)


def random_shift(pixels: int, *, flip: bool) -> Jitter:
    """Rolled by up to `pixels` in both directions and, if `flip`, mirrored every other time (Yin et al. 2020)."""

    if pixels < 0:
        raise BadInput(f"attack.shift: {pixels} must be from 0 pixels.")

    def draw(rng: Rng) -> Callable[[Tensor], Tensor]:
        down, right = (int(n) for n in rng.at("shift").numpy().integers(-pixels, pixels + 1, 2))
        mirrored = flip and rng.at("flip").numpy().random() < 0.5
        return lambda x: shifted(x, down, right, flip=mirrored)

    return draw
