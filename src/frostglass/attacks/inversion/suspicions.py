"""What the values of an update say about loss scale, mode and normalisation of the client that made it.

Each sentence rests on an identity that an honest client's update obeys; where none applies, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from frostglass.attacks.inversion.head import answers_plainly
from frostglass.core.threat import GradientMessage, Observation
from frostglass.numerics.bn import bn_layers
from frostglass.numerics.labels import classifier_layer

_SAME_LOSS = 0.02
"""Relative deviation of the loss scale that is still called 1."""

_INVARIANT, _VARIANT = 0.05, 0.25
"""<w, g> / (||w|| ||g||) sqrt(d), median over channels and layers: below the first where BatchNorm normalised by the
batch, above the second where it did not (0.67 for unrelated w and g)."""


def suspicions(seen: Observation) -> Iterator[str]:
    """Sentences on what makes a result misleading; the update's names, shapes and values are in order."""
    yield from _statistics(seen)
    gradients = _as_gradients(seen)
    if gradients is None:
        return
    yield from _loss(seen, gradients)
    yield from _mode(seen, gradients)
    yield from _first_linear(seen, gradients)


def _as_gradients(seen: Observation) -> dict[str, Tensor] | None:
    """The gradient of one step in float64 on the CPU; None for longer differences."""
    sent = {n: g.detach().double().cpu() for n, g in seen.gradients.items()}
    kinds = {m.kind for m in seen.messages if isinstance(m, GradientMessage)}
    if kinds == {"gradient"}:
        return sent
    plan = seen.local_plan
    if plan is None or seen.examples is None or not plan.one_sgd_step(seen.examples) or plan.lr == 0:
        return None
    weights = {n: w.detach().double().cpu() for n, w in seen.model.named_parameters()}
    return {n: g / plan.lr - plan.weight_decay * weights[n] for n, g in sent.items()}


def _loss(seen: Observation, gradients: Mapping[str, Tensor]) -> Iterator[str]:
    """With cross-entropy, the classifier's bias gradient is the batch's mean of m p - y: it sums to 0, and its
    positive entries to 1 at the most. Not where the network changes what the classifier gives."""
    layer = classifier_layer(seen.model, seen.classes, seen.image_shape)
    bias = gradients.get(f"{layer}.bias" if layer else "bias") if layer is not None else None
    if bias is None or not bool(bias.any()) or not answers_plainly(seen):
        return
    total, size = float(bias.sum()), float(bias.abs().sum())
    if abs(total) > 0.01 * size:
        yield (
            f"Update: the classifier's bias gradient sums to {total:.3g} and not to 0 (its entries to {size:.3g}), as "
            "that of a cross-entropy does: another loss, or a defence that changed the update."
        )
        return
    assert layer is not None
    scale = _scale(seen, gradients, layer, bias) if seen.examples == 1 else None
    most = float(bias.clamp_min(0).sum())
    if scale is not None and abs(scale - 1) > _SAME_LOSS:
        what = "the sign is turned (W_after - W_before?), and " if scale < 0 else ""
        yield (
            f"Update: {what}the loss was multiplied by {abs(scale):.3g} (exact, from one image). The cosine does not "
            "mind a positive factor, L2 matching does: divide the update by it, or correct lr."
        )
    elif scale is None and most > 1 + _SAME_LOSS:
        yield (
            f"Update: positive entries of the classifier's bias gradient sum to {most:.3g}, at most 1 is possible for "
            f"a mean over the batch: the loss was multiplied by {most:.3g} or more, as by a sum over the batch, a loss "
            "scale of mixed precision, or a wrong lr. L2 matching needs it divided out (--loss-scale of raw gradients)."
        )


def _scale(seen: Observation, gradients: Mapping[str, Tensor], layer: str, bias: Tensor) -> float | None:
    """Factor of the loss, for one image: its embedding is exact, so p - y is known. None if they do not agree."""
    module = seen.model.get_submodule(layer)
    grad = gradients.get(f"{layer}.weight" if layer else "weight")
    if grad is None or not isinstance(module, nn.Linear) or module.bias is None:
        return None
    row = int(bias.abs().argmax())
    embedding = grad[row] / bias[row]
    logits = module.weight.detach().double().cpu() @ embedding + module.bias.detach().double().cpu()
    for label, sign in ((int(bias.argmin()), 1), (int(bias.argmax()), -1)):
        expected = torch.softmax(logits, 0)
        expected[label] -= 1
        scale = float(bias @ expected / (expected @ expected).clamp_min(1e-300))
        if scale * sign > 0 and float((bias - scale * expected).norm()) < 1e-2 * float(bias.norm()):
            return scale
    return None


