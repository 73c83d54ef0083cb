"""Memory that is given back only to be asked for again: what a loop over large tensors costs on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
_MOST = 32 * 2**20
"""Largest block that glibc can be told to keep on its heap."""

_NONE_LEFT = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
"""What torch's RuntimeErrors say where it raises no OutOfMemoryError."""


def is_memory(wrong: BaseException) -> bool:
    """Whether an exception says that memory has run out, in whatever words."""
    known = isinstance(wrong, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(wrong, RuntimeError) and any(words in str(wrong) for words in _NONE_LEFT))


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """In the block, memory that was freed is kept for what is asked for next; afterwards it goes back to the system.

    By default the C library hands large blocks back at once, and the system clears every page anew at its next use: a
    tenth of an inversion's time on a ResNet-18. Blocks beyond 32 MiB and other C libraries are as before. The setting
    is the process's; what remains of it afterwards is what glibc arrives at by itself as it sees large blocks.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _MOST)
    library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _MOST)
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    try:
        library: Any = ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018 - raises where there is none
    except (OSError, AttributeError, TypeError):  # Windows, macOS, musl
        return None
    return library
