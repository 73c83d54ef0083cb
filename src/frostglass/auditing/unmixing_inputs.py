"""An encoded set as an attacker finds it: as `frostglass encode` writes it, or arrays as in the InstaHide challenge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from frostglass.auditing.unmixing_challenge import ABOUT, read_about
from frostglass.core.errors import BadInput
from frostglass.defenses.sets.manifest import MANIFEST, problems_of, read_manifest

ENCODINGS, LABELS = "encryption.npy", "label.npy"
"""Names in the challenge's format."""
_CHUNK = 4096
MOST_CLASSES = 100_000
"""Columns of labels at the most."""


@dataclass(frozen=True)
class EncodedSet:
    """Encodings and what was published with them.

    Args:
        images: [E, c, h, w] in [-1, 1].
        targets: [E, classes] as published, None if there are none.
        manifest: what the set says about itself; empty for plain arrays.
        digest: SHA-256 of images and targets.
        name: for titles.
        notes: sentences on what was converted.
        behind: of gradients: encodings that they were made of; None where the encodings themselves were published.
    """

    images: Float[Tensor, "e c h w"] = field(repr=False)
    targets: Float[Tensor, "e k"] | None = field(repr=False)
    manifest: Mapping[str, Any]
    digest: str
    name: str
    notes: tuple[str, ...] = ()
    behind: int | None = None

    @property
    def count(self) -> int:
        """Encodings, also those behind gradients."""
        return len(self.images) if self.behind is None else self.behind

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        c, h, w = self.images.shape[1:]
        return c, h, w


def read_encoded(folder: Path) -> EncodedSet:
    """An encoded set or a folder of arrays.

    Raises:
        BadInput: neither is there, the manifest does not verify, arrays are pickled, or shapes do not fit.
    """
    if (folder / MANIFEST).is_file():
        return _from_shards(folder)
    if (folder / ENCODINGS).is_file():
        return _from_arrays(folder)
    if not folder.is_dir():
        raise BadInput(f"unmix: {folder} is no folder; give an encoded set, or a folder with {ENCODINGS}.")
    raise BadInput(f"unmix: {folder} holds neither {MANIFEST} (an encoded set) nor {ENCODINGS} (plain arrays).")


def _from_shards(folder: Path) -> EncodedSet:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_manifest(folder)
    wrong = problems_of(folder, manifest)
    if wrong:
        raise BadInput(wrong)
    shape = tuple(manifest["shape"])
    images, targets = [], []
    for shard in manifest["shards"]:
        try:
            held = load_file(folder / shard["file"])
        except (SafetensorError, OSError, ValueError) as broken:
            raise BadInput(f"unmix: shard {shard['file']} cannot be read ({broken}); copy the set anew.") from None
        if "images" not in held or tuple(held["images"].shape) != (shard["rows"], *shape):
            raise BadInput(f"unmix: shard {shard['file']} is not of the shape {shape} in the manifest; copy it anew.")
        images.append(held["images"].float())
        if "targets" in held:
            if tuple(held["targets"].shape) != (shard["rows"], manifest["classes"]):
                raise BadInput(
                    f"unmix: shard {shard['file']} has no row of {manifest['classes']} targets for each encoding; copy "
                    "it anew."
                )
            targets.append(_masses(held["targets"].float(), f"targets in {shard['file']}"))
    if targets and len(targets) != len(images):
        raise BadInput("unmix: some shards have labels and others do not; copy the set anew.")
    return _made(torch.cat(images), torch.cat(targets) if targets else None, manifest, folder.name, ())


