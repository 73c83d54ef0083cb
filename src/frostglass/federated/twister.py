"""Recognises the state of a Mersenne Twister (torch on the CPU, numpy, Python) by what it holds, not by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TORCH_BYTES = (5056, 5048)
"""Bytes of torch's CPU generator, now and before version 1.0.1: 624 words of 8 bytes behind three numbers."""

_WORDS = 624
_WINDOW, _STEP = 520, 104  # any 624 words in a row hold such a window that starts at a multiple of the step
_MIXED = 180  # of 256 top bytes, 520 random words show 222, give or take 6; counts, indices and floats show few
_MOST = 1 << 20  # values looked at: some hundred states


def twister_in(values: NDArray[Any] | bytes) -> str | None:
    """What state `values` hold, as words, as bytes, as bytes each widened to a number, or stacked; None if none.

    Args:
        values: whole numbers of any shape and type, or raw bytes; floats hold none.
    """
    if isinstance(values, bytes):
        return _in_bytes(values)
    if values.dtype.kind not in "iu" or not _WINDOW <= values.size <= _MOST:
        return None
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.itemsize == 1:
        return _in_bytes(flat.tobytes())
    if int(flat.min()) < 0:
        flat = flat.astype(np.int64) & 0xFFFFFFFF if flat.dtype.itemsize == 4 else flat[:0]  # int32 that were uint32
    if len(flat) and int(flat.max()) < 256:
        return _in_bytes(flat.astype(np.uint8).tobytes())
    return f"a Mersenne Twister state ({_WORDS} words)" if _mixed(flat.astype(np.uint64)) else None


def _in_bytes(raw: bytes) -> str | None:
    if not 4 * _WORDS <= len(raw) <= 8 * _MOST:
        return None
    wide = np.frombuffer(raw, "<u8", len(raw) // 8)
    if any(len(raw) % size == 0 for size in TORCH_BYTES) and _mixed(wide):
        return f"torch's CPU generator state ({next(s for s in TORCH_BYTES if len(raw) % s == 0)} bytes)"
    if _mixed(wide) or (len(raw) in (4 * _WORDS, 4 * _WORDS + 4) and _mixed(np.frombuffer(raw, "<u4").astype("<u8"))):
        return f"a Mersenne Twister state ({_WORDS} words)"
    for kind in ("<u8", "<u4", "<u2"):  # bytes that an array holds as larger numbers
        numbers = np.frombuffer(raw, kind, len(raw) // np.dtype(kind).itemsize)
        if len(numbers) >= min(TORCH_BYTES) and int(numbers.max()) < 256:
            return _in_bytes(numbers.astype(np.uint8).tobytes())
    return None


def _mixed(words: NDArray[np.uint64]) -> bool:
    """Whether 520 words in a row are below 2^32 and random up to their top byte."""
    if len(words) < _WINDOW:
        return False
    small = words < (1 << 32)
    if np.count_nonzero(small) < _WINDOW:
        return False
    starts = range(0, len(words) - _WINDOW + 1, _STEP)
    return any(
        bool(small[i : i + _WINDOW].all()) and len(np.unique(words[i : i + _WINDOW] >> np.uint64(24))) >= _MIXED
        for i in starts
    )
