"""The fused encoder for GPUs, in Triton: gather k rows, weighted sum, affine, mask, one read of the sources, one write.

Triton comes with torch's CUDA builds for Linux. `mix_block` is compiled when it is first used on a device, and used
there only if it repeats `mixing.mix_torch` on a small case (`mixing.device_kernel`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

tl: Any = None
"""triton.language, once it has been imported; compiled code finds it here by this name."""

BLOCK = 1024
"""Pixels of one program: 1,024 bytes of every source, or 4,096."""

MASKS = {"none": 0, "sign": 1, "abs": 2}
Launch: TypeAlias = Callable[..., None]


def mix_block(  # type: ignore[no-untyped-def]
    private,
    public,
    indices,
    coefficients,
    bits,
    out,
    pixels,
    width,
    scale,
    shift,
    k: tl.constexpr,
    inside: tl.constexpr,
    mask: tl.constexpr,
    block: tl.constexpr,
):
    """out[r, i] = mask(shift + sum_j scale coefficients[r, j] source_j[indices[r, j], i]), for a block of pixels i.

    Args:
        private, public: pointers to rows of `pixels` values, uint8 or float32; slots from `inside` on read `public`.
        indices, coefficients: to [b, k], int64 and float32.
        bits: to [b, width] keystream: pixel i is negated by bit i // width of byte i % width, where mask = 1.
        out: to [b, pixels], float32 or bfloat16 (rounded to nearest even).
        pixels, width, scale, shift: numbers.
        k, inside, mask, block: known when it is compiled; mask as in `MASKS`.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    there = at < pixels
    mixed = tl.full([block], shift, tl.float32)
    for j in tl.static_range(k):
        source = tl.load(indices + row * k + j) * pixels
        weight = tl.load(coefficients + row * k + j) * scale
        if j < inside:
            value = tl.load(private + source + at, mask=there, other=0)
        else:
            value = tl.load(public + source + at, mask=there, other=0)
        mixed += weight * value.to(tl.float32)
    if mask == 1:
        byte = tl.load(bits + row * width + at % width, mask=there, other=0).to(tl.int32)
        mixed = tl.where(((byte >> (at // width)) & 1) == 1, -mixed, mixed)
    if mask == 2:
        mixed = tl.abs(mixed)
    tl.store(out + row * pixels + at, mixed.to(out.dtype.element_ty), mask=there)


@functools.cache
def compiled() -> Any | None:
    """`mix_block` as a Triton kernel, or None where Triton is not installed."""
    global tl
    try:
        import triton
        import triton.language
    except ImportError:
        return None
    tl = triton.language
    return triton.jit(inspect.unwrap(mix_block))  # tests wrap every function in shape checks


def launch(
    private: Tensor,
    public: Tensor,
    inside: int,
    keys: tuple[Tensor, Tensor, Tensor | None],
    affine: tuple[float, float],
    mask: str,
    out: Tensor,
) -> None:
    """Writes encodings to `out`; all tensors on its device.

    Args:
        private, public: [n, d] and [m, d], uint8 or float32 of one type; their rows are copied if they are not one
            block of memory.
        inside: slots 0 .. inside - 1 read `private`.
        keys: indices [b, k] int64, coefficients [b, k] float32, bits [b, ceil(d / 8)] uint8 (None but for "sign").
        affine: (scale, shift); a pixel p as stored stands for scale p + shift.
        mask: "sign", "abs" or "none".
        out: [b, d], contiguous, float32 or bfloat16.
    """
    run = compiled()
    assert run is not None
    indices, coefficients, bits = keys
    b, d = out.shape
    if not b:
        return
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        run[(b, -(-d // BLOCK))](
            private.contiguous(),
            public.contiguous(),
            indices,
            coefficients,
            coefficients if bits is None else bits,
            out,
            d,
            (d + 7) // 8,
            *affine,
            k=indices.shape[1],
            inside=inside,
            mask=MASKS[mask],
            block=BLOCK,
        )
