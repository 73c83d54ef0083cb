"""Instance encoding as pure functions: gather, mix and mask on any device, given the keys.

    x~ = mask( sum_j lambda_j x_j ),   lambda on the simplex, lambda_j <= c1      (InstaHide: Huang et al. 2020, ICML)

Coefficients are drawn as multiples of 2^-14 (`key_rows.on_grid`), so that sums over bytes are exact on every path. All
paths give the same mask bits and values within 1e-5: numba for CPUs (`fused_mixing`), Triton for CUDA
(`device_mixing`), torch for every device, and a reference in plain loops for tests. The affine map of pixels to [-1, 1]
is applied after the sum, which is exact because coefficients sum to 1 and all sources share one normalisation.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.numerics import device_mixing
from frostglass.numerics.compiled import kernel
from frostglass.numerics.fused_mixing import mix_labels, mix_more_rows, mix_most_rows, mix_rows, to_bytes
from frostglass.numerics.key_rows import KeyRows, mask_width
from frostglass.numerics.mixing_vectors import LANES

Mask: TypeAlias = Literal["sign", "abs", "none"]
Labels: TypeAlias = Literal["exact", "quantised", "renormalised"]
Backend: TypeAlias = Literal["auto", "fused", "torch", "reference"]
_CACHE = 1 << 25
"""Bytes of memory to write encodings to (of the whole of it, where a part is written at a time) beyond which they would
leave the caches before anybody reads them."""
Table: TypeAlias = "Tensor | NDArray[np.uint8] | NDArray[np.float32]"
"""Images flattened to rows: [n, d], uint8 in 0 .. 255 or float32 in [0, 1]; a memory map is an array too."""


def mask_flips(bits: UInt8[Tensor, "b m"], d: int) -> Tensor:
    """[b, d] bool: which pixels the sign mask negates (pixel i: bit i // m of byte i % m)."""
    planes = torch.arange(8, dtype=torch.uint8, device=bits.device).view(1, 8, 1)
    return ((bits[:, None] >> planes) & 1).flatten(1)[:, :d].bool()


def mask_images(images: Float[Tensor, "b d"], mask: Mask, bits: UInt8[Tensor, "b m"] | None) -> Tensor:
    """Sign mask, absolute value, or the images themselves."""
    if mask == "abs":
        return images.abs()
    if mask == "none":
        return images
    if bits is None:
        raise ValueError("the sign mask needs bits")
    return torch.where(mask_flips(bits, images.shape[1]), -images, images)


def affine(dtype: torch.dtype | np.dtype[np.generic]) -> tuple[float, float]:
    """(scale, shift) that take pixels as stored to [-1, 1]: uint8 from 0 .. 255, floats from [0, 1]."""
    return (1 / 127.5 if dtype is torch.uint8 or dtype == np.uint8 else 2.0), -1.0


def mix(
    private: Table,
    public: Table | None,
    inside: int,
    keys: KeyRows,
    mask: Mask,
    out: Float[Tensor, "b ..."],
    backend: Backend = "auto",
) -> Tensor:
    """Writes the encodings, in [-1, 1], to `out` and returns it.

    Args:
        private, public: source tables of one dtype; slots 0 .. inside - 1 read the private one.
        keys: one row per encoding.
        mask: "sign" flips each pixel by a key bit; "abs" gives |mix|, which holds exactly as much; "none" is Mixup.
        out: float32 or bfloat16, [b, d] or images of d pixels, contiguous; its device decides where "torch" computes.
        backend: "auto" is "fused" where that can be had (numba on CPUs, Triton on CUDA), else "torch".

    Raises:
        BadInput: the tables differ in width or dtype, or "fused" was asked for and cannot be had (bytes need
            coefficients that are multiples of 2^-14).
    """
    if public is not None and (public.shape[1] != private.shape[1] or pixel_type(public) != pixel_type(private)):
        raise BadInput(
            f"public: rows of {public.shape[1]} {pixel_type(public)} pixels do not mix with private rows of "
            f"{private.shape[1]} {pixel_type(private)}; store both alike."
        )
    if mask == "sign" and keys.bits is None:
        raise ValueError("the sign mask needs bits")
    if backend == "reference":
        return out.copy_(mix_reference(private, public, inside, keys, mask).view_as(out))
    near = out.device.type == "cpu" and _near(private) and _near(public)
    exact = out.dtype in (torch.float32, torch.bfloat16)
    if backend in ("auto", "fused") and exact and near and _mix_fused(private, public, inside, keys, mask, out):
        return out
    if backend in ("auto", "fused") and exact and _plain(private) and device_kernel(out.device):
        mix_on_device(private, public, inside, keys, mask, out)
    elif backend == "fused":
        raise BadInput(
            "backend: 'fused' needs float32 or bfloat16 output, coefficients in steps of 2^-14 for bytes, and numba on "
            "a CPU or Triton on CUDA; use 'auto' or 'torch'."
        )
    else:
        out.copy_(mix_torch(private, public, inside, keys, mask, out.device).view_as(out))
    return out


def pixel_type(table: Table) -> str:
    """Its dtype by name, the same for a tensor and for an array or memory map."""
    return str(table.dtype).removeprefix("torch.")


def as_source(table: Table, backend: Backend, alone: bool) -> Table:
    """The table in the form that `mix` reads fastest: for what is mixed from at every batch.

    Args:
        table: [n, d], floats in [0, 1].
        alone: no other table is mixed with it. Floats that are all bytes over 255, as images that were read from files
            mostly are, then become these bytes: a copy of a quarter of their size, and a quarter of what mixing waits
            for. Mixes differ by the rounding of float32.
    """
    if not _near(table) or backend not in ("auto", "fused") or kernel(mix_rows) is None:
        return table
    plain = _readonly(table)
    return _bytes_of(plain) if alone and plain.dtype == np.float32 else plain


def _bytes_of(table: NDArray[np.float32]) -> NDArray[np.uint8] | NDArray[np.float32]:
    """uint8 where every value is a byte over 255, else what was given."""
    made = np.empty(table.shape, np.uint8)
    run = kernel(to_bytes)
    fits = run is not None and run(table.reshape(-1), made.reshape(-1))
    return _readonly(made) if fits else table


def _readonly(table: Table) -> Any:
    """The table as an array that numba types the same way, memory map or not."""
    if type(table) is np.ndarray and not table.flags.writeable:
        return table
    plain = table.numpy() if isinstance(table, Tensor) else np.asarray(table)
    view = plain.view(np.ndarray)
    view.flags.writeable = False
    return view


def _mix_fused(
    private: Table,
    public: Table | None,
    inside: int,
    keys: KeyRows,
    mask: Mask,
    out: Tensor,
) -> bool:
    """False, with nothing written, where numba is not installed or the coefficients do not fit."""
    scale, shift = affine(private.dtype)
    first = _readonly(private)
    d, k = first.shape[1], keys.indices.shape[1]
    whole = out.numpy().view(np.uint32) if out.dtype == torch.float32 else out.view(torch.uint16).numpy()
    past = out.untyped_storage().nbytes() > _CACHE and mask_width(d) % LANES == d % 8 == out.data_ptr() % 64 == 0
    run = kernel(mix_rows if k <= 4 else mix_more_rows if k <= 6 else mix_most_rows)
    mixed = run is not None and run(
        first,
        first if public is None else _readonly(public),
        inside,
        keys.indices,
        keys.coefficients,
        np.float32(scale),
        np.float32(shift),
        keys.bits if mask == "sign" else np.zeros((1, mask_width(d)), np.uint8),
        whole.reshape(len(whole), d),
        True if past else None,
    )
    if mixed and mask == "abs":
        out.abs_()
    return bool(mixed)


def mix_torch(
    private: Table, public: Table | None, inside: int, keys: KeyRows, mask: Mask, device: torch.device
) -> Float[Tensor, "b d"]:
    """The same in torch operations on `device`: embedding_bag for float tables, a sum of gathers for uint8.

    float64 tables are mixed in float64, all others in float32.
    """
    scale, shift = affine(private.dtype)
    exact = torch.float64 if private.dtype in (torch.float64, np.dtype(np.float64)) else torch.float32
    weights = torch.from_numpy(keys.coefficients).to(device, exact)
    index = torch.from_numpy(keys.indices)
    total = _weighted(*_rows_on(device, private, index[:, :inside]), weights[:, :inside])
    if public is not None and inside < index.shape[1]:
        total = total + _weighted(*_rows_on(device, public, index[:, inside:]), weights[:, inside:])
    bits = None if keys.bits is None else torch.from_numpy(keys.bits).to(device)
    return mask_images(total.mul_(scale).add_(shift), mask, bits)


def mix_on_device(
    private: Table, public: Table | None, inside: int, keys: KeyRows, mask: Mask, out: Float[Tensor, "b ..."]
) -> None:
    """The same by `device_mixing`; the copies of the keys on the device are overwritten."""
    wanted = torch.from_numpy(keys.indices)
    first, index = _rows_on(out.device, private, wanted[:, :inside])
    second = first
    if public is not None and inside < wanted.shape[1]:
        second, others = _rows_on(out.device, public, wanted[:, inside:])
        index = torch.cat([index, others], 1)
    weights = torch.from_numpy(keys.coefficients).to(out.device)
    bits = torch.from_numpy(keys.bits).to(out.device) if mask == "sign" and keys.bits is not None else None
    flat = out.view(len(out), first.shape[1])
    device_mixing.launch(first, second, inside, (index.contiguous(), weights, bits), affine(first.dtype), mask, flat)
    for part in (index, weights, bits):
        if part is not None and out.device.type != "cpu":  # there they are the caller's
            part.zero_()


@functools.cache
def device_kernel(device: torch.device) -> bool:
    """Whether `device_mixing` can be had on a device: it is tried on a small case, as Triton also needs a compiler."""
    if device.type != "cuda" or device_mixing.compiled() is None:
        return False
    pixels = np.arange(3 * 40, dtype=np.uint8).reshape(3, 40)
    weights = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], np.float32)
    keys = KeyRows(np.array([[0, 1, 2], [2, 0, 1]]), weights, np.arange(10, dtype=np.uint8).reshape(2, 5))
    try:
        found = torch.empty(2, 40, device=device)
        mix_on_device(pixels, None, 3, keys, "sign", found)
        return bool(torch.allclose(found, mix_torch(pixels, None, 3, keys, "sign", device), atol=1e-5))
    except Exception:  # no compiler, no driver that Triton knows, a device that it does not
        return False


