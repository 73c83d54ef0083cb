"""The fused encoder for CPUs: gather k rows, weighted sum, affine, mask, one read of the sources and one write.

The functions are plain Python over arrays (and run as such, slowly); `compiled.kernel` compiles one with numba where
numba is installed, and what they call then is what `compiled.taught` says.
"""

from __future__ import annotations

import numpy as np

from frostglass.numerics.compiled import allocates_nothing, as_it_is
from frostglass.numerics.mixing_lanes import fit, mix_lanes, mix_line, mix_pixels
from frostglass.numerics.mixing_vectors import LANES, LINE


@allocates_nothing
def mix_rows(private, public, inside, indices, coefficients, scale, shift, bits, out, past):  # type: ignore[no-untyped-def]
    """out[r] = flip(shift + sum_j scale coefficients[r, j] source_j[indices[r, j]]), as IEEE bits; k <= 4.

    The mask flips pixel i by bit i // m of byte i % m (m = ceil(d / 8)): within one of these eight planes all pixels
    look at the same bit of consecutive bytes, which makes vector instructions of them.

    Args:
        private, public: [N, d] and [M, d], uint8 or float32, of one type.
        inside: slots 0 .. inside - 1 read `private`, the others `public`.
        indices, coefficients: [b, k] int64 and float32; for bytes multiples of 1 / GRID.
        scale, shift: float32; a pixel p as stored stands for scale p + shift.
        bits: [b, m] keystream for the sign mask; one row of zeros for none (one loop for all masks).
        out: [b, d], uint32 for float32, or uint16 for bfloat16 (rounded to nearest even).
        past: not None to write past the caches (see `mixing_lanes`); then m is a multiple of LANES.

    Returns:
        False, with nothing written, if the coefficients do not fit.
    """
    b, k = indices.shape
    if not fit(private, coefficients):
        return False
    # Fewer than four slots are padded by slot 0 at weight 0.
    j1, j2, j3 = (1 if k > 1 else 0), (2 if k > 2 else 0), (3 if k > 3 else 0)
    t1 = private if j1 < inside else public
    t2 = private if j2 < inside else public
    t3 = private if j3 < inside else public
    zero = np.float32(0)
    for r in range(b):
        w0 = coefficients[r, 0]
        w1 = coefficients[r, 1] if k > 1 else zero
        w2 = coefficients[r, 2] if k > 2 else zero
        w3 = coefficients[r, 3] if k > 3 else zero
        now, then = indices[r], indices[min(r + 1, b - 1)]
        sources = (private[now[0]], t1[now[j1]], t2[now[j2]], t3[now[j3]])
        following = (private[then[0]], t1[then[j1]], t2[then[j2]], t3[then[j3]])
        flips = bits[r if len(bits) == b else 0]
        mix_row((sources, (w0, w1, w2, w3), scale, shift, flips), following, out[r], past)
    return True


@allocates_nothing
def mix_more_rows(private, public, inside, indices, coefficients, scale, shift, bits, out, past):  # type: ignore[no-untyped-def]
    """As `mix_rows`, for k = 5 and 6."""
    b, k = indices.shape
    if not fit(private, coefficients):
        return False
    j5 = 5 if k > 5 else 0
    t1 = private if inside > 1 else public
    t2 = private if inside > 2 else public
    t3 = private if inside > 3 else public
    t4 = private if inside > 4 else public
    t5 = private if j5 < inside else public
    for r in range(b):
        w0, w1, w2 = coefficients[r, 0], coefficients[r, 1], coefficients[r, 2]
        w3, w4 = coefficients[r, 3], coefficients[r, 4]
        w5 = coefficients[r, 5] if k > 5 else np.float32(0)
        now, then = indices[r], indices[min(r + 1, b - 1)]
        sources = (private[now[0]], t1[now[1]], t2[now[2]], t3[now[3]], t4[now[4]], t5[now[j5]])
        following = (private[then[0]], t1[then[1]], t2[then[2]], t3[then[3]], t4[then[4]], t5[then[j5]])
        flips = bits[r if len(bits) == b else 0]
        mix_row((sources, (w0, w1, w2, w3, w4, w5), scale, shift, flips), following, out[r], past)
    return True


