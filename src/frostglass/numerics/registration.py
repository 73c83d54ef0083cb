"""Registration: warp images onto others. OpenCV, on the CPU; a substitute for RANSAC-flow, which needs weights.

Every method takes (moving, fixed), both [b, c, h, w] in [0, 1], and returns `moving` warped onto `fixed`, on the device
and in the dtype of `moving`. An image that cannot be registered, and one that already equals its target, comes back
bit by bit, so that callers can count failures and identical images stay identical.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from frostglass.core.errors import BadInput, close_match

Register: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(moving [b, c, h, w], fixed [b, c, h, w]) -> moving, warped onto fixed."""

_Array: TypeAlias = NDArray[Any]
_Warp: TypeAlias = Callable[[_Array, _Array, _Array], _Array | None]
"""(moving [h, w, c], its grey, the target's grey) -> warped [h, w, c], None if it did not work."""


def none(moving: Float[Tensor, "b c h w"], fixed: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """No registration: the average of the seeds is their pixel mean."""
    del fixed
    return moving


def ecc_euclidean(moving: Float[Tensor, "b c h w"], fixed: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Shift and rotation by enhanced correlation (Evangelidis & Psarakis 2008); moving where it does not converge."""
    return _each(moving, fixed, lambda x, g, t: _ecc(x, g, t, affine=False))


def ecc_affine(moving: Float[Tensor, "b c h w"], fixed: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """As `ecc_euclidean` with six parameters: also scale and shear."""
    return _each(moving, fixed, lambda x, g, t: _ecc(x, g, t, affine=True))


def dis(moving: Float[Tensor, "b c h w"], fixed: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Dense optical flow by inverse search (Kroeger et al. 2016); images below 12 pixels come back as they are."""
    return _each(moving, fixed, _dis)


def phase(moving: Float[Tensor, "b c h w"], fixed: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Shift alone, by phase correlation under a Hann window."""
    return _each(moving, fixed, _phase)


METHODS: dict[str, Register] = {
    "none": none,
    "ecc_euclidean": ecc_euclidean,
    "ecc_affine": ecc_affine,
    "dis": dis,
    "phase": phase,
}
"""By the name that a plan gives."""


def method(name: str) -> Register:
    """A built-in method, or "package.module:function" for one of the user's (RANSAC-flow, say).

    Raises:
        BadInput: an unknown name, or a function that cannot be imported.
    """
    if ":" not in name:
        if name not in METHODS:
            raise BadInput(
                f"registration: {name!r} is not known; {close_match(name, METHODS)}, or package.module:function."
            )
        return METHODS[name]
    home, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(home), function)
    except (ImportError, AttributeError, ValueError) as wrong:
        raise BadInput(f"registration: {name!r} cannot be imported ({wrong}); check the path.") from None
    if not callable(found):
        raise BadInput(f"registration: {name!r} is no function of (moving, fixed).")
    register: Register = found
    return register


def unmoved(
    moving: Float[Tensor, "b c h w"], warped: Float[Tensor, "b c h w"], fixed: Float[Tensor, "b c h w"]
) -> Float[Tensor, ""]:
    """How many images came back as they were although they differ from their target: registration failed there."""
    same = (moving == warped).flatten(1).all(1)
    done = (moving == fixed).flatten(1).all(1)
    return (same & ~done).to(moving.dtype).sum()


def _each(moving: Tensor, fixed: Tensor, warp: _Warp) -> Tensor:
    """Applies `warp` image by image on the CPU."""
    if moving.shape != fixed.shape:
        raise ValueError(f"registration: shapes {tuple(moving.shape)} and {tuple(fixed.shape)} differ")
    wide = torch.float64 if moving.dtype == torch.float64 else torch.float32
    source, target = (t.detach().to("cpu", wide).permute(0, 2, 3, 1).contiguous().numpy() for t in (moving, fixed))
    out = moving.clone()
    for i in range(len(source)):
        if np.array_equal(source[i], target[i]) or not np.isfinite(source[i]).all():
            continue
        warped = warp(source[i], _grey(source[i]), _grey(target[i]))
        if warped is not None and np.isfinite(warped).all():
            out[i] = torch.from_numpy(warped.reshape(source[i].shape)).permute(2, 0, 1).to(moving)
    return out


def _grey(image: _Array) -> _Array:
    """[h, w, c] -> [h, w] float32, by luma for three channels, else their mean."""
    weights = [0.299, 0.587, 0.114] if image.shape[2] == 3 else [1 / image.shape[2]] * image.shape[2]
    return np.ascontiguousarray(image @ np.asarray(weights, image.dtype), np.float32)


def _warped(image: _Array, matrix: Any) -> _Array:
    """`image` read through the 2 x 3 `matrix`, edges repeated."""
    import cv2

    return np.asarray(
        cv2.warpAffine(
            image,
            matrix,
            (image.shape[1], image.shape[0]),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    )


def _ecc(image: _Array, grey: _Array, target: _Array, *, affine: bool) -> _Array | None:
    import cv2

    motion = cv2.MOTION_AFFINE if affine else cv2.MOTION_EUCLIDEAN
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
    try:
        _, matrix = cv2.findTransformECC(target, grey, np.eye(2, 3, dtype=np.float32), motion, stop, None, 5)  # type: ignore[call-overload]
    except cv2.error:  # no convergence, or a flat image
        return None
    if not np.isfinite(matrix).all() or np.abs(matrix[:, 2]).max() > 0.25 * max(grey.shape):
        return None  # a shift by a quarter of the picture is no alignment of two guesses at one image
    return _warped(image, matrix)


def _dis(image: _Array, grey: _Array, target: _Array) -> _Array | None:
    import cv2

    if min(grey.shape) < 12:  # its patches are 8 pixels wide
        return None
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # type: ignore[attr-defined]
    seen, goal = ((np.clip(g, 0, 1) * 255).astype(np.uint8) for g in (grey, target))
    try:
        found = flow.calc(goal, seen, None)
    except cv2.error:
        return None
    rows, columns = np.indices(grey.shape, dtype=np.float32)
    return np.asarray(
        cv2.remap(
            image,
            columns + found[..., 0],
            rows + found[..., 1],
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
    )


def _phase(image: _Array, grey: _Array, target: _Array) -> _Array | None:
    import cv2

    window = cv2.createHanningWindow((grey.shape[1], grey.shape[0]), cv2.CV_32F)
    (right, down), _ = cv2.phaseCorrelate(target, grey, window)
    if max(abs(right), abs(down)) > 0.25 * max(grey.shape):
        return None
    matrix = np.asarray([[1, 0, right], [0, 1, down]], np.float32)
    return _warped(image, matrix)
