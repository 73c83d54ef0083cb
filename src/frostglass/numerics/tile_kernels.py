"""The six linear maps of a convolution by tiles (`tiled_convolution`), each one pass over its arrays.

Plain Python over flat arrays (and run as such, slowly); `compiled.kernel` compiles them with numba where it is
installed. Each gathers what belongs to one tile, `BLOCK` channels at a time, transforms it in the first-level cache by
the `times_*` functions, and puts the result where it belongs. Offsets are unsigned, because numba tests every signed
index for being negative, which keeps loops from becoming vector instructions.

Layouts, all flat float32: images [b, h, w, c]; tiles [36, places, c], where a place is a tile of an image and the 36
points of it are `stride` numbers apart; kernels [o, i, 9]; spread kernels [36, o, i].
"""

from __future__ import annotations

import numpy as np

from frostglass.numerics.compiled import called_in_kernels

BLOCK = 32
"""Channels at a time: two arrays of 36 x BLOCK numbers leave a third of a first-level cache of 32 KiB free."""

U = np.uint64
ZERO, TWO, FOUR, FIVE, EIGHT = (np.float32(x) for x in (0, 2, 4, 5, 8))
QUARTER, SIXTH, TWELFTH, TWENTY_FOURTH = (np.float32(1 / x) for x in (4, 6, 12, 24))

# Every times_* function multiplies the columns of a small matrix of vectors by the matrix of its name: column j is
# at far_in * j, its entries near_in apart, and so it is written.


@called_in_kernels
def times_bt(src, near_in, far_in, dst, near_out, far_out, columns):  # type: ignore[no-untyped-def]
    """6 -> 6."""
    for j in range(columns):
        a0, b0 = U(j * far_in), U(j * far_out)
        a1, b1 = a0 + U(near_in), b0 + U(near_out)
        a2, b2 = a1 + U(near_in), b1 + U(near_out)
        a3, b3 = a2 + U(near_in), b2 + U(near_out)
        a4, b4 = a3 + U(near_in), b3 + U(near_out)
        a5, b5 = a4 + U(near_in), b4 + U(near_out)
        for i in range(U(BLOCK)):
            d0, d1, d2, d3, d4, d5 = src[a0 + i], src[a1 + i], src[a2 + i], src[a3 + i], src[a4 + i], src[a5 + i]
            even, odd = d4 - FOUR * d2, d3 - FOUR * d1
            level, slope = d4 - d2, TWO * (d3 - d1)
            dst[b0 + i] = FOUR * d0 - FIVE * d2 + d4
            dst[b1 + i] = even + odd
            dst[b2 + i] = even - odd
            dst[b3 + i] = level + slope
            dst[b4 + i] = level - slope
            dst[b5 + i] = FOUR * d1 - FIVE * d3 + d5


@called_in_kernels
def times_b(src, near_in, far_in, dst, near_out, far_out, columns):  # type: ignore[no-untyped-def]
    """6 -> 6, the transpose."""
    for j in range(columns):
        a0, b0 = U(j * far_in), U(j * far_out)
        a1, b1 = a0 + U(near_in), b0 + U(near_out)
        a2, b2 = a1 + U(near_in), b1 + U(near_out)
        a3, b3 = a2 + U(near_in), b2 + U(near_out)
        a4, b4 = a3 + U(near_in), b3 + U(near_out)
        a5, b5 = a4 + U(near_in), b4 + U(near_out)
        for i in range(U(BLOCK)):
            v0, v1, v2, v3, v4, v5 = src[a0 + i], src[a1 + i], src[a2 + i], src[a3 + i], src[a4 + i], src[a5 + i]
            near, near_slope, far, far_slope = v1 + v2, v1 - v2, v3 + v4, TWO * (v3 - v4)
            dst[b0 + i] = FOUR * v0
            dst[b1 + i] = FOUR * (v5 - near_slope) - far_slope
            dst[b2 + i] = -FIVE * v0 - FOUR * near - far
            dst[b3 + i] = near_slope + far_slope - FIVE * v5
            dst[b4 + i] = v0 + near + far
            dst[b5 + i] = v5


@called_in_kernels
def times_at(src, near_in, far_in, dst, near_out, far_out, columns):  # type: ignore[no-untyped-def]
    """6 -> 4."""
    for j in range(columns):
        a0, b0 = U(j * far_in), U(j * far_out)
        a1, b1 = a0 + U(near_in), b0 + U(near_out)
        a2, b2 = a1 + U(near_in), b1 + U(near_out)
        a3, b3 = a2 + U(near_in), b2 + U(near_out)
        a4 = a3 + U(near_in)
        a5 = a4 + U(near_in)
        for i in range(U(BLOCK)):
            m0, m1, m2, m3, m4, m5 = src[a0 + i], src[a1 + i], src[a2 + i], src[a3 + i], src[a4 + i], src[a5 + i]
            near, near_slope, far, far_slope = m1 + m2, m1 - m2, m3 + m4, TWO * (m3 - m4)
            dst[b0 + i] = m0 + near + far
            dst[b1 + i] = near_slope + far_slope
            dst[b2 + i] = near + FOUR * far
            dst[b3 + i] = near_slope + FOUR * far_slope + m5


