"""Counts on a network whose posteriors vary: their sum over the batch, by regression on the gradient.

The bias identity K gb = sum_i p_i - n needs the sum of the posteriors only to half a label, but at K = 48 that is one
part in a hundred, and the posterior at the mean feature is not the mean posterior. So batches of other images are put
together, with labels that have nothing to do with them (as on an untrained network), and the difference between the
two is regressed, by ridge, on what the last layer's gradient says about the logits, gW W^T and gb. What the regression
misses on batches that were held out is the metric in which the counts are made whole: errors of the classes hang
together, so that most wrong exchanges of two labels would need an unlikely one. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics.label_counts import Counts, Head
from frostglass.numerics.labels import largest_remainder

_RIDGE = 0.1
_FLOOR = 0.05  # labels: private images are others than those of the simulation
_LARGEST = 10_000_000  # numbers in a table of the simulation
_TINY = 1e-300


@dataclass(frozen=True)
class SumRule:
    """A fitted rule for one layer and one K.

    Args:
        mean, std: [f] of the descriptors.
        slope: [f, k] of the regression on standardised descriptors.
        centre: [k] mean of what is predicted.
        precision: [k, k] inverse covariance of the counts' errors on batches held out.
        spread: standard deviation of the least certain count there.
        right: share of the labels that came out right there.
        most: largest count of a class.
    """

    mean: Float[Tensor, " f"]
    std: Float[Tensor, " f"]
    slope: Float[Tensor, "f k"]
    centre: Float[Tensor, " k"]
    precision: Float[Tensor, "k k"]
    spread: float
    right: float
    most: int


def learn_sums(
    head: Head,
    groups: Sequence[Float[Tensor, "m d"]],
    *,
    distinct: bool = False,
    with_bias: bool = True,
    batches: int = 3000,
    seed: int = 0,
) -> SumRule:
    """Fits the rule; about a second at ten classes.

    Args:
        head: the layer, and K; its gradient is not used, so that one rule serves many updates.
        groups: features of other images on the same network in the same mode. A simulated batch comes from one group,
            so that brightness, contrast and texture may differ between groups as they do between clients; under batch
            statistics a group is one batch of K images.
        distinct: the labels are known to be distinct.
        with_bias: the update holds the bias gradient.
        batches: simulated batches (fewer if there are many classes or images), a third of them held out.
        seed: of the draws.
    """
    made = torch.Generator().manual_seed(seed)
    batches = max(150, min(batches, _LARGEST // (head.classes * max(head.classes, head.examples))))
    share = [batches * (i + 1) // len(groups) - batches * i // len(groups) for i in range(len(groups))]
    level = None if with_bias else float(torch.cat([g.sum(1) for g in groups]).mean())
    parts = [_simulated(head, g.double(), n, level, distinct, made) for g, n in zip(groups, share, strict=True) if n]
    order = torch.randperm(batches, generator=made)
    products, slopes, truth = (torch.cat([p[j] for p in parts])[order] for j in range(3))
    first, x = _described(head, products, slopes)
    y = truth / head.examples + slopes - first
    held = batches // 3
    mean, std, centre = x[held:].mean(0), x[held:].std(0).clamp_min(1e-9), y[held:].mean(0)
    z = (x - mean) / std
    gram = z[held:] @ z[held:].T
    gram.diagonal().add_(_RIDGE * len(gram))
    slope = z[held:].T @ torch.linalg.solve(gram, y[held:] - centre)  # dual form: descriptors may outnumber batches
    estimate = head.examples * (z[:held] @ slope + centre + first[:held] - slopes[:held])
    wrong = estimate - truth[:held]
    covariance = wrong.T @ wrong / held
    covariance.diagonal().add_(_FLOOR**2)
    precision = torch.linalg.inv(covariance)
    most = 1 if distinct else head.examples
    some = range(min(held, 200))
    found = torch.stack([nearest_counts(estimate[i], precision, head.examples, most) for i in some])
    right = 1 - float((found - truth[: len(some)]).abs().sum(1).mean()) / (2 * head.examples)
    spread = float(covariance.diagonal().max().sqrt())
    return SumRule(mean, std, slope, centre, precision, spread, right, most)


def apply_sums(rule: SumRule, head: Head) -> Counts:
    """Counts of one update; `residual` is the distance between estimate and whole counts, as a share of K."""
    product = (head.grad_weight @ head.weight.T)[None]
    first, x = _described(head, product, head.grad_bias[None])
    z = (x - rule.mean) / rule.std
    estimate = head.examples * (z @ rule.slope + rule.centre + first - head.grad_bias)[0]
    counts = nearest_counts(estimate, rule.precision, head.examples, rule.most)
    residual = float((estimate - counts).abs().sum()) / (2 * head.examples)
    return Counts(counts, estimate, residual, rule.spread)


def nearest_counts(
    estimate: Float[Tensor, " k"], metric: Float[Tensor, "k k"], total: int, most: int
) -> Float[Tensor, " k"]:
    """Whole counts from 0 to `most`, of sum `total`, near `estimate` in `metric`: best exchanges of one label."""
    found = largest_remainder(estimate, total).double()
    if float(found.max()) > most:
        found = torch.zeros_like(found)
        found[estimate.topk(total).indices] = 1
    curve = metric.diagonal()[:, None] + metric.diagonal()[None] - 2 * metric
    for _ in range(4 * total):
        slope = metric @ (found - estimate)
        change = slope[:, None] - slope[None] + 0.5 * curve  # one label from the column's class to the row's class
        change = change.masked_fill((found < 1)[None] | (found >= most)[:, None], float("inf"))
        change.fill_diagonal_(float("inf"))
        best = int(change.argmin())
        if float(change.flatten()[best]) >= -1e-9:
            break
        found[best // len(found)] += 1
        found[best % len(found)] -= 1
    return found


def _simulated(
    head: Head, features: Tensor, batches: int, level: float | None, distinct: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(gW W^T [n, k, k], gb [n, k], counts [n, k]) of batches from one group; half of them of uneven classes."""
    examples, classes = head.examples, head.classes
    chances = torch.ones(batches, len(features), dtype=torch.float64)
    rows = torch.multinomial(chances, examples, replacement=len(features) < examples, generator=generator)
    if distinct:
        labels = torch.rand(batches, classes, generator=generator).argsort(1)[:, :examples]
    else:
        even = torch.rand(batches, 1, generator=generator, dtype=torch.float64) < 0.5
        uneven = -torch.rand(batches, classes, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
        picked = torch.where(even, torch.ones_like(uneven), uneven)
        labels = torch.multinomial(picked, examples, replacement=True, generator=generator)
    products = (features @ head.weight.T)[rows]
    hot = torch.nn.functional.one_hot(labels, classes).double()
    errors = (products + head.bias).softmax(2) - hot
    slopes = errors.mean(1)
    if level is not None:  # as `bias_gradient` does it
        slopes = (errors * features.sum(1)[rows][..., None]).mean(1) / (level if abs(level) > 1e-12 else 1.0)
    return errors.transpose(1, 2) @ products / examples, slopes, hot.sum(1)


def _described(head: Head, products: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """(posterior at the mean feature [n, k], descriptors [n, f]) from gW W^T and gb."""
    mass = slopes.abs().sum(1, keepdim=True).clamp_min(_TINY)
    logits = (slopes.sign()[..., None] * products).sum(1) / mass  # of the `mean_feature`, without the bias
    first = (logits + head.bias).softmax(1)
    bent = products - slopes[..., None] * logits[:, None]
    return first, torch.cat([first, logits - logits.mean(1, keepdim=True), slopes, bent.flatten(1)], 1)
