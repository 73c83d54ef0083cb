"""Images by the name of their source: `load("photos", size=32)`, `load("folder:holiday", size=64)`.

A source is a function that returns a `Catalogue` (names and labels at once, pixels on request), registered in
`DATASETS` from any module of this package; `bundled`, `folder` and `parquet` hold those that come with frostglass.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from frostglass.core.errors import BadInput, close_match
from frostglass.core.registry import Registry
from frostglass.vision.decoding import TRAITS, Picture

MAX_BYTES = 8 * 2**30
"""Largest set of images that `load` builds in memory."""

Size: TypeAlias = int | tuple[int, int]
"""Side in pixels of a square, or (height, width)."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow converts colour to grey


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    Args:
        images: float32 [n, c, h, w] in [0, 1], c = 1 or 3.
        labels: int64 [n] in 0 .. classes - 1.
        names: one per image, for reports; never seen by an attack.
        classes: how many outputs a model for these labels needs.
        notes: sentences on what was converted or made up; a report repeats them.
        source: what was asked for.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    names: tuple[str, ...]
    classes: int
    notes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Catalogue:
    """What a source holds, before a picture is decoded.

    Args:
        names: one per image, in an order that never changes.
        labels: one per image, in 0 .. classes - 1.
        classes: outputs that a model for these labels needs.
        read: decodes the pictures of these rows, one after the other, in the order asked.
        notes: sentences for `ImageSet.notes`.
        words: what the classes are called, in their order; empty where nobody says.
    """

    names: Sequence[str]
    labels: Sequence[int]
    classes: int
    read: Callable[[Sequence[int]], Iterable[Picture]]
    notes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


DATASETS: Registry[Catalogue] = Registry("dataset", "frostglass.vision")


def catalogue(source: str) -> Catalogue:
    """Names and labels of a source; nothing is decoded.

    Args:
        source: "photos", "digits", "folder:PATH" or "parquet:FILE".

    Raises:
        BadInput: an unknown source, a path missing or not wanted, or what the source finds wrong with the path.
    """
    kind, colon, path = source.partition(":")
    if kind not in DATASETS:
        near = close_match(kind, DATASETS.names())
        if colon:
            raise BadInput(f"dataset: {source!r} is not a known source; {near}.")
        if Path(source).expanduser().is_dir():
            raise BadInput(f"dataset: {source!r} is a folder, not a source; write {'folder:' + source!r}.")
        raise BadInput(  # most likely meant as a folder, which the command line takes by its path
            f"dataset: there is no folder {source!r}, and it is not a known source; give a folder that exists, or a "
            f"source ({near})."
        )
    entry = DATASETS[kind]
    if "path" not in entry.parameters:
        if colon:
            raise BadInput(f"dataset: {source!r} gives {kind!r} a path, which it does not take; write {kind!r}.")
        return entry.make()
    if not path:
        raise BadInput(f"dataset: {source!r} lacks a path; write {kind + ':PATH'!r}.")
    return entry.make(path=path)


def count(source: str) -> int:
    """How many images a source holds, without decoding one. Raises `BadInput` as `catalogue` does."""
    return len(catalogue(source).names)


def labels(source: str) -> Int64[Tensor, " n"]:
    """All labels of a source, without decoding an image, to choose `rows` by. Raises `BadInput` as `catalogue` does."""
    return torch.tensor(catalogue(source).labels, dtype=torch.int64)


def load(
    source: str,
    *,
    size: Size | None,
    channels: int | None = None,
    limit: int | None = None,
    rows: Sequence[int] | None = None,
) -> ImageSet:
    """Images of a source, decoding only those asked for.

    Args:
        source: "photos", "digits", "folder:PATH" or "parquet:FILE".
        size: side in pixels, or (height, width): the centre of each image in these proportions, resized (bicubic,
            antialiased, clamped to [0, 1]); None keeps images as they are, if all have one size.
        channels: 1 (luma), 3 (grey is repeated), or None: 1 if all images are grey, else 3.
        limit: at most so many images, the first ones; with `rows`, the first of those.
        rows: these images, in this order (0 is the first of the source).

    Raises:
        BadInput: a setting out of range, an unknown source, or the first file that cannot be used, and what to do.
    """
    _check_settings(size, channels, limit)
    found = catalogue(source)
    chosen = _choose(len(found.names), rows, limit)
    if size is not None:
        _refuse_memory(len(chosen), (channels or 3, *sides(size)))
    pictures, seen = _read(found, chosen, size)
    if channels is None:
        channels = max(len(p) for p in pictures)
    return ImageSet(
        images=torch.stack([_in_channels(p, channels, seen) for p in pictures]),
        labels=torch.tensor([int(found.labels[i]) for i in chosen], dtype=torch.int64),
        names=tuple(found.names[i] for i in chosen),
        classes=found.classes,
        notes=(*found.notes, *_sentences(seen, len(pictures))),
        source=source,
    )


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else size


