"""Keys of `frostglass challenge make --insecure-seed`: the seed by search, then every key by replay.

A challenge draws otherwise than an encoded set: each round has a secret of its own, partners are permutations, and the
rows of all rounds then stand in one secret order. All of it hangs on the seed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from frostglass.core.randomness import Insecure
from frostglass.numerics.key_rows import (
    MixLaw,
    draw_coefficients,
    draw_distinct,
    draw_mask,
    draw_partner_permutations,
)
from frostglass.numerics.keystream import Keystream, Secret
from frostglass.numerics.prng_search import SKIP, Clues, fits
from frostglass.numerics.prng_search_own import mask_bits
from frostglass.numerics.prng_search_released import SeededKeys


def search_challenge(clues: Clues, law: MixLaw, images: int, rounds: int, start: int, stop: int) -> int:
    """The first seed in [start, stop) whose coefficients and order of rows explain the clues, -1 if none does.

    Args:
        clues: of the first rows of the challenge.
        law: of the coefficients.
        images, rounds: as `challenge.json` says; together the rows of the challenge.
    """
    telling = [int(i) for i in np.flatnonzero(clues.kinds != SKIP)]
    if not telling:
        return -1
    rows = [replace(clues, kinds=clues.kinds[i : i + 1], parts=clues.parts[i : i + 1], mass=clues.mass[i : i + 1])
            for i in telling]  # fmt: skip
    first = telling[-1] + 1
    for seed in range(start, stop):
        secret = Secret.draw(Insecure(seed))
        places = _first_of_order(secret, images * rounds, first)[telling]
        drawn: dict[int, NDArray[np.float32]] = {}
        for place, clue in zip(places.tolist(), rows, strict=True):
            r, i = divmod(place, images)
            if r not in drawn:
                drawn[r] = draw_coefficients(_round(secret, r).stream("coefficients"), law, images)
            if not fits(drawn[r][i : i + 1, : law.private], clue):
                break
        else:
            return seed
    return -1


def challenge_keys(seed: int, images: int, public: int, rounds: int, law: MixLaw, pixels: int) -> SeededKeys:
    """All keys of a challenge, in the order of its rows.

    Args:
        seed: the insecure seed.
        images, rounds: as `challenge.json` says.
        public: size of the pool, 0 without one or if it is not known.
        law: of the coefficients.
        pixels: c h w.
    """
    secret, first = Secret.draw(Insecure(seed)), np.arange(images)
    indices, coefficients, bits = [], [], []
    for r in range(rounds):
        of_round = _round(secret, r)
        made = np.full((images, law.k), -1, np.int64)
        made[:, 0] = first
        if law.private > 1:
            made[:, 1 : law.private] = draw_partner_permutations(of_round.stream("indices"), images, law.private - 1).T
        if law.private < law.k and public:
            made[:, law.private :] = draw_distinct(of_round.stream("public"), public, law.k - law.private, images)
        indices.append(made)
        coefficients.append(draw_coefficients(of_round.stream("coefficients"), law, images))
        bits.append(draw_mask(of_round.stream("mask"), images, pixels))
    order = _order(secret).permutation(images * rounds)
    flips = mask_bits(np.concatenate(bits)[order], pixels)
    return SeededKeys(np.concatenate(indices)[order], np.concatenate(coefficients)[order], flips, law.private)


def _round(secret: Secret, r: int) -> Secret:
    return secret.at("challenge", r)


def _order(secret: Secret) -> Keystream:
    return secret.at("challenge order").stream("order")


def _first_of_order(secret: Secret, n: int, count: int) -> NDArray[np.int64]:
    """The first `count` places of `Keystream.permutation(n)`, without sorting the others."""
    words = _order(secret).bytes(8 * n).view("<u8")
    if count < n:
        least = np.argpartition(words, count)[:count]
        made: NDArray[np.int64] = least[np.argsort(words[least])]
        return made
    return np.argsort(words)
