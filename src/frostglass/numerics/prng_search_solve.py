"""With all keys known, images are the solution of linear equations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.prng_search import TOLERANCE, search_permutation
from frostglass.numerics.prng_search_released import SeededKeys, released_coefficients

PRIOR = 0.5
"""Standard deviation of a pixel of an image in [-1, 1], as a prior."""


@dataclass(frozen=True)
class Solved:
    """Images [n, d] in [-1, 1], and the root mean square of what they leave unexplained.

    Args:
        open_signs: the sign of each pixel is not in the data, jointly over all images.
    """

    images: Float[Tensor, "n d"]
    residual: float
    open_signs: bool = False


def solve_images(
    encodings: Float[Tensor, "e d"],
    keys: SeededKeys,
    images: int,
    mask: str,
    pool: Float[Tensor, "m d"] | None = None,
) -> Solved:
    """Weighted ridge regression of the unmasked encodings on the private images and the mean public one.

    An encoding's weight is the inverse of the variance that its unknown public partners leave: PRIOR^2 sum lambda^2.

    Args:
        encodings: in [-1, 1].
        keys: of as many rows, or of more (then the first are taken).
        images: private images.
        mask: "sign" (the keys hold the flips), "none", or "abs" (signs are found by alternation).
        pool: [m, d] public images in [-1, 1]; subtracted where the keys name them.
    """
    e, p = len(encodings), keys.private
    index, weight = torch.from_numpy(keys.indices[:e]), torch.from_numpy(keys.coefficients[:e])
    design = torch.zeros(e, images + 1)
    design.scatter_add_(1, index[:, :p], weight[:, :p])
    y = encodings.clone()
    if mask == "sign" and keys.flips is not None:
        y = torch.where(torch.from_numpy(keys.flips[:e]), -y, y)
    noise = PRIOR**2 * weight[:, p:].square().sum(1)
    known = pool is not None and p < weight.shape[1] and bool((index[:, p:] >= 0).all())
    public = _public_part(pool, index[:, p:], weight[:, p:]) if known and pool is not None else None
    if public is not None:
        noise = torch.zeros(e)
    else:
        design[:, images] = weight[:, p:].sum(1)
    scale = (noise + 1e-4).rsqrt()[:, None]
    if mask == "abs":
        return _alternated(y.abs(), design, scale, images, public)
    if public is not None:
        y = y - public
    x = _ridge(design * scale, y * scale)
    return Solved(x[:images].clamp(-1, 1), float((y - design @ x).square().mean().sqrt()))


def _public_part(pool: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    made = pool.new_zeros(len(index), pool.shape[1])
    for slot in range(index.shape[1]):
        made += weight[:, slot, None] * pool[index[:, slot]]
    return made


def _ridge(a: Tensor, y: Tensor) -> Tensor:
    a, y = a.double(), y.double()
    gram = a.T @ a + torch.eye(a.shape[1], dtype=a.dtype) / PRIOR**2
    return torch.linalg.solve(gram, a.T @ y).float()


def _alternated(
    y: Tensor, design: Tensor, scale: Tensor, images: int, public: Tensor | None, steps: int = 60
) -> Solved:
    """Without signs: a spectral start per pixel, then signs of the prediction and least squares by turns.

    The sign of a pixel is then free jointly over all images, unless the public part is known and fixes it.
    """
    a, offset = design * scale, torch.zeros_like(y) if public is None else public
    square = y.square() - y.square().mean(0)
    m = torch.einsum("en,ed,em->dnm", a, square, a)
    x = torch.linalg.eigh(m).eigenvectors[:, :, -1].T * 0.5 * images**0.5
    for _ in range(steps):
        predicted = design @ x + offset
        signed = torch.where(predicted < 0, -y, y)
        x = _ridge(a, (signed - offset) * scale)
    predicted = design @ x + offset
    left = float((y - predicted.abs()).square().mean().sqrt())
    return Solved(x[:images].clamp(-1, 1), left, open_signs=public is None)


def consistent(seed: int, targets: NDArray[np.float32], images: int, law: MixLaw) -> bool:
    """Whether the same seed also gives the first round's pairs: each partner has the class that the label says."""
    first, second = second_classes(seed, targets, images, law)
    return search_permutation(first, second, seed, seed + 1) == seed


def second_classes(
    seed: int, targets: NDArray[np.float32], images: int, law: MixLaw
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([n] class of slot 0, [n] class of slot 1) of the first round, read off labels whose coefficients are known.

    -1 where a label does not tell them apart (coarse labels, or coefficients too near to each other).
    """
    n = min(images, len(targets))
    rows = released_coefficients(seed, images, 1, law)[:n]
    found = []
    for slot in (0, min(1, law.private - 1)):
        gap = np.abs(targets[:n] - rows[:, slot : slot + 1])
        best = gap.argmin(1)
        clear = (gap[np.arange(n), best] <= TOLERANCE) & ((gap <= TOLERANCE).sum(1) == 1)
        both = (targets[:n] > 0).sum(1) == 1  # one class for both slots
        only = targets[:n].argmax(1)
        found.append(np.where(clear, best, np.where(both, only, -1)).astype(np.int64))
    return found[0], found[1]
