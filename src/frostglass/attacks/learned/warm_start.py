"""Thaw from where a learned inverter ends: learning finds what an image looks like, matching the details."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from frostglass.attacks.inversion.machine import Inversion, InversionState
from frostglass.attacks.learned.inverter import InverterState, LearnedInverter, learned_inverter
from frostglass.attacks.recipes.thaw import thaw
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation


@dataclass(frozen=True)
class Both:
    """States of the two attacks; the second one's is where it begins until the first has ended."""

    learned: InverterState
    matched: InversionState
    started: int


@dataclass(frozen=True)
class WarmStarted:
    """An inverter, then an inversion in pixel space that starts from its images."""

    name: str
    first: LearnedInverter
    second: Inversion
    every: int

    @property
    def steps(self) -> int:
        """Of both."""
        return self.first.steps + self.second.steps

    @property
    def needs(self) -> frozenset[Knows]:
        """Of both."""
        return self.first.needs | self.second.needs

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        return list(dict.fromkeys([*self.first.check(seen), *self.second.check(seen)]))

    def warnings(self, seen: Observation) -> list[str]:
        """Of the inversion."""
        return self.second.warnings(seen)

    def init(self, seen: Observation, run: Runtime) -> Both:
        """Before the first step of either."""
        return Both(self.first.init(seen, run.at("learn")), self.second.init(seen, run.at("match")), 0)

    def step(self, seen: Observation, state: Both, run: Runtime, t: int) -> tuple[Both, Scalars]:
        """One of the inverter's steps, then of the inversion's."""
        if t < self.first.steps:
            learned, scalars = self.first.step(seen, state.learned, run.at("learn"), t)
            return replace(state, learned=learned), scalars
        matched = state.matched
        if t == self.first.steps:
            matched = replace(matched, z=self._start(seen, state.learned, matched.z))
        matched, scalars = self.second.step(seen, matched, run.at("match"), t - self.first.steps)
        return Both(state.learned, matched, 1), scalars

    def done(self, state: Both) -> bool:
        """The schedules end it."""
        return False

    def read(self, seen: Observation, state: Both) -> Reconstruction:
        """Of the inversion, once it has begun."""
        return self.second.read(seen, state.matched) if state.started else self.first.read(seen, state.learned)

    def objective_of(self, seen: Observation, images: Tensor, targets: Tensor, run: Runtime) -> float:
        """The inversion's, at given images."""
        return self.second.objective_of(seen, images, targets, run)

    def _start(self, seen: Observation, learned: InverterState, like: Tensor) -> Tensor:
        """[s, rows, c, h, w]: the learned images for every seed, and for every epoch that has images of its own."""
        z = seen.domain.normalise(self.first.read(seen, learned).images.to(like))
        return z.repeat(like.shape[1] // len(z), 1, 1, 1).expand_as(like).clone()


@ATTACKS.register(paper="Frostglass; Wu et al. 2023, UAI, as a start for gradient matching", family="learned")
def learned_thaw(
    *,
    steps: int = 400,
    lr: float = 0.1,
    tv: float = 1e-3,
    rehearsals: int = 1000,
    training: int = 600,
    every: int = 50,
) -> WarmStarted:
    """`thaw` with a small learning rate, from the images that `learned_inverter` draws.

    Args:
        steps: iterations of thaw.
        lr: its peak learning rate: small, or the start is forgotten.
        tv: its weight of the total variation.
        rehearsals, training: of the inverter.
        every: steps between two reports.
    """
    first = learned_inverter(rehearsals=rehearsals, training=training, every=every)
    second = thaw(steps=steps, lr=lr, tv=tv, tv_start=tv, every=every)
    return WarmStarted("learned_thaw", first, second, every)
