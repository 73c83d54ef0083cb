"""One seed's objective and its gradient: one shared simulation of the client for all terms, two ways to differentiate.

The matching loss D(g(x)) holds the gradient g of the network, so that its own gradient needs second derivatives.
"double_backward" has autograd take them, in seven times the work of a forward pass. "frozen_fd" needs five, and no
double backward (custom kernels, flash attention): with v = dD/dg held fixed, grad_x D(g(x)) = d/de grad_x L(x; W + e v)
at e = 0, taken as the difference to one second pass in which every ReLU and max-pooling repeats the choices it made
at W. Without that freezing, finite differences cross kinks and are wrong on ReLU networks (cosine below 0.7 to the
true gradient), so they are not offered. Priors that read the network (BatchNorm statistics) are taken from the second
pass, in whose backward pass they cost nothing; W + e v is W but for some 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from frostglass.attacks.inversion.frozen import Choices
from frostglass.attacks.inversion.schedules import Schedule, as_schedule
from frostglass.attacks.inversion.spaces import Space
from frostglass.attacks.inversion.target import Target
from frostglass.attacks.inversion.terms import Candidate, Term
from frostglass.core.errors import AttackFailed
from frostglass.core.randomness import Rng, global_draws
from frostglass.core.update import BNStatistics
from frostglass.numerics.bn import recorded_bn
from frostglass.numerics.called import called_with
from frostglass.numerics.distance import norm_of
from frostglass.numerics.image import anchor_distance
from frostglass.numerics.local_update import Trace, in_mode, local_update, soft_cross_entropy, trainable
from frostglass.numerics.second_order import first_order_layers, second_order_layers

Engine: TypeAlias = Literal["double_backward", "frozen_fd"]
Augment: TypeAlias = Callable[[Tensor], Tensor]

RELATIVE_STEP = {torch.float64: 1e-8}
"""||e v|| / ||W|| by dtype; 1e-5 elsewhere: below it round-off rules, above it the curvature of the smooth parts.

At 1e-5 the direction of the gradient is off by 1e-6 to 2e-5 (1 - cosine; ResNet-20 and small BN CNN, 8 and 32 px).
"""

ADAM_SMOOTHING = 1.0
"""For clients that use Adam, whose first step has no slope: 3 to 9 dB better than none on a small BN CNN.

