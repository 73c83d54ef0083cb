"""Counts on a network whose posteriors vary: those under which the last layer's gradient is most likely.

The bias identity K gb = sum_i p_i - n needs the sum of the posteriors only to half a label, but at K = 48 that is one
part in a hundred, and nothing in the gradient states it. What does speak are the rows of gW: an image of label c adds
v = (p - e_c) u^T to K [gb, gW], where u = [1, h], and labels that have nothing to do with the images (as on an
untrained network) leave the moments of v to be measured on other images. A sum of K such terms is nearly normal, with
mean sum_c n_c E v(c) and covariance sum_c n_c Cov v(c), so its likelihood can be computed for any counts n. With the
covariance held the best counts are a least squares problem over whole numbers; the covariance follows. Features enter
by their logits only: what they hold beyond that adds next to nothing. Ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics.label_counts import Counts, Head
from frostglass.numerics.labels import largest_remainder

_RIDGE = 1e-3  # of the covariance: simulated images are not the private ones
_DIRECTIONS = 15  # of the logits, at the most
_ROUNDS = 4  # of counts and covariance
_CHECKS = 200  # simulated batches that tell how often the rule is right


@dataclass(frozen=True)
class CountLikelihood:
    """Moments on one network, for one K.

    Args:
        level: what a constant feature is replaced by: 1, or sum(h) over its typical value without a bias gradient.
        centre: [d] mean feature.
        basis: [d, r] directions that are read, scaled to unit variance.
        mean: [k, k (r + 1)] of v, a row for each label.
        shared: [k (r + 1), k (r + 1)] second moment of p u^T.
        cross: [k, r + 1, r + 1] second moment of u, weighted by each class's posterior.
        plain: [r + 1, r + 1] second moment of u.
        most: largest count of a class.
        right: share of the labels that came out right on simulated batches.
    """

    level: float | None
    centre: Float[Tensor, " d"]
    basis: Float[Tensor, "d r"]
    mean: Float[Tensor, "k f"]
    shared: Float[Tensor, "f f"]
    cross: Float[Tensor, "k s s"]
    plain: Float[Tensor, "s s"]
    most: int
    right: float = float("nan")


def learn_likelihood(
    head: Head,
    groups: Sequence[Float[Tensor, "m d"]],
    *,
    distinct: bool = False,
    with_bias: bool = True,
    seed: int = 0,
) -> CountLikelihood:
    """Measures the moments; well under a second at ten classes.

    Args:
        head: the layer, and K; its gradient is not used, so that one rule serves many updates.
        groups: features of other images on the same network in the same mode. The check draws a batch from one group,
            so that brightness, contrast and texture may differ between groups as they do between clients; under batch
            statistics a group is one batch of K images.
        distinct: the labels are known to be distinct.
        with_bias: the update holds the bias gradient.
        seed: of the simulated batches.
    """
    held = [g.double() for g in groups]
    level = None if with_bias else float(torch.cat([g.sum(1) for g in held]).mean())
    halves = [[g[i::2] for g in held if len(g) > 1] for i in (0, 1)]
    found = _measured(head, torch.cat(held), level, distinct)
    trial = _measured(head, torch.cat(halves[0] or held), level, distinct)
    made = torch.Generator().manual_seed(seed)
    wrong = 0.0
    pool = halves[1] or held
    for i in range(_CHECKS):
        batch, counts = _simulated(head, pool[i % len(pool)], level, distinct, made)
        wrong += float((apply_likelihood(trial, batch).counts - counts).abs().sum()) / (2 * head.examples)
    return replace(found, right=1 - wrong / _CHECKS)


def apply_likelihood(rule: CountLikelihood, head: Head) -> Counts:
    """Counts of one update.

    `residual` is the distance between estimate and whole counts, as a share of K; `spread` is of the estimate.
    """
    total, k = head.examples, head.classes
    bent = head.grad_weight - head.grad_bias[:, None] * rule.centre
    seen = total * torch.cat([head.grad_bias[:, None], bent @ rule.basis], 1).flatten()
    counts = torch.full((k,), total / k, dtype=torch.float64)
    for _ in range(_ROUNDS):
        before = counts
        factor = torch.linalg.cholesky(_covariance(rule, before))
        white = torch.linalg.solve_triangular(factor, torch.cat([rule.mean, seen[None]]).T, upper=False)
        metric = white[:, :k].T @ white[:, :k]
        weight = metric.diagonal().mean()  # of the sum, which is known
        metric = metric + weight
        estimate = torch.linalg.solve(metric, white[:, :k].T @ white[:, k] + weight * total)
        counts = nearest_counts(estimate, metric, total, rule.most)
        if torch.equal(counts, before):
            break
    residual = float((estimate - counts).abs().sum()) / (2 * total)
    return Counts(counts, estimate, residual, float(torch.linalg.inv(metric).diagonal().max().clamp_min(0).sqrt()))


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


def _measured(head: Head, features: Tensor, level: float | None, distinct: bool) -> CountLikelihood:
    classes, centre = head.classes, features.mean(0)
    moved = features - centre
    logits = moved @ head.weight.T
    directions = torch.linalg.svd(logits, full_matrices=False)[2][: min(classes - 1, _DIRECTIONS)]
    basis = head.weight.T @ directions.T
    size = (moved @ basis).square().mean(0).sqrt()
    keep = size > 1e-6 * size.max()
    basis = basis[:, keep] / size[keep]
    ones = _constant(features, level)
    u = torch.cat([ones[:, None], (features - ones[:, None] * centre) @ basis], 1)
    p = (features @ head.weight.T + head.bias).softmax(1)
    n, width = u.shape
    both = (p[:, :, None] * u[:, None]).flatten(1)
    own = torch.zeros(classes, classes, width, dtype=torch.float64)
    own[range(classes), range(classes)] = u.mean(0)
    return CountLikelihood(
        level=level,
        centre=centre,
        basis=basis,
        mean=both.mean(0) - own.flatten(1),
        shared=both.T @ both / n,
        cross=torch.einsum("nk,ni,nj->kij", p, u, u) / n,
        plain=u.T @ u / n,
        most=1 if distinct else head.examples,
    )


def _constant(features: Tensor, level: float | None) -> Tensor:
    """[n] what the bias gradient weighs errors with: 1, or as `bias_gradient` replaces it."""
    if level is None:
        return torch.ones(len(features), dtype=torch.float64)
    return features.sum(1) / (level if abs(level) > 1e-12 else 1.0)


def _covariance(rule: CountLikelihood, counts: Tensor) -> Tensor:
    """sum_c n_c Cov v(c), with v(c) = p u^T - e_c u^T multiplied out, and the ridge."""
    k, width = len(counts), len(rule.plain)
    mixed = torch.einsum("a,bij->biaj", counts, rule.cross).reshape(k * width, k * width)
    own = torch.einsum("ab,ij->aibj", torch.diag(counts), rule.plain).reshape(k * width, k * width)
    found = counts.sum() * rule.shared - mixed - mixed.T + own - rule.mean.T @ (counts[:, None] * rule.mean)
    found.diagonal().add_(_RIDGE * found.diagonal().mean())
    return found


def _simulated(
    head: Head, features: Tensor, level: float | None, distinct: bool, generator: torch.Generator
) -> tuple[Head, Tensor]:
    """One batch of these images with labels that have nothing to do with them, half the time of uneven classes."""
    examples, classes = head.examples, head.classes
    again = len(features) < examples
    rows = torch.multinomial(torch.ones(len(features)), examples, replacement=again, generator=generator)
    if distinct:
        labels = torch.randperm(classes, generator=generator)[:examples]
    else:
        uneven = -torch.rand(classes, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
        even = float(torch.rand((), generator=generator)) < 0.5
        picked = torch.ones_like(uneven) if even else uneven
        labels = torch.multinomial(picked, examples, replacement=True, generator=generator)
    h = features[rows]
    hot = torch.nn.functional.one_hot(labels, classes).double()
    errors = (h @ head.weight.T + head.bias).softmax(1) - hot
    slopes = (errors * _constant(h, level)[:, None]).mean(0)
    return Head(head.weight, head.bias, errors.T @ h / examples, slopes, examples), hot.sum(0)
