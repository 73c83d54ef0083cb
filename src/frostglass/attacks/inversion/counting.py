"""The default label rule: which estimator suits a network, and what it is worth there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics import label_counts as basics
from frostglass.numerics import label_learn, label_likelihood, label_pool
from frostglass.numerics.label_counts import Head

Confidence: TypeAlias = Literal["high", "low", "none", "granted"]

ENOUGH = 200
"""Auxiliary images from which on they replace what is made up."""
_UNSURE = 0.35  # mean largest posterior below which every image speaks, trained or not
_UNTRAINED = 0.45  # share of the loss slope that labels independent of the images would give
_DIVERSE = 2.0  # variance of the logits over images, relative to that of their means over classes
_SETTLED = 0.05  # spread of the sum of posteriors below which the identity is right by itself
_MANY = 100  # classes above which the covariance would be too large; there the identity alone is used
MISFIT = 0.1
"""Misfit of the equations above which they settle nothing: a wrong number of images, or a changed update."""
_ONE = 0.01  # second singular value of the classifier's gradient, relative to the first, that one image may leave
_NEARLY_ALL = 0.95  # expected share of labels right that counts as high confidence


@dataclass(frozen=True)
class Counted:
    """Counts of one batch.

    Args:
        counts: [k] whole, of sum K; the guess K/C if `confidence` is "none".
        confidence: "high": settled by the equations, or nearly all labels expected right; "low": better than guessing.
        residual: misfit of the bias identity, relative to what it explains; where the most likely counts were found,
            the share of the labels that rounding moved.
        rule: which estimator spoke.
    """

    counts: Float[Tensor, " k"]
    confidence: Confidence
    residual: float
    rule: str


@dataclass(frozen=True)
class CountRule:
    """For one network, mode and K; learned at most once, then applied to any number of updates.

    Args:
        features: [n, d] of other images on the network in the client's mode, None if there are none.
        groups: features to measure moments on, asked for once and only if needed (`head.feature_groups`).
        granted: those images are of the same kind as the private ones (else dummy images).
        distinct: the labels are known to be distinct.
        with_bias: the updates hold a bias gradient.
        coupled: the client's BatchNorm uses the batch.
        fresh: the network was never trained (`head.fresh`).
    """

    features: Float[Tensor, "n d"] | None
    groups: Callable[[], Sequence[Tensor]]
    granted: bool = False
    distinct: bool = False
    with_bias: bool = True
    coupled: bool = False
    fresh: bool = False
    _likelihood: list[label_likelihood.CountLikelihood] = field(default_factory=list, repr=False, compare=False)
    _learned: list[label_learn.LearnedRule | None] = field(default_factory=list, repr=False, compare=False)

    def count(self, head: Head) -> Counted:
        """The counts behind one update; where its equations do not fit, no confidence is high."""
        found = self._count(head)
        # the learned rule rests on no identity, and tells by itself whether an update is like those it learned from
        unfit = found.rule != "learned" and found.residual > MISFIT
        unfit |= head.examples == 1 and not _rank_one(head)
        return replace(found, confidence="low") if unfit and found.confidence == "high" else found

    def _count(self, head: Head) -> Counted:
        if head.silent:
            return self._guess(head, 0.0, "no gradient")
        start = basics.least_squares_counts(head.grad_bias, basics.posterior_observed(head), head.examples)
        if head.examples == 1:
            # exact, and settles the ties of a saturated softmax, where further classes have a gradient of 0
            posterior = torch.softmax(head.weight @ basics.mean_feature(head) + head.bias, 0)
            counts = torch.zeros(head.classes, dtype=torch.float64)
            counts[int((posterior - head.grad_bias).argmax())] = 1
            return Counted(counts, "high", start.residual, "one image")
        if self.features is not None and (self.fresh or untrained(head, self.features)):
            settled = _wobble(head, self.features) < _SETTLED
            if head.classes > _MANY or settled:
                # of another number of images the estimates are seldom whole (multiples of it look like this one)
                whole = float((start.estimate - start.counts).abs().sum()) / (2 * head.examples) <= MISFIT
                return Counted(start.counts, "high" if whole and settled else "low", start.residual, "identity")
            rule = self._likelihood_rule(head)
            found = label_likelihood.apply_likelihood(rule, head)
            return Counted(found.counts, "high" if rule.right >= _NEARLY_ALL else "low", found.residual, "likelihood")
        learned = self._rule(head)
        if learned is None or learned.gain_low <= 0:
            return self._guess(head, start.residual, "learned")
        counts, expected, familiar = label_learn.apply(learned, head)
        return Counted(counts, "high" if familiar and expected >= _NEARLY_ALL else "low", start.residual, "learned")

    def _likelihood_rule(self, head: Head) -> label_likelihood.CountLikelihood:
        if not self._likelihood:
            known = {"distinct": self.distinct and head.examples <= head.classes, "with_bias": self.with_bias}
            self._likelihood.append(label_likelihood.learn_likelihood(head, self.groups(), **known))
        return self._likelihood[0]

    def _rule(self, head: Head) -> label_learn.LearnedRule | None:
        if not self._learned:
            images = self.features if self.granted else None
            distinct = self.distinct and head.examples <= head.classes
            try:
                pool = pool_of(head, images, self.features)
                found = label_learn.learn(head, pool, distinct=distinct, with_bias=self.with_bias, coupled=self.coupled)
            except ValueError:  # the simulation names fewer classes than the batch must hold
                self._learned.append(None)
            else:
                self._learned.append(found)
        return self._learned[0]

    def _guess(self, head: Head, residual: float, rule: str) -> Counted:
        return Counted(basics.guess(head.classes, head.examples), "none", residual, rule)


def _rank_one(head: Head) -> bool:
    """Whether the classifier's gradient can be of one image: an error times its features."""
    sizes = torch.linalg.svdvals(torch.cat([head.grad_weight, head.grad_bias[:, None]], 1))
    return len(sizes) < 2 or float(sizes[1]) <= _ONE * float(sizes[0])


