"""The client step: one function for the honest client and, differentiably, for the attacker's simulation of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.update import BNStatistics, LocalPlan
from frostglass.numerics.bn import recorded_bn, recorded_bn_of_clients
from frostglass.numerics.called import called_with
from frostglass.numerics.client_optimizer import OptimizerState, optimizer_step
from frostglass.numerics.fedavg import own_order
from frostglass.numerics.many_clients import expanded, many_clients
from frostglass.numerics.recompute import recomputed

REMEMBERED = 8
"""Differentiable simulations of so many steps keep no graph beyond one step."""


@dataclass(frozen=True)
class Trace:
    """What one simulated client step leaves behind; all terms of an attack read the same one.

    Args:
        gradients: by parameter name: the gradient, or W_before - W_after for `plan.kind == "delta"`.
        bn: batch statistics per BatchNorm layer of the first forward pass (the first minibatch).
        logits: [b, k] of the first forward pass.
        loss: scalar, of the first forward pass.
        buffers: the model's buffers after the step (running statistics as the client would send them).
    """

    gradients: Mapping[str, Tensor]
    bn: Mapping[str, BNStatistics]
    logits: Tensor
    loss: Tensor
    buffers: Mapping[str, Tensor]


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """The block sees every module of `model` in train or eval mode; afterwards each is as it was."""
    before = {m: m.training for m in model.modules()}
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def soft_cross_entropy(logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """-(1/b) sum_i sum_k y_ik log p_ik. Rows of mass m < 1 give the logit gradient m p - y."""
    return -(targets * torch.log_softmax(logits, dim=1)).sum(1).mean()


def a_row_each(logits: object, images: int) -> Tensor:
    """The logits, if there is a row for each image.

    Raises:
        BadInput: the network drops the axis of a batch of one, or answers with something else.
    """
    if not isinstance(logits, Tensor):
        raise BadInput(
            f"model: answers a batch of {images} with {type(logits).__name__}; it must be a tensor of logits "
            f"[{images}, classes]."
        )
    if logits.ndim != 2 or len(logits) != images:
        raise BadInput(
            f"model: answers a batch of {images} with a tensor of shape {tuple(logits.shape)}; it must be [{images}, "
            "classes], for a single image too: flatten(1) keeps the first axis where squeeze() drops it."
        )
    return logits


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that take part in training, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def local_update(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    plan: LocalPlan,
    *,
    order: Sequence[Tensor] | None = None,
    differentiable: bool = False,
    smooth: float = 0.0,
    statistics: bool = True,
) -> Trace:
    """What a client that holds (images, targets) sends, per `plan`; `model` is left unchanged.

    Args:
        model: the global model.
        images: in the bounds of its domain.
        targets: rows of mass at most 1.
        plan: gradient or delta, optimiser, steps, mode.
        order: rows that each step sees, for all steps; None: the minibatches of `plan` as they lie, every epoch alike.
            Its length is the number of steps (unused for a gradient).
        differentiable: keep the graph to `images` and `targets` (second derivatives). From `REMEMBERED` steps on, the
            graph of one step at a time: the memory of all weights a step instead, and 1.4 to 1.7 times the time
            (ResNet-20, 8 images of 32 px, 16 steps: 143 MiB and 3.7 s instead of 475 MiB and 2.6 s).
        smooth: of Adam's derivative (see `numerics.client_optimizer`); 0 for the exact one.
        statistics: False leaves `bn` of the trace empty, and saves computing it where nothing reads it.

    Returns:
        the trace; gradients are zero for parameters that the loss does not reach.
    """
    weights: dict[str, Tensor] = dict(trainable(model))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    steps = _steps(plan, len(images), order, images.device)
    client = _Client(model, plan, smooth, differentiable)
    with in_mode(model, plan.mode), torch.enable_grad():
        first = (images, targets) if steps[0] is None else (images[steps[0]], targets[steps[0]])
        watch: AbstractContextManager[dict[str, BNStatistics]] = recorded_bn(model) if statistics else nullcontext({})
        with watch as bn:
            logits = a_row_each(called_with(model, {**weights, **buffers}, first[0]), len(first[0]))
        loss = soft_cross_entropy(logits, first[1])
        grads = _gradients(loss, weights, differentiable)
        if plan.kind == "delta":
            start = weights
            weights, state = optimizer_step(weights, grads, OptimizerState(), plan, smooth=smooth)
            long = differentiable and len(steps) >= REMEMBERED
            for rows in steps[1:]:
                x, y = (images, targets) if rows is None else (images[rows], targets[rows])
                weights, state = (client.recomputed if long else client.step)(weights, state, buffers, x, y)
            grads = {name: start[name] - weights[name] for name in start}
    return _trace(grads, bn, logits, loss, buffers, differentiable)


def local_gradients(
    model: nn.Module,
    images: Float[Tensor, "s b c h w"],
    targets: Float[Tensor, "s b k"],
    mode: str,
    *,
    statistics: bool = True,
) -> tuple[Trace, ...]:
    """What several clients send who take one gradient each, simulated in one pass, differentiably.

    As `local_update` of every client, for networks that treat the images of a batch independently but for BatchNorm;
    whether one does is for the caller to compare.

    Args:
        model: the global model; left unchanged.
        images: in the bounds of its domain.
        targets: rows of mass at most 1.
        mode: "train" or "eval".
        statistics: False leaves `bn` of the traces empty.

    Returns:
        a trace for each client, without buffers.

    Raises:
        NotTogether: a layer is not known to `many_clients`.
    """
    clients, b = targets.shape[:2]
    weights = {name: expanded(w, clients) for name, w in trainable(model).items()}
    buffers = {name: x.clone() for name, x in model.named_buffers()}
    none: tuple[dict[str, BNStatistics], ...] = ({},) * clients
    watch = recorded_bn_of_clients(model, clients) if statistics else nullcontext(none)
    with in_mode(model, mode), torch.enable_grad(), many_clients(weights.values(), clients), watch as bn:
        logits = called_with(model, {**weights, **buffers}, images.flatten(0, 1))
    apart = logits.split(b)
    losses = [soft_cross_entropy(own, y) for own, y in zip(apart, targets.unbind(), strict=True)]
    grads = _gradients(torch.stack(losses).sum(), weights, differentiable=True)
    rows = {name: g.unbind() for name, g in grads.items()}
    return tuple(Trace({n: rows[n][i] for n in rows}, bn[i], apart[i], losses[i], {}) for i in range(clients))


def _steps(plan: LocalPlan, examples: int, order: Sequence[Tensor] | None, device: torch.device) -> list[Tensor | None]:
    """Rows of each step, on the device of the images; None for all."""
    if plan.kind == "gradient":
        return [None]
    if order is not None:
        return [rows.to(device) for rows in order]
    if plan.whole_batches(examples):
        return [None] * plan.steps_for(examples)
    return list(_own_order(plan, examples, device))


@lru_cache(maxsize=64)
def _own_order(plan: LocalPlan, examples: int, device: torch.device) -> tuple[Tensor, ...]:
    """Moved once: an attack simulates the same client thousands of times."""
    return tuple(rows.to(device) for rows in own_order(plan, examples))


@dataclass(frozen=True)
class _Client:
    """Everything about a step that stays the same."""

    model: nn.Module
    plan: LocalPlan
    smooth: float
    differentiable: bool

    def step(
        self, weights: Mapping[str, Tensor], state: OptimizerState, buffers: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """(weights, state) after one more step; running statistics in `buffers` move on."""
        if not self.differentiable:
            weights = {n: w.detach().requires_grad_(True) for n, w in weights.items()}
        loss = soft_cross_entropy(a_row_each(called_with(self.model, {**weights, **buffers}, x), len(x)), y)
        grads = _gradients(loss, weights, self.differentiable)
        return optimizer_step(weights, grads, state, self.plan, smooth=self.smooth)

    def recomputed(
        self, weights: Mapping[str, Tensor], state: OptimizerState, buffers: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[dict[str, Tensor], OptimizerState]:
        """The same without keeping the step's graph."""
        names, firsts, seconds = list(weights), list(state.first), list(state.second)
        cuts = len(names), len(names) + len(firsts), len(names) + len(firsts) + len(seconds)
        before = {n: b.clone() for n, b in buffers.items()}
        calls: list[int] = []

        def run(*flat: Tensor) -> list[Tensor]:
            held = OptimizerState(
                dict(zip(firsts, flat[cuts[0] : cuts[1]], strict=True)),
                dict(zip(seconds, flat[cuts[1] : cuts[2]], strict=True)),
                state.steps,
            )
            # the repetition must not move the running statistics once more
            own = {n: b.clone() for n, b in before.items()} if calls else buffers
            calls.append(1)
            with in_mode(self.model, self.plan.mode):
                now = self.step(dict(zip(names, flat[: cuts[0]], strict=True)), held, own, flat[-2], flat[-1])
            return [*now[0].values(), *now[1].first.values(), *now[1].second.values()]

        flat = [*weights.values(), *state.first.values(), *state.second.values(), x, y]
        after = recomputed(run, *flat)
        k = len(names)
        first = dict(zip(names, after[k : 2 * k], strict=True)) if len(after) > k else {}
        second = dict(zip(names, after[2 * k :], strict=True)) if len(after) > 2 * k else {}
        return dict(zip(names, after[:k], strict=True)), OptimizerState(first, second, state.steps + 1)


def _gradients(loss: Tensor, weights: Mapping[str, Tensor], differentiable: bool) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(weights.values()), create_graph=differentiable, allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found, strict=True)}


def _trace(
    gradients: Mapping[str, Tensor],
    bn: Mapping[str, BNStatistics],
    logits: Tensor,
    loss: Tensor,
    buffers: Mapping[str, Tensor],
    differentiable: bool,
) -> Trace:
    if differentiable:
        return Trace(gradients, bn, logits, loss, buffers)
    return Trace(
        {n: g.detach() for n, g in gradients.items()},
        {n: BNStatistics(s.mean.detach(), s.var.detach(), s.count) for n, s in bn.items()},
        logits.detach(),
        loss.detach(),
        {n: b.detach() for n, b in buffers.items()},
    )
