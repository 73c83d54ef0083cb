"""What a candidate is compared with: the observation, laid out once for the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from frostglass.attacks.inversion.validate import errors_of
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Observation
from frostglass.core.update import BNStatistics, LocalPlan
from frostglass.numerics.called import copied
from frostglass.numerics.distance import flatten, norm_of
from frostglass.numerics.fedavg import Order, epoch_order
from frostglass.numerics.local_update import trainable
from frostglass.numerics.tile_weights import Kept


@dataclass(frozen=True, eq=False)
class Target:
    """The observation on the attack's device.

    Args:
        seen: the observation.
        model: a copy of its model, whose weights are the same memory where device and type are: no attack writes there.
        gradients: observed gradients, of the parameters that were sent, in the model's order.
        plan: what the attacker simulates.
        bn_batch, bn_running: statistics, where granted.
        mean, std: [c, 1, 1] of the normalisation inside the model.
        low, high: [c, 1, 1] bounds of a pixel in normalised space.
    """

    seen: Observation
    model: nn.Module
    gradients: Mapping[str, Tensor]
    plan: LocalPlan
    bn_batch: Mapping[str, BNStatistics] | None
    bn_running: Mapping[str, BNStatistics] | None
    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def denormalise(self, z: Tensor) -> Tensor:
        """z * std + mean, as the domain does it, with constants that are on the device already."""
        return z * self.std + self.mean

    @property
    def epochs(self) -> int:
        """Epochs that went through the images in an order of their own, which the attacker does not know; else 1."""
        n = self.seen.examples
        shuffled = n is not None and self.plan.kind == "delta" and not self.plan.whole_batches(n)
        return self.plan.epochs if shuffled else 1

    def order(self, images: int) -> Order | None:
        """Rows of each simulated step where there is an image of its own for every epoch; None for the plan's own."""
        n = self.seen.examples
        return self._epoch_order if n is not None and self.epochs > 1 and images == n * self.epochs else None

    @cached_property
    def _epoch_order(self) -> Order:
        assert self.seen.examples is not None
        return tuple(rows.to(self.mean.device) for rows in epoch_order(self.plan, self.seen.examples))

    def as_sent(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gradients of a candidate as the client's defence would send them, noise apart, where that grant was given.

        So pruned entries are not matched, rounding is passed straight through, and clipping scales.
        """
        return own if self.seen.defence is None else self.seen.defence.simulate(own, self.gradients)

    @property
    def names(self) -> list[str]:
        """Parameters that were sent."""
        return list(self.gradients)

    @cached_property
    def kept(self) -> Kept:
        """What is computed from the weights alone, once for the whole run: nothing changes them here."""
        return Kept()

    @cached_property
    def size(self) -> Tensor:
        """Norm of the weights that an update moves."""
        return norm_of(list(trainable(self.model).values()))

    @cached_property
    def flat(self) -> Tensor:
        """All observed gradients as one vector."""
        return flatten(list(self.gradients.values()))


def lay_out(seen: Observation, run: Runtime) -> Target:
    """Copies the observation to the runtime's device and dtype.

    Raises:
        BadInput: the update has no parameter of the model, or a wrong shape.
        AttackFailed: its values are not finite, or all zero.
    """
    problems = update_problems(seen)
    if problems:
        raise BadInput(problems)
    refuse_broken_values(seen)
    model = _copied(seen.model).to(run.device, run.dtype)
    weights = trainable(model)
    sent = {n: seen.gradients[n].to(run.device, run.dtype) for n in weights if n in seen.gradients}
    kind = next(m.kind for m in seen.messages if isinstance(m, GradientMessage))
    plan = seen.local_plan or LocalPlan(kind="gradient" if kind == "gradient" else "delta")
    plan = replace(plan, mode="train" if seen.mode == "train" else "eval")
    if plan.kind == "gradient" or (seen.examples is not None and plan.steps_for(seen.examples) == 1):
        for name, weight in weights.items():
            weight.requires_grad_(name in sent)  # what was not sent is not matched, nor does a later step see it moved
    model.train(plan.mode == "train")
    move = {"batch": seen.bn_batch, "running": seen.bn_running}
    moved = {k: _moved(v, run) if v else None for k, v in move.items()}
    mean, std = seen.domain.channel_constants(torch.zeros((), dtype=run.dtype, device=run.device))
    low, high = (seen.domain.low - mean) / std, (seen.domain.high - mean) / std
    return Target(seen, model, sent, plan, moved["batch"], moved["running"], mean, std, low, high)


def _copied(model: nn.Module) -> nn.Module:
    """A copy with modes, flags and buffers of its own, and the weights of the original in their place."""
    weights = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    twin: nn.Module = copied(model, dict(weights))
    return twin


def update_problems(seen: Observation) -> list[str]:
    """What does not fit between the update and the model, a sentence each."""
    return errors_of(seen)


def refuse_broken_values(seen: Observation) -> None:
    """Ends the run, not the plan, on an update that fits the model and holds nothing usable.

    Raises:
        AttackFailed: values that are not finite, or zeros only.
    """
    wrong = [n for n, g in seen.gradients.items() if not bool(g.isfinite().all())]
    if wrong:
        raise AttackFailed(f"update: {wrong[0]!r} holds values that are not finite ({len(wrong)} such tensors).")
    if all(float(g.abs().max()) == 0 for g in seen.gradients.values() if g.numel()):
        raise AttackFailed("update: every value is zero; nothing can be recovered from it.")


def _moved(statistics: Mapping[str, BNStatistics], run: Runtime) -> dict[str, BNStatistics]:
    def move(t: Tensor) -> Tensor:
        return t.to(run.device, run.dtype)

    return {n: BNStatistics(move(s.mean), move(s.var), s.count) for n, s in statistics.items()}
