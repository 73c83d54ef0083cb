"""What a client sends: a gradient or a weight difference, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

Gradients: TypeAlias = Mapping[str, Tensor]
"""By parameter name, never by position."""


@dataclass(frozen=True)
class LocalPlan:
    """What a client does with its batch before it sends something.

    Args:
        kind: "gradient" sends the FedSGD gradient; "delta" sends the FedAvg difference W_before - W_after.
        mode: whether the client's model is in train or eval mode (BatchNorm uses the batch in train mode).
        local_steps: full-batch steps an epoch; 1 for a gradient.
        epochs: how many times the steps are repeated.
        lr, momentum, weight_decay: of the client's SGD (unused for a gradient).
        loss: "cross_entropy" with soft targets, mean over the batch.
    """

    kind: Literal["gradient", "delta"] = "gradient"
    mode: Literal["train", "eval"] = "train"
    local_steps: int = 1
    epochs: int = 1
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    loss: Literal["cross_entropy"] = "cross_entropy"

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.local_steps * self.epochs


@dataclass(frozen=True)
class BNStatistics:
    """Batch statistics of one BatchNorm layer's input.

    Args:
        mean: [channels]
        var: [channels], *biased* (divided by count).
        count: elements per channel (batch x height x width).
    """

    mean: Float[Tensor, " c"]
    var: Float[Tensor, " c"]
    count: int


@dataclass(frozen=True)
class PrivacySpent:
    """(epsilon, delta) of one release, with what they rest on."""

    epsilon: float
    delta: float
    noise_multiplier: float
    clipping_norm: float
    accountant: str
    unit: str = "image"


@dataclass(frozen=True)
class Update:
    """One client's message before the channel.

    Args:
        gradients: by parameter name; for `plan.kind == "delta"` the difference W_before - W_after.
        bn: batch statistics per BatchNorm layer name, empty if none were computed.
        examples: images that went into it.
        plan: how it was made.
        spent: privacy spent by a defence with a proof, else None.
        clients: how many clients are summed in it.
    """

    gradients: Gradients
    bn: Mapping[str, BNStatistics]
    examples: int
    plan: LocalPlan
    spent: PrivacySpent | None = None
    clients: int = 1
