"""Unmixing as steps of the one loop: several starts of alternating rounds, the likeliest kept.

The mathematics is `frostglass.numerics.unmixing`; here is what an attack adds: which encodings are taken, what was
granted, checkpoints, and the account for the report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from frostglass.attacks.encodings.given import (
    NO_ENCODINGS,
    encodings_of,
    messages_of,
    mixing_of,
    per_class_of,
    targets_of,
)
from frostglass.core.drive import Scalars
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics import unmixing
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.phase_retrieval import start_bytes
from frostglass.numerics.prng_search import label_mode
from frostglass.numerics.unmixing_weights import LabelKind

MOST_BYTES = 8 * 2**30
"""Tables of all pairs of images that are held."""

Likeness = Callable[[Tensor], Tensor]
"""[E, c, h, w] encodings -> [E, E] how much two of them seem to share an image."""


@dataclass(frozen=True)
class Progress:
    """Where the search stands.

    Args:
        rows: [e] encodings that are used.
        now: state of the current start.
        best: state of the likeliest start so far.
        start: number of the current start.
    """

    rows: Tensor
    now: unmixing.UnmixState
    best: unmixing.UnmixState
    start: int


@dataclass(frozen=True)
class Unmix:
    """Alternating assignment and reconstruction; see `unmix_statistical`.

    Args:
        name: as registered.
        starts: independent starts; the likeliest is read.
        rounds: of each start, at the most.
        limit: encodings used at the most, so that the table of all pairs stays below 4 limit^2 bytes.
        likeness: similarity of two encodings; None for the one of `numerics.unmixing`.
        misfit: of `likeness` and an image shape, a sentence, or nothing where it can be had of such encodings.
        needs: grants.
        sign_free: the images are recovered up to one sign for the whole set.
    """

    name: str
    starts: int
    rounds: int
    limit: int
    likeness: Likeness | None = field(default=None, compare=False)
    misfit: Callable[[tuple[int, ...]], str] | None = field(default=None, compare=False)
    needs: frozenset[Knows] = frozenset({Knows.EXAMPLES})
    every: int = 1
    sign_free: bool = True

    @property
    def steps(self) -> int:
        """Rounds of all starts."""
        return self.starts * self.rounds

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        if not messages_of(seen):
            return [NO_ENCODINGS]
        wrong = "" if self.misfit is None else self.misfit(seen.image_shape)
        if wrong:
            return [wrong]
        if not seen.examples:
            return ["it needs the number of private images; give --known images=N."]
        if private_slots(seen) is None:
            return ["it needs the number of private images in one encoding; give --known k=6,private=2."]
        needed = start_bytes(seen.examples, math.prod(seen.image_shape))
        if needed > MOST_BYTES:
            return [
                f"{seen.examples} private images are too many at once: tables of all pairs of images would take "
                f"{needed / 2**30:.0f} GiB; attack a part of the set (encodings of some classes), or smaller images."
            ]
        if not len(labelled_rows(seen)):
            return ["every label is a row of zeros, which names no class; give --known labels=none."]
        try:
            self._problem(seen, labelled_rows(seen)[: self.limit], torch.device("cpu"))
        except BadInput as told:
            return list(told.problems)
        return []

    def init(self, seen: Observation, run: Runtime) -> Progress:
        """Chooses the encodings and groups them for the first start."""
        held = encodings_of(seen)
        if not bool(held.isfinite().all()):
            raise AttackFailed(f"{self.name}: the encodings hold values that are not finite.")
        rows = labelled_rows(seen)
        if len(rows) > self.limit:
            rows = rows[run.rng.at("sample").permutation(len(rows))[: self.limit].sort().values]
        state = self._start(seen, rows, run, 0)
        return Progress(rows, state, state, 0)

    def step(self, seen: Observation, state: Progress, run: Runtime, t: int) -> tuple[Progress, Scalars]:
        """One round of the current start, or the first one of the next."""
        now, start = state.now, state.start
        if now.settled or now.round >= self.rounds:
            start += 1
            now = self._start(seen, state.rows, run, start)
        now = unmixing.unmix_round(self._problem(seen, state.rows, run.device), now)
        best = now if start == state.start == 0 or now.log_likelihood >= state.best.log_likelihood else state.best
        new = replace(state, now=now, best=best, start=start)
        changed = now.history[-1].get("changed", 0.0) if now.history else 0.0
        return new, {"log_likelihood": now.log_likelihood, "changed": changed, "start": float(start)}

    def done(self, state: Progress) -> bool:
        """The last start has settled."""
        ended = state.now.settled or state.now.round >= self.rounds
        return ended and state.start >= self.starts - 1

    def warnings(self, seen: Observation) -> list[str]:
        """What the result leaves out."""
        missing = len(encodings_of(seen)) - len(labelled_rows(seen))
        return [f"{missing} encodings have a label of zeros, and were left out."] if missing else []

    def read(self, seen: Observation, state: Progress) -> Reconstruction:
        """Images of the likeliest start, numbered class by class."""
        found = unmixing.unmix_read(state.best)
        counts = per_class_of(seen)
        targets = None
        if counts is not None and int(counts.sum()) == len(found.images) and targets_of(seen) is not None:
            classes = torch.repeat_interleave(torch.arange(len(counts)), counts)
            targets = torch.nn.functional.one_hot(classes, len(counts)).float()
        info: dict[str, float | int | str | bool] = {
            "encodings_used": len(state.rows), "of": len(encodings_of(seen)), "starts": state.start + 1,
            "rounds_of_the_best": state.best.round, "settled": state.best.settled,
            "log_likelihood": state.best.log_likelihood,
        }  # fmt: skip
        return Reconstruction(
            seen.domain.clamp(found.images.float().cpu()),
            torch.zeros(len(found.images), dtype=torch.bool),
            -state.best.log_likelihood,
            targets=targets,
            info=info,
        )

    def _problem(self, seen: Observation, rows: Tensor, device: torch.device) -> unmixing.UnmixProblem:
        targets, mixing = targets_of(seen), mixing_of(seen)
        return unmixing.problem(
            encodings_of(seen)[rows].to(device).float(),
            None if targets is None else targets[rows].float(),
            None if targets is None else per_class_of(seen),
            private=private_slots(seen) or 2,
            images=seen.examples or 1,
            kind=label_kind(seen),
            most=(MixLaw() if mixing is None else mixing.law).c1,
        )

    def _start(self, seen: Observation, rows: Tensor, run: Runtime, start: int) -> unmixing.UnmixState:
        given = self._problem(seen, rows, run.device)
        alike = None if self.likeness is None else self.likeness(given.y)
        return unmixing.unmix_start(given, run.rng.at("start", start), similarity=alike)


def labelled_rows(seen: Observation) -> Tensor:
    """Encodings whose label says something (coarse labels may round to zeros); all if there are no labels."""
    targets = targets_of(seen)
    return torch.arange(len(encodings_of(seen))) if targets is None else targets.sum(1).nonzero().flatten()


def label_kind(seen: Observation) -> LabelKind:
    """What the labels tell of the coefficients, as their values show."""
    targets, mixing = targets_of(seen), mixing_of(seen)
    if targets is None:
        return "none"
    if mixing is None:  # without k nobody knows whether mass may be missing: any bound will do
        return label_mode(targets.numpy(), MixLaw(2, 2, c1=1.0)) or "one_hot"
    support = targets > 0
    mean = targets.sum(1, keepdim=True) / support.sum(1, keepdim=True).clamp_min(1)
    if bool(torch.where(support, (targets - mean).abs() < 1e-6, True).all()) and bool(targets.sum(1).std() < 1e-6):
        return "one_hot"  # classes without coefficients
    return label_mode(targets.numpy(), mixing.law) or "one_hot"


def private_slots(seen: Observation) -> int | None:
    """Private images in one encoding: as granted, else the most classes that a label names; None if neither tells."""
    mixing, targets = mixing_of(seen), targets_of(seen)
    if mixing is not None:
        return mixing.law.private
    most = 0 if targets is None else int((targets > 0).sum(1).max())
    return most if most > 1 else None  # one class a label: nothing is said of how many images there are
