"""What is done with the key rows of a batch besides mixing: loops over a few hundred numbers, for `compiled.fastest`.

In numpy each of them is several calls with temporary arrays, which at 128 small images took as long as the mixing.
"""

from __future__ import annotations

import numpy as np

from frostglass.numerics.compiled import allocates_nothing
from frostglass.numerics.mixing_vectors import GRID


@allocates_nothing
def next_keys(rows, partners, public, weights, indices, coefficients):  # type: ignore[no-untyped-def]
    """Moves drawn keys to where they are used: what was drawn is overwritten, so that no key row is there twice.

    Args:
        rows: [b] slot 0 of each encoding.
        partners: [b, p - 1] ranks among the images other than the row itself.
        public: [b, k - p] rows of the public pool.
        weights: [b, k] float32.
        indices, coefficients: [b, k] int64 and float32, to be filled.
    """
    p = 1 + partners.shape[1]
    for r in range(len(rows)):
        indices[r, 0] = rows[r]
        for j in range(1, p):
            rank = partners[r, j - 1]
            indices[r, j] = rank + (1 if rank >= rows[r] else 0)
            partners[r, j - 1] = 0
        for j in range(p, indices.shape[1]):
            indices[r, j] = public[r, j - p]
            public[r, j - p] = 0
        for j in range(indices.shape[1]):
            coefficients[r, j] = weights[r, j]
            weights[r, j] = 0


@allocates_nothing
def share_out(weights, most, private, least, first, out):  # type: ignore[no-untyped-def]
    """|weights| on the grid (`key_rows.on_grid`), one after another those rows that keep the bounds.

    Args:
        weights: [n, k] floats.
        most: no share exceeds it.
        private, least: the first `private` shares come to `least` or more.
        first: slot 0 has this or more.
        out: [n, k] float32, to be filled.

    Returns:
        How many rows are kept. A row of zeros has no shares.
    """
    kept = 0
    for r in range(weights.shape[0]):
        total = 0.0
        for j in range(weights.shape[1]):
            total += abs(np.float64(weights[r, j]))  # where nothing is compiled, a float32 would make the sum one
        if not total > 0:
            continue
        scale = GRID / total
        reached, before, greatest, inside = 0.0, 0.0, 0.0, 0.0
        for j in range(weights.shape[1]):
            reached += abs(np.float64(weights[r, j])) * scale
            edge = np.rint(reached)
            share = (edge - before) / GRID
            before = edge
            greatest = max(greatest, share)
            if j < private:
                inside += share
            out[kept, j] = share
        if greatest <= most and inside >= least and out[kept, 0] >= first:
            kept += 1
    return kept


def choose_distinct(words, population, out):  # type: ignore[no-untyped-def]
    """Rows of distinct numbers in 0 .. population - 1, one after another, every such row as likely as any.

    Slot j is a rank among the population - j numbers that its row does not have yet, without bias: multiply and reject
    (Lemire 2019, arXiv 1805.10941, algorithm 5), by the next word where one is rejected.

    Args:
        words: [any] random 32-bit words.
        population: at least the slots, below 2^32.
        out: [n, slots] int64, to be filled.

    Returns:
        How many rows are whole when the words end.
    """
    next_word, slots = 0, out.shape[1]
    used = np.empty(slots, np.int64)  # ascending
    for r in range(out.shape[0]):
        for j in range(slots):
            left = np.uint64(population - j)
            product, low, fair = np.uint64(0), np.uint64(0), False
            while not fair:
                if next_word == len(words):
                    return r
                product = np.uint64(words[next_word]) * left
                low = product & np.uint64(0xFFFFFFFF)
                fair = bool(low >= left or low >= (np.uint64(1 << 32) - left) % left)
                next_word += 1
            value = np.int64(product >> np.uint64(32))
            for i in range(j):
                value += np.int64(value >= used[i])
            largest = value
            for i in range(j):  # no branch that depends on what was drawn: it would be guessed wrongly half of the time
                used[i], largest = min(used[i], largest), max(used[i], largest)
            used[j] = largest
            out[r, j] = value
    return out.shape[0]


@allocates_nothing
def within(rows, size):  # type: ignore[no-untyped-def]
    """Whether all of `rows` [any] are in 0 .. size - 1."""
    for i in rows:  # noqa: SIM110 - numba compiles no generators
        if not 0 <= i < size:
            return False
    return True


@allocates_nothing
def count_rows(counts, first, partners, step):  # type: ignore[no-untyped-def]
    """Adds `step` to counts[0, i] for each i of `first` [any], and to counts[1, i] for each of `partners` [any, any].

    Returns:
        False, with nothing counted, if one of them is not in 0 .. counts.shape[1] - 1.
    """
    for i in first:
        if not 0 <= i < counts.shape[1]:
            return False
    for row in range(partners.shape[0]):
        for j in range(partners.shape[1]):
            if not 0 <= partners[row, j] < counts.shape[1]:
                return False
    for i in first:
        counts[0, i] += step
    for row in range(partners.shape[0]):
        for j in range(partners.shape[1]):
            counts[1, partners[row, j]] += step
    return True