@called_in_kernels
def times_a(src, near_in, far_in, dst, near_out, far_out, columns):  # type: ignore[no-untyped-def]
    """4 -> 6, the transpose."""
    for j in range(columns):
        a0, b0 = U(j * far_in), U(j * far_out)
        a1, b1 = a0 + U(near_in), b0 + U(near_out)
        a2, b2 = a1 + U(near_in), b1 + U(near_out)
        a3, b3 = a2 + U(near_in), b2 + U(near_out)
        b4 = b3 + U(near_out)
        b5 = b4 + U(near_out)
        for i in range(U(BLOCK)):
            y0, y1, y2, y3 = src[a0 + i], src[a1 + i], src[a2 + i], src[a3 + i]
            even, odd, far_even, far_odd = y0 + y2, y1 + y3, y0 + FOUR * y2, TWO * y1 + EIGHT * y3
            dst[b0 + i] = y0
            dst[b1 + i] = even + odd
            dst[b2 + i] = even - odd
            dst[b3 + i] = far_even + far_odd
            dst[b4 + i] = far_even - far_odd
            dst[b5 + i] = y3


@called_in_kernels
def times_g(src, near_in, far_in, dst, near_out, far_out, columns):  # type: ignore[no-untyped-def]
    """3 -> 6."""
    for j in range(columns):
        a0, b0 = U(j * far_in), U(j * far_out)
        a1, b1 = a0 + U(near_in), b0 + U(near_out)
        a2, b2 = a1 + U(near_in), b1 + U(near_out)
        b3 = b2 + U(near_out)
        b4 = b3 + U(near_out)
        b5 = b4 + U(near_out)
        for i in range(U(BLOCK)):
            w0, w1, w2 = src[a0 + i], src[a1 + i], src[a2 + i]
            even, odd = -SIXTH * (w0 + w2), SIXTH * w1
            far_even, far_odd = TWENTY_FOURTH * w0 + SIXTH * w2, TWELFTH * w1
            dst[b0 + i] = QUARTER * w0
            dst[b1 + i] = even - odd
            dst[b2 + i] = even + odd
            dst[b3 + i] = far_even + far_odd
            dst[b4 + i] = far_even - far_odd
            dst[b5 + i] = w2


@called_in_kernels
def times_gt(src, near_in, far_in, dst, near_out, far_out, columns):  # type: ignore[no-untyped-def]
    """6 -> 3, the transpose."""
    for j in range(columns):
        a0, b0 = U(j * far_in), U(j * far_out)
        a1, b1 = a0 + U(near_in), b0 + U(near_out)
        a2, b2 = a1 + U(near_in), b1 + U(near_out)
        a3 = a2 + U(near_in)
        a4 = a3 + U(near_in)
        a5 = a4 + U(near_in)
        for i in range(U(BLOCK)):
            u0, u1, u2, u3, u4, u5 = src[a0 + i], src[a1 + i], src[a2 + i], src[a3 + i], src[a4 + i], src[a5 + i]
            near, far = -SIXTH * (u1 + u2), u3 + u4
            dst[b0 + i] = QUARTER * u0 + near + TWENTY_FOURTH * far
            dst[b1 + i] = SIXTH * (u2 - u1) + TWELFTH * (u3 - u4)
            dst[b2 + i] = near + SIXTH * far + u5


def cut_tiles(x, first, last, h, w, c, pad, down, across, tiles, stride):  # type: ignore[no-untyped-def]
    """tiles = B^T x B for the 6 x 6 pieces of images at some places, four apart, from -pad on; zero outside."""
    one, other = np.zeros(36 * BLOCK, np.float32), np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * 4 - pad
        left = place % across * 4 - pad
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for t in range(36):
                row, column, to = top + t // 6, left + t % 6, U(t * BLOCK)
                if 0 <= row < h and 0 <= column < w:
                    at = U(((n * h + row) * w + column) * c + lo)
                    for i in range(size):
                        one[to + i] = x[at + i]
                else:
                    for i in range(U(BLOCK)):
                        one[to + i] = ZERO
            times_bt(one, 6 * BLOCK, BLOCK, other, 6 * BLOCK, BLOCK, 6)
            times_bt(other, BLOCK, 6 * BLOCK, one, BLOCK, 6 * BLOCK, 6)
            for t in range(36):
                at, to = U(t * BLOCK), U(t * stride + place * c + lo)
                for i in range(size):
                    tiles[to + i] = one[at + i]


