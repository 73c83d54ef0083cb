"""Float32 that is float32: on recent GPUs torch rounds the inputs of convolutions to ten bits of mantissa (TF32)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """In the block, CUDA multiplies float32 as it is; afterwards torch's settings are as they were.

    TF32 moves a gradient by a thousandth of its size. Exact attacks read it to a millionth, and a proof that fails for
    rounding would pass for privacy. The settings are the process's: not for a thread beside a training.
    """
    restore = _switched_off()
    try:
        yield
    finally:
        restore()


def _switched_off() -> Callable[[], None]:
    """TF32 off; returns what undoes it."""
    backends: Any = torch.backends
    try:
        allowed, precision = backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller uses torch's newer names for these settings, and may not mix them with the older
        parts = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
        held = [part.fp32_precision for part in parts]
        _set_precisions(parts, ["ieee"] * len(parts))
        return lambda: _set_precisions(parts, held)

    def restore() -> None:
        backends.cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision(precision)

    backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    return restore


def _set_precisions(parts: Sequence[Any], precisions: Sequence[str]) -> None:
    for part, precision in zip(parts, precisions, strict=True):
        part.fp32_precision = precision
