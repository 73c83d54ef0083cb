"""What a single encoding shows: the absolute value of the mix, the mask taken off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frostglass.attacks.encodings.given import NO_ENCODINGS, encodings_of, messages_of
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation

BRIGHT = 0.99
"""This quantile of |x~| is shown as white."""
MOST_PIXELS = 1 << 22
"""Pixels of one encoding that the quantile is taken of, at the most."""


@dataclass(frozen=True)
class Views:
    """Which encodings are shown, and as what: [r, c, h, w] in [-1, 1]."""

    images: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Demask:
    """See `demask`."""

    name: str
    views: int
    steps: int = 1
    every: int = 1
    needs: frozenset[Knows] = frozenset()

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        return [] if messages_of(seen) else [NO_ENCODINGS]

    def init(self, seen: Observation, run: Runtime) -> Views:
        """Nothing is shown yet."""
        return Views(torch.zeros(0, *seen.image_shape), torch.zeros(0, dtype=torch.long))

    def step(self, seen: Observation, state: Views, run: Runtime, t: int) -> tuple[Views, Scalars]:
        """|x~| of all encodings, or of a sample, each stretched to the full range."""
        held = encodings_of(seen)
        rows = torch.arange(len(held))
        if len(held) > self.views:
            rows = run.rng.at("sample").permutation(len(held))[: self.views].sort().values
        y = held[rows].float().abs()
        if not bool(y.isfinite().all()):
            raise AttackFailed("demask: the encodings hold values that are not finite.")
        pixels = y.flatten(1)
        some = pixels[:, :: -(-pixels.shape[1] // MOST_PIXELS)]  # torch refuses quantiles of more than 2^24 values
        white = some.quantile(BRIGHT, dim=1).clamp_min(1e-6).view(-1, 1, 1, 1)
        return Views((2 * y / white - 1).clamp(-1, 1), rows), {"views": len(rows)}

    def done(self, state: Views) -> bool:
        """One step is all."""
        return False

    def warnings(self, seen: Observation) -> list[str]:
        """What makes the score mislead."""
        return [
            "Best achievable similarity: the view that is closest to each private image was picked by the matching, "
            "among all views. Whoever holds the encodings cannot pick so; a person sees the views themselves."
        ]

    def read(self, seen: Observation, state: Views) -> Reconstruction:
        """The views."""
        return Reconstruction(
            state.images,
            torch.zeros(len(state.images), dtype=torch.bool),
            float("nan"),
            info={"views": len(state.images), "of_encodings": len(encodings_of(seen))},
        )


@ATTACKS.register(paper="Huang et al. 2020, ICML (demask, without its network)", family="encodings", reads="encodings")
def demask(*, views: int = 2000) -> Demask:
    """The view |x~| of each encoding: what one encoding shows by itself; its score is a best case, and says so.

    Args:
        views: encodings shown at the most, drawn from all.
    """
    if views < 1:
        raise BadInput(f"demask: views = {views} must be from 1.")
    return Demask("demask", views)
