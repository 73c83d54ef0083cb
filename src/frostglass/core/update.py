"""What a client sends: a gradient or a weight difference, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        local_steps: full-batch steps an epoch; 1 for a gradient, and 1 with minibatches.
        epochs: how many times the steps are repeated, or the images are gone through in minibatches.
        lr, momentum, weight_decay: of the client's optimiser (unused for a gradient; Adam takes no momentum).
        loss: "cross_entropy" with soft targets, mean over what a step sees.
        optimizer: "sgd" as torch.optim.SGD (no dampening, no Nesterov), or "adam" as torch.optim.Adam with its own
            betas and eps; weight decay is added to the gradient in both.
        minibatch: images a step, shuffled anew in every epoch, the last step of an epoch taking what is left; None
            for all of them.
    """

    kind: Literal["gradient", "delta"] = "gradient"
    mode: Literal["train", "eval"] = "train"
    local_steps: int = 1
    epochs: int = 1
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    loss: Literal["cross_entropy"] = "cross_entropy"
    optimizer: Literal["sgd", "adam"] = "sgd"
    minibatch: int | None = None

    def steps_for(self, examples: int) -> int:
        """Optimiser steps in all, of a client that holds so many images."""
        if self.minibatch is None:
            return self.local_steps * self.epochs
        return -(-examples // self.minibatch) * self.epochs

    def one_sgd_step(self, examples: int) -> bool:
        """Whether a delta is lr (gradient + weight_decay W) of one step over all images."""
        return self.optimizer == "sgd" and self.steps_for(examples) == 1

    def whole_batches(self, examples: int) -> bool:
        """Whether every step sees all images, so that their order says nothing."""
        return self.minibatch is None or self.minibatch >= examples

    def sampling_rate(self, examples: int) -> float:
        """Probability with which a step sees an image, where minibatches are Poisson draws; 1 where all are seen."""
        if self.kind == "gradient" or self.minibatch is None or not examples:
            return 1.0
        return min(1.0, self.minibatch / examples)


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
    """(epsilon, delta) of one release, with what they rest on; `adjacency` is what neighbouring data sets differ in."""

    epsilon: float
    delta: float
    noise_multiplier: float
    clipping_norm: float
    accountant: str
    unit: str = "image"
    adjacency: Literal["add_remove", "replace_one"] = "add_remove"


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
        buffers: the model's buffers after the step, from a defence that replaces it (`Defense.gradient`) to its client;
            no part of what is sent as this update.
    """

    gradients: Gradients
    bn: Mapping[str, BNStatistics]
    examples: int
    plan: LocalPlan
    spent: PrivacySpent | None = None
    clients: int = 1
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
