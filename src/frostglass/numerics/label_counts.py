"""Counts of labels from the gradient of the last linear layer: mean feature, posterior matrix, least squares.

For the mean cross-entropy over K images, with h_i the input of the last layer and r_i = p_i - y_i,

    K gW = sum_i r_i h_i^T        K gb = sum_i r_i = sum_i p_i - n

so the counts n follow from the bias gradient as soon as the sum of the posteriors p_i is known. What is needed for that
can be read from the gradient itself (`mean_feature`, `posterior_observed`), measured on images, or assumed uniform.
Everything is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from frostglass.numerics.labels import largest_remainder

_TINY = 1e-300


@dataclass(frozen=True)
class Head:
    """The last linear layer and its gradient, in float64 on the CPU.

    Args:
        weight: [k, d].
        bias: [k], zeros if the layer has none.
        grad_weight: [k, d] gradient of the mean loss.
        grad_bias: [k], measured, or estimated by `bias_gradient`.
        examples: K, the images in the batch.
    """

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    grad_weight: Float[Tensor, "k d"]
    grad_bias: Float[Tensor, " k"]
    examples: int

    @property
    def classes(self) -> int:
        """Outputs of the layer."""
        return len(self.weight)

    @property
    def summed(self) -> Float[Tensor, "k d1"]:
        """K [gW | gb]: the sum of r_i [h_i; 1]^T."""
        return self.examples * torch.cat([self.grad_weight, self.grad_bias[:, None]], 1)

    @property
    def silent(self) -> bool:
        """True if nothing follows from the gradient: zeros (a saturated softmax), or values that are not finite."""
        if not bool(self.grad_weight.isfinite().all() and self.grad_bias.isfinite().all()):
            return True
        return float(self.grad_bias.abs().max()) == 0 or float(self.grad_weight.abs().max()) == 0


@dataclass(frozen=True)
class Counts:
    """An estimate of the counts.

    Args:
        counts: [k] whole, non-negative, of sum K.
        estimate: [k] before rounding.
        residual: relative misfit of the equations that were solved, from 0.
        spread: largest standard deviation of an entry of `estimate` that is still open; NaN if not known.
    """

    counts: Float[Tensor, " k"]
    estimate: Float[Tensor, " k"]
    residual: float
    spread: float = float("nan")


def bias_gradient(grad_weight: Float[Tensor, "k d"], feature_sum: float) -> Float[Tensor, " k"]:
    """Stand-in for a missing bias gradient: row sums over the typical sum of a feature vector.

    Exact when all images have that feature sum, since the row sum is sum_i r_ik (sum_m h_im) / K.
    """
    return grad_weight.sum(1) / (feature_sum if abs(feature_sum) > 1e-12 else 1.0)


def mean_feature(head: Head) -> Float[Tensor, " d"]:
    """Mean input of the layer over the batch, weighted by how strongly each image speaks.

    Each row of gW over its entry of gb is a weighted mean of features; rows are combined by |gb|, which cancels the
    small denominators. Exact at K = 1.
    """
    mass = head.grad_bias.abs().sum().clamp_min(_TINY)
    return (head.grad_bias.sign()[:, None] * head.grad_weight).sum(0) / mass


def posterior_uniform(classes: int) -> Float[Tensor, "k k"]:
    """M of a network that knows nothing: 1/C everywhere."""
    return torch.full((classes, classes), 1 / classes, dtype=torch.float64)


def posterior_measured(posterior: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Float[Tensor, "k k"]:
    """M[c] = mean posterior over images of class c; classes without an image get the mean over all images."""
    classes = posterior.shape[1]
    p = posterior.double()
    member = torch.nn.functional.one_hot(labels, classes).double()
    size = member.sum(0)[:, None]
    return torch.where(size > 0, member.T @ p / size.clamp_min(1), p.mean(0))


def posterior_observed(head: Head) -> Float[Tensor, "k k"]:
    """M from the gradient alone: row c is the posterior at the feature that row c of the gradient points to.

    A class whose bias gradient is negative is dominated by its own images, so gW_c / gb_c stands for them (the class
    embedding of Ma et al. 2023, iLRG); where it is implausible (a class mostly absent, or a clearly negative entry
    among non-negative features) the batch mean takes its place.
    """
    mean = mean_feature(head)
    gb = head.grad_bias
    own = head.grad_weight / torch.where(gb.abs() > _TINY, gb, torch.ones_like(gb))[:, None]
    near = (own - mean).norm(dim=1) <= 3 * mean.norm()
    signed = (mean >= 0).all() & (own < -1e-3 * mean.abs().amax()).any(1)
    trusted = (gb < 0) & near & ~signed
    return torch.softmax(torch.where(trusted[:, None], own, mean) @ head.weight.T + head.bias, 1)


def least_squares_counts(
    grad_bias: Float[Tensor, " k"],
    posterior: Float[Tensor, "k k"],
    examples: int,
    *,
    ridge: float = 1e-2,
    sum_weight: float = 10.0,
) -> Counts:
    """min_n ||(M^T - I) n - K gb||^2 + ridge ||n - K/C||^2 subject to n >= 0 and sum n = K.

    The ridge decides where M^T - I is nearly singular, as on a confident network: the estimate then falls back to K/C
    instead of following noise. The sum is a row of weight `sum_weight`, the sign is kept by NNLS.

    Args:
        grad_bias: gradient of the mean loss with respect to the bias.
        posterior: M, row c the mean posterior on images of class c; rows sum to 1.
        examples: K.
        ridge: lambda, from 0.
        sum_weight: weight of the row that holds sum n = K.
    """
    from scipy.optimize import nnls

    classes = len(grad_bias)
    eye = torch.eye(classes, dtype=torch.float64)
    system = posterior.double().T - eye
    right = examples * grad_bias.double()
    prior = torch.full((classes,), examples / classes, dtype=torch.float64)
    rows = torch.cat([system, ridge**0.5 * eye, sum_weight * torch.ones(1, classes, dtype=torch.float64)])
    values = torch.cat([right, ridge**0.5 * prior, torch.tensor([sum_weight * examples], dtype=torch.float64)])
    found = torch.from_numpy(nnls(rows.numpy(), values.numpy(), maxiter=30 * classes)[0])
    residual = float((system @ found - right).norm() / right.norm().clamp_min(_TINY))
    return Counts(largest_remainder(found, examples), found, residual)


def guess(classes: int, examples: int) -> Float[Tensor, " k"]:
    """K/C per class as whole numbers: what can be said without a gradient."""
    return largest_remainder(torch.full((classes,), examples / classes, dtype=torch.float64), examples)
