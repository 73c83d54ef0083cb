"""Diagonal Fisher information leakage: a floor under the mean squared error of any reconstruction.

Of a release e(x) + N(0, s^2 I) with x in R^d: dFIL = Tr(J^T J) / (s^2 d), J the Jacobian of e at x. An unbiased
estimate of x has a mean squared error per coordinate of at least 1 / dFIL (Cramer-Rao); any estimate one of at least
1 / (E[dFIL] + Tr(I_prior) / d) on average over the prior (van Trees). Sources: Maeng et al. 2023 (dFIL), Guo et al.
2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng


@dataclass(frozen=True)
class Leakage:
    """dFIL of one point.

    Args:
        value: Tr(J^T J) / (s^2 d).
        standard_error: of its Monte Carlo, 0 if the trace was computed exactly.
        probes: Jacobian-vector products.
    """

    value: float
    standard_error: float
    probes: int

    @property
    def unbiased_floor(self) -> float:
        """Mean squared error per coordinate that no unbiased estimate undercuts."""
        return 1 / self.value if self.value > 0 else math.inf


def dfil(
    encode: Callable[[Tensor], Tensor], x: Tensor, noise: float, *, probes: int | None = 64, rng: Rng | None = None
) -> Leakage:
    """dFIL of `encode` at `x`, by Hutchinson's estimate of the trace with Rademacher probes and forward-mode products.

    Args:
        encode: [shape of x] -> a tensor of any shape; differentiable; the gradient of a client is one such map.
        x: the point, any shape, d values.
        noise: s, standard deviation of the Gaussian noise on each output, above 0.
        probes: random probes; None computes all d columns.
        rng: needed with probes.

    Raises:
        BadInput: no noise, no probes, or probes without an rng.
    """
    if not noise > 0:
        raise BadInput(f"noise: {noise:g} must be above 0; without noise the Fisher information is infinite.")
    d = x.numel()
    if probes is None:
        columns = torch.eye(d, dtype=x.dtype, device=x.device).view(d, *x.shape)
    elif probes < 2 or rng is None:
        raise BadInput(f"probes: {probes} random probes need at least 2 and an rng; None computes the trace exactly.")
    else:
        signs = 1.0 - 2.0 * rng.at("dfil").integers(2, (probes, *x.shape))
        columns = signs.to(x.device, x.dtype)
    squares = torch.stack([_product(encode, x, v).double().square().sum() for v in columns])
    scale = noise * noise * d
    if probes is None:
        return Leakage(float(squares.sum()) / scale, 0.0, d)
    spread = float(squares.std(correction=1)) / math.sqrt(len(columns))
    return Leakage(float(squares.mean()) / scale, spread / scale, len(columns))


def _product(encode: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """J v."""
    return torch.func.jvp(encode, (x.detach(),), (v,))[1].detach()


def van_trees_floor(mean_dfil: float, prior_information: float) -> float:
    """1 / (E[dFIL] + Tr(I_prior) / d): mean squared error per coordinate of any estimate, under the prior.

    Args:
        mean_dfil: dFIL averaged over the prior.
        prior_information: Tr(I_prior) / d; 1 / v for independent Gaussian coordinates of variance v.

    Raises:
        BadInput: both are 0, or one is negative.
    """
    if min(mean_dfil, prior_information) < 0 or mean_dfil + prior_information <= 0:
        raise BadInput(f"dFIL {mean_dfil:g} and prior information {prior_information:g} must be >= 0, one above 0.")
    return 1 / (mean_dfil + prior_information)
