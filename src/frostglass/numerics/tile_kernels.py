"""The six linear maps of a convolution by tiles (`tiled_convolution`), each one pass over its arrays.

Plain Python over flat arrays (and run as such, slowly); `compiled.kernel` compiles them with numba where it is
installed. Each gathers what belongs to one tile, `BLOCK` channels at a time, multiplies it by a constant matrix from
both sides in the first-level cache, and puts the result where it belongs.

Layouts, all flat float32: images [b, h, w, c]; tiles [points, panels of c, places, BLOCK], where a place is a tile of
an image; kernels [o, i, 9]; spread kernels [points, panels of i, o, BLOCK]. Points are `apart` numbers apart, and what
fills up a last panel is not touched. A tile gives edge x edge results from its (edge + 2)^2 points; an edge is 4 or 2.
"""

from __future__ import annotations

import numpy as np

from frostglass.numerics.compiled import RUN, both_sides, put, put_on

BLOCK = RUN
"""Channels at a time, those of a panel: 36 x BLOCK numbers lie in a first-level cache beside what they come from."""

U = np.uint64  # numba tests every signed index for being negative, which keeps loops from becoming vector instructions
ZERO = np.float32(0)

# Lavin and Gray (2016), section 4.1 for tiles of 2 x 2 results and section 4.3 for 4 x 4.
_SMALL_B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_SMALL_G = np.array([[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]])
_SMALL_A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
_B = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_A = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])

# The matrices named B^T and A^T there, and G; and the transposes.
small_bt, small_b = both_sides(_SMALL_B), both_sides(_SMALL_B.T)
small_at, small_a = both_sides(_SMALL_A), both_sides(_SMALL_A.T)
small_g, small_gt = both_sides(_SMALL_G), both_sides(_SMALL_G.T)
large_bt, large_b = both_sides(_B), both_sides(_B.T)
large_at, large_a = both_sides(_A), both_sides(_A.T)
large_g, large_gt = both_sides(_G), both_sides(_G.T)


def cut_tiles(x, first, last, h, w, c, pad, edge, down, across, tiles, apart, places):  # type: ignore[no-untyped-def]
    """tiles = B^T x B for the pieces of images at some places, `edge` apart, from -pad on; zero outside."""
    side = edge + 2
    tile = np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * edge - pad
        left = place % across * edge - pad
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for r in range(side):
                for s in range(side):
                    row, column, to = top + r, left + s, U((r * side + s) * BLOCK)
                    if 0 <= row < h and 0 <= column < w:
                        at = U(((n * h + row) * w + column) * c + lo)
                        put(x, at, tile, to, size)
                    else:
                        for i in range(size):
                            tile[to + i] = ZERO
            if edge == 4:
                large_bt(tile)
            else:
                small_bt(tile)
            for t in range(side * side):
                at, to = U(t * BLOCK), U(t * apart + lo * places + place * BLOCK)
                put(tile, at, tiles, to, size)


def cut_tiles_back(tiles, apart, places, first, last, h, w, c, pad, edge, down, across, x):  # type: ignore[no-untyped-def]
    """The transpose of `cut_tiles`: x += B tile B^T where the tile was cut. Places of one image overlap."""
    side = edge + 2
    tile = np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * edge - pad
        left = place % across * edge - pad
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for t in range(side * side):
                at, to = U(t * apart + lo * places + place * BLOCK), U(t * BLOCK)
                put(tiles, at, tile, to, size)
            if edge == 4:
                large_b(tile)
            else:
                small_b(tile)
            for r in range(side):
                for s in range(side):
                    row, column, at = top + r, left + s, U((r * side + s) * BLOCK)
                    if 0 <= row < h and 0 <= column < w:
                        to = U(((n * h + row) * w + column) * c + lo)
                        put_on(tile, at, x, to, size)


def join_tiles(tiles, apart, places, first, last, h, w, c, edge, down, across, y):  # type: ignore[no-untyped-def]
    """y = A^T tile A, the pieces of the result side by side."""
    side = edge + 2
    tile = np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * edge
        left = place % across * edge
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for t in range(side * side):
                at, to = U(t * apart + lo * places + place * BLOCK), U(t * BLOCK)
                put(tiles, at, tile, to, size)
            if edge == 4:
                large_at(tile)
            else:
                small_at(tile)
            for r in range(edge):
                for s in range(edge):
                    row, column, at = top + r, left + s, U((r * side + s) * BLOCK)
                    if row < h and column < w:
                        to = U(((n * h + row) * w + column) * c + lo)
                        put(tile, at, y, to, size)


def join_tiles_back(y, first, last, h, w, c, edge, down, across, tiles, apart, places):  # type: ignore[no-untyped-def]
    """The transpose of `join_tiles`: tile = A y A^T."""
    side = edge + 2
    tile = np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * edge
        left = place % across * edge
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for r in range(edge):
                for s in range(edge):
                    row, column, to = top + r, left + s, U((r * side + s) * BLOCK)
                    if row < h and column < w:
                        at = U(((n * h + row) * w + column) * c + lo)
                        put(y, at, tile, to, size)
                    else:
                        for i in range(size):
                            tile[to + i] = ZERO
            if edge == 4:
                large_a(tile)
            else:
                small_a(tile)
            for t in range(side * side):
                at, to = U(t * BLOCK), U(t * apart + lo * places + place * BLOCK)
                put(tile, at, tiles, to, size)


def spread_kernels(w, first, last, outputs, inputs, left, right, edge, spread, apart):  # type: ignore[no-untyped-def]
    """spread = G w G^T for the kernels of outputs `first` to `last` and inputs `left` (a multiple of BLOCK) to `right`.

    Their panels begin with the one of `left`.
    """
    side = edge + 2
    tile = np.zeros(36 * BLOCK, np.float32)
    for lo in range(left, right, BLOCK):
        size = U(min(BLOCK, right - lo))
        for o in range(first, last):
            at = U((o * inputs + lo) * 9)
            for i in range(size):
                for r in range(U(3)):
                    for s in range(U(3)):
                        tile[(r * U(side) + s) * U(BLOCK) + i] = w[at + i * U(9) + r * U(3) + s]
            if edge == 4:
                large_g(tile)
            else:
                small_g(tile)
            for t in range(side * side):
                start, to = U(t * BLOCK), U(t * apart + (lo - left) * outputs + o * BLOCK)
                put(tile, start, spread, to, size)


def spread_kernels_back(spread, apart, first, last, outputs, inputs, left, right, edge, w, add):  # type: ignore[no-untyped-def]
    """The transpose of `spread_kernels`: w = G^T spread G, or w += that where `add` is 1."""
    side = edge + 2
    tile = np.zeros(36 * BLOCK, np.float32)
    for lo in range(left, right, BLOCK):
        size = U(min(BLOCK, right - lo))
        for o in range(first, last):
            for t in range(side * side):
                at, to = U(t * apart + (lo - left) * outputs + o * BLOCK), U(t * BLOCK)
                put(spread, at, tile, to, size)
            if edge == 4:
                large_gt(tile)
            else:
                small_gt(tile)
            start = U((o * inputs + lo) * 9)
            if add:
                for i in range(size):
                    for r in range(U(3)):
                        for s in range(U(3)):
                            w[start + i * U(9) + r * U(3) + s] += tile[(r * U(side) + s) * U(BLOCK) + i]
            else:
                for i in range(size):
                    for r in range(U(3)):
                        for s in range(U(3)):
                            w[start + i * U(9) + r * U(3) + s] = tile[(r * U(side) + s) * U(BLOCK) + i]