def _mode(seen: Observation, gradients: Mapping[str, Tensor]) -> Iterator[str]:
    """Normalised by its own statistics, a layer does not mind the length of its weights: <w, g> = 0 a channel."""
    sizes = []
    for layer, norm in _normalised_layers(seen.model):
        g = gradients.get(f"{layer}.weight")
        module = seen.model.get_submodule(layer)
        if g is None or not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or not bool(g.any()):
            continue
        w = module.weight.detach().double().cpu().flatten(1)  # type: ignore[operator]
        h = g.flatten(1)
        cosines = (w * h).sum(1).abs() / (w.norm(dim=1) * h.norm(dim=1)).clamp_min(1e-300)
        sizes.append(cosines[h.norm(dim=1) > 0].median() * w.shape[1] ** 0.5)
    if not sizes:
        return
    size = float(torch.stack(sizes).median())
    if seen.mode == "eval" and size < _INVARIANT:
        yield (
            "Update: it looks like one of train mode (the layers before BatchNorm have gradients at right angles to "
            "their weights), and the model is in eval mode: the simulation differs; set the mode to train."
        )
    if seen.mode == "train" and size > _VARIANT:
        yield (
            "Update: it looks like one of eval mode (the layers before BatchNorm have gradients along their weights, "
            "which batch statistics rule out), and the model is in train mode: set the mode to eval; or a defence "
            "changed the update."
        )


def _normalised_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(layer, the BatchNorm that follows it), by the order of registration and equal channels."""
    leaves = [(n, m) for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    return [
        (name, norm)
        for (name, layer), (_, norm) in pairwise(leaves)
        if isinstance(layer, nn.Conv2d | nn.Linear)
        and isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        and layer.weight.shape[0] == norm.num_features
    ]


def _first_linear(seen: Observation, gradients: Mapping[str, Tensor]) -> Iterator[str]:
    """One image into a first Linear layer is the ratio of its weight and bias gradient, and must be in range."""
    first = next(((n, m) for n, m in seen.model.named_modules() if next(m.parameters(recurse=False), None) is not None))
    name, module = first
    channels, height, width = seen.image_shape
    grad, bias = gradients.get(f"{name}.weight"), gradients.get(f"{name}.bias")
    if seen.examples != 1 or not isinstance(module, nn.Linear) or grad is None or bias is None or not bool(bias.any()):
        return
    if grad.shape[1] != channels * height * width:
        return
    row = int(bias.abs().argmax())
    found = seen.domain.denormalise((grad[row] / bias[row]).view(channels, height, width))
    low, high = float(found.min()), float(found.max())
    if low < seen.domain.low - 0.02 or high > seen.domain.high + 0.02:
        yield _range_sentence(seen, low, high)


def _statistics(seen: Observation) -> Iterator[str]:
    """Statistics of the first BatchNorm say which mean colour went into the convolution before it."""
    if seen.mode == "eval" and seen.bn_batch:
        yield (
            "Update: batch statistics were granted for a client in eval mode, which neither uses nor sends them; if "
            "the client trained in train mode, set the mode to train."
        )
    pairs = _normalised_layers(seen.model)
    if not pairs or not seen.bn_batch:
        return
    name, norm = pairs[0]
    layer = seen.model.get_submodule(name)
    first = next(m for m in seen.model.modules() if next(m.parameters(recurse=False), None) is not None)
    held = next((seen.bn_batch[n] for n, m in bn_layers(seen.model).items() if m is norm and n in seen.bn_batch), None)
    if (
        held is None
        or layer is not first
        or not isinstance(layer, nn.Conv2d)
        or len(layer.weight) < 3 * seen.image_shape[0]
    ):
        return
    taps = layer.weight.detach().double().cpu().sum((2, 3))
    goal = held.mean.double().cpu() - (0 if layer.bias is None else layer.bias.detach().double().cpu())
    colour = torch.linalg.lstsq(taps, goal[:, None]).solution[:, 0]
    mean = seen.domain.denormalise(colour.view(-1, 1, 1)).flatten()
    low, high = float(mean.min()), float(mean.max())
    span = 0.1 * (seen.domain.high - seen.domain.low)  # edges are padded, so the sum of taps is not quite what they saw
    if low < seen.domain.low - span or high > seen.domain.high + span:
        yield _range_sentence(seen, low, high)


def _range_sentence(seen: Observation, low: float, high: float) -> str:
    return (
        f"Update: undoing the model's normalisation, the first layer's input runs from {low:.3g} to {high:.3g}, "
        f"outside [{seen.domain.low:g}, {seen.domain.high:g}]: the client normalised otherwise, twice, or not at all."
    )