def _from_arrays(folder: Path) -> EncodedSet:
    array = _load(folder / ENCODINGS)
    if array.ndim != 4 or 0 in array.shape:
        raise BadInput(f"unmix: {ENCODINGS} has shape {array.shape} and must be [encodings, height, width, channels].")
    if array.dtype.kind not in "fiu":
        raise BadInput(f"unmix: {ENCODINGS} holds {array.dtype}; give numbers.")
    notes = []
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    elif array.shape[1] not in (1, 3):
        raise BadInput(f"unmix: {ENCODINGS} has shape {array.shape}; neither its last nor its second axis is 1 or 3.")
    largest = float(images.abs().max())
    if np.isfinite(largest) and largest > 1 + 1e-4:
        scale = max(largest, 255.0) if array.dtype == np.uint8 else largest
        images = images / scale
        notes.append(f"Encodings reached {largest:.4g} in size; they were divided by {scale:.4g}.")
    if np.isfinite(largest) and float(images.min()) >= 0:
        images, told = _without_sign(images)
        notes.append(told)
    return _made(images, _labels(folder / LABELS, len(images)), _challenge(folder), folder.name, tuple(notes))


def _without_sign(images: Tensor) -> tuple[Tensor, str]:
    """Encodings without negative values: moved to [-1, 1] if they were stored in [0, 1], which random signs betray.

    A sign mask makes values as often v as -v, so that stored as (1 + v) / 2 they lie evenly about 1/2. Absolute values
    do not: small ones are the most frequent.
    """
    values = images.flatten()[:: max(1, images.numel() // 1_000_000)]
    low = values.quantile(torch.tensor([0.05, 0.1, 0.25, 0.5]))
    high = values.quantile(torch.tensor([0.95, 0.9, 0.75, 0.5]))
    if float((low + high - 1).abs().max()) < 0.03 and float(high[0] - low[0]) > 0.1:
        return 2 * images - 1, "Encodings lie evenly about the middle of [0, 1]; they were moved to [-1, 1]."
    return images, (
        "No encoding has a negative value: they are read as absolute values. If pixels were stored in [0, 1], give "
        "2 x - 1 instead."
    )


def _challenge(folder: Path) -> dict[str, Any]:
    """What `frostglass challenge make` publishes beside the arrays, in the words of a manifest; empty without it."""
    if not (folder / ABOUT).is_file():
        return {}
    held = read_about(folder)
    counts = ("private_images", "k", "private", "public_images", "rounds")
    wrong = [n for n in counts if n in held and (type(held[n]) is not int or held[n] < 0)]
    wrong += [] if held.get("mask", "sign") in ("sign", "abs", "none") else ["mask"]
    if wrong:
        raise BadInput(f"unmix: {ABOUT} is damaged (at {', '.join(wrong)}); copy the challenge anew.")
    kept = ("k", "private", "c1", "c2", "law", "mask", "labels", "public_images", "rounds", "insecure")
    made = {"images": held.get("private_images"), **{key: held[key] for key in kept if key in held}}
    return made | {"challenge_rounds": held.get("rounds", 0)}


def _labels(path: Path, encodings: int) -> Tensor | None:
    if not path.is_file():
        return None
    held = _load(path)
    if held.ndim not in (1, 2) or len(held) != encodings or not held.size:
        raise BadInput(f"unmix: {path.name} has shape {held.shape} for {encodings} encodings; give one row for each.")
    if held.ndim == 1:
        if held.dtype.kind not in "iu" or int(held.min()) < 0:
            raise BadInput(
                f"unmix: {path.name} holds one {held.dtype} an encoding; give class numbers or rows of mass."
            )
        if int(held.max()) >= MOST_CLASSES:
            raise BadInput(
                f"unmix: {path.name} names class {int(held.max())}, more than {MOST_CLASSES}; number them from 0."
            )
        return torch.nn.functional.one_hot(torch.from_numpy(held.astype(np.int64))).float()
    if held.dtype.kind not in "fiub":
        raise BadInput(f"unmix: {path.name} holds {held.dtype}; give class numbers or rows of mass.")
    return _masses(torch.from_numpy(np.ascontiguousarray(held, dtype=np.float32)), path.name)


def _masses(targets: Float[Tensor, "e k"], what: str) -> Float[Tensor, "e k"]:
    """The labels, if each row can be one."""
    if not bool((targets >= 0).all()) or bool((targets.sum(1) > 1.01).any()):  # NaN is not at least 0
        raise BadInput(f"unmix: rows of {what} must be finite, not negative and sum to at most 1.")
    return targets


def _load(path: Path) -> NDArray[Any]:
    """A memory-mapped array; nothing that is pickled is ever unpacked."""
    try:
        held: NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except ValueError as wrong:
        if "empty" in str(wrong):  # nothing to map: its shape is judged later
            return np.load(path, allow_pickle=False)
        if "pickle" in str(wrong).lower() or "object" in str(wrong).lower():
            raise BadInput(
                f"unmix: {path.name} holds Python objects (pickled, or arrays of unlike shapes), which could run "
                "anything; save one array of numbers with np.save."
            ) from None
        raise BadInput(f"unmix: {path.name} cannot be read ({wrong}); save it anew with np.save.") from None
    except (OSError, EOFError) as wrong:
        raise BadInput(f"unmix: {path.name} cannot be read ({wrong}); save it anew with np.save.") from None
    if not isinstance(held, np.ndarray):
        raise BadInput(f"unmix: {path.name} is an archive; save one array of numbers with np.save.")
    return held


def _made(
    images: Tensor, targets: Tensor | None, manifest: Mapping[str, Any], name: str, notes: tuple[str, ...]
) -> EncodedSet:
    if not bool(images.isfinite().all()):
        raise BadInput(f"unmix: {name} holds encodings with values that are not finite; encode anew.")
    digest = hashlib.sha256()
    for start in range(0, len(images), _CHUNK):
        digest.update(images[start : start + _CHUNK].contiguous().numpy().tobytes())
    if targets is not None:
        digest.update(targets.contiguous().numpy().tobytes())
    return EncodedSet(images, targets, manifest, digest.hexdigest(), name, notes)


_MOVED = "give 2 x - 1 of pixels in [0, 1], and x / 127.5 - 1 of bytes"


def within(values: Tensor, low: float, high: float) -> bool:
    """Whether these are real floating-point numbers, finite and from `low` to `high`; none of them is in no range."""
    if not values.is_floating_point() or not values.numel():
        return False
    return bool(((values >= low) & (values <= high)).all())  # NaN is in no range


def range_of(values: Tensor) -> str:
    """Type and range of a tensor's values, for a message: "torch.uint8 values from 0 to 255"."""
    if values.is_complex():
        return f"{values.dtype} values"
    return f"{values.dtype} values from {float(values.min()):g} to {float(values.max()):g}"


def from_tensors(images: Any, targets: Any) -> EncodedSet:
    """Encodings given from Python: [E, c, h, w] in [-1, 1] and targets [E, classes] or None.

    Raises:
        BadInput: something else was given.
    """
    try:
        x = torch.as_tensor(images).detach().cpu()
        y = None if targets is None else torch.as_tensor(targets).detach().cpu().float()
    except (TypeError, ValueError, RuntimeError) as wrong:
        raise BadInput(f"encoded: give a folder, or tensors ({wrong}).") from None
    if x.ndim != 4 or not x.numel() or x.shape[1] not in (1, 3):
        raise BadInput(f"encoded: shape {tuple(x.shape)} must be [encodings, 1 or 3 channels, height, width].")
    if not within(x, -1 - 1e-4, 1 + 1e-4):
        raise BadInput(f"encoded: {range_of(x)} must be floating point, finite and in [-1, 1]; {_MOVED}.")
    if y is not None and (y.ndim != 2 or len(y) != len(x) or not y.numel()):
        raise BadInput(f"targets: shape {tuple(y.shape)} must be [{len(x)}, classes].")
    return _made(x.float(), None if y is None else _masses(y, "targets"), {}, "python", ())
