"""What is done with the key rows of a batch besides mixing: loops over a few hundred numbers, for `compiled.fastest`.

In numpy each of them is several calls with temporary arrays, which at 128 small images took as long as the mixing.
"""

from __future__ import annotations


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


def within(rows, size):  # type: ignore[no-untyped-def]
    """Whether all of `rows` [any] are in 0 .. size - 1."""
    for i in rows:  # noqa: SIM110 - numba compiles no generators
        if not 0 <= i < size:
            return False
    return True


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
