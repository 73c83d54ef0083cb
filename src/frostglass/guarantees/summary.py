"""All bounds of one noise setting together: what `frostglass bound` prints and the linter recomputes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from frostglass.core.randomness import Rng
from frostglass.guarantees import conversions, rero
from frostglass.guarantees.accounting import Accountant, accounted_epsilon
from frostglass.guarantees.composed import NOISE, composed_gammas
from frostglass.guarantees.domain import SENSITIVITY, Adjacency, check
from frostglass.guarantees.exchange import exchanged_epsilon
from frostglass.guarantees.psnr_ceiling import psnr_ceiling

MANY = 1000
"""Releases from which the bound under sampling is composed numerically, where a grid can be had, and not simulated."""
MOST_SAMPLED = 10**6
"""Releases that are simulated at the most; of more, the bound without sampling is given, which holds too."""
PRV_GRID = 30_000
"""epsilon x sqrt(steps), to which the PRV accountant's memory is proportional: 100 MB here, terabytes beyond."""


@dataclass(frozen=True)
class Setting:
    """A Gaussian mechanism and how often it is applied.

    Args:
        noise_multiplier: sigma, noise on the sum in clipping norms.
        steps: releases T.
        rate: Poisson sampling rate q; 1: no sampling.
        delta: of (epsilon, delta).
        adjacency: "add_remove" or "replace_one".
        unit: what was clipped: "image" or "client".
    """

    noise_multiplier: float
    steps: int = 1
    rate: float = 1.0
    delta: float = 1e-5
    adjacency: Adjacency = "add_remove"
    unit: str = "image"

    def __post_init__(self) -> None:
        check(
            noise_multiplier=self.noise_multiplier, steps=self.steps, rate=self.rate, delta=self.delta,
            adjacency=self.adjacency,
        )  # fmt: skip

    @property
    def effective_noise(self) -> float:
        """sigma in units of the sensitivity: halved for replace-one."""
        return self.noise_multiplier / SENSITIVITY[self.adjacency]

    @property
    def exchanged(self) -> bool:
        """Whether a sampled unit is exchanged for another: half the noise is not its account then."""
        return self.rate < 1 and self.adjacency == "replace_one"

    def assumptions(self) -> list[str]:
        """What has to hold for the numbers to hold, a sentence each."""
        counted = "is added or removed" if self.adjacency == "add_remove" else "is exchanged for another"
        found = [
            f"Neighbouring data sets differ in one {self.unit}: it {counted}.",
            f"Each {self.unit}'s contribution is clipped, then Gaussian noise of {self.noise_multiplier:g} clipping "
            "norms is added to the sum; every tensor that leaves is noised.",
            f"At most {self.steps} such release{'s' if self.steps > 1 else ''} in all.",
            "The noise comes from a cryptographic generator whose seed nobody else knows; floating point is ignored.",
        ]
        if self.rate < 1:
            found.append(
                f"Each {self.unit} takes part in a step with probability {self.rate:g}, independently (Poisson); the "
                "attacker does not see who did. Shuffled batches are not covered."
            )
        return found


@dataclass(frozen=True)
class Bound:
    """The highest success of any attack at one level of chance.

    Args:
        kappa: success of the best guess without access.
        gamma: the bound.
        standard_error: of a simulated gamma, else 0.
    """

    kappa: float
    gamma: float
    standard_error: float = 0.0

    @property
    def upper(self) -> float:
        """Three standard errors above."""
        return min(1.0, self.gamma + 3 * self.standard_error)


