"""The fused encoder for CPUs: gather k rows, weighted sum, affine, mask, one read of the sources and one write.

The functions are plain Python over arrays (and run as such, slowly); `compiled.kernel` compiles one with numba where
numba is installed. Each is self-contained but for `fetch`, `pour` and `stored` of `compiled`, because a compiled
function cannot call an uncompiled one.
"""

from __future__ import annotations

import numpy as np

from frostglass.numerics.compiled import AHEAD, LANES, fetch, pour, stored

BLOCK = 128  # pixels that `mix_blocks` mixes at a time


def mix_rows(private, public, inside, indices, coefficients, scale, shift, bits, keep, out):  # type: ignore[no-untyped-def]
    """out[r] = mask(shift + sum_j scale coefficients[r, j] source_j[indices[r, j]]), as IEEE bits; k <= 4.

    The mask flips pixel i by bit i // m of byte i % m (m = ceil(d / 8)): within one of these eight planes all pixels
    look at the same bit of consecutive bytes, so that every inner loop below turns into vector instructions.

    Args:
        private, public: [N, d] and [M, d], uint8 or float32, of one type.
        inside: slots 0 .. inside - 1 read `private`, the others `public`.
        indices, coefficients: [b, k] int64 and float32.
        scale, shift: float32; a pixel p as stored stands for scale p + shift.
        bits: [b, m] keystream for the sign mask; one row of zeros for none (one loop for all masks: a second one
            beside it costs a third of the speed).
        keep: the result's IEEE bits are and-ed with it (0x7fffffff gives the absolute value).
        out: [b, d], uint32 for float32, or uint16 for bfloat16 (rounded to nearest even).
    """
    b, k = indices.shape
    d = private.shape[1]
    m = (d + 7) // 8
    masked = bits.shape[0] == b
    # Fewer than four slots are padded by slot 0 at weight 0.
    j1, j2, j3 = (1 if k > 1 else 0), (2 if k > 2 else 0), (3 if k > 3 else 0)
    zero, kind = np.float32(0), out.dtype.type(0)
    flip, same = np.uint32(0x80000000), np.uint32(0)
    for r in range(b):
        w0 = coefficients[r, 0] * scale
        w1 = coefficients[r, 1] * scale if k > 1 else zero
        w2 = coefficients[r, 2] * scale if k > 2 else zero
        w3 = coefficients[r, 3] * scale if k > 3 else zero
        for plane in range(8):
            lo = plane * m
            n = min(m, d - lo)
            if n <= 0:
                break
            if r + 1 < b:
                for j in range(k):
                    for c in range(lo, lo + n, AHEAD):
                        fetch(private if j < inside else public, indices[r + 1, j], c)
            s0 = private[indices[r, 0], lo : lo + n]
            s1 = (private if j1 < inside else public)[indices[r, j1], lo : lo + n]
            s2 = (private if j2 < inside else public)[indices[r, j2], lo : lo + n]
            s3 = (private if j3 < inside else public)[indices[r, j3], lo : lo + n]
            to = out[r, lo : lo + n]
            row, bit = bits[r if masked else 0], np.uint8(1 << plane)
            for i in range(n):
                x = shift + w0 * np.float32(s0[i]) + w1 * np.float32(s1[i])
                x = x + w2 * np.float32(s2[i]) + w3 * np.float32(s3[i])
                sign = flip if np.uint8(row[i] & bit) != 0 else same
                to[i] = stored(kind, (np.float32(x).view(np.uint32) ^ sign) & keep)