def _wobble(head: Head, features: Tensor) -> float:
    """Standard deviation of the sum of K posteriors, in the class where it is largest."""
    p = (features @ head.weight.T + head.bias).softmax(1)
    return float(head.examples**0.5 * p.std(0).max())


def pool_of(head: Head, granted: Tensor | None, dummies: Tensor | None) -> label_pool.Pool:
    """Simulated images: granted ones if there are enough, else made from the layer's weights at the features' size."""
    made = torch.Generator().manual_seed(0)
    if granted is not None and len(granted) >= ENOUGH:
        return label_pool.pool_from_images(granted, granted @ head.weight.T + head.bias, made)
    known = basics.mean_feature(head)[None] if dummies is None else dummies
    level = max(float(known.abs().mean()), 1e-3)  # a floor keeps one dead gradient from collapsing the simulation
    positive = bool((known >= -1e-3 * level).all())
    return label_pool.pool_from_weights(head.weight, head.bias, level, made, positive=positive)


def untrained(head: Head, features: Tensor | None) -> bool:
    """Whether the bias identity has signal: posteriors unsure, or labels that have nothing to do with the logits.

    sum_i <p_i - y_i, z_i> can be read from the gradient; if labels were independent of the images it would be near
    K times the mean of <p - 1/C, z>. A trained network leaves a small part of that, but chance can make it more at
    small K; so logits must also differ less from image to image than from class to class, as those of untrained
    networks do (measured: random ResNets up to 0.5, trained ones in train mode from 30, in eval mode 0.3 to 0.7).
    """
    if features is None:
        return False
    logits = features @ head.weight.T + head.bias
    p = logits.softmax(1)
    if float(p.amax(1).mean()) < max(_UNSURE, 2 / head.classes):
        return True
    if float(logits.var(0).sum()) > _DIVERSE * float((logits.mean(0) - logits.mean()).square().sum()):
        return False
    slope = float((head.grad_weight * head.weight).sum() + head.grad_bias @ head.bias)
    independent = float(((p - 1 / head.classes) * logits).sum(1).mean())
    return slope > _UNTRAINED * independent
