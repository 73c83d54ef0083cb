"""InstaHide's keys as its released code drew them: from Mersenne Twisters that a 32-bit number starts.

Our own re-expression of Hazelsuko07/InstaHide (2020), as a baseline that `prng_attack` opens; never use it to encode
anything. In every round:

    numpy   |N(0, 1)| for all n k coefficients, rows normalised; then row by row redrawn while a bound is broken
    torch   one permutation for each further private slot, one of the pool for each public slot, then n d mask bits

Only numpy's and torch's legacy generators are touched; both keep 32 bits of a seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from frostglass.core.errors import BadInput
from frostglass.numerics.key_rows import MixLaw

SEEDS = 1 << 32
"""Seeds that either generator can tell apart."""


@dataclass(frozen=True)
class SeededKeys:
    """Keys of E encodings that a small seed gives; rows in the order of the set.

    Args:
        indices: [E, k] rows of the private table (slots below `private`) or of the pool; -1 where unknown.
        coefficients: [E, k] float32.
        flips: [E, d] bool, pixels that the sign mask negates; None without a mask.
        private: private slots.
    """

    indices: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    flips: NDArray[np.bool_] | None
    private: int


def released_coefficients(seed: int, images: int, rounds: int, law: MixLaw) -> NDArray[np.float32]:
    """[rounds * images, k] coefficient rows, round after round.

    Raises:
        BadInput: the seed does not fit 32 bits, or the law is not the released one.
    """
    _check(seed, law)
    draw = np.random.RandomState(seed)
    made = []
    for _ in range(rounds):
        rows = np.abs(draw.normal(0, 1, (images, law.k)))
        rows /= rows.sum(1, keepdims=True)
        for i in np.flatnonzero(~law.accepts(rows.astype(np.float32))):
            while not law.accepts(rows[i : i + 1].astype(np.float32))[0]:
                fresh = np.abs(draw.normal(0, 1, law.k))
                rows[i] = fresh / fresh.sum()
        made.append(rows.astype(np.float32))
    return np.concatenate(made)


def released_keys(
    seed: int, images: int, public: int, rounds: int, law: MixLaw, pixels: int, torch_seed: int | None = None
) -> SeededKeys:
    """All keys of a set of `rounds * images` encodings, image i being slot 0 of row i of each round.

    Args:
        seed: of both generators, or of numpy's alone where `torch_seed` is given.
        images, public: sizes of the private set and of the pool.
        rounds: encodings with each image in slot 0.
        law: "folded_normal", as released.
        pixels: c h w of an image; 0 leaves the mask out.
        torch_seed: of permutations and mask.

    Raises:
        BadInput: a seed does not fit 32 bits, or the pool is smaller than the private set where it is needed.
    """
    coefficients = released_coefficients(seed, images, rounds, law)
    outside = law.k - law.private
    if outside and public < images:
        raise BadInput(f"public: the released code takes one of {public} public images for each of {images}; add some.")
    generator = torch.Generator().manual_seed(seed if torch_seed is None else torch_seed)
    indices = np.empty((rounds * images, law.k), np.int64)
    flips = np.empty((rounds * images, pixels), np.bool_) if pixels else None
    for r in range(rounds):
        rows = slice(r * images, (r + 1) * images)
        indices[rows, 0] = np.arange(images)
        for slot in range(1, law.private):
            indices[rows, slot] = torch.randperm(images, generator=generator).numpy()
        for slot in range(law.private, law.k):
            indices[rows, slot] = torch.randperm(public, generator=generator)[:images].numpy()
        if flips is not None:
            flips[rows] = torch.randint(2, (images, pixels), generator=generator).numpy() == 0
    return SeededKeys(indices, coefficients, flips, law.private)


def _check(seed: int, law: MixLaw) -> None:
    if not 0 <= seed < SEEDS:
        raise BadInput(f"seed: {seed} does not fit the 32 bits that the released generators keep; give 0 to 2^32 - 1.")
    if law.law != "folded_normal":
        raise BadInput(f"law: {law.law!r} is not what the released code draws; use 'folded_normal'.")
    law.check()