def mix_most_rows(private, public, inside, indices, coefficients, scale, shift, bits, out, past):  # type: ignore[no-untyped-def]
    """As `mix_rows`, for k >= 7: the slots from the seventh on first, in pairs."""
    b, k = indices.shape
    if not fit(private, coefficients):
        return False
    d = private.shape[1]
    t1 = private if inside > 1 else public
    t2 = private if inside > 2 else public
    t3 = private if inside > 3 else public
    t4 = private if inside > 4 else public
    t5 = private if inside > 5 else public
    start = np.empty(d, np.float32)  # shift, plus all slots but the first six
    for r in range(b):
        w0, w1, w2 = coefficients[r, 0], coefficients[r, 1], coefficients[r, 2]
        w3, w4, w5 = coefficients[r, 3], coefficients[r, 4], coefficients[r, 5]
        now, then = indices[r], indices[min(r + 1, b - 1)]
        sources = (private[now[0]], t1[now[1]], t2[now[2]], t3[now[3]], t4[now[4]], t5[now[5]])
        following = (private[then[0]], t1[then[1]], t2[then[2]], t3[then[3]], t4[then[4]], t5[then[5]])
        flips = bits[r if len(bits) == b else 0]
        for j in range(6, k, 2):
            second = j + 1 if j + 1 < k else j
            e0 = (private if j < inside else public)[indices[r, j]]
            e1 = (private if second < inside else public)[indices[r, second]]
            v0 = coefficients[r, j] * scale
            v1 = coefficients[r, second] * scale if second > j else np.float32(0)
            for i in range(d):
                before = shift if j == 6 else start[i]
                start[i] = before + v0 * np.float32(e0[i]) + v1 * np.float32(e1[i])
        mix_row((sources, (w0, w1, w2, w3, w4, w5), scale, start, flips), following, out[r], past)
    return True


@as_it_is
def mix_row(row, following, out, past):  # type: ignore[no-untyped-def]
    """One encoding, [d]; for the arguments see `mixing_lanes`."""
    d, m = len(out), len(row[4])
    if m % LINE == 0 and d == 8 * m:
        plane, i = 0, 0
        for at in range(0, d, LINE):
            mix_line(row, following, plane, i, at, out, past)
            i += LINE
            if i == m:
                plane, i = plane + 1, 0
    else:
        for plane in range(8):
            lo = plane * m
            n = max(min(m, d - lo), 0)
            for i in range(0, n - LINE + 1, LINE):
                mix_line(row, following, plane, i, lo + i, out, past)
            for i in range(n // LINE * LINE, n - LANES + 1, LANES):
                mix_lanes(row, plane, i, lo + i, out, past)
            if n < LANES:
                mix_pixels(row, plane, 0, lo, out, n)
            elif n % LANES:  # some are done already; once more is faster than the others one by one
                mix_lanes(row, plane, n - LANES, lo + n - LANES, out, None)


@allocates_nothing
def mix_labels(labels, inside, indices, weights, out):  # type: ignore[no-untyped-def]
    """out[r, labels[indices[r, j]]] += weights[r, j] over the private slots j < inside; `out` starts as zeros."""
    for r in range(indices.shape[0]):
        for j in range(inside):
            out[r, labels[indices[r, j]]] += weights[r, j]


@allocates_nothing
def to_bytes(values, out):  # type: ignore[no-untyped-def]
    """Writes the bytes of which `values` [n] float32 are the 255th parts to `out` [n] uint8.

    Returns:
        False, with `out` undefined, if a value is not b / 255, or b times 1 / 255, as float32 rounds it.
    """
    part = np.float32(1) / np.float32(255)
    for start in range(0, len(values), 4096):  # a stretch is looked at as a whole, in vector instructions
        others = 0
        for i in range(start, min(start + 4096, len(values))):
            whole = np.rint(values[i] * np.float32(255))
            out[i] = np.uint8(whole)
            others += values[i] != whole / np.float32(255) and values[i] != whole * part
        if others:
            return False
    return True