def bounds(
    setting: Setting,
    kappas: Sequence[float],
    rng: Rng,
    samples: int | None = None,
    tick: Callable[[int], object] = lambda runs: None,
) -> list[Bound]:
    """gamma at each kappa: in closed form; under sampling composed numerically from `MANY` releases on, else simulated.

    Args:
        setting: the mechanism.
        kappas: levels in (0, 1).
        rng: of the simulation.
        samples, tick: of the simulation, if there is one, as in `rero.subsampled`; `tick` is told of 0 runs first.

    Raises:
        BadInput: a kappa outside (0, 1).
    """
    s = setting
    if s.rate < 1 and s.steps >= MANY:
        composed = composed_gammas(kappas, s.noise_multiplier, s.steps, s.rate, s.adjacency)
        if composed is not None:
            return [Bound(k, g) for k, g in zip(kappas, composed, strict=True)]
    if s.rate == 1 or s.steps > MOST_SAMPLED:
        return [Bound(k, rero.gaussian(k, s.noise_multiplier, s.steps, s.adjacency)) for k in kappas]
    tick(0)
    found = rero.subsampled(
        kappas, s.noise_multiplier, s.steps, s.rate, rng, adjacency=s.adjacency, samples=samples, tick=tick
    )  # fmt: skip
    return [Bound(k, e.gamma, e.standard_error) for k, e in zip(kappas, found, strict=True)]


def epsilons(setting: Setting) -> dict[str, float]:
    """epsilon at the setting's delta by name of the method; Opacus's numbers where it can be asked.

    RDP overflows far from a useful noise, and PRV takes memory as epsilon and steps grow; such a method is left out.
    Under sampling, exchanging a unit has an account of its own (`exchange`), of which Opacus does the composition.
    """
    s = setting
    found: dict[str, float] = {}
    if s.rate == 1:
        mu = conversions.gdp_mu(s.noise_multiplier, s.steps, s.adjacency)
        found["GDP, exact"] = conversions.gdp_epsilon(mu, s.delta)
        found["zCDP"] = conversions.zcdp_epsilon(conversions.zcdp_rho(mu), s.delta)
    rdp = _accounted(s, "rdp")
    if math.isfinite(rdp):
        found["RDP" if s.exchanged else "RDP, Opacus"] = rdp
    if NOISE[0] <= s.effective_noise <= NOISE[1] and rdp * math.sqrt(s.steps) <= PRV_GRID:
        prv = _accounted(s, "prv")
        if math.isfinite(prv):
            found["PRV, Opacus"] = prv
    return found


def _accounted(s: Setting, accountant: Accountant) -> float:
    """epsilon; infinite where the arithmetic overflows."""
    if s.exchanged:
        return exchanged_epsilon(s.noise_multiplier, steps=s.steps, rate=s.rate, delta=s.delta, accountant=accountant)
    try:
        return accounted_epsilon(s.effective_noise, steps=s.steps, rate=s.rate, delta=s.delta, accountant=accountant)
    except OverflowError:
        return math.inf


def to_json(
    setting: Setting, found: Sequence[Bound], spent: dict[str, float], dimensions: int | None
) -> dict[str, Any]:
    """Everything as values, for `--format json`."""
    return {
        "noise_multiplier": setting.noise_multiplier,
        "steps": setting.steps,
        "sampling_rate": setting.rate,
        "delta": setting.delta,
        "adjacency": setting.adjacency,
        "unit": setting.unit,
        "bounds": [{"kappa": b.kappa, "gamma": b.gamma, "standard_error": b.standard_error} for b in found],
        "epsilon": spent,
        "psnr_ceiling": None if dimensions is None else ceiling(setting, dimensions),
        "assumptions": setting.assumptions(),
    }


def ceiling(setting: Setting, dimensions: int) -> float | None:
    """No-prior PSNR ceiling in dB of an image; None where the unit is not the image.

    Of an image that is in every release; under sampling, in as many as are expected, rounded up. An image that chance
    takes more often has a higher one.
    """
    if setting.unit != "image":
        return None
    return psnr_ceiling(setting.noise_multiplier, dimensions, observations=observations(setting))


def observations(setting: Setting) -> int:
    """Releases that hold the image of `ceiling`."""
    return max(1, math.ceil(setting.steps * setting.rate - 1e-9))