def cut_tiles_back(tiles, stride, first, last, h, w, c, pad, down, across, x):  # type: ignore[no-untyped-def]
    """The transpose of `cut_tiles`: x += B tile B^T where the tile was cut. Places of one image overlap."""
    one, other = np.zeros(36 * BLOCK, np.float32), np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * 4 - pad
        left = place % across * 4 - pad
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for t in range(36):
                at, to = U(t * stride + place * c + lo), U(t * BLOCK)
                for i in range(size):
                    one[to + i] = tiles[at + i]
            times_b(one, 6 * BLOCK, BLOCK, other, 6 * BLOCK, BLOCK, 6)
            times_b(other, BLOCK, 6 * BLOCK, one, BLOCK, 6 * BLOCK, 6)
            for t in range(36):
                row, column, at = top + t // 6, left + t % 6, U(t * BLOCK)
                if 0 <= row < h and 0 <= column < w:
                    to = U(((n * h + row) * w + column) * c + lo)
                    for i in range(size):
                        x[to + i] += one[at + i]


def join_tiles(tiles, stride, first, last, h, w, c, down, across, y):  # type: ignore[no-untyped-def]
    """y = A^T tile A, the 4 x 4 pieces of the result side by side."""
    one, other = np.zeros(36 * BLOCK, np.float32), np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * 4
        left = place % across * 4
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for t in range(36):
                at, to = U(t * stride + place * c + lo), U(t * BLOCK)
                for i in range(size):
                    one[to + i] = tiles[at + i]
            times_at(one, 6 * BLOCK, BLOCK, other, 6 * BLOCK, BLOCK, 6)
            times_at(other, BLOCK, 6 * BLOCK, one, BLOCK, 6 * BLOCK, 4)
            for t in range(16):
                row, column, at = top + t // 4, left + t % 4, U((t // 4 * 6 + t % 4) * BLOCK)
                if row < h and column < w:
                    to = U(((n * h + row) * w + column) * c + lo)
                    for i in range(size):
                        y[to + i] = one[at + i]


def join_tiles_back(y, first, last, h, w, c, down, across, tiles, stride):  # type: ignore[no-untyped-def]
    """The transpose of `join_tiles`: tile = A y A^T."""
    one, other = np.zeros(36 * BLOCK, np.float32), np.zeros(36 * BLOCK, np.float32)
    for place in range(first, last):
        n = place // (down * across)
        top = place // across % down * 4
        left = place % across * 4
        for lo in range(0, c, BLOCK):
            size = U(min(BLOCK, c - lo))
            for t in range(16):
                row, column, to = top + t // 4, left + t % 4, U((t // 4 * 6 + t % 4) * BLOCK)
                if row < h and column < w:
                    at = U(((n * h + row) * w + column) * c + lo)
                    for i in range(size):
                        one[to + i] = y[at + i]
                else:
                    for i in range(U(BLOCK)):
                        one[to + i] = ZERO
            times_a(one, 6 * BLOCK, BLOCK, other, 6 * BLOCK, BLOCK, 4)
            times_a(other, BLOCK, 6 * BLOCK, one, BLOCK, 6 * BLOCK, 6)
            for t in range(36):
                at, to = U(t * BLOCK), U(t * stride + place * c + lo)
                for i in range(size):
                    tiles[to + i] = one[at + i]


def spread_kernels(w, first, last, inputs, spread, stride):  # type: ignore[no-untyped-def]
    """spread = G w G^T for the kernels of outputs `first` to `last`."""
    one, other = np.zeros(36 * BLOCK, np.float32), np.zeros(36 * BLOCK, np.float32)
    for o in range(first, last):
        for lo in range(0, inputs, BLOCK):
            size = U(min(BLOCK, inputs - lo))
            at = U((o * inputs + lo) * 9)
            for i in range(size):
                for t in range(U(9)):
                    one[(t // U(3) * U(6) + t % U(3)) * U(BLOCK) + i] = w[at + i * U(9) + t]
            times_g(one, 6 * BLOCK, BLOCK, other, 6 * BLOCK, BLOCK, 3)
            times_g(other, BLOCK, 6 * BLOCK, one, BLOCK, 6 * BLOCK, 6)
            for t in range(36):
                start, to = U(t * BLOCK), U(t * stride + o * inputs + lo)
                for i in range(size):
                    spread[to + i] = one[start + i]


def spread_kernels_back(spread, stride, first, last, inputs, w):  # type: ignore[no-untyped-def]
    """The transpose of `spread_kernels`: w = G^T spread G."""
    one, other = np.zeros(36 * BLOCK, np.float32), np.zeros(36 * BLOCK, np.float32)
    for o in range(first, last):
        for lo in range(0, inputs, BLOCK):
            size = U(min(BLOCK, inputs - lo))
            for t in range(36):
                at, to = U(t * stride + o * inputs + lo), U(t * BLOCK)
                for i in range(size):
                    one[to + i] = spread[at + i]
            times_gt(one, 6 * BLOCK, BLOCK, other, 6 * BLOCK, BLOCK, 6)
            times_gt(other, BLOCK, 6 * BLOCK, one, BLOCK, 6 * BLOCK, 3)
            start = U((o * inputs + lo) * 9)
            for i in range(size):
                for t in range(U(9)):
                    w[start + i * U(9) + t] = one[(t // U(3) * U(6) + t % U(3)) * U(BLOCK) + i]
