"""Exact labels of a wholly recovered batch, from the gradient of the last linear layer.

With cross-entropy, dL/dV = (1/n) sum_i (p_i - y_i) f_i^T and dL/dc = (1/n) sum_i (p_i - y_i), where V, c are the last
layer's weight and bias, f_i its input and p_i the predicted probabilities. Once the inputs are known, so are f_i
and p_i,
and the equations are linear in y_i: least squares instead of the counting rules that must work without the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SolvedLabels:
    """labels: class index per row of the batch. targets: the solved y before rounding (a mixed label shows here).

    confidence: per row in [0, 1]: 1 - max |y - one-hot|, clipped at 0, times the share of the gradient explained;
    near 1
    for an exact recovery, low for repeated images, wrong images or soft labels. residual: relative error of the rebuilt
    dL/dV and dL/dc.
    """

    labels: Int[Tensor, " n"]
    targets: Float[Tensor, "n k"]
    confidence: Float[Tensor, " n"]
    residual: float


def labels_from(
    grad_weight: Float[Tensor, "k f"],
    grad_bias: Float[Tensor, " k"] | None,
    features: Float[Tensor, "n f"],
    probabilities: Float[Tensor, "n k"],
    batch: int | None = None,
) -> SolvedLabels:
    """Solve the last layer's gradient for p_i - y_i and return one label per image.

    features: inputs of the last layer; probabilities: softmax outputs, both on the recovered inputs, all rows of
    the batch.
    batch: divisor of the mean loss, n unless images are missing. Computed in float64.
    Raises ValueError: shapes that do not fit, NaN or infinity, or features that do not separate the images (rank < n).
    """
    n = len(features)
    if grad_weight.shape != (probabilities.shape[1], features.shape[1]) or len(probabilities) != n:
        raise ValueError("labels_from needs grad_weight [k, f], features [n, f] and probabilities [n, k]")
    system, right = features.double().T, grad_weight.double().T
    if grad_bias is not None:
        system = torch.cat([system, system.new_ones(1, n)])
        right = torch.cat([right, grad_bias.double()[None]])
    if not bool(torch.isfinite(system).all()) or not bool(torch.isfinite(right).all()):
        raise ValueError("labels_from needs finite numbers: the gradient or the features contain NaN or infinity")
    values = torch.linalg.svdvals(system)
    if len(values) < n or float(values[-1]) <= 1e-9 * float(values[0]):
        raise ValueError(
            f"the last layer's features do not separate the {n} images: repeated images or too few features"
        )
    errors = torch.linalg.lstsq(system, right).solution
    residual = float((system @ errors - right).norm() / right.norm().clamp_min(1e-300))
    targets = probabilities.double() - (batch or n) * errors
    labels = targets.argmax(1)
    ideal = torch.nn.functional.one_hot(labels, targets.shape[1])
    confidence = (1 - (targets - ideal).abs().amax(1)).clamp_min(0) * max(0.0, 1 - residual)
    return SolvedLabels(labels, targets, confidence, residual)
