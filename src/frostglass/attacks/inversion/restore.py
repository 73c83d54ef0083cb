"""Where an inversion gets its targets: granted, or restored from the classifier's gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.inversion.counting import ENOUGH, Confidence, CountRule, pool_of, untrained
from frostglass.attacks.inversion.head import (
    answers_plainly,
    classifier_of,
    coupled,
    dummy_images,
    examples_of,
    feature_groups,
    features_of,
    fresh,
    head_of,
)
from frostglass.core.errors import BadInput
from frostglass.core.threat import Observation
from frostglass.numerics import label_counts as counting
from frostglass.numerics import label_pool
from frostglass.numerics.label_counts import Head
from frostglass.numerics.labels import counts_to_targets, row_minimum, single_label, sum_rule

Posterior: TypeAlias = Literal["observed", "auxiliary", "simulated", "uniform"]


@dataclass(frozen=True)
class Restored:
    """Targets of a batch and where they come from.

    Args:
        targets: [b, k] one row an image.
        counts: [k] whole, of sum b; None if the labels were granted.
        confidence: "high": the equations settle the counts, or nearly all labels are expected to be right; "low":
            better than guessing; "none": no better, so `counts` are the guess K/C; "granted".
        residual: relative misfit of the bias identity (0 is exact), NaN for rules that solve no equation.
        rule: which rule spoke.
    """

    targets: Float[Tensor, "b k"]
    counts: Float[Tensor, " k"] | None
    confidence: Confidence
    residual: float
    rule: str

    @property
    def info(self) -> dict[str, float | str]:
        """For `Reconstruction.info`."""
        about: dict[str, float | str] = {"labels_confidence": self.confidence, "labels_rule": self.rule}
        return about if self.residual != self.residual else {**about, "labels_residual": self.residual}


Restore: TypeAlias = Callable[[Observation], Restored]

_KNOWN: weakref.WeakKeyDictionary[Observation, dict[Restore, Restored]] = weakref.WeakKeyDictionary()


def restored_of(seen: Observation, restore: Restore) -> Restored:
    """Granted labels, or restored ones; a restoration is done once an observation.

    Raises:
        BadInput: the rule cannot work on this observation.
    """
    if seen.labels is not None:
        return Restored(seen.labels, None, "granted", float("nan"), "granted")
    known = _KNOWN.setdefault(seen, {})
    if restore not in known:
        known[restore] = restore(seen)
    return known[restore]


def targets_of(seen: Observation, restore: Restore) -> tuple[Tensor, Tensor | None]:
    """(targets [b, k], restored counts or None if the labels were granted); see `restored_of`."""
    found = restored_of(seen, restore)
    return found.targets, found.counts


@cache
def by_row_minimum() -> Restore:
    """Distinct labels by the row minimum (Yin et al. 2021, Eq. 8)."""
    return lambda seen: _distinct(seen, row_minimum, "row_minimum")


@cache
def by_sum() -> Restore:
    """Distinct labels by the row sum (iDLG extended to a batch; the baseline in Yin et al. 2021, Table 1)."""
    return lambda seen: _distinct(seen, sum_rule, "sum")


@cache
def by_idlg() -> Restore:
    """One label by argmin (Zhao et al. 2020); one image only."""

    def restore(seen: Observation) -> Restored:
        _, weight, bias = classifier_of(seen)
        if examples_of(seen) != 1:
            raise BadInput(
                f"attack: the iDLG rule names one label, and there are {seen.examples}; use restore = 'counts'."
            )
        counts = weight.new_zeros(len(weight))
        counts[single_label(weight, bias)] = 1
        return _restored(seen, counts, "none" if float(weight.abs().max()) == 0 else "high", float("nan"), "idlg")

    return restore


@cache
def by_least_squares(posterior: Posterior = "observed", ridge: float = 1e-2) -> Restore:
    """Regularised constrained least squares alone, with the posterior matrix of one source.

    Args:
        posterior: "observed" (from the gradient), "auxiliary" (granted images), "simulated" (dummy images), "uniform".
        ridge: pull towards K/C.

    The rule is tried on simulated batches of this network; where it does not beat the guess there, the guess is
    returned with confidence "none".
    """

    def restore(seen: Observation) -> Restored:
        head, features = _head_and_features(seen, posterior)
        if head.silent:
            return _guessed(seen, head, 0.0, "least_squares")
        pool = pool_of(head, features if posterior == "auxiliary" else None, features)
        fixed = None if posterior == "observed" else _matrix(seen, head, features, posterior)

        def solve(h: Head) -> counting.Counts:
            m = counting.posterior_observed(h) if fixed is None else fixed
            return counting.least_squares_counts(h.grad_bias, m, h.examples, ridge=ridge)

        found = solve(head)
        if not fresh(seen) and not untrained(head, features) and not _beats_guess(head, pool, solve, coupled(seen)):
            return _guessed(seen, head, found.residual, "least_squares")
        return _restored(seen, found.counts, "low", found.residual, "least_squares")

    return restore


def _moved_between(seen: Observation, examples: int) -> bool:
    """Whether posteriors changed between the client's steps, so that no equation of one gradient holds exactly."""
    plan = seen.local_plan
    return plan is not None and plan.kind == "delta" and examples > 1 and plan.steps_for(examples) > 1


