"""What `peel` keeps between steps, and what its residuals say about the images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.analytic.peel_problem import Problem
from frostglass.attacks.inversion.machine import InversionState
from frostglass.numerics import head
from frostglass.numerics.conv_peel import CERTIFIED

FITTED, FITTED_GROUP = 1e-3, 2e-3
"""Largest loss of certified pixels; the second where a norm leaves the scale of the activations open."""


@dataclass(frozen=True)
class PeelState:
    """Of all stages; each reads what the one before it left.

    Args:
        stage: "heads", "activations", "pixels", "matching" (when the algebra failed), "over".
        tried: steps of the first stage, then thresholds of the second one.
        mixing: [b, b] the best solution for the classifier's inputs; heads_residual: its residual.
        targets: [b, k] that go with it.
        activations: [b, c, h, w] input of the last convolution; peel_residual: its residual.
        above: [b, c, h, w] gradient of the loss at them.
        hidden: gradient at the output of the convolution before them, as of the last refresh.
        z: [b, c, h, w] pixels in the domain's normalised space; rule: state of Adam; iteration: of either fit.
        best, best_loss: the pixels at their lowest loss.
        matching: state of the gradient matching that takes over where the algebra fails; fell_back: True once it has.
    """

    stage: str
    tried: int
    mixing: Float[Tensor, "b b"]
    heads_residual: float
    targets: Float[Tensor, "b k"]
    activations: Tensor
    peel_residual: float
    above: Tensor
    hidden: Tensor
    z: Float[Tensor, "b c h w"]
    rule: Any
    iteration: int
    best: Float[Tensor, "b c h w"]
    best_loss: Tensor
    matching: InversionState
    fell_back: bool


def info(problem: Problem, state: PeelState) -> dict[str, float | int | str | bool]:
    """Residuals, the certificate that rests on them, and what to make of it."""
    grouped = len(problem.layers) > 1 and problem.layers[-2].norm in ("group", "own")
    loss = float(state.best_loss)
    told: dict[str, float | int | str | bool] = {
        "heads_residual": state.heads_residual,
        "peel_residual": state.peel_residual,
        "pixel_loss": loss,
    }
    told = {k: v for k, v in told.items() if not isinstance(v, float) or math.isfinite(v)}
    told["certificate"] = (
        state.heads_residual < head.ACCEPTED
        and state.peel_residual < CERTIFIED
        and loss < (FITTED_GROUP if grouped else FITTED)
    )
    told["labels"] = (
        "granted" if problem.granted
        else "restored; the certificate covers them" if told["certificate"]
        else "restored; nothing certifies them"
    )  # fmt: skip
    if problem.free_contrast:
        told["contrast"] = (
            f"a norm hides the contrast of every {problem.free_contrast}; shown is that of a typical photograph"
        )
    if state.fell_back:
        told["warning"] = (
            "the gradient does not follow from the network exactly (noise, rounding, wrong labels, another batch size "
            "or a loss that is no mean over the batch): shown are images by gradient matching, without a certificate"
        )
    elif not told["certificate"]:
        told["warning"] = "the residuals do not certify these images"
    return told


def contrasted(problem: Problem, z: Tensor) -> Tensor:
    """Images scaled to a mean square of 1 in the normalised space, where the network does not see their scale."""
    if not problem.free_contrast:
        return z
    over = (1, 2, 3) if problem.free_contrast == "image" else (0, 1, 2, 3)
    return z / z.square().mean(over, keepdim=True).sqrt().clamp_min(1e-6)


def agreement(problem: Problem, state: PeelState, images: Tensor) -> float:
    """Share of the ReLUs after the peeled convolution and after the last one that `images` switch as observed."""
    known = state.activations
    with torch.no_grad():
        x = problem.to_input(images.to(known))
        for layer in problem.layers[:-1]:
            x = layer.scaled(layer.standardise(layer.conv(x))).relu()
        fit = [] if len(problem.layers) == 1 else [((x > 0) == (known > 1e-5 * known.max())).double().mean()]
        shown, goal = (
            problem.layers[-1].scaled(problem.layers[-1].standardise(problem.layers[-1].conv(v))) for v in (x, known)
        )
    return float(torch.stack([*fit, ((shown > 0) == (goal > 0)).double().mean()]).min())
