"""Keys of this library's own encoder when it was given `insecure_seed`: the seed by search, then every key by replay.

The encoder's secret is then a hash of a number. Below it everything is defined: the path of a shard, one AES stream for
each purpose, coefficients by Box and Muller. Nothing of this helps against a key of the operating system: there is no
number to try.
"""

from __future__ import annotations

import functools
import hmac
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frostglass.core.randomness import Insecure
from frostglass.numerics.key_rows import (
    MixLaw,
    acceptance,
    candidates,
    draw_coefficients,
    draw_distinct,
    draw_mask,
    mask_width,
    on_grid,
)
from frostglass.numerics.keystream import Secret, normals_from
from frostglass.numerics.prng_search import MASS, PARTS, SKIP, Clues, fits
from frostglass.numerics.prng_search_released import SeededKeys

AHEAD = 4096
"""Rows that an encoder draws at the least at a time; it decides which words of a stream become which coefficient."""
SCREEN = 16
"""Rows looked at before a seed is replayed."""
_BATCH = 2048


def shard_path(shard: int) -> tuple[int, ...]:
    """Path of the keys of one shard below the seed, for an encoder that never was copied, in one process."""
    return (0, shard + 1, shard, 0, 1, -1, 0)


def search_own(clues: Clues, law: MixLaw, shards: Sequence[int], start: int, stop: int) -> int:
    """The first seed in [start, stop) whose shards explain the clues, -1 if none does.

    Args:
        clues: of the first rows of the set, in the order of the set.
        law: of the coefficients.
        shards: encodings in each shard.
    """
    screen = min(SCREEN, len(clues.kinds), shards[0])
    for first in range(start, stop, _BATCH):
        seeds = np.arange(first, min(stop, first + _BATCH))
        for seed in _screened(seeds, clues, law, max(shards[0], AHEAD), screen):
            if _explains(int(seed), clues, law, shards):
                return int(seed)
    return -1


def _explains(seed: int, clues: Clues, law: MixLaw, shards: Sequence[int]) -> bool:
    """Whether a seed gives all clues, in as many shards as they reach into: a short one alone tells few seeds apart."""
    done = 0
    for number, rows in enumerate(shards):
        here = slice(done, done + rows)
        part = replace(clues, kinds=clues.kinds[here], parts=clues.parts[here], mass=clues.mass[here])
        if not len(part.kinds):
            break
        secret = Secret.draw(Insecure(seed)).at(*shard_path(number))
        drawn = draw_coefficients(secret.stream("coefficients"), law, max(rows, AHEAD))[: len(part.kinds)]
        if not fits(drawn[:, : law.private], part):
            return False
        done += rows
    return True


def _screened(seeds: NDArray[np.int64], clues: Clues, law: MixLaw, count: int, rows: int) -> NDArray[np.int64]:
    """Seeds whose first coefficient rows do not contradict the clues; raw rows that the law rejects are passed over."""
    raw = _raw_rows(seeds, law, count, rows)
    ok = law.accepts(raw.reshape(-1, law.k)).reshape(len(seeds), rows)
    telling = np.flatnonzero(clues.kinds[:rows] != SKIP)
    row = int(telling[0]) if len(telling) else 0
    nth = np.cumsum(ok, 1) == row + 1  # the accepted row number `row`, and rejected ones behind it
    known = nth.any(1)
    chosen = raw[np.arange(len(seeds)), nth.argmax(1)][:, : law.private].astype(np.float64)
    keep = np.ones(len(seeds), bool)
    if clues.labels == "exact" and clues.kinds[row] == MASS:
        keep = np.abs(chosen.sum(1) - clues.mass[row]) <= 1e-5
    elif clues.labels == "exact" and clues.kinds[row] == PARTS:
        keep = np.abs(chosen.max(1) - clues.parts[row, 0]) <= 1e-5
    passed = np.flatnonzero(keep | ~known)
    return seeds[[i for i in passed if fits(raw[i, ok[i], : law.private], clues)]]


def _raw_rows(seeds: NDArray[np.int64], law: MixLaw, count: int, rows: int) -> NDArray[np.float32]:
    """[s, rows, k] coefficient rows before rejection, from single words of each seed's stream."""
    n = candidates(law, count, acceptance(law))
    if law.law == "dirichlet":
        width = law.k + 2
        words = _words(seeds, [(0, rows * width)])
        e = -np.log(_uniform(words[0])).reshape(len(seeds), rows, width)
        weights = np.concatenate([e[..., :3].sum(-1, keepdims=True), e[..., 3:]], -1)
    else:
        half = (n * law.k + 1) // 2
        radius, angle = _words(seeds, [(0, rows * law.k), (half, rows * law.k)], "<u4")
        weights = np.abs(normals_from(radius, angle)[:, : rows * law.k].astype(np.float64))
        weights = weights.reshape(len(seeds), rows, law.k)
    return on_grid(weights)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    made: NDArray[np.float64] = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return made