@cache
def by_counts() -> Restore:
    """The default: counts per class, repeated or not, by what suits the network; never worse than guessing.

    One image: exact, from the ratio of weight and bias gradient. An untrained or unsure network: the bias identity,
    by least squares where posteriors hardly vary, else the most likely counts (`label_likelihood`). A trained,
    confident one, where the identity has almost no signal: a rule learned on simulated batches (`label_learn`), on
    auxiliary images where granted, else on features made from the layer's weights; if it does not beat the guess
    there, the guess with confidence "none".
    """

    def restore(seen: Observation) -> Restored:
        head, features = _head_and_features(seen, "simulated" if seen.auxiliary is None else "auxiliary")
        enough = features is not None and seen.auxiliary is not None and len(features) >= max(ENOUGH, head.examples)
        rule = CountRule(
            features,
            lambda: feature_groups(seen, features if enough else None),
            granted=seen.auxiliary is not None,
            distinct=seen.labels_distinct is True,
            with_bias=classifier_of(seen)[2] is not None,
            coupled=coupled(seen),
            fresh=fresh(seen),
        )
        found = rule.count(head)
        doubted = found.confidence == "high" and (_moved_between(seen, head.examples) or not answers_plainly(seen))
        confidence = "low" if doubted else found.confidence
        return _restored(seen, found.counts, confidence, found.residual, f"counts: {found.rule}")

    return restore


RESTORE: Mapping[str, Callable[[], Restore]] = {
    "counts": by_counts,
    "least_squares": by_least_squares,
    "row_minimum": by_row_minimum,
    "sum": by_sum,
    "idlg": by_idlg,
}
"""Rules by the name that a plan gives; "joint" (DLG) is no rule but a further variable, and belongs to its recipe."""


def restore_by(name: str) -> Restore:
    """The rule of this name.

    Raises:
        BadInput: there is none.
    """
    if name not in RESTORE:
        raise BadInput(f"attack.restore: {name!r} is not a rule for labels; use one of {', '.join(RESTORE)}.")
    return RESTORE[name]()


def _head_and_features(seen: Observation, source: Posterior) -> tuple[Head, Tensor | None]:
    """The layer, and features of granted or dummy images in the client's mode (None where these cannot be had)."""
    classifier_of(seen)
    if source == "auxiliary":
        if seen.auxiliary is None:
            raise BadInput(
                "attack: the posterior matrix 'auxiliary' needs images; grant 'auxiliary', or use 'simulated'."
            )
        images = seen.auxiliary
    else:
        images = dummy_images(seen, max(384, 2 * examples_of(seen)))
    features = features_of(seen, images)
    if features is not None and len(features) < 2:
        features = None
    return head_of(seen, None if features is None else float(features.sum(1).mean())), features


def _matrix(seen: Observation, head: Head, features: Tensor | None, source: Posterior) -> Tensor:
    if source == "uniform":
        return counting.posterior_uniform(head.classes)
    if features is None:
        raise BadInput(f"attack: the network gives no posteriors for {seen.examples} images in {seen.mode} mode.")
    logits = features @ head.weight.T + head.bias
    pool = label_pool.pool_from_images(features, logits, torch.Generator().manual_seed(0))
    return counting.posterior_measured(logits.softmax(1), pool.labels)


def _beats_guess(head: Head, pool: label_pool.Pool, solve: Callable[[Head], counting.Counts], together: bool) -> bool:
    """Whether a rule's mean gain over K/C on simulated batches is above 0 with 95 % confidence."""
    made = torch.Generator().manual_seed(1)
    summed, truth = label_pool.simulate(pool, head, 200, distinct=False, coupled=together, generator=made)
    sent = summed / head.examples
    found = torch.stack([solve(Head(head.weight, head.bias, g[:, :-1], g[:, -1], head.examples)).counts for g in sent])
    flat = torch.full_like(truth, head.examples / head.classes)
    gains = ((flat - truth).abs().sum(1) - (found - truth).abs().sum(1)) / (2 * head.examples)
    return float(gains.mean() - 1.96 * gains.std() / len(gains) ** 0.5) > 0


def _distinct(seen: Observation, rule: Callable[[Tensor, int], Tensor], name: str) -> Restored:
    _, weight, _ = classifier_of(seen)
    examples = examples_of(seen)
    if examples > len(weight):
        words = name.replace("_", "-")
        raise BadInput(
            f"attack: the {words} rule names distinct classes, and {examples} images exceed {len(weight)} classes; "
            "use restore = 'counts', or grant 'labels'."
        )
    counts = weight.new_zeros(len(weight))
    counts[rule(weight, examples)] = 1
    silent = float(weight.abs().max()) == 0
    return _restored(seen, counts, "none" if silent else "low", float("nan"), name)


def _guessed(seen: Observation, head: Head, residual: float, rule: str) -> Restored:
    return _restored(seen, counting.guess(head.classes, head.examples), "none", residual, rule)


def _restored(seen: Observation, counts: Tensor, confidence: Confidence, residual: float, rule: str) -> Restored:
    like = next(iter(seen.gradients.values()))
    dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
    whole = counts.to(like.device, dtype)
    return Restored(counts_to_targets(whole), whole, confidence, residual, rule)
