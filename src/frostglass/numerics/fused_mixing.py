"""The fused encoder for CPUs: gather k rows, weighted sum, affine, mask, one read of the sources and one write.

The functions are plain Python over arrays (and run as such, slowly); `kernel` compiles one with numba where numba is
installed. Each is self-contained because a compiled function cannot call an uncompiled one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np


def mix_rows(private, public, inside, indices, weights, shift, bits, keep, wide, narrow):  # type: ignore[no-untyped-def]
    """wide[r] = mask(shift + sum_j weights[r, j] * source_j[indices[r, j]]), as IEEE bits; narrow as bfloat16; k <= 4.

    The mask flips pixel i by bit i // m of byte i % m (m = ceil(d / 8)): within one of these eight planes the flip is
    a shift by a constant, so that every inner loop below turns into vector instructions.

    Args:
        private, public: [N, d] and [M, d], uint8 or float32, of one type.
        inside: slots 0 .. inside - 1 read `private`, the others `public`.
        indices, weights: [b, k] int64 and float32; weights are coefficients times the scale of a pixel.
        shift: float32 added once.
        bits: [b, m] keystream for the sign mask; one row of zeros for none (one loop for all masks: a second one
            beside it costs a third of the speed).
        keep: the result's IEEE bits are and-ed with it (0x7fffffff gives the absolute value).
        wide: [b, d] uint32, the result; [1, d] scratch where `narrow` takes it.
        narrow: [b, d] uint16, the result rounded to nearest even; [0, d] if not wanted.
    """
    b, k = indices.shape
    d = private.shape[1]
    m = (d + 7) // 8
    rounding, masked = narrow.shape[0] > 0, bits.shape[0] == b
    # Fewer than four slots are padded by slot 0 at weight 0.
    j1, j2, j3 = (1 if k > 1 else 0), (2 if k > 2 else 0), (3 if k > 3 else 0)
    zero = np.float32(0)
    flip = np.uint32(0x80000000)
    for r in range(b):
        w0 = weights[r, 0]
        w1 = weights[r, 1] if k > 1 else zero
        w2 = weights[r, 2] if k > 2 else zero
        w3 = weights[r, 3] if k > 3 else zero
        for plane in range(8):
            lo = plane * m
            n = min(m, d - lo)
            if n <= 0:
                break
            s0 = private[indices[r, 0], lo : lo + n]
            s1 = (private if j1 < inside else public)[indices[r, j1], lo : lo + n]
            s2 = (private if j2 < inside else public)[indices[r, j2], lo : lo + n]
            s3 = (private if j3 < inside else public)[indices[r, j3], lo : lo + n]
            out = wide[0 if rounding else r, lo : lo + n]
            row = bits[r if masked else 0]
            up = np.uint32(31 - plane)
            for i in range(n):
                x = shift + w0 * np.float32(s0[i]) + w1 * np.float32(s1[i])
                x = x + w2 * np.float32(s2[i]) + w3 * np.float32(s3[i])
                out[i] = (np.float32(x).view(np.uint32) ^ ((np.uint32(row[i]) << up) & flip)) & keep
        if rounding:
            full, half = wide[0], narrow[r]
            for i in range(d):
                tie = (full[i] >> np.uint32(16)) & np.uint32(1)
                half[i] = np.uint16((full[i] + np.uint32(0x7FFF) + tie) >> np.uint32(16))


def mix_more_rows(private, public, inside, indices, weights, shift, bits, keep, wide, narrow):  # type: ignore[no-untyped-def]
    """As `mix_rows`, for k >= 5: six slots in the inner loop (a fifth faster than four), further pairs first."""
    b, k = indices.shape
    d = private.shape[1]
    m = (d + 7) // 8
    head = np.empty(m, np.float32)  # shift, plus all slots but the first six
    head[:] = shift
    rounding, masked = narrow.shape[0] > 0, bits.shape[0] == b
    j5 = 5 if k > 5 else 0
    zero = np.float32(0)
    flip = np.uint32(0x80000000)
    for r in range(b):
        w0, w1, w2 = weights[r, 0], weights[r, 1], weights[r, 2]
        w3, w4, w5 = weights[r, 3], weights[r, 4], weights[r, 5] if k > 5 else zero
        for plane in range(8):
            lo = plane * m
            n = min(m, d - lo)
            if n <= 0:
                break
            for j in range(6, k, 2):
                second = j + 1 if j + 1 < k else j
                e0 = (private if j < inside else public)[indices[r, j], lo : lo + n]
                e1 = (private if second < inside else public)[indices[r, second], lo : lo + n]
                v0 = weights[r, j]
                v1 = weights[r, second] if second > j else zero
                for i in range(n):
                    before = shift if j == 6 else head[i]
                    head[i] = before + v0 * np.float32(e0[i]) + v1 * np.float32(e1[i])
            s0 = private[indices[r, 0], lo : lo + n]
            s1 = (private if inside > 1 else public)[indices[r, 1], lo : lo + n]
            s2 = (private if inside > 2 else public)[indices[r, 2], lo : lo + n]
            s3 = (private if inside > 3 else public)[indices[r, 3], lo : lo + n]
            s4 = (private if inside > 4 else public)[indices[r, 4], lo : lo + n]
            s5 = (private if j5 < inside else public)[indices[r, j5], lo : lo + n]
            out = wide[0 if rounding else r, lo : lo + n]
            row = bits[r if masked else 0]
            up = np.uint32(31 - plane)
            for i in range(n):
                x = head[i] + w0 * np.float32(s0[i]) + w1 * np.float32(s1[i])
                x = x + w2 * np.float32(s2[i]) + w3 * np.float32(s3[i])
                x = x + w4 * np.float32(s4[i]) + w5 * np.float32(s5[i])
                out[i] = (np.float32(x).view(np.uint32) ^ ((np.uint32(row[i]) << up) & flip)) & keep
        if rounding:
            full, half = wide[0], narrow[r]
            for i in range(d):
                tie = (full[i] >> np.uint32(16)) & np.uint32(1)
                half[i] = np.uint16((full[i] + np.uint32(0x7FFF) + tie) >> np.uint32(16))


def mix_labels(labels, inside, indices, weights, out):  # type: ignore[no-untyped-def]
    """out[r, labels[indices[r, j]]] += weights[r, j] over the private slots j < inside; `out` starts as zeros."""
    for r in range(indices.shape[0]):
        for j in range(inside):
            out[r, labels[indices[r, j]]] += weights[r, j]


@functools.cache
def kernel(function: Callable[..., None]) -> Callable[..., None] | None:
    """`function` compiled with numba (kept on disk between runs), or None if numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    plain = inspect.unwrap(function)  # tests wrap every function in shape checks
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        made: Callable[..., None] = numba.njit(cache=True, **options)(plain)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        made = numba.njit(**options)(plain)
    return made