def _words(seeds: NDArray[np.int64], places: Sequence[tuple[int, int]], kind: str = "<u8") -> list[NDArray[Any]]:
    """Words (start, count) of the coefficient stream of every seed: [s, count] of `kind` for each place."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    blocks, cuts, size = b"", [], np.dtype(kind).itemsize
    each = 16 // size  # words in a block of the cipher
    for start, count in places:
        first, last = start // each, -(-(start + count) // each)
        cuts.append((len(blocks) // size + start % each, count))
        blocks += b"".join(i.to_bytes(16, "big") for i in range(first, last))
    table = np.empty((len(seeds), len(blocks)), np.uint8)
    below, purpose = _info(shard_path(0)), _info(("stream", "coefficients"))
    for i, seed in enumerate(seeds.tolist()):
        key = hmac.digest(hmac.digest(Insecure(seed).rng().key, below, "sha256"), purpose, "sha256")
        cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        table[i] = np.frombuffer(cipher.update(blocks), np.uint8)
    words = table.view(kind)
    return [words[:, at : at + count] for at, count in cuts]


@functools.lru_cache(maxsize=8)
def _info(path: tuple[str | int, ...]) -> bytes:
    """What HKDF-Expand (RFC 5869) hashes for `Secret.at(*path)` in its only round."""
    parts = [f"{type(p).__name__}:{p}".encode() for p in path]
    return b"frostglass" + b"".join(len(p).to_bytes(8, "big") + p for p in parts) + b"\x01"


def own_keys(
    seed: int,
    images: int,
    public: int,
    shards: Sequence[int],
    law: MixLaw,
    pixels: int,
    mask: bool,
    in_rounds: bool = False,
) -> SeededKeys:
    """All keys of a set that `frostglass encode --insecure-seed` wrote in one go, in the order of its rows.

    Args:
        seed: the insecure seed.
        images, public: sizes of the private set and of the pool (0 without one, or if it is not known).
        shards: rows of each shard; together a multiple of `images`.
        law: of the coefficients.
        pixels: c h w.
        mask: whether the sign mask was used.
        in_rounds: rows go through the images again and again, instead of in a set's secret order.
    """
    rounds = sum(shards) // images
    order = np.tile(np.arange(images), rounds) if in_rounds else _set_order(seed, images, rounds)
    indices, coefficients, flips, done = [], [], [], 0
    for number, rows in enumerate(shards):
        secret = Secret.draw(Insecure(seed)).at(*shard_path(number))
        first, count = order[done : done + rows], max(rows, AHEAD)
        made = np.full((rows, law.k), -1, np.int64)
        made[:, 0] = first
        if law.private > 1:
            ranks = draw_distinct(secret.stream("indices"), images - 1, law.private - 1, count)[:rows]
            made[:, 1 : law.private] = ranks + (ranks >= first[:, None])
        if law.private < law.k and public:
            outside = law.k - law.private
            made[:, law.private :] = draw_distinct(secret.stream("public"), public, outside, count)[:rows]
        indices.append(made)
        coefficients.append(draw_coefficients(secret.stream("coefficients"), law, count)[:rows])
        if mask:
            bits = draw_mask(secret.stream("mask"), rows, pixels)
            flips.append(mask_bits(bits, pixels))
        done += rows
    return SeededKeys(
        np.concatenate(indices), np.concatenate(coefficients), np.concatenate(flips) if mask else None, law.private
    )


def _set_order(seed: int, images: int, rounds: int) -> NDArray[np.int64]:
    """First image of each row, as `SetWriter` orders them."""
    left = np.repeat(np.arange(images), rounds)
    stream = Secret.draw(Insecure(seed)).at("set order", 0).stream("set order")
    made: NDArray[np.int64] = left[stream.permutation(len(left))]
    return made


def mask_bits(bits: NDArray[np.uint8], pixels: int) -> NDArray[np.bool_]:
    """[b, pixels] of mask bytes: pixel i is flipped by bit i // m of byte i % m, m = ceil(pixels / 8)."""
    planes = (bits[:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    made: NDArray[np.bool_] = planes.reshape(len(bits), 8 * mask_width(pixels))[:, :pixels].astype(bool)
    return made
