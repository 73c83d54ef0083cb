"""Simulated batches at the last layer: images or made-up features with labels, and the gradients they would send.

Features come from real images where an attacker has some, else from the weights alone: noise around a mean, pushed
along the rows of the layer until the logits have margins like a trained network's. Labels are drawn from the posterior
at a temperature, since a simulation in which the network is always right would hold no misclassified image. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from frostglass.numerics.label_counts import Head

TEMPERATURE = 2.0
"""Of the posterior from which labels of simulated images are drawn: trained networks are about twice too sure."""
_MARGIN = 14.0  # largest logit margin that features made from weights are pushed to


@dataclass(frozen=True)
class Pool:
    """Simulated images at the last layer.

    Args:
        features: [n, d].
        logits: [n, k].
        labels: [n] drawn or known.
    """

    features: Float[Tensor, "n d"]
    logits: Float[Tensor, "n k"]
    labels: Int[Tensor, " n"]


def pool_from_images(
    features: Float[Tensor, "n d"],
    logits: Float[Tensor, "n k"],
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> Pool:
    """Pool of images that were run through the network; labels drawn at `TEMPERATURE` unless known."""
    if labels is None:
        labels = _drawn(logits.double(), generator)
    return Pool(features.double(), logits.double(), labels)


def pool_from_weights(
    weight: Float[Tensor, "k d"],
    bias: Float[Tensor, " k"],
    level: float,
    generator: torch.Generator,
    *,
    size: int = 4000,
    positive: bool = True,
) -> Pool:
    """Pool made from the layer's weights: no image is needed, and the client's mode does not matter.

    Args:
        weight, bias: of the last layer.
        level: typical size of a feature.
        generator: of the draws.
        size: features to make.
        positive: clip at 0, as behind a ReLU.
    """
    classes, width = weight.shape

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    centred = weight.double() - weight.double().mean(0)
    gain = centred.norm(dim=1).mean().clamp_min(1e-12)
    aim = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
    noise = torch.randn(size, width, generator=generator, dtype=torch.float64)
    first, second = (torch.randint(classes, (size,), generator=generator) for _ in range(2))
    push = rand(size, 1) * _MARGIN / gain
    brightness = level * torch.exp(0.6 * rand(size, 1) - 0.2)  # private images speak louder than dummies
    made = brightness * (1 + 0.4 * noise) + push * aim[first] + push * rand(size, 1) * aim[second]
    features = made.clamp_min(0) if positive else made
    logits = features @ weight.double().T + bias.double()
    return Pool(features, logits, _drawn(logits, generator))


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial((logits / TEMPERATURE).softmax(1), 1, generator=generator)[:, 0]


def simulate(
    pool: Pool, head: Head, batches: int, *, distinct: bool, coupled: bool, generator: torch.Generator
) -> tuple[Float[Tensor, "n k d1"], Float[Tensor, "n k"]]:
    """(K [gW | gb], counts) of simulated batches; classes drawn evenly, a tenth of the batches skewed.

    Args:
        pool: images to draw from.
        head: the layer, and K; its gradient is not used.
        batches: how many.
        distinct: no label occurs twice in a batch.
        coupled: the client's BatchNorm uses the batch: features are moved towards the mean of all images, by a random
            share from 0.5 of the way, after labels are drawn. A class that is frequent in a batch is then predicted
            too rarely, which makes its bias gradient speak.
        generator: of all draws.

    Raises:
        ValueError: distinct labels asked for more examples than the pool has classes.
    """
    examples = head.examples
    classes = pool.logits.shape[1]
    present = torch.bincount(pool.labels, minlength=classes).nonzero()[:, 0]
    if distinct and examples > len(present):
        raise ValueError(f"{examples} distinct labels cannot be drawn from {len(present)} classes")
    order = pool.labels.argsort(stable=True)
    size = torch.bincount(pool.labels, minlength=classes)
    begin = size.cumsum(0) - size
    chances = torch.ones(batches, len(present), dtype=torch.float64)
    if not distinct:
        skewed = torch.rand(batches, 1, generator=generator, dtype=torch.float64) < 0.1
        exponential = -torch.rand(chances.shape, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
        chances = torch.where(skewed, exponential, chances)
    picked = present[torch.multinomial(chances, examples, replacement=not distinct, generator=generator)]
    within = torch.rand(picked.shape, generator=generator, dtype=torch.float64)
    rows = order[begin[picked] + (within * size[picked]).long()]
    features = pool.features[rows]
    if coupled:
        share = 0.5 + 0.5 * torch.rand(batches, 1, 1, generator=generator, dtype=torch.float64)
        features = features - share * (features.mean(1, keepdim=True) - pool.features.mean(0))
        if bool((pool.features >= 0).all()):
            features = features.clamp_min(0)
    hot = torch.nn.functional.one_hot(picked, classes).double()
    error = torch.softmax(features @ head.weight.T + head.bias, 2) - hot
    extended = torch.cat([features, features.new_ones(batches, examples, 1)], 2)
    summed = error.transpose(1, 2) @ extended
    return summed.float().double(), hot.sum(1)  # what is sent is float32: no signal below its rounding
