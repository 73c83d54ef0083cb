"""What the numbers of a configuration really give: noise multiplier, epsilon, gamma, and the PSNR ceiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from frostglass.auditing.linting.facts import Facts
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.guarantees.domain import LEAST_NOISE
from frostglass.guarantees.summary import Bound, Setting, bounds, ceiling, epsilons

DIMENSIONS = 3 * 224 * 224
"""Of the PSNR ceiling where the image size is not given."""

KAPPAS = (0.1, 0.01, 0.001)
SIMULATED = 20_000_000
"""Steps x runs of a simulation at most: a linter answers at once."""


@dataclass(frozen=True)
class Recomputed:
    """Of one mechanism, at its true sensitivity.

    Args:
        where: the mechanism.
        sigma: s / C.
        noise_std: s.
        rho: zCDP of one release.
        steps: releases that are composed; 1 where the file does not say.
        delta: of epsilon.
        declared: epsilon as the file says, None if it says none.
        epsilon: by method, over all releases.
        epsilon_release: exact epsilon of one release.
        gamma: bounds by chance level.
        psnr: no-prior ceiling in dB of a one-image update; None if clipped by client with many images.
        dimensions: that it is for.
        dimensions_given: False where a usual size was taken.
    """

    where: str
    sigma: float
    noise_std: float | None
    rho: float
    steps: int
    delta: float
    declared: float | None
    epsilon: dict[str, float]
    epsilon_release: float
    gamma: tuple[Bound, ...]
    psnr: float | None
    dimensions: int
    dimensions_given: bool

    def to_json(self) -> dict[str, Any]:
        """As values."""
        return asdict(self) | {"gamma": [asdict(b) for b in self.gamma]}


def recompute(facts: Facts, kappas: Sequence[float] = KAPPAS) -> Recomputed | None:
    """None where the file does not hold enough numbers, or impossible ones."""
    sigma = facts.sigma
    if sigma is None or not facts.calibrated or not (LEAST_NOISE <= sigma < math.inf):
        return None
    if facts.clip is not None and not facts.clip > 0:  # two negative numbers have a positive ratio
        return None
    rate = facts.rate if facts.rate is not None and facts.sampling in ("poisson", None) else 1.0
    steps = facts.steps or 1
    delta = facts.delta if facts.delta is not None else 1e-5
    try:
        setting = Setting(sigma, steps, rate, delta, facts.adjacency, facts.clip_unit or "image")
        one = Setting(sigma, 1, 1.0, delta, facts.adjacency)
    except BadInput:
        return None
    budget = max(2_000, min(100_000, SIMULATED // steps))
    found = bounds(setting, kappas, Rng.from_seed(0, "linter"), None if rate == 1 else budget)
    dimensions = facts.dimensions or DIMENSIONS
    as_image = Setting(sigma, steps, rate, delta, facts.adjacency)
    return Recomputed(
        facts.where or facts.name, sigma, facts.std, 0.5 * (1 / one.effective_noise) ** 2, steps, delta, facts.epsilon,
        epsilons(setting), epsilons(one)["GDP, exact"], tuple(found),
        ceiling(as_image if facts.clip_unit != "client" or steps == 1 else setting, dimensions), dimensions,
        facts.dimensions is not None,
    )  # fmt: skip
