"""Images of a source as bytes, a quarter of the memory of floats: what encoders and public pools work on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.vision.datasets import MAX_BYTES, Catalogue, Size, _in_channels, _sentences, _sized, _spell, catalogue
from frostglass.vision.decoding import TRAITS, Picture

OnError = Literal["stop", "skip"]

_CHUNK = 256  # rows asked for at a time: a Parquet source reads its row groups once


ARBITRARY = "labels are arbitrary"
"""What the note of a source says whose labels stand for nothing."""


@dataclass(frozen=True)
class ByteImages:
    """Labelled images in memory, 8 bits a channel.

    Args:
        images: uint8 [n, c, h, w] in 0 .. 255, c = 1 or 3.
        labels: int64 [n] in 0 .. classes - 1.
        names: one per image, for its owner.
        classes: how many outputs a model for these labels needs.
        notes: sentences on what was converted or made up.
        skipped: a sentence for each image that could not be used and was left out.
        words: what the classes are called, in their order; empty where nobody says.
    """

    images: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    names: tuple[str, ...]
    classes: int
    notes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def made_up(self) -> bool:
        """Whether the labels stand for nothing."""
        return any(ARBITRARY in note for note in self.notes)


def load_bytes(
    source: str,
    *,
    size: Size | None,
    channels: int | None = None,
    limit: int | None = None,
    on_error: OnError = "stop",
    tick: Callable[[int], object] = lambda done: None,
) -> ByteImages:
    """Images of a source, rounded to 8 bits a channel.

    Args:
        source: as in `datasets.load`.
        size: side in pixels, or (height, width) (centre, resized); None keeps images as they are, if all have one size.
        channels: 1 (luma), 3 (grey is repeated), or None: 1 if all images are grey, else 3.
        limit: at most so many images, the first ones.
        on_error: "stop" at the first image that does not decode, or "skip" and name it in `skipped`.
        tick: told after each image how many are done.

    Raises:
        BadInput: as `datasets.load`; with "skip", if no image is left.
    """
    found = catalogue(source)
    rows = range(len(found.names) if limit is None else min(limit, len(found.names)))
    seen: Counter[str] = Counter()
    kept: list[int] = []
    images: list[Tensor] = []
    skipped: list[str] = []
    for row, picture in pictures(found, rows, on_error, skipped):
        image = _as_bytes(picture, size, seen)
        if images and image.shape[1:] != images[0].shape[1:]:
            raise BadInput(
                f"size: {found.names[kept[0]]} has {_spell(images[0])} pixels and {found.names[row]} has "
                f"{_spell(image)}; give a size, so that all are cropped and resized to it."
            )
        if not images and len(rows) * image.numel() > MAX_BYTES:
            raise BadInput(
                f"dataset: {len(rows)} images of {_spell(image)} pixels take more than {MAX_BYTES // 2**30} GiB; "
                "give a smaller size or a limit."
            )
        kept.append(row)
        images.append(image)
        tick(len(kept) + len(skipped))
    if not images:
        raise BadInput([f"dataset: none of the {len(rows)} images of {source!r} can be used.", *skipped[:3]])
    wanted = channels or max(len(image) for image in images)
    return ByteImages(
        torch.stack([_channels(image, wanted, seen) for image in images]),
        torch.tensor([int(found.labels[i]) for i in kept], dtype=torch.int64),
        tuple(found.names[i] for i in kept),
        found.classes,
        (*found.notes, *_sentences(seen, len(images))),
        tuple(skipped),
        tuple(found.words),
    )


def pictures(
    found: Catalogue, rows: Sequence[int], on_error: OnError, skipped: list[str]
) -> Iterator[tuple[int, Picture]]:
    """(row, picture) of a catalogue, in order; under "skip" the sentence on a broken one goes to `skipped` instead."""
    todo = list(rows)
    while todo:
        chunk, todo = todo[:_CHUNK], todo[_CHUNK:]
        done = 0
        try:
            for picture in found.read(chunk):
                done += 1
                yield chunk[done - 1], picture
        except BadInput as wrong:
            if on_error == "stop":
                raise
            skipped.append(str(wrong))
            todo = chunk[done + 1 :] + todo  # a reader that has raised is finished: start another behind the bad row


def _as_bytes(picture: Picture, size: Size | None, seen: Counter[str]) -> UInt8[Tensor, "c h w"]:
    seen.update(TRAITS[trait] for trait in picture.traits)
    image = torch.tensor(picture.pixels, dtype=torch.float32).permute(2, 0, 1)
    if size is not None:
        image = _sized(image, size, seen)
    return image.mul(255).round().to(torch.uint8).contiguous()


def _channels(image: Tensor, channels: int, seen: Counter[str]) -> Tensor:
    if len(image) == channels:
        return image
    return _in_channels(image.float() / 255, channels, seen).mul(255).round().to(torch.uint8)
