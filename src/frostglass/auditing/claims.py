"""The guarantee that stands behind a cell: the plan's claim, or the proof of its defence."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from frostglass.auditing.cells import CellPlan
from frostglass.auditing.plan import Plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.plan_verdict import ClaimPlan
from frostglass.auditing.verdict_rules import Guarantee
from frostglass.core.defense import Defense
from frostglass.core.randomness import Rng
from frostglass.guarantees import rero
from frostglass.guarantees.domain import Adjacency
from frostglass.guarantees.summary import Setting, bounds

SAMPLES = 100_000


def guarantee_of(plan: Plan, cell: CellPlan, kappa: float, spent: Mapping[str, Any] | None = None) -> Guarantee | None:
    """gamma for a cell's success event at chance `kappa`; None where nothing is proved or claimed.

    `spent` is the privacy that one message of the cell was accounted to spend. The image is in the message that the
    attack sees, so sampling does not amplify what one message proves.
    """
    claim = plan.verdict.claim
    if claim is not None and cell.defense.label != "none" and claim.defense in (None, cell.defense.label):
        return _claimed(claim, kappa, _steps(cell, make_defense(cell.defense)))
    defense = make_defense(cell.defense)
    proofs = list(_proofs(cell, defense))
    found = [Guarantee(g := _gaussian(s, kappa), g, basis, tuple(s.assumptions())) for s, basis in proofs]
    found += _encoded(defense, spent or {}, kappa)
    return min(found, key=lambda g: g.observed, default=None)


def _proofs(cell: CellPlan, defense: Defense) -> Iterator[tuple[Setting, str]]:
    """Gaussian mechanisms among the parts of a defence; what follows one is post-processing."""
    for part in defense.parts or (defense,):
        mechanism = part.mechanism
        if part.claim == "proof" and mechanism is not None and mechanism.clip and mechanism.std > 0:
            unit = "image" if mechanism.unit == "image" else "client"
            steps = _steps(cell, part) if unit == "image" else 1
            sigma = mechanism.std / mechanism.clip
            yield Setting(sigma, steps, unit=unit), f"the proof of {part.name} (noise multiplier {sigma:g})"


def _encoded(defense: Defense, spent: Mapping[str, Any], kappa: float) -> Iterator[Guarantee]:
    """Noise on encodings, accounted for one image exchanged for another; what is trained on them is post-processing."""
    part = next((p for p in defense.parts or (defense,) if p.claim == "proof" and p.account is not None), None)
    sigma, epsilon = spent.get("noise_multiplier"), spent.get("epsilon")
    if part is None or not isinstance(sigma, int | float) or not isinstance(epsilon, int | float):
        return
    gamma = rero.pure_dp(kappa, epsilon) if spent.get("delta") == 0 else rero.gdp(kappa, 1 / sigma)
    yield Guarantee(
        gamma, gamma, f"the proof of {part.name}",
        (
            "Neighbouring data sets differ in one image: it is exchanged for another.",
            f"It covers the {spent.get('unit', 'pixels of one image')}.",
            f"Accounted as: {spent.get('accountant', 'not stated')}.",
            "Coefficients do not depend on the images, and no further encoding of the image leaves.",
        ),
    )  # fmt: skip


def _steps(cell: CellPlan, defense: Defense) -> int:
    """Releases in one message: steps that clip example by example, else one."""
    from frostglass.auditing.simulate import local_plan

    client = cell.scenario.client
    if defense.gradient is None or client.update == "gradient":
        return 1
    return local_plan(client, cell.scenario.model.mode).steps_for(client.batch)


def _gaussian(setting: Setting, kappa: float) -> float:
    return rero.gaussian(kappa, setting.noise_multiplier, setting.steps, setting.adjacency)


@functools.cache
def _simulated(setting: Setting, kappa: float) -> float:
    """gamma with three standard errors; once for all cells of an audit, as hundreds of releases take seconds."""
    return bounds(setting, [kappa], Rng.from_seed(0, "claim"), SAMPLES)[0].upper


def _claimed(claim: ClaimPlan, kappa: float, steps: int) -> Guarantee:
    """What the plan claims, for one message and for all that hold the image, each of so many steps."""
    if claim.epsilon is not None:
        gamma = rero.approximate_dp(kappa, claim.epsilon, claim.delta)
        words = f"The whole training is ({claim.epsilon:g}, {claim.delta:g})-differentially private as it is run."
        counted = "is added or removed" if claim.adjacency == "add_remove" else "is exchanged for another"
        unit = f"Neighbouring data sets differ in one {claim.unit}: it {counted}."
        return Guarantee(gamma, gamma, f"the claimed epsilon = {claim.epsilon:g}", (unit, words))
    assert claim.noise_multiplier is not None
    adjacency: Adjacency = "replace_one" if claim.adjacency == "replace_one" else "add_remove"
    unit_name = claim.unit or "image"
    releases, rate, sigma = claim.releases or 1, claim.sampling_rate, claim.noise_multiplier
    one = Setting(sigma, steps, 1.0, claim.delta, adjacency, unit_name)
    whole = Setting(sigma, steps * releases, rate, claim.delta, adjacency, unit_name)
    # What is drawn is whole messages, whose steps together are one release with so many times less variance.
    drawn = replace(whole, noise_multiplier=sigma / math.sqrt(steps), steps=releases)
    observed = _gaussian(one, kappa)
    total = _simulated(drawn, kappa)
    return Guarantee(
        observed, max(observed, total), f"the claimed noise multiplier {sigma:g}", tuple(whole.assumptions())
    )
