"""Terms of an inversion objective. Each reads the one shared simulation of a client step and returns a scalar."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from frostglass.attacks.inversion.schedules import Schedule
from frostglass.attacks.inversion.target import Target
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.threat import Knows, Observation
from frostglass.numerics import distance, image
from frostglass.numerics.bn import bn_distance
from frostglass.numerics.local_update import Trace


@dataclass(frozen=True)
class Candidate:
    """One seed's current guess.

    Args:
        z: [b, c, h, w] in the victim's normalised space; priors on pixels read this.
        images: [b, c, h, w] what the network is shown: the same in the bounds of the domain, augmented where a recipe
            says so.
        targets: [b, k].
        trace: of the simulated client step; every term reads this one.
        target: what was observed.
    """

    z: Tensor
    images: Tensor
    targets: Tensor
    trace: Trace
    target: Target


@dataclass(frozen=True)
class Term:
    """weight x value(candidate).

    Args:
        name: in the event stream and the report.
        weight: number or schedule.
        value: scalar, on the graph.
        needs: grants without which the term cannot be computed.
        gradient: True if it compares with the observed update (a prior does not).
        statistics: False if it does not read `candidate.trace.bn`; where no term does, that is not computed.
    """

    name: str
    weight: float | Schedule
    value: Callable[[Candidate], Tensor]
    needs: frozenset[Knows] = field(default_factory=frozenset)
    gradient: bool = False
    statistics: bool = True

    def __post_init__(self) -> None:
        if not callable(self.weight) and not 0 <= self.weight < math.inf:
            raise BadInput(
                f"attack: the weight of {self.name!r} is {self.weight!r}; give a number from 0 (0: left out)."
            )


def _simulated(c: Candidate) -> list[Tensor]:
    sent = c.target.as_sent({name: c.trace.gradients[name] for name in c.target.names})
    return [sent[name] for name in c.target.names]


def match_cosine(weight: float | Schedule = 1.0) -> Term:
    """1 - cosine similarity of all gradients together (Geiping et al. 2020, Eq. 4)."""
    return Term(
        "cosine",
        weight,
        lambda c: distance.cosine(_simulated(c), list(c.target.gradients.values())),
        gradient=True,
        statistics=False,
    )


def match_layer_norms(weight: float | Schedule = 1.0) -> Term:
    """Sum over layers of unsquared L2 norms (Yin et al. 2021, Eq. 3)."""
    return Term(
        "layer_norms",
        weight,
        lambda c: distance.layer_norms(_simulated(c), list(c.target.gradients.values())),
        gradient=True,
        statistics=False,
    )


def match_squared(weight: float | Schedule = 1.0) -> Term:
    """Sum of squared differences (Zhu et al. 2019, Eq. 4)."""
    return Term(
        "squared",
        weight,
        lambda c: distance.squared_error(_simulated(c), list(c.target.gradients.values())),
        gradient=True,
        statistics=False,
    )


def total_variation(weight: float | Schedule) -> Term:
    """Anisotropic total variation of the variable (mean absolute difference)."""
    return Term("tv", weight, lambda c: image.total_variation(c.z), statistics=False)


def variation_norm(weight: float | Schedule) -> Term:
    """TV(x) of Yin et al. 2021, Eq. 9, as ||dx||_2 + ||dy||_2 per image.

    The norm is our reading: like all other norms of that objective it is not squared.
    """
    return Term("tv", weight, lambda c: image.variation_norm(c.z), statistics=False)


def l2_norm(weight: float | Schedule) -> Term:
    """||x||_2 per image (Yin et al. 2021, Eq. 9), not squared."""
    return Term("l2", weight, lambda c: image.mean_norm(c.z), statistics=False)


def cross_entropy(weight: float | Schedule) -> Term:
    """The network's loss on the candidate: images that it recognises as their label (Yin et al. 2020, Eq. 1).

    A prior: the observed gradient has no part in it.
    """
    return Term("cross_entropy", weight, lambda c: c.trace.loss, statistics=False)


def bn_statistics(weight: float | Schedule, source: Knows, *, relative: bool = False) -> Term:
    """Distance of the candidate's batch statistics to those granted (Yin et al. 2021, Eq. 10).

    Args:
        weight: number or schedule.
        source: `Knows.BN_BATCH` (statistics of the target batch) or `Knows.BN_RUNNING`.
        relative: divide each layer's distance by the size of its target.
    """

    def value(c: Candidate) -> Tensor:
        goal = c.target.bn_batch if source is Knows.BN_BATCH else c.target.bn_running
        assert goal is not None  # `needs` was checked before the run
        if goal.keys().isdisjoint(c.trace.bn):
            raise AttackFailed(
                f"attack: term 'bn' has statistics of {', '.join(goal)}, and no image passes there; set its weight to "
                "0 (or bn = 'none')."
            )
        return bn_distance(c.trace.bn, goal, relative=relative)

    return Term("bn", weight, value, needs=frozenset({source}))


def epoch_agreement(weight: float | Schedule = 10.0) -> Term:
    """Squared distance of each epoch's mean image to that of all epochs (Dimitrov et al. 2022, Eq. 6, with the mean).

    For a variable that holds an image for every epoch of a client that shuffles; 0 for any other.
    """

    def value(c: Candidate) -> Tensor:
        if c.target.order(len(c.z)) is None:
            return c.z.new_zeros(())
        means = c.z.unflatten(0, (c.target.epochs, -1)).mean(1)
        return (means - means.mean(0)).square().mean()

    return Term("epochs", weight, value, statistics=False)


def available_bn(seen: Observation) -> Knows | None:
    """The best BatchNorm statistics that were granted and exist: of the batch, else running, else None."""
    if seen.bn_batch:
        return Knows.BN_BATCH
    return Knows.BN_RUNNING if seen.bn_running else None


def live(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Without the terms of weight 0: one key switches a term off, and what is off costs nothing.

    Raises:
        BadInput: nothing is left.
    """
    kept = tuple(t for t in terms if callable(t.weight) or t.weight != 0)
    if not kept:
        raise BadInput("attack: every term has weight 0; give one of them a weight.")
    return kept


def require(terms: tuple[Term, ...], seen: Observation) -> None:
    """Refuses an observation that lacks what a term needs.

    Raises:
        BadInput: a BatchNorm term and no statistics.
    """
    held = {Knows.BN_BATCH: seen.bn_batch, Knows.BN_RUNNING: seen.bn_running}
    for term in terms:
        for need in term.needs:
            if not held.get(need, True):
                raise BadInput(
                    f"attack: term {term.name!r} needs {need.value!r}, and the model has no such statistics; set its "
                    "weight to 0 (or bn = 'none')."
                )
