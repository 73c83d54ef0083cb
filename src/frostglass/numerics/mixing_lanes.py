"""A few pixels of one encoding at a time, as vector instructions: what `fused_mixing` spends its time in.

As plain Python here, and as instructions in `mixing_vectors`. The functions share these arguments.

    row         of an encoding, (sources, weights, scale, start, bits): k rows of d pixels, uint8 or float32, in a
                tuple; k float32 in a tuple, for bytes multiples of 1 / GRID in [0, 1] and k even; float32; what to add
                them to, float32 or [d] float32; [m] bytes of keystream
    plane       0 to 7: the sign of a pixel flips where this bit of its byte is set
    i, at       first of the bytes and of the pixels
    out         [d] uint32 for float32, or uint16 for bfloat16 (rounded to nearest even)
    past        not None to write past the caches, to a place aligned to a vector: for what is larger than they are, an
                ordinary store first reads the line that it overwrites. Other threads see it once they hold the
                interpreter's lock, as ever
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from frostglass.numerics import mixing_vectors
from frostglass.numerics.compiled import as_it_is, stored, taught
from frostglass.numerics.mixing_vectors import GRID, LANES, LINE

# ruff: noqa: ARG001 - numba goes by the names of arguments, whether they are used or not


@taught(lambda: _begin)
def begin(start, at):  # type: ignore[no-untyped-def]
    """What pixel `at` begins with."""
    return start[at] if np.ndim(start) else start


def _begin(start, at):  # type: ignore[no-untyped-def]
    return (lambda start, at: start[at]) if hasattr(start, "dtype") else lambda start, at: start


@taught(lambda: _fit)
def fit(table, coefficients):  # type: ignore[no-untyped-def]
    """Whether images of `table` can be mixed by `coefficients` [b, k]: bytes by multiples of 1 / GRID in [0, 1]."""
    form: Any = _multiples
    return table.dtype != np.uint8 or form(table, coefficients)


def _fit(table, coefficients):  # type: ignore[no-untyped-def]
    return inspect.unwrap(_multiples) if table.dtype.bitwidth == 8 else lambda table, coefficients: True


def _multiples(table, coefficients):  # type: ignore[no-untyped-def]
    for r in range(coefficients.shape[0]):
        for j in range(coefficients.shape[1]):
            steps = coefficients[r, j] * np.float32(GRID)
            if not 0 <= steps <= GRID or steps != np.floor(steps):
                return False
    return True


@taught(lambda: _weighed)
def weighed(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    """start + scale sum_j weights[j] sources[j][at], in float32."""
    form: Any = _weighed_bytes if sources[0].dtype == np.uint8 else _weighed_floats
    return form(sources, weights, scale, start, at)


def _weighed(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    return inspect.unwrap(_weighed_bytes if sources.dtype.dtype.bitwidth == 8 else _weighed_floats)


def _weighed_floats(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    x = start
    for j in range(len(sources)):
        x = x + weights[j] * scale * sources[j][at]
    return np.float32(x)


def _weighed_bytes(sources, weights, scale, start, at):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for j in range(len(sources)):
        total += np.int64(weights[j] * np.float32(GRID)) * np.int64(sources[j][at])
    # the product is exact, and so is its sum with the rest but for the last place: as if multiplied and added at once
    return np.float32(np.float64(total) * np.float64(scale / np.float32(GRID)) + np.float64(start))


@as_it_is
def mix_pixels(row, plane, i, at, out, count):  # type: ignore[no-untyped-def]
    """out[at ...] = flip(start[at ...] + scale sum_j weights[j] sources[j][at ...]), `count` pixels."""
    sources, weights, scale, start, bits = row
    for p in range(count):
        x = weighed(sources, weights, scale, begin(start, at + p), at + p)
        flip = np.uint32(np.uint32(bits[i + p]) >> np.uint32(plane)) & np.uint32(1)
        out[at + p] = stored(out[at + p], np.float32(x).view(np.uint32) ^ np.uint32(flip << np.uint32(31)))


@taught(mixing_vectors.lanes)
def mix_lanes(row, plane, i, at, out, past):  # type: ignore[no-untyped-def]
    """LANES of `mix_pixels`."""
    mix_pixels(row, plane, i, at, out, LANES)


@taught(mixing_vectors.line)
def mix_line(row, following, plane, i, at, out, past):  # type: ignore[no-untyped-def]
    """LINE of `mix_pixels`, while those of `following`, the sources to be mixed next, are brought into a cache.

    Random rows come as fast as they are asked for early enough and a few lines at a time. Bytes go to the first level;
    float32 to the second, as requests to the first wait in the same short queue as loads.
    """
    mix_pixels(row, plane, i, at, out, LINE)