See `numerics.client_optimizer`.
"""


@dataclass(frozen=True)
class Objective:
    """What is minimised at one step.

    Args:
        target: what was observed.
        terms: those of weight other than 0.
        space: decodes variables.
        engine: how the gradient is taken.
        t, steps: the step, for schedules.
        targets: [b, k], unless the space holds labels.
        anchor: [b, c, h, w] or None.
        group: weight of the distance to it.
        augment: applied to the images that the network sees, not to the pixel priors.
        draws: what a network that draws (Dropout in train mode) draws from; None for torch's own generator.
        scales: [terms + 1] weights of the terms and of the anchor at this step, on the device; None to take them from
            the schedules.
    """

    target: Target
    terms: tuple[Term, ...]
    space: Space
    engine: Engine
    t: int
    steps: int
    targets: Tensor
    anchor: Tensor | None = None
    group: float | Schedule = 0.0
    augment: Augment | None = None
    draws: Rng | None = None
    scales: Tensor | None = None

    def drawing(self) -> AbstractContextManager[None]:
        """Of one pass through the network; every pass of an evaluation draws the same."""
        return nullcontext() if self.draws is None else global_draws(self.draws, self.targets.device)

    def scale(self, which: int) -> float | Tensor:
        """Weight at this step of a term, by its place, or with -1 of the distance to the anchor."""
        return self._scheduled(which, self.t) if self.scales is None else self.scales[which]

    def all_scales(self, like: Tensor) -> Tensor:
        """[steps, terms + 1] what `scales` is at each step."""
        places = [*range(len(self.terms)), -1]
        made = [[self._scheduled(place, t) for place in places] for t in range(self.steps)]
        return torch.tensor(made, dtype=like.dtype, device=like.device)

    def _scheduled(self, which: int, t: int) -> float:
        weight = self.group if which == -1 else self.terms[which].weight
        return as_schedule(weight)(t, self.steps)


@dataclass(frozen=True)
class Evaluation:
    """One seed at one point.

    Args:
        own: matching and priors, weighted: what can be computed from the images alone, and by which seeds are chosen.
        total: with the distance to the anchor: what is minimised.
        gradient: of `total`, as the variable; None if not asked for.
        values: of each term, unweighted.
    """

    own: Float[Tensor, ""]
    total: Float[Tensor, ""]
    gradient: Tensor | None
    values: Mapping[str, Tensor]


def evaluate(z: Tensor, problem: Objective, *, gradient: bool = True) -> Evaluation:
    """The objective, and its gradient unless `gradient` is False, at the variable z of one seed."""
    if not gradient:
        with torch.no_grad():
            return finished(*valued(problem, _simulated(z, problem, differentiable=False)), None)
    z = z.detach().requires_grad_(True)
    if problem.engine == "frozen_fd" and any(t.gradient for t in problem.terms):
        return _frozen_differences(z, problem)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels of attention cannot be differentiated twice
        own, total, values = valued(problem, _simulated(z, problem, differentiable=True))
        return finished(own, total, values, torch.autograd.grad(total, z)[0])


ALIKE = 0.99
"""Least cosine between the gradients of the two engines; frozen differences reach .9999 where they hold all kinks."""


def refuse_unheld_kinks(z: Tensor, problem: Objective) -> None:
    """Compares frozen differences with double backward once, at the variable z of one seed.

    A network may choose in ways that no list of functions covers (`torch.where`, comparisons, in-place tricks).
    Nothing is compared where double backward cannot be had, or does not fit into memory.

    Raises:
        AttackFailed: they differ, so that the choices of some layer are not held.
    """
    try:
        exact = evaluate(z, replace(problem, engine="double_backward")).gradient
    except RuntimeError:
        return
    found = evaluate(z, problem).gradient
    assert exact is not None
    assert found is not None
    alike = float(torch.nn.functional.cosine_similarity(exact.flatten(), found.flatten(), 0))
    if alike < ALIKE and float(exact.norm()) > 0:
        raise AttackFailed(
            f"engine: 'frozen_fd' gives another gradient than double backward here (cosine {alike:.3g}): the network "
            "has kinks that it does not hold fixed; use double_backward."
        )


def finished(own: Tensor, total: Tensor, values: Mapping[str, Tensor], gradient: Tensor | None) -> Evaluation:
    """Off the graph."""
    kept = {n: v.detach() for n, v in values.items()}
    return Evaluation(own.detach(), total.detach(), gradient, kept)


def _simulated(z: Tensor, problem: Objective, *, differentiable: bool) -> Candidate:
    pixels, images, targets = decoded(z, problem)
    target = problem.target
    if any(term.gradient for term in problem.terms):
        smooth = ADAM_SMOOTHING if target.plan.optimizer == "adam" else 0.0
        with problem.drawing(), second_order_layers(target.kept) if differentiable else nullcontext():
            trace = local_update(
                target.model,
                images,
                targets,
                target.plan,
                order=target.order(len(images)),
                differentiable=differentiable,
                smooth=smooth,
                statistics=any(term.statistics for term in problem.terms),
            )
    else:
        with problem.drawing():
            trace = _forward(target, dict(trainable(target.model)), images, targets, mode="eval", statistics=True)
    return Candidate(pixels, images, targets, trace, target)


def decoded(z: Tensor, problem: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised images, what the network is shown, targets) of one seed, on its graph."""
    pixels = problem.space.images(z, problem.target)
    labels = problem.space.labels(z, problem.target)
    shown = pixels if problem.augment is None else problem.augment(pixels)
    rows = problem.targets if labels is None else labels
    if len(rows) != len(pixels):  # an image of its own for every epoch of the client
        rows = rows.repeat(len(pixels) // len(rows), 1)
    return pixels, problem.target.denormalise(shown), rows


def _forward(
    target: Target,
    weights: Mapping[str, Tensor],
    images: Tensor,
    targets: Tensor,
    *,
    mode: str | None = None,
    statistics: bool = False,
) -> Trace:
    """A forward pass alone, with the gradients left out of the trace.

    Args:
        mode: of the network; the client's if None. Attacks that match nothing look at the network as it is deployed.
        statistics: record what BatchNorm layers see.
    """
    buffers = {name: b.clone() for name, b in target.model.named_buffers()}
    watch: AbstractContextManager[dict[str, BNStatistics]] = (
        recorded_bn(target.model) if statistics else nullcontext({})
    )
    with in_mode(target.model, mode or target.plan.mode), watch as bn:
        logits = called_with(target.model, {**weights, **buffers}, images)
    return Trace({}, bn, logits, soft_cross_entropy(logits, targets), buffers)


def valued(
    problem: Objective, candidate: Candidate, *, only: bool | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(own objective, total, values); `only` keeps the terms that match gradients, or those that do not."""
    terms = [(i, t) for i, t in enumerate(problem.terms) if only is None or t.gradient is only]
    values = {term.name: term.value(candidate) for _, term in terms}
    own = sum((problem.scale(i) * values[t.name] for i, t in terms), candidate.z.new_zeros(()))
    total = own
    if problem.anchor is not None and only is not True:
        values["group"] = anchor_distance(candidate.z, problem.anchor)
        total = own + problem.scale(-1) * values["group"]
    return own, total, values


def _frozen_differences(z: Tensor, problem: Objective) -> Evaluation:
    """As the module says: two passes through the network, each differentiated once."""
    target = problem.target
    weights = dict(trainable(target.model))
    pixels, images, targets = decoded(z, problem)
    inputs = [images] + ([targets] if targets.requires_grad else [])
    starts = [x.detach().requires_grad_(True) for x in inputs]
    choices = Choices()
    with problem.drawing(), first_order_layers(target.kept), choices.recorded():
        trace = _forward(target, weights, starts[0], starts[1] if len(starts) > 1 else targets)
    found = torch.autograd.grad(trace.loss, [*weights.values(), *starts], allow_unused=True)
    slopes = found[len(weights) :]
    own = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found, strict=False)}
    del found
    matched = Candidate(pixels.detach(), images.detach(), targets.detach(), replace(trace, gradients=own), target)
    loss, values, v = _matching(problem, matched)
    del own, matched  # as much memory as the weights
    step = _step_size(target.size, v)
    moved = {n: torch.addcmul(w.detach(), v.pop(0), step) for n, w in weights.items()}
    reads = any(term.statistics and not term.gradient for term in problem.terms)
    with problem.drawing(), first_order_layers(None), choices.replayed():
        trace = _forward(target, moved, images, targets, statistics=reads)
    priors, rest, others = valued(problem, Candidate(pixels, images, targets, trace, target), only=False)
    # linear in the inputs: its slope is what the first pass found
    before = sum(((g * x).sum() for g, x in zip(slopes, inputs, strict=True)), loss.new_zeros(()))
    change = torch.autograd.grad((trace.loss - before) / step + rest, z)[0]
    return finished(loss + priors, loss + rest, {**values, **others}, change)


def _matching(problem: Objective, candidate: Candidate) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """(sum, each value, slopes in the candidate's gradients) of the terms that match gradients, all off the graph."""
    leaves = {n: g.detach().requires_grad_(True) for n, g in candidate.trace.gradients.items()}
    free = replace(candidate, trace=replace(candidate.trace, gradients=leaves))
    loss, _, values = valued(problem, free, only=True)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    slopes = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), found, strict=True)]
    return loss.detach(), {name: value.detach() for name, value in values.items()}, slopes


def _step_size(weights: Tensor, v: list[Tensor]) -> Tensor:
    """Given the norm of the weights."""
    size = norm_of(v)
    return RELATIVE_STEP.get(size.dtype, 1e-5) * weights / size.clamp_min(torch.finfo(size.dtype).tiny)
