"""A label rule that is learned on simulated batches of the audited network's last layer.

On a trained, confident network the bias identity has almost no signal: most images leave |p - y| near 1e-3 and a few
misclassified ones leave 1. What is left is spread over orders of magnitude of the weight gradient's rows, which linear
rules cannot read. So many batches with known labels are simulated, their last-layer gradients computed (one product, no
backward pass), each class described by a few numbers on a logarithmic scale, and a small network fitted to
P(n_c >= 1), P(n_c >= 2), ... . The counts with the greatest expected number of right labels are the K largest of these
probabilities; without any signal they are those of the prior, so that the rule falls back to the guess by itself.
Where the batches come from is in `label_pool`. Ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.numerics.label_counts import Head
from frostglass.numerics.label_pool import Pool, simulate

_SMALLEST = (1e-1, 1e-4)  # scales of the two signed logarithms


@dataclass(frozen=True)
class LearnedRule:
    """A fitted rule for one network and one K.

    Args:
        networks: per-class descriptors -> logits of P(n_c >= j), j = 1 .. levels; their probabilities are averaged,
            since one network's score moves by 0.02 with its start.
        mean, std: of the descriptors.
        typical: [d] mean feature of the simulation.
        with_bias: whether the bias gradient was simulated (else it is estimated from row sums there, too).
        gain: mean gain of multiset accuracy over the guess on simulated batches that were held out.
        gain_low: lower end of its 95 % interval.
        reach: [f] largest absolute value of each standardised descriptor in the simulation.
    """

    networks: tuple[nn.Module, ...]
    mean: Tensor
    std: Tensor
    typical: Float[Tensor, " d"]
    with_bias: bool
    gain: float
    gain_low: float
    reach: Tensor


def learn(
    head: Head,
    pool: Pool,
    *,
    distinct: bool,
    with_bias: bool,
    coupled: bool = False,
    batches: int = 6000,
    steps: int = 400,
    members: int = 3,
    seed: int = 0,
) -> LearnedRule:
    """Fits the rule for one layer and one K; some seconds on a CPU at ten classes.

    Args:
        head: layer; its gradient is not used, so that one rule serves many updates of the same network and K.
        pool: simulated images.
        distinct: labels are known to be distinct.
        with_bias: the update holds the bias gradient.
        coupled: the client's BatchNorm uses the batch (see `simulate`).
        batches: simulated batches, a sixth of them held out (fewer for a large layer).
        steps: of Adam.
        members: networks that are averaged.
        seed: of batches and starting weights.
    """
    made = torch.Generator().manual_seed(seed)
    each = head.weight.numel() + head.examples * head.weight.shape[1] // 4
    batches = max(60, min(batches, 10_000_000 // each))
    typical = pool.features.mean(0)
    parts = []
    for first in range(0, batches, max(1, 2_000_000 // each)):  # a piece of the gradients at a time is in memory
        now = min(batches - first, max(1, 2_000_000 // each))
        summed, truth = simulate(pool, head, now, distinct=distinct, coupled=coupled, generator=made)
        parts.append((_described(head, summed, typical, with_bias), truth))
    x, counts = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])
    levels = 1 if distinct else max(1, int(counts.max()))
    y = (counts[..., None] > torch.arange(levels)).float()
    held = batches // 6
    mean, std = x[held:].mean((0, 1)), x[held:].std((0, 1)).clamp_min(1e-3)
    x = (x - mean) / std
    networks = tuple(_fitted(x[held:], y[held:], steps, made) for _ in range(members))
    found = decode(_tails(networks, x[:held]), head.examples)[0]
    truth, flat = counts[:held], torch.full_like(counts[:held], head.examples / head.classes)
    gains = ((flat - truth).abs().sum(1) - (found - truth).abs().sum(1)) / (2 * head.examples)
    low = float(gains.mean() - 1.96 * gains.std() / held**0.5)
    return LearnedRule(networks, mean, std, typical, with_bias, float(gains.mean()), low, x.abs().amax((0, 1)))


def apply(rule: LearnedRule, head: Head) -> tuple[Float[Tensor, " k"], float, bool]:
    """(whole counts of sum K, share of labels that the rule expects to have right, familiar) for one update.

    Familiar: no descriptor is far outside what the simulation showed; elsewhere the expectation is worth little.
    """
    x = (_described(head, head.summed[None], rule.typical, rule.with_bias) - rule.mean) / rule.std
    counts, expected = decode(_tails(rule.networks, x), head.examples)
    familiar = bool((x.abs().amax((0, 1)) <= 1.5 * rule.reach + 0.5).all())
    return counts[0], float(expected[0]), familiar


@torch.no_grad()
def _tails(networks: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return torch.stack([network(x).sigmoid() for network in networks]).mean(0)


def decode(tails: Float[Tensor, "n k levels"], examples: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, " n"]]:
    """Counts with the greatest expected multiset accuracy, from P(n_c >= j): the K largest of these probabilities.

    The expected overlap of counts m with the truth n is sum_c sum_{j <= m_c} P(n_c >= j), and these fall with j.

    Returns:
        (counts of sum K, expected share of labels right)
    """
    batches, classes, levels = tails.shape
    if (
        classes * levels < examples
    ):  # more images than simulated levels could hold: deeper levels are as rare as the last
        deeper = -(-examples // classes) - levels
        tails = torch.cat([tails, tails[..., -1:].expand(-1, -1, deeper)], 2)
        levels += deeper
    falling = tails.cummin(-1).values
    # float32 ties must go to the lower level first, or counts would skip one
    falling = falling.double() - 1e-9 * torch.arange(levels)
    top = falling.flatten(1).topk(examples, dim=1)
    taken = torch.zeros(batches, classes * levels, dtype=torch.float64).scatter_(1, top.indices, 1.0)
    return taken.view(batches, classes, levels).sum(-1), top.values.sum(1) / examples


def _fitted(x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> nn.Module:
    """A perceptron shared by all classes, by Adam on the log loss; starts from `generator`, not from global state."""
    width = 64

    def linear(inputs: int, outputs: int) -> nn.Linear:
        made: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # no draw from the global generator
        return made

    network = nn.Sequential(
        linear(x.shape[-1], width), nn.GELU(), linear(width, width), nn.GELU(), linear(width, y.shape[-1])
    )
    for layer in network:
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                bound = layer.in_features**-0.5
                layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound)
                layer.bias.zero_()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    per_step = max(8, min(128, 20_000 // x.shape[1]))
    with torch.enable_grad():
        for _ in range(steps):
            pick = torch.randint(len(x), (per_step,), generator=generator)
            loss = nn.functional.binary_cross_entropy_with_logits(network(x[pick]), y[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def _signed_log(x: Tensor, smallest: float) -> Tensor:
    return x.sign() * torch.log1p(x.abs() / smallest)


def _described(
    head: Head, summed: Float[Tensor, "n k d1"], typical: Float[Tensor, " d"], with_bias: bool
) -> Float[Tensor, "n k f"]:
    """Per class: bias gradient, extreme entries of the row, how far it points along the class's own weights, the bias
    identity at the mean feature; each on two logarithmic scales, with mean, least and greatest over classes and ranks.
    """
    rows = summed[..., :-1]
    bias = summed[..., -1:] if with_bias else rows.sum(-1, keepdim=True) / float(typical.sum())
    against = rows / typical.abs().clamp_min(0.05 * float(typical.abs().mean()))
    least = against.amin(-1, keepdim=True)
    own = (rows * (head.weight - head.weight.mean(0))).sum(-1, keepdim=True)
    identity = _identity(head, rows, bias)
    base = torch.cat(
        [bias, least, against.amax(-1, keepdim=True), rows.amin(-1, keepdim=True), own, _tenth(against)], -1
    )
    own_part = torch.cat(
        [_signed_log(base, s) for s in _SMALLEST] + [identity, (rows < 0).double().mean(-1, keepdim=True)], -1
    )
    around = torch.cat(
        [own_part.mean(1, keepdim=True), own_part.amin(1, keepdim=True), own_part.amax(1, keepdim=True)], -1
    )
    ranks = [t.argsort(1).argsort(1).double() / head.classes for t in (bias, least)]
    parts = [own_part, around.expand_as(torch.cat([own_part] * 3, -1)), *ranks]
    if head.classes <= 100:  # which class it is: what the network confuses with what
        parts.append(torch.eye(head.classes, dtype=torch.float64).expand(len(summed), -1, -1))
    return torch.cat(parts, -1).float()


def _tenth(x: Tensor) -> Tensor:
    place = max(1, round(0.1 * x.shape[-1]))
    return x.kthvalue(place, dim=-1, keepdim=True).values


def _identity(head: Head, rows: Tensor, bias: Tensor) -> Tensor:
    """K p - K gb at the batch's mean feature: the exact counts on a network whose posteriors agree."""
    mass = bias.abs().sum(1).clamp_min(1e-300)
    mean = (bias.sign() * rows).sum(1) / mass
    posterior = torch.softmax(mean @ head.weight.T + head.bias, 1)
    return head.examples * posterior[..., None] - bias
