"""Identification through InstaHide and Mixup: encodings first, by exact recovery, then what they can be mixed of."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.analytic.spear import spear
from frostglass.core.drive import drive
from frostglass.core.errors import AttackFailed
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Gallery, Observation

ROUNDS = 12
"""Alternations of signs and coefficients; most fits settle within five."""
AT_ONCE = 2**22
"""Pixels of fitted mixes that are held at a time."""


@dataclass(frozen=True, eq=False)
class Mixes:
    """Encodings that were read out of an update, against mixes of a candidate and the known rest of the batch.

    A sign mask hides signs alone: |x~| = |sum_j l_j x_j|. The coefficients of such a mix are found by guessing signs,
    solving for l and reading the signs anew (Gerchberg, Saxton 1972), from the signs of every image of the batch. With
    the true candidate every encoding is explained; with another the encodings that hold the target are not.

    Args:
        encodings: [e, d] in [-1, 1].
        gallery: candidates and the rest, pixels in [0, 1].
        masked: whether signs are hidden.
    """

    encodings: Float[Tensor, "e d"]
    gallery: Gallery
    masked: bool

    @property
    def name(self) -> str:
        """Of the statistic."""
        return "residual of encodings"

    def scores(self, rows: slice, chunk: int) -> Float[Tensor, " n"]:
        """Minus the squared residual of all encodings together."""
        others = self.gallery.other_images
        fits = len(self.encodings) * (2 + len(others)) * self.encodings.shape[1]
        at_once = max(1, min(chunk, AT_ONCE // fits))
        found = []
        for part in self.gallery.images[rows].split(at_once):
            batch = torch.cat([part[:, None], others.expand(len(part), *others.shape)], 1)
            found.append(-residuals(2 * batch.flatten(2).double() - 1, self.encodings, masked=self.masked))
        return torch.cat(found)


def residuals(batch: Float[Tensor, "n b d"], encodings: Float[Tensor, "e d"], *, masked: bool) -> Float[Tensor, " n"]:
    """Squared error of the best mixes of each batch, summed over the encodings.

    Args:
        batch: in float64, in [-1, 1].
        encodings: likewise.
        masked: compare absolute values.
    """
    n, b, d = batch.shape
    inverse = torch.linalg.pinv(batch, rtol=1e-6)  # [n, d, b]: weights of a mix from the mix
    y = encodings.abs() if masked else encodings
    if not masked:
        weights = _mixing_weights((y.expand(n, -1, -1)) @ inverse)
        return (weights @ batch - y).square().sum((1, 2))
    starts = torch.cat([batch, batch.mean(1, keepdim=True)], 1)  # [n, b + 1, d]
    signs = starts.sign()[:, None].expand(n, len(y), b + 1, d)
    for _ in range(ROUNDS):
        weights = _mixing_weights((signs * y[:, None]).flatten(1, 2) @ inverse)
        mixes = (weights @ batch).view(n, len(y), b + 1, d)
        signs = mixes.sign()
    return (mixes.abs() - y[:, None]).square().sum(3).amin(2).sum(1)


def _mixing_weights(solved: Tensor) -> Tensor:
    """Coefficients of a mix: none below 0, of sum 1."""
    weights = solved.clamp_min(0)
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)


_KNOWN: weakref.WeakKeyDictionary[Observation, list[Tensor]] = weakref.WeakKeyDictionary()


def unmixed(seen: Observation, gallery: Gallery, run: Runtime) -> Mixes | None:
    """Encodings out of a network whose first layer gives its inputs away; None where that does not work.

    Nothing is taken that SPEAR did not prove, and partners must be images of the batch, as the rest of it is known.
    Computed once an observation.
    """
    assert seen.defence is not None
    mixers = [p for p in (seen.defence.parts or (seen.defence,)) if p.encodes]
    inside = all(p.settings.get("private", p.settings.get("k")) == p.settings.get("k") for p in mixers)
    if len(mixers) != 1 or not inside or not len(gallery.other_images):
        return None
    if seen not in _KNOWN:
        _KNOWN[seen] = _recovered(seen, run)
    if not _KNOWN[seen]:
        return None
    encodings = _KNOWN[seen][0].flatten(1).double().to(gallery.images.device)
    return Mixes(encodings, gallery, mixers[0].settings.get("mask", "none") != "none")


def _recovered(seen: Observation, run: Runtime) -> list[Tensor]:
    """[images] or nothing."""
    attack = spear()
    if attack.check(seen):
        return []
    try:
        found = drive(attack, seen, run.at("unmix"))
    except AttackFailed:
        return []
    proved = found.images[found.proved]
    return [proved] if len(proved) else []
