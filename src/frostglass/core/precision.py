"""Float32 that is float32: on recent GPUs torch rounds the inputs of convolutions to ten bits of mantissa (TF32)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """In the block, CUDA multiplies float32 as it is; afterwards torch's settings are as they were.

    TF32 moves a gradient by a thousandth of its size. Exact attacks read it to a millionth, and a proof that fails for
    rounding would pass for privacy. The settings are the process's: not for a thread beside a training.
    """
    backends: Any = torch.backends
    parts = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul]
    try:
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:  # the caller uses torch's newer names for these settings, and may not mix them with the older
        precisions = [part.fp32_precision for part in parts]
        for part in parts:
            part.fp32_precision = "ieee"
        try:
            yield
        finally:
            for part, held in zip(parts, precisions, strict=True):
                part.fp32_precision = held
        return
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