def _near(table: Table | None) -> bool:
    return not isinstance(table, Tensor) or table.device.type == "cpu"


def _plain(table: Table) -> bool:
    return pixel_type(table) in ("uint8", "float32")


def _rows_on(device: torch.device, table: Table, index: Tensor) -> tuple[Tensor, Tensor]:
    """The table where it lies on `device`, else the rows that are needed of it (it may be a memory map), and `index`
    into what is returned, on `device`."""
    if isinstance(table, Tensor) and table.device == device:
        return table, index.to(device)
    if isinstance(table, Tensor):
        rows = table[index.flatten().to(table.device)]
    else:
        rows = torch.from_numpy(np.ascontiguousarray(table[index.flatten().numpy()]))
    return rows.to(device), torch.arange(index.numel(), device=device).view_as(index)


def _weighted(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if table.dtype != torch.uint8:
        return torch.nn.functional.embedding_bag(index, table, mode="sum", per_sample_weights=weights)
    total = torch.zeros(len(index), table.shape[1], device=index.device)
    for j in range(index.shape[1]):
        total.addcmul_(table[index[:, j]].float(), weights[:, j, None])
    return total


def mix_reference(private: Table, public: Table | None, inside: int, keys: KeyRows, mask: Mask) -> Tensor:
    """The definition in plain loops and float64; for tests."""
    tables = [np.asarray(t, np.float64) for t in (private, private if public is None else public)]
    scale, shift = affine(private.dtype)
    b, d = len(keys.indices), private.shape[1]
    out = np.zeros((b, d))
    for r in range(b):
        for j, (i, weight) in enumerate(zip(keys.indices[r], keys.coefficients[r], strict=True)):
            out[r] += float(weight) * (tables[0 if j < inside else 1][i] * scale + shift)
        for i in range(d):
            if mask == "abs":
                out[r, i] = abs(out[r, i])
            elif mask == "sign" and keys.bits is not None:
                m = mask_width(d)
                out[r, i] *= -1.0 if (int(keys.bits[r, i % m]) >> (i // m)) & 1 else 1.0
    return torch.from_numpy(out)


def mix_targets(
    labels: NDArray[np.int64], classes: int, inside: int, keys: KeyRows, backend: Backend = "auto"
) -> Float[Tensor, "b classes"]:
    """[b, classes]: private coefficients at their classes; mass below 1 where public images take a share."""
    out = np.zeros((len(keys.indices), classes), np.float32)
    run = kernel(mix_labels) if backend in ("auto", "fused") else None
    if run is not None:
        run(labels, inside, keys.indices, keys.coefficients, out)
    else:
        rows = np.arange(len(out))[:, None]
        np.add.at(out, (rows, labels[keys.indices[:, :inside]]), keys.coefficients[:, :inside])
    return torch.from_numpy(out)


def coarse_targets(targets: Float[Tensor, "b k"], labels: Labels) -> Float[Tensor, "b k"]:
    """Targets as they leave: exact ones publish the private coefficients, which every known attack reads.

    Args:
        targets: [b, k] rows of mass m <= 1.
        labels: "exact" as in the paper; "quantised" in quarters, by largest remainder, mass rounded alike;
            "renormalised" to mass 1, which hides the public share but keeps the ratio of private coefficients.
    """
    if labels == "exact":
        return targets
    if labels == "renormalised":
        return targets / targets.sum(1, keepdim=True).clamp_min(torch.finfo(targets.dtype).tiny)
    quarters = targets.double() * 4
    whole = quarters.floor()
    rest = quarters - whole
    spare = quarters.sum(1, keepdim=True).round() - whole.sum(1, keepdim=True)
    rank = rest.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    coarse: Tensor = (whole + (rank < spare)) / 4
    return coarse.to(targets.dtype)
