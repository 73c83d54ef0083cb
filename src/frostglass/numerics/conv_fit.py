"""Images behind known activations: how far a candidate is from them, without a second derivative of the network.

Given the exact ReLU output a of a stack of convolutions and the gradient dz at its last convolution, a candidate should
reproduce a, and its own inputs of that convolution should reproduce the convolution's observed weight gradient. The
first is an ordinary forward pass; the second is linear in those inputs, so its derivative is one transposed
convolution. Frostglass's own method, the third stage of `peel`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.conv_peel import first_guess, with_hidden


@dataclass(frozen=True, eq=False)
class ConvFit:
    """What a candidate is compared with.

    Args:
        layers: convolutions up to the one behind whose ReLU the activations were peeled.
        outputs: [b, o, i, j] those activations.
        active: where they are positive.
        above: [b, o, i, j] gradient of the loss at them, 0 where the ReLU is off.
        grad_weight: of the last of `layers`, None if it was not sent.
    """

    layers: tuple[ConvLayer, ...]
    outputs: Float[Tensor, "b o i j"]
    active: Bool[Tensor, "b o i j"]
    above: Float[Tensor, "b o i j"]
    grad_weight: Float[Tensor, "o c kh kw"] | None

    @property
    def last(self) -> ConvLayer:
        """The convolution before the known activations."""
        return self.layers[-1]

    @property
    def free_scale(self) -> bool:
        """True if the activations are known up to a factor only, as a norm follows whose statistics were not seen.

        A GroupNorm leaves one factor an image, a BatchNorm one for all.
        """
        return self.last.norm in ("group", "own")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A forward pass through the layers.

    Args:
        inputs: of the last convolution.
        raw: its output.
        y: the same after the norm, what the ReLU reads.
    """

    inputs: Float[Tensor, "b c h w"]
    raw: Float[Tensor, "b o i j"]
    y: Float[Tensor, "b o i j"]


def forward(fit: ConvFit, x: Float[Tensor, "b c h w"]) -> Candidate:
    """Inputs of the first convolution -> what is compared."""
    for layer in fit.layers[:-1]:
        x = layer.scaled(layer.standardise(layer.conv(x))).relu()
    raw = fit.last.conv(x)
    return Candidate(x, raw, fit.last.scaled(fit.last.standardise(raw)))


def scale_of(fit: ConvFit, y: Float[Tensor, "b o i j"], *, known: bool) -> Float[Tensor, "#b 1 1 1"]:
    """Factor of the activations: 1 unless it is free; then fitted to the candidate, or typical of a norm.

    Args:
        fit: what is known.
        y: the candidate's.
        known: False while the candidate says nothing yet.
    """
    if not fit.free_scale:
        return y.new_ones(len(y), 1, 1, 1)
    over = (1, 2, 3) if fit.last.norm == "group" else (0, 1, 2, 3)
    power = fit.outputs.square().mean(over, keepdim=True)
    if not known:  # of a standard normal, a ReLU keeps half the mean square
        return (0.5 / power).sqrt()
    shared = (y.detach().relu() * fit.outputs).mean(over, keepdim=True)
    return (shared / power).clamp_min(1e-6)


def gradient_below(fit: ConvFit, candidate: Candidate, scale: Float[Tensor, "#b 1 1 1"], *, known: bool) -> Tensor:
    """Gradient at the last convolution's output.

    What the ReLU hides of its norm is the candidate's, or one constant a channel if the candidate is not `known` yet.
    """
    layer = fit.last
    if layer.norm in ("none", "fixed"):
        return layer.backward(fit.above, fit.outputs)
    xhat = first_guess(layer, fit.outputs * scale, fit.active)
    if known:
        xhat = with_hidden(layer, xhat, candidate.y.detach(), fit.active)
    deviation = layer.statistics(candidate.raw.detach())[1] if fit.free_scale else None
    return layer.backward(fit.above / scale, xhat, deviation)


def mismatch(
    fit: ConvFit, candidate: Candidate, dz: Tensor, scale: Float[Tensor, "#b 1 1 1"]
) -> tuple[Tensor, Tensor, Tensor]:
    """How far a candidate is from the activations and from the weight gradient.

    Returns:
        (loss with the derivative of both parts, relative squared distance to the activations, the same to the weight
        gradient). Where the ReLU is off, a negative y is no distance.
    """
    goal = fit.outputs * scale
    away = torch.where(fit.active, candidate.y - goal, candidate.y.relu())
    hinge = away.square().sum() / goal.square().sum()
    if fit.grad_weight is None:
        return hinge, hinge.detach(), torch.zeros_like(hinge)
    with torch.no_grad():
        size = fit.grad_weight.square().sum()
        left = fit.last.gradient_of_weight(candidate.inputs, dz) - fit.grad_weight
        linear = left.square().sum() / size
        pull = fit.last.adjoint_of_weight(2 * left / size, dz, candidate.inputs)
    return hinge + (candidate.inputs * pull).sum(), hinge.detach(), linear
