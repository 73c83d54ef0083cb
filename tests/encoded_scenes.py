"""Small sets of encodings that tests attack: crops of the bundled photographs, mixed by the real encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frostglass.core.defense import Defense
from frostglass.core.randomness import Rng
from frostglass.core.threat import EncodingMessage, Observation
from frostglass.defenses.encoder import encoded_domain
from frostglass.defenses.instahide import InstaHide
from frostglass.vision import datasets


@cache
def crops(side: int = 16, count: int = 72) -> Tensor:
    """[count, 3, side, side] in [0, 1]: tiles of the photographs, one photograph after the other, all unlike."""
    held = datasets.load("photos", size=3 * side, rows=range(8)).images
    tiles = held.unfold(2, side, side).unfold(3, side, side)  # [8, 3, 3, 3, side, side]
    made = tiles.permute(2, 3, 0, 1, 4, 5).reshape(-1, 3, side, side)
    return made[:count].contiguous()


@dataclass(frozen=True)
class Scene:
    """Encodings as an attacker sees them, with the truth beside them for the test."""

    seen: Observation
    images: Tensor
    labels: Tensor
    pool: Tensor | None = field(default=None)


def scene(
    *, images: int = 6, rounds: int = 20, k: int = 2, private: int | None = None, classes: int = 3, side: int = 16,
    pool: int = 40, grant_pool: bool = False, **settings: Any,
) -> Scene:  # fmt: skip
    """`rounds` encodings of each image; slot 0 in the order of the images."""
    private = k if private is None else private
    held = crops(side)
    x, y = held[:images], torch.arange(images) % classes
    public = held[-pool:] if private < k else None
    encoder = InstaHide(
        **{"k": k, "private": private, "public": public, "labels": "exact", "insecure_seed": 1, **settings}
    )
    rows = np.tile(np.arange(images), rounds)
    made = encoder.encode_rows(x, y, rows, 0, classes)
    told: dict[str, Any] = {
        "k": k, "private": private, "law": encoder.law.law, "mask": encoder.mask, "labels": encoder.labels,
        "c1": encoder.law.c1, "c2": encoder.law.c2, "public_images": 0 if public is None else len(public),
        "public": public * 2 - 1 if grant_pool and public is not None else None,
    }  # fmt: skip
    return Scene(observed(made.images, made.targets, images, torch.bincount(y, minlength=classes), told), x, y, public)


def observed(
    encodings: Tensor,
    targets: Tensor | None,
    images: int | None,
    per_class: Tensor | None,
    given: dict[str, Any] | None,
    groups: list[Tensor] | None = None,
    auxiliary: Tensor | None = None,
) -> Observation:
    """An observation of encodings under explicit grants."""
    index = groups or [torch.arange(len(encodings))]
    rows = None
    if per_class is not None:
        rows = torch.nn.functional.one_hot(
            torch.repeat_interleave(torch.arange(len(per_class)), per_class), len(per_class)
        )
    shape = encodings.shape[1:]
    return Observation(
        model=nn.Identity(),
        messages=tuple(EncodingMessage(encodings[i], None if targets is None else targets[i]) for i in index),
        domain=encoded_domain(int(shape[0])),
        mode="eval",
        image_shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        classes=1 if targets is None else targets.shape[1],
        examples=images,
        labels=None if rows is None else rows.float(),
        auxiliary=auxiliary,
        defence=None if given is None else Defense("instahide", settings=given, encodes=True),
    )


def similarity_of_best(found: Tensor, truth: Tensor, *, either_sign: bool) -> float:
    """Mean SSIM after matching; `found` in [-1, 1], `truth` in [0, 1]."""
    from frostglass.auditing.metrics.ssim import ssim_values
    from frostglass.numerics.assign import assign

    best = -1.0
    for sign in (1, -1) if either_sign else (1,):
        unit = (sign * found + 1) / 2
        order = assign(unit, truth)
        hit = order >= 0
        total = float(ssim_values(unit[order[hit]], truth[hit]).sum()) if bool(hit.any()) else 0.0
        best = max(best, total / len(truth))
    return best


def random_key(seed: int) -> Rng:
    """A key for an attack under test."""
    return Rng.from_seed(seed, "test")