def _check_settings(size: Size | None, channels: int | None, limit: int | None) -> None:
    problems = []
    if channels not in (None, 1, 3):
        problems.append(f"channels: {channels!r} must be 1 (grey) or 3 (colour).")
    if isinstance(size, tuple) and len(size) != 2:
        problems.append(f"size: {size!r} must be a side in pixels, or (height, width).")
    given = [("size", side) for side in (size if isinstance(size, tuple) else (size,))]
    for word, value in (*given, ("limit", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            problems.append(f"{word}: {value!r} must be a whole number from 1.")
    if problems:
        raise BadInput(problems)


def _choose(total: int, rows: Sequence[int] | None, limit: int | None) -> list[int]:
    if rows is None:
        return list(range(total if limit is None else min(total, limit)))
    try:
        chosen = [operator.index(row) for row in rows]
    except TypeError:
        raise BadInput(f"rows: {list(rows)[:5]!r} must be whole numbers from 0 to {total - 1}.") from None
    outside = [row for row in chosen if not 0 <= row < total]
    if outside:
        raise BadInput(f"rows: {outside[0]} is outside the source, which has rows 0 to {total - 1}.")
    if not chosen:
        raise BadInput(f"rows: none given; give some of 0 to {total - 1}, or leave rows out.")
    return chosen[:limit]


def _refuse_memory(number: int, shape: tuple[int, ...]) -> None:
    need = number * 4 * shape[0] * shape[1] * shape[2]
    if need > MAX_BYTES:
        raise BadInput(
            f"dataset: {number} images of {shape[0]} x {shape[1]} x {shape[2]} take {need / 2**30:.0f} GiB, above the "
            f"limit of {MAX_BYTES // 2**30}; give a smaller size, a limit or rows."
        )


def _read(found: Catalogue, chosen: Sequence[int], size: Size | None) -> tuple[list[Tensor], Counter[str]]:
    """Tensors [1 or 3, h, w] of one height and width, and how often each kind of conversion was needed."""
    images: list[Tensor] = []
    seen: Counter[str] = Counter()
    for row, picture in zip(chosen, found.read(chosen), strict=True):
        seen.update(TRAITS[trait] for trait in picture.traits)
        image = torch.tensor(picture.pixels, dtype=torch.float32).permute(2, 0, 1)
        if size is not None:
            image = _sized(image, size, seen)
        elif not images:
            _refuse_memory(len(chosen), tuple(image.shape))
        elif image.shape[1:] != images[0].shape[1:]:
            raise BadInput(
                f"size: {found.names[chosen[0]]} has {_spell(images[0])} pixels and {found.names[row]} has "
                f"{_spell(image)}; give a size, so that all are cropped and resized to it."
            )
        images.append(image.contiguous())
    return images, seen


def _spell(image: Tensor) -> str:
    return f"{image.shape[2]} x {image.shape[1]}"


def _sized(image: Tensor, size: Size, seen: Counter[str]) -> Tensor:
    """The largest centre of the size's proportions, resized to it."""
    (h, w), (height, width) = image.shape[1:], sides(size)
    # the side that runs out first stays whole
    high, wide = (h, max(1, round(h * width / height))) if h * width <= w * height else (round(w * height / width), w)
    high = max(1, high)
    if (high, wide) != (h, w):
        square = "not square, cropped to the centre square"
        seen[square if height == width else f"cropped to the centre in proportions {width} : {height}"] += 1
        top, left = (h - high) // 2, (w - wide) // 2
        image = image[:, top : top + high, left : left + wide]
    if (high, wide) == (height, width):
        return image
    seen[f"resized to {width} x {height} (bicubic, antialiased)"] += 1
    resized = torch.nn.functional.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)
    return resized[0].clamp(0, 1)  # bicubic overshoots at edges


def _in_channels(image: Tensor, channels: int, seen: Counter[str]) -> Tensor:
    if len(image) == channels:
        return image
    if channels == 1:
        seen["in colour, reduced to grey (luma)"] += 1
        return (image * image.new_tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True).clamp(0, 1)
    seen["grey, repeated over three channels"] += 1
    return image.expand(3, -1, -1)


def _sentences(seen: Counter[str], total: int) -> list[str]:
    return [f"{number} of {total} images: {what}." for what, number in sorted(seen.items())]


def shown(name: Any) -> str:
    """A file name as text that any report can hold: bytes that are no UTF-8 become escapes."""
    return str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