def mix_more_rows(private, public, inside, indices, coefficients, scale, shift, bits, keep, out):  # type: ignore[no-untyped-def]
    """As `mix_rows`, for k >= 5: six slots in the inner loop (a fifth faster than four), further pairs first."""
    b, k = indices.shape
    d = private.shape[1]
    m = (d + 7) // 8
    head = np.full(m, shift, np.float32)  # shift, plus all slots but the first six
    masked = bits.shape[0] == b
    j5 = 5 if k > 5 else 0
    zero, kind = np.float32(0), out.dtype.type(0)
    flip, same = np.uint32(0x80000000), np.uint32(0)
    for r in range(b):
        w0, w1, w2 = coefficients[r, 0] * scale, coefficients[r, 1] * scale, coefficients[r, 2] * scale
        w3, w4 = coefficients[r, 3] * scale, coefficients[r, 4] * scale
        w5 = coefficients[r, 5] * scale if k > 5 else zero
        for plane in range(8):
            lo = plane * m
            n = min(m, d - lo)
            if n <= 0:
                break
            if r + 1 < b:
                for j in range(k):
                    for c in range(lo, lo + n, AHEAD):
                        fetch(private if j < inside else public, indices[r + 1, j], c)
            for j in range(6, k, 2):
                second = j + 1 if j + 1 < k else j
                e0 = (private if j < inside else public)[indices[r, j], lo : lo + n]
                e1 = (private if second < inside else public)[indices[r, second], lo : lo + n]
                v0 = coefficients[r, j] * scale
                v1 = coefficients[r, second] * scale if second > j else zero
                for i in range(n):
                    before = shift if j == 6 else head[i]
                    head[i] = before + v0 * np.float32(e0[i]) + v1 * np.float32(e1[i])
            s0 = private[indices[r, 0], lo : lo + n]
            s1 = (private if inside > 1 else public)[indices[r, 1], lo : lo + n]
            s2 = (private if inside > 2 else public)[indices[r, 2], lo : lo + n]
            s3 = (private if inside > 3 else public)[indices[r, 3], lo : lo + n]
            s4 = (private if inside > 4 else public)[indices[r, 4], lo : lo + n]
            s5 = (private if j5 < inside else public)[indices[r, j5], lo : lo + n]
            to = out[r, lo : lo + n]
            row, bit = bits[r if masked else 0], np.uint8(1 << plane)
            for i in range(n):
                x = head[i] + w0 * np.float32(s0[i]) + w1 * np.float32(s1[i])
                x = x + w2 * np.float32(s2[i]) + w3 * np.float32(s3[i])
                x = x + w4 * np.float32(s4[i]) + w5 * np.float32(s5[i])
                sign = flip if np.uint8(row[i] & bit) != 0 else same
                to[i] = stored(kind, (np.float32(x).view(np.uint32) ^ sign) & keep)


def mix_blocks(private, public, inside, indices, coefficients, scale, shift, bits, keep, out, past):  # type: ignore[no-untyped-def]
    """As `mix_rows`, for float32 where an eighth of a row is whole blocks; the same bits up to k = 6, and faster.

    Random rows of float32 come as fast as they are asked for early enough and a few lines at a time: here those of the
    next encoding, a block of one slot before each block of this encoding's slot. Blocks of half or twice the size are
    slower, and so are blocks of a size that is not known when this is compiled.

    Args:
        past: whether to write past the caches; then `out` is aligned to LANES of its values.
    """
    b, k = indices.shape
    d = private.shape[1]
    m = d // 8
    masked = bits.shape[0] == b
    kind = out.dtype.type(0)
    flip, same = np.uint32(0x80000000), np.uint32(0)
    block, words = np.empty(BLOCK, np.float32), np.empty(BLOCK, out.dtype)
    for r in range(b):
        row = bits[r if masked else 0]
        for lo in range(0, d, BLOCK):
            for j in range(k):
                table = private if j < inside else public
                if r + 1 < b:
                    for c in range(0, BLOCK, AHEAD):
                        fetch(table, indices[r + 1, j], lo + c)
                w, s = coefficients[r, j] * scale, table[indices[r, j], lo : lo + BLOCK]
                for i in range(BLOCK):
                    before = shift if j == 0 else block[i]
                    block[i] = before + w * np.float32(s[i])
            to, part, bit = out[r, lo : lo + BLOCK], row[lo % m : lo % m + BLOCK], np.uint8(1 << (lo // m))
            if past:
                for i in range(BLOCK):
                    sign = flip if np.uint8(part[i] & bit) != 0 else same
                    words[i] = stored(kind, (np.float32(block[i]).view(np.uint32) ^ sign) & keep)
                for i in range(0, BLOCK, LANES):
                    pour(words, i, out, r, lo + i)
            else:
                for i in range(BLOCK):
                    sign = flip if np.uint8(part[i] & bit) != 0 else same
                    to[i] = stored(kind, (np.float32(block[i]).view(np.uint32) ^ sign) & keep)


def mix_labels(labels, inside, indices, weights, out):  # type: ignore[no-untyped-def]
    """out[r, labels[indices[r, j]]] += weights[r, j] over the private slots j < inside; `out` starts as zeros."""
    for r in range(indices.shape[0]):
        for j in range(inside):
            out[r, labels[indices[r, j]]] += weights[r, j]
