"""The identification game: which of N candidates is in the message? N gradients, no optimisation, chance 1/N."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from frostglass.attacks.identification.statistics import Evidence, evidence_of
from frostglass.attacks.inversion.target import refuse_broken_values, update_problems
from frostglass.attacks.registry import ATTACKS
from frostglass.core.defense import Defense, as_they_are
from frostglass.core.drive import Scalars
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation

PIECES = 10
"""Parts that the candidates are gone through in, so that a long run reports and resumes."""


@dataclass(frozen=True)
class Scores:
    """Of every candidate; NaN before its turn. The greatest is named."""

    values: Tensor


@dataclass(frozen=True)
class GalleryAttack:
    """See `gallery`."""

    name: str
    chunk: int
    steps: int = PIECES
    every: int = 1
    needs: frozenset[Knows] = frozenset({Knows.GALLERY})

    _held: weakref.WeakKeyDictionary[Observation, tuple[torch.device, Evidence]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        problems = update_problems(seen)
        if seen.gallery is None or len(seen.gallery) < 2:
            problems.append("attack gallery: there are no candidates; grant 'gallery'.")
        kinds = {getattr(m, "kind", "gradient") for m in seen.messages}
        if kinds != {"gradient"} and seen.local_plan is None:
            problems.append(
                "attack gallery: weight differences are rehearsed by the client's plan; grant 'local_plan'."
            )
        if (seen.cohort or 1) > 1 and seen.defence is not None and not _adds_up(seen.defence):
            problems.append(
                f"attack gallery: {seen.defence.name!r} acts on each client's update, which a sum of {seen.cohort} "
                "does not show; set client.cohort = 1."
            )
        return problems

    def warnings(self, seen: Observation) -> list[str]:
        """What its game supposes."""
        if seen.gallery is None or not len(seen.gallery.other_images):
            return []
        return [
            "The gallery attack was told all other images of the message, as proved bounds suppose; whoever does not "
            "know them succeeds less often."
        ]

    def init(self, seen: Observation, run: Runtime) -> Scores:
        """No candidate has been looked at."""
        refuse_broken_values(seen)
        assert seen.gallery is not None
        self._evidence(seen, run)
        return Scores(torch.full((len(seen.gallery),), float("nan"), dtype=torch.float64))

    def step(self, seen: Observation, state: Scores, run: Runtime, t: int) -> tuple[Scores, Scalars]:
        """The t-th tenth of the candidates."""
        count = len(state.values)
        rows = slice(t * count // PIECES, (t + 1) * count // PIECES)
        values = state.values.clone()
        if rows.start < rows.stop:
            values[rows] = self._evidence(seen, run).scores(rows, self.chunk).cpu()
        return Scores(values), {"candidates": rows.stop}

    def done(self, state: Scores) -> bool:
        """Every candidate has its turn."""
        return False

    def read(self, seen: Observation, state: Scores) -> Reconstruction:
        """No image is drawn: the choice is a number in `info`, and scoring alone knows whether it is right."""
        known = state.values.nan_to_num(float("-inf"))
        order = known.argsort(descending=True, stable=True)
        lead = float(known[order[0]] - known[order[1]])
        info: dict[str, float | int | str | bool] = {
            "choice": int(order[0]),
            "candidates": len(known),
            "statistic": self._held[seen][1].name,
        }
        if abs(lead) < float("inf"):
            info["lead"] = lead
        return Reconstruction(
            images=torch.zeros(0, *seen.image_shape),
            proved=torch.zeros(0, dtype=torch.bool),
            objective=float("nan"),
            info=info,
        )

    def _evidence(self, seen: Observation, run: Runtime) -> Evidence:
        held = self._held.get(seen)
        if held is None or held[0] != run.device:
            held = (run.device, evidence_of(seen, run))
            self._held[seen] = held
        return held[1]


def _adds_up(defence: Defense) -> bool:
    """Whether a sum of defended updates is the defended update of all images: nothing but noise acts on the whole."""
    parts = defence.parts or (defence,)
    return all(p.simulate is as_they_are or (p.mechanism is not None and p.mechanism.unit == "image") for p in parts)


@ATTACKS.register(paper="Hayes et al. 2023, NeurIPS (reconstruction robustness, prior-aware attack)", family="gallery")
def gallery(*, chunk: int = 32) -> GalleryAttack:
    """Names the image of the message among N candidates of its class; the attack that bounds can be compared with.

    The statistic is the log-likelihood ratio where the defence is granted and adds Gaussian noise, else the cosine.
    All other images of the message are known to it. Needs no optimisation: one gradient a candidate.

    Args:
        chunk: candidates that go through the network together.
    """
    return GalleryAttack("gallery", max(1, chunk))
