"""Tensors -> the pictures of the report, each a base64 PNG inside the page.

Private images, reconstructions and film frames arrive in [0, 1] (the run has brought an attack on encodings there);
encodings arrive in [-1, 1], as they were sent.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from frostglass.auditing.scorecard import Cell, ImageScore
from frostglass.auditing.wording import number

SMOOTH_FROM = 96
"""From this many pixels a picture is smoothed when scaled; below, its pixels are shown as they are."""
LARGEST, LARGEST_FRAME = 320, 96
FILM_ROWS, FILM_FRAMES, LEAST_FRAMES = 4, 12, 3


@dataclass(frozen=True)
class Tile:
    """One picture, or the place of one that was not recovered.

    Args:
        uri: a data URI; None draws a hatched tile.
        alt: for whoever cannot see it.
        label: what stands above it.
    """

    uri: str | None
    alt: str
    label: str = ""


@dataclass(frozen=True)
class Pair:
    """A private image, its encoding if there is one, and what the attack made of it, with the scores.

    Args:
        index: from 1, as shown.
        tiles: two, or three with an encoding.
        score: against the private image.
        encoding_score: against the encoding.
    """

    index: int
    tiles: tuple[Tile, ...]
    score: ImageScore | None
    encoding_score: ImageScore | None


@dataclass(frozen=True)
class Gallery:
    """The before and after of a cell's first batch.

    Args:
        pairs: one per private image.
        pixelated: pictures are small; show their pixels.
        width: of a tile, in CSS pixels.
        shape: width / height, for tiles without a picture.
        encoded: encodings are among the tiles, shown shifted.
        notes: sentences on what the eye cannot see.
    """

    pairs: tuple[Pair, ...]
    pixelated: bool
    width: int
    shape: str
    encoded: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Film:
    """Candidates from noise to picture.

    Args:
        heads: column titles: steps, then the original.
        rows: one per image.
        pixelated: as in Gallery.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[Tile, ...], ...]
    pixelated: bool


def gallery(cell: Cell, pictures: Mapping[str, Tensor]) -> Gallery | None:
    """Before and after of one cell, or None if no picture of it was kept; without a truth, only what came after."""
    private = pictures.get(f"{cell.id}/private")
    encoding, made = pictures.get(f"{cell.id}/encoding"), pictures.get(f"{cell.id}/reconstruction")
    if private is None and made is not None and len(made):
        return _unscored(cell, made)
    if private is None or not len(private):
        return None
    pairs = []
    for i in range(len(private)):
        score = cell.images[i] if i < len(cell.images) else None
        coded = cell.encoding_images[i] if i < len(cell.encoding_images) else None
        tiles = [Tile(picture_uri(private[i]), f"Private image {i + 1}", "private")]
        if encoding is not None and i < len(encoding):
            tiles.append(Tile(picture_uri((encoding[i] + 1) / 2), f"Encoding of image {i + 1}, shifted", "encoding"))
        tiles.append(_made(made, i, coded if coded and (score is None or score.psnr is None) else score))
        pairs.append(Pair(i + 1, tuple(tiles), score, coded))
    side = max(private.shape[-2:])
    wide = 118 if encoding is None else 106  # four pairs, or three triples, in a row of the widest page
    return Gallery(
        tuple(pairs), side < SMOOTH_FROM, wide,
        f"{private.shape[-1]} / {private.shape[-2]}", encoding is not None,
        _notes(private, encoding is not None),
    )  # fmt: skip


def _unscored(cell: Cell, made: Tensor) -> Gallery:
    """What an attack on a recorded message returned, with nothing to put beside it."""
    scores = [cell.images[i] if i < len(cell.images) else None for i in range(len(made))]
    pairs = tuple(Pair(i + 1, (_made(made, i, None),), score, None) for i, score in enumerate(scores))
    small = max(made.shape[-2:]) < SMOOTH_FROM
    return Gallery(pairs, small, 118, f"{made.shape[-1]} / {made.shape[-2]}", False, _notes(made, False))


def film(cell: Cell, pictures: Mapping[str, Tensor]) -> Film | None:
    """Filmstrips of the first images of a cell, or None if no frame was kept."""
    start = f"{cell.id}/film/"
    kept = {int(k[len(start) :]): v for k, v in pictures.items() if k.startswith(start) and k[len(start) :].isdigit()}
    steps = sorted(step for step, frames in kept.items() if len(frames))
    if len(steps) < LEAST_FRAMES:
        return None  # an attack of one step makes no film
    pick = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), FILM_FRAMES)).round().astype(int))
    steps = [steps[i] for i in pick]
    private = pictures.get(f"{cell.id}/private")
    rows = []
    for i in range(min(FILM_ROWS, max(len(kept[s]) for s in steps))):
        tiles = [_frame(kept[s], i, s) for s in steps]
        if private is not None and i < len(private):
            tiles.append(Tile(picture_uri(private[i], LARGEST_FRAME), f"Private image {i + 1}"))
        rows.append(tuple(tiles))
    heads = [f"{s:,}".replace(",", "\u202f") for s in steps] + (["private"] if private is not None else [])
    return Film(tuple(heads), tuple(rows), max(kept[steps[0]].shape[-2:]) < SMOOTH_FROM)


def _made(made: Tensor | None, i: int, score: ImageScore | None) -> Tile:
    if made is None or i >= len(made) or not bool(torch.isfinite(made[i]).all()):
        return Tile(None, f"Image {i + 1} was not recovered", "reconstruction")
    told = "" if score is None else f", PSNR {number(score.psnr)} dB against the {score.target} image"
    told = told.replace("encoding image", "encoding")
    return Tile(picture_uri(made[i]), f"Reconstruction of image {i + 1}{told}", "reconstruction")


def _frame(frames: Tensor, i: int, step: int) -> Tile:
    if i >= len(frames) or not bool(torch.isfinite(frames[i]).all()):
        return Tile(None, f"Image {i + 1} at step {step}: none")
    return Tile(picture_uri(frames[i], LARGEST_FRAME), f"Image {i + 1} at step {step}")


def _notes(private: Tensor, encoded: bool) -> tuple[str, ...]:
    channels, height, width = private.shape[1:]
    notes = []
    if encoded:
        notes.append("Sign-masked encodings hold values from −1 to 1; they are shown shifted, as (x + 1) / 2.")
    if channels not in (1, 3):
        notes.append(f"Of {channels} channels, the first is shown.")
    if max(height, width) > LARGEST:
        notes.append(
            f"Pictures of {width} × {height} pixels are shown reduced to {LARGEST}; scores are of the originals."
        )
    return tuple(notes)


def picture_uri(image: Float[Tensor, "c h w"], largest: int = LARGEST) -> str:
    """A PNG data URI; values are clamped to [0, 1], whatever an early candidate holds."""
    shown = image if image.shape[0] in (1, 3) else image[:1]
    pixels = (shown.detach().float().cpu().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels[0].numpy() if pixels.shape[0] == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    if max(picture.size) > largest:
        picture.thumbnail((largest, largest), Image.Resampling.BOX)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
