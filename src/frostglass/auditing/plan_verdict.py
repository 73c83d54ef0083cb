"""What a verdict is about, fixed in the plan before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LEAST_TRIALS = 30
"""Independent trials below which nothing can be said about an attack that did not succeed."""


class Strict(BaseModel):
    """No coercion: "8" is no number, true is no 1."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class ClaimPlan(Strict):
    """A guarantee that somebody claims, for the audit to hold against what it sees."""

    unit: Literal["image", "client"] | None = Field(None, description="what is protected: one image, or a client's all")
    adjacency: Literal["add_remove", "replace_one"] | None = Field(
        None, description="what may differ between data sets"
    )
    noise_multiplier: float | None = Field(None, description="noise on the sum / clipping norm")
    releases: int | None = Field(
        None, description="messages that hold the image, each with all its local steps; none: one"
    )
    sampling_rate: float = Field(1.0, description="Poisson; amplifies the whole training, not one observed message")
    epsilon: float | None = Field(None, description="claimed, instead of a noise multiplier; needs delta")
    delta: float = Field(1e-5, description="of (epsilon, delta)")
    defense: str | None = Field(None, description="label of the defence that it is about; none: all but none")


class VerdictPlan(Strict):
    """Success event, chance, tolerance and confidence."""

    event: Literal["recovered", "proved", "identified"] = Field(
        "recovered", description="what counts as a success of the attack"
    )
    chance: float = Field(0.05, description="kappa: success of a guess without access; identified: 1 / candidates")
    tolerance: float = Field(0.1, description="tau: success rate that is tolerated, at least the chance")
    confidence: float = Field(0.95, description="of the two-sided interval, over all tests together")
    primary: str | None = Field(None, description="the one attack that is tested; none: all, and they share the error")
    claim: ClaimPlan | None = Field(None, description="a guarantee that is claimed; none: the defence's own")


def verdict_problems(verdict: VerdictPlan, attacks: set[str]) -> Iterator[str]:
    """What no verdict could be given on, a sentence each; `attacks` are the names in the plan."""
    v = verdict
    inside = 0 < v.chance < 1
    if not inside:
        yield f"verdict.chance: {v.chance:g} must be strictly between 0 and 1; 0.01 is usual."
    if not 0 < v.confidence < 1:
        yield f"verdict.confidence: {v.confidence:g} must be strictly between 0 and 1; 0.95 is usual."
    if not 0 < v.tolerance <= 1:
        yield f"verdict.tolerance: {v.tolerance:g} must be above 0 and at most 1."
    elif inside and v.tolerance < v.chance:
        yield (
            f"verdict.tolerance: {v.tolerance:g} is below verdict.chance = {v.chance:g}, which guessing reaches; raise "
            "it to the chance at least."
        )
    if v.primary is not None and v.primary not in attacks:
        yield f"verdict.primary: {v.primary!r} is no attack of this plan; give one of {', '.join(sorted(attacks))}."
    if v.claim is not None:
        yield from _claim_problems(v.claim)


def _claim_problems(claim: ClaimPlan) -> Iterator[str]:
    where = "verdict.claim"
    if claim.unit is None:
        yield f'{where}.unit: missing; a claim without a unit says nothing: "image" or "client".'
    if claim.adjacency is None:
        yield f'{where}.adjacency: missing; give "add_remove" or "replace_one", which doubles the sensitivity.'
    if (claim.noise_multiplier is None) == (claim.epsilon is None):
        yield f"{where}.noise_multiplier: give either it or epsilon (with delta); a claim is one of them."
    if claim.noise_multiplier is not None and not claim.noise_multiplier > 0:
        yield f"{where}.noise_multiplier: {claim.noise_multiplier:g} must be above 0; without noise nothing is proved."
    if claim.epsilon is not None and not claim.epsilon > 0:
        yield f"{where}.epsilon: {claim.epsilon:g} must be above 0."
    if claim.releases is not None and claim.releases < 1:
        yield f"{where}.releases: {claim.releases} must be at least 1; count every message."
    if not 0 < claim.sampling_rate <= 1:
        yield f"{where}.sampling_rate: {claim.sampling_rate:g} must be above 0 and at most 1."
    if not 0 < claim.delta < 1:
        yield f"{where}.delta: {claim.delta:g} must be strictly between 0 and 1."
