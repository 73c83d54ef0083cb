"""The client step: one function for the honest client and, differentiably, for the attacker's simulation of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from frostglass.core.update import BNStatistics, LocalPlan
from frostglass.numerics.bn import recorded_bn


@dataclass(frozen=True)
class Trace:
    """What one simulated client step leaves behind; all terms of an attack read the same one.

    Args:
        gradients: by parameter name: the gradient, or W_before - W_after for `plan.kind == "delta"`.
        bn: batch statistics per BatchNorm layer of the first forward pass.
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


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that take part in training, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def local_update(
    model: nn.Module,
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b k"],
    plan: LocalPlan,
    *,
    differentiable: bool = False,
) -> Trace:
    """What a client that holds (images, targets) sends, per `plan`; `model` is left unchanged.

    Args:
        model: the global model.
        images: in the bounds of its domain.
        targets: rows of mass at most 1.
        plan: gradient or delta, steps, learning rate, mode.
        differentiable: keep the graph to `images` and `targets` (second derivatives).

    Returns:
        the trace; gradients are zero for parameters that the loss does not reach.
    """
    weights: dict[str, Tensor] = dict(trainable(model))
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with in_mode(model, plan.mode), torch.enable_grad():
        with recorded_bn(model) as bn:
            logits = functional_call(model, {**weights, **buffers}, (images,))
        loss = soft_cross_entropy(logits, targets)
        grads = _gradients(loss, weights, differentiable)
        if plan.kind == "gradient":
            return _trace(grads, bn, logits, loss, buffers, differentiable)
        start = weights
        velocity: dict[str, Tensor] = {}
        for step in range(plan.steps):
            if step:
                now = soft_cross_entropy(functional_call(model, {**weights, **buffers}, (images,)), targets)
                grads = _gradients(now, weights, differentiable)
            weights, velocity = _sgd(weights, grads, velocity, plan)
            if not differentiable:
                weights = {n: w.detach().requires_grad_(True) for n, w in weights.items()}
        delta = {name: start[name] - weights[name] for name in start}
    return _trace(delta, bn, logits, loss, buffers, differentiable)


def _gradients(loss: Tensor, weights: Mapping[str, Tensor], differentiable: bool) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(weights.values()), create_graph=differentiable, allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found, strict=True)}


def _sgd(
    weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], velocity: Mapping[str, Tensor], plan: LocalPlan
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step of torch.optim.SGD (dampening 0, no Nesterov), out of place so that it can be differentiated."""
    new_weights, new_velocity = {}, {}
    for name, w in weights.items():
        g = grads[name] + plan.weight_decay * w if plan.weight_decay else grads[name]
        if plan.momentum:
            g = plan.momentum * velocity[name] + g if name in velocity else g
            new_velocity[name] = g
        new_weights[name] = w - plan.lr * g
    return new_weights, new_velocity


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
