"""Images that are already on the disk: inside the wheels of scikit-image and scikit-learn. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from frostglass.core.errors import BadInput
from frostglass.vision.datasets import DATASETS, Catalogue
from frostglass.vision.decoding import Picture, decode

_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets", "images")

# name, folder, file, then left, top and side of a square that shows the subject; no two squares overlap
_PHOTOS = (
    ("astronaut", _SKIMAGE, "astronaut.png", 105, 0, 205),
    ("cat", _SKIMAGE, "chelsea.png", 90, 0, 300),
    ("coffee", _SKIMAGE, "coffee.png", 75, 0, 400),
    ("rocket", _SKIMAGE, "rocket.jpg", 180, 110, 300),
    ("pagoda", _SKLEARN, "china.jpg", 40, 10, 360),
    ("dahlia", _SKLEARN, "flower.jpg", 156, 72, 300),
    ("shuttle", _SKIMAGE, "astronaut.png", 310, 50, 202),
    ("helmet", _SKIMAGE, "astronaut.png", 290, 290, 222),
)


def _bundled_file(folder: tuple[str, ...], file: str) -> Path:
    spec = importlib.util.find_spec(folder[0])  # finds the package without importing it
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root, *folder[1:], file)
        if path.is_file():
            return path
    raise BadInput(f"dataset: {file} is missing from the installed {folder[0]}; reinstall it, or use 'digits'.")


@DATASETS.register()
def photos() -> Catalogue:
    """Eight real photographs in colour, square, from 202 to 400 pixels wide.

    Sources: NASA (astronaut, also cropped to shuttle and helmet; public domain), SpaceX (rocket; public domain),
    Stefan van der Walt (cat; CC0), Rachel Michetti (coffee; CC0), danielbuechele (pagoda; CC BY 2.0), vultilion
    (dahlia; CC BY 2.0).
    """

    def read(rows: Sequence[int]) -> Iterable[Picture]:
        for row in rows:
            _, folder, file, left, top, side = _PHOTOS[row]
            whole = decode(_bundled_file(folder, file), file)
            yield replace(whole, pixels=whole.pixels[top : top + side, left : left + side])

    return Catalogue(
        names=[photo[0] for photo in _PHOTOS],
        labels=range(len(_PHOTOS)),
        classes=10,
        read=read,
        notes=(
            "The labels of the photographs are arbitrary: 0 to 7, one each, out of 10 classes.",
            "The photographs are crops chosen by hand; astronaut, shuttle and helmet come from one picture.",
        ),
    )


@DATASETS.register()
def digits() -> Catalogue:
    """1,797 handwritten digits, grey, 8 x 8 pixels with 17 levels (scikit-learn)."""
    from sklearn.datasets import load_digits  # 1 s to import

    bunch = load_digits()
    pixels = (bunch.images / 16).astype(np.float32)[:, :, :, None]

    def read(rows: Sequence[int]) -> Iterable[Picture]:
        return (Picture(pixels[row]) for row in rows)

    return Catalogue(
        names=[f"digit-{i:04d}" for i in range(len(pixels))], labels=bunch.target.tolist(), classes=10, read=read
    )
