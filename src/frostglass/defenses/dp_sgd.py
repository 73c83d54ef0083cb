"""Differentially private SGD: per-example clipping and Gaussian noise, both by Opacus."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.core.update import LocalPlan, PrivacySpent, Update
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.local_update import soft_cross_entropy, trainable


@DEFENSES.register(paper="Abadi et al. 2016, CCS (DP-SGD); Opacus")
def dp_sgd(*, clipping_norm: float = 1.0, noise_multiplier: float = 1.0, delta: float = 1e-5) -> Defense:
    """Per-example clipping and Gaussian noise: the only defence here with a proof, by Opacus.

    Each example's gradient is clipped to `clipping_norm` C, N(0, (noise_multiplier C)^2) is added to the sum, which is
    divided by the batch size. The privacy spent is accounted for the steps of this update alone, without sampling
    amplification, for adding or removing one image.

    Args:
        clipping_norm: C, in the units of a gradient's L2 norm; above 0.
        noise_multiplier: sigma; 0 clips only and proves nothing.
        delta: of (epsilon, delta).
    """
    if clipping_norm <= 0 or noise_multiplier < 0 or not 0 < delta < 1:
        raise BadInput(
            f"dp_sgd: clipping_norm = {clipping_norm} must be above 0, noise_multiplier = {noise_multiplier} at least "
            f"0 and delta = {delta} between 0 and 1."
        )

    def gradient(model: nn.Module, batch: Batch, plan: LocalPlan, randomness: Randomness) -> Update:
        sent = _private_update(model, batch, plan, randomness, clipping_norm, noise_multiplier)
        steps = plan.steps_for(len(batch)) if plan.kind == "delta" else 1
        spent = _accounted(noise_multiplier, clipping_norm, delta, steps)
        return Update(sent, {}, len(batch), plan, spent)

    return Defense(
        "dp_sgd",
        gradient=gradient,
        claim="proof" if noise_multiplier > 0 else "heuristic",
        settings={"clipping_norm": clipping_norm, "noise_multiplier": noise_multiplier, "delta": delta},
    )


def _private_update(
    model: nn.Module, batch: Batch, plan: LocalPlan, randomness: Randomness, clip: float, sigma: float
) -> dict[str, Tensor]:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    _refuse_unsuitable(model)
    if plan.kind == "delta" and (plan.optimizer != "sgd" or not plan.whole_batches(len(batch))):
        raise BadInput("defense dp_sgd: takes SGD steps over all images; leave out client.optimizer and minibatch.")
    inner = copy.deepcopy(model).train(plan.mode == "train")
    names = list(trainable(inner))
    before = {n: p.detach().clone() for n, p in trainable(inner).items()}
    with _opacus_quiet():
        wrapped = GradSampleModule(inner, loss_reduction="mean", strict=False)
        sgd = torch.optim.SGD(
            [p for p in wrapped.parameters() if p.requires_grad],
            lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay,
        )  # fmt: skip
        optimizer = DPOptimizer(
            sgd,
            noise_multiplier=sigma,
            max_grad_norm=clip,
            expected_batch_size=len(batch),
            loss_reduction="mean",
            generator=randomness.rng().at("dp_sgd").generator(batch.images.device),
        )
        for _ in range(plan.steps_for(len(batch)) if plan.kind == "delta" else 1):
            optimizer.zero_grad()
            soft_cross_entropy(wrapped(batch.images), batch.targets).backward()
            if plan.kind == "delta":
                optimizer.step()
            else:
                optimizer.pre_step()
    after = trainable(inner)
    if plan.kind == "delta":
        return {n: before[n] - after[n].detach() for n in names}
    return {n: after[n].grad.detach().clone() for n in names}  # type: ignore[union-attr]


def _refuse_unsuitable(model: nn.Module) -> None:
    from opacus.validators import ModuleValidator

    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise BadInput(
            f'defense dp_sgd: Opacus refuses this model ({str(errors[0]).rstrip(".")}); set model.fix = "opacus" to '
            "replace such layers (BatchNorm becomes GroupNorm)."
        )


@contextmanager
def _opacus_quiet() -> Iterator[None]:
    """Opacus and torch warn about hooks on inputs without gradient; it does not concern the numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _accounted(sigma: float, clip: float, delta: float, steps: int) -> PrivacySpent | None:
    if sigma == 0:
        return None
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    with _opacus_quiet():
        for _ in range(steps):
            accountant.step(noise_multiplier=sigma, sample_rate=1.0)
        epsilon = float(accountant.get_epsilon(delta))
    return PrivacySpent(epsilon, delta, sigma, clip, "Opacus RDP, no sampling amplification, add/remove one image")
