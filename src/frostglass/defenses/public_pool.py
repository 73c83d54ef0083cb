"""Public pools: patches with enough detail to hide something, in one memory-mapped file.

The paper mixes with random crops of ImageNet images that have more than 40 SIFT key points, which drops flat patches;
its filter was never released. A 32-pixel patch hardly ever has 40 key points, so a larger square is cut, filtered and
then shrunk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from frostglass.core.errors import BadInput
from frostglass.core.files import alone_in, left_over, write_json, written_beside
from frostglass.core.randomness import Rng
from frostglass.defenses.sources import PublicPool
from frostglass.vision.byte_images import OnError, pictures
from frostglass.vision.datasets import catalogue

POOL, PIXELS = "pool.json", "pool.uint8"
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)


MOST_TRIES = 100_000
"""Cuts of one image at the most: their places are drawn at once."""


@dataclass(frozen=True)
class PoolSettings:
    """What is cut from public images.

    Args:
        size: side of a patch in the pool, pixels.
        crops: patches wanted in all.
        cut: side of the square that is cut and judged before it is shrunk to `size`; None for twice `size`.
        key_points: a patch is kept if SIFT finds more than this; -1 keeps all.
        channels: 1 or 3.
        tries: cuts tried in each image, spread over it at random.
        on_error: "stop" at an image that does not decode, or "skip" it.

    Raises:
        BadInput: numbers out of range.
    """

    size: int = 32
    crops: int = 10_000
    cut: int | None = None
    key_points: int = 40
    channels: int = 3
    tries: int = 20
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        found = [
            f"{name}: {value} must be at least {least}."
            for name, value, least in (
                ("size", self.size, 4),
                ("crops", self.crops, 1),
                ("tries", self.tries, 1),
                ("key-points", self.key_points, -1),
                ("cut", self.side, self.size),
            )
            if value < least
        ]
        if self.tries > MOST_TRIES:
            found.append(f"tries: {self.tries} must be at most {MOST_TRIES}.")
        if self.channels not in (1, 3):
            found.append(f"channels: {self.channels} must be 1 (grey) or 3 (colour).")
        if found:
            raise BadInput(found)

    @property
    def side(self) -> int:
        """Side of the square that is cut."""
        return 2 * self.size if self.cut is None else self.cut


@dataclass
class PoolStatistics:
    """What became of the images.

    Args:
        images: read; too_small: smaller than a cut; broken: sentences on those that did not decode.
        tried, kept: cuts; mean_key_points: over all cuts tried.
    """

    images: int = 0
    too_small: int = 0
    tried: int = 0
    kept: int = 0
    mean_key_points: float = 0.0
    broken: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For a person."""
        share = self.kept / self.tried if self.tried else 0.0
        return [
            f"{self.images} images read, {self.too_small} too small, {len(self.broken)} that do not decode",
            f"{self.tried} patches tried, {self.kept} kept ({share:.1%}), {self.mean_key_points:.1f} key points on "
            "average",
        ]


def make_pool(
    source: str, out: Path, settings: PoolSettings, rng: Rng, tick: Callable[[int], object] = lambda kept: None
) -> PoolStatistics:
    """Writes a pool: `pool.uint8` ([M, c, size, size], memory-mapped later) and `pool.json`; whole or not at all.

    Each image is visited once, in random order, and gives as many patches as an even share asks for; a second visit
    fills up what flat images left open. No place of an image is cut twice, so small images give fewer patches.

    Args:
        source: as in `datasets.load`.
        out: a folder without a pool.
        settings: what is cut.
        rng: of the order and the cuts. The pool is public: it is no key material.
        tick: told of the patches kept, one by one.

    Raises:
        BadInput: a pool is there already, or made by another process, the source is unusable, or no patch was kept.
    """
    if (out / POOL).exists():
        raise BadInput(f"public-pool: {out} holds a pool already; name another folder.")
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise BadInput(f"public-pool: {out} cannot be written ({wrong.strerror or wrong}).") from None
    with alone_in(out, "public-pool"):
        if (out / POOL).exists():  # by now: another process has made it meanwhile
            raise BadInput(f"public-pool: {out} holds a pool already; name another folder.")
        for stray in (held for held in out.iterdir() if left_over(held, "pool.")):
            stray.unlink(missing_ok=True)
        return _written(source, out, made, settings, rng, tick)


def _written(
    source: str, out: Path, made: list[Path], settings: PoolSettings, rng: Rng, tick: Callable[[int], object]
) -> PoolStatistics:
    """Into a folder that is held; of a pool that is not made nothing stays, nor the folders that were made for it."""
    found = PoolStatistics()
    broken: list[str] = []
    try:
        with written_beside(out / PIXELS) as beside, beside.open("wb") as held:
            for _ in _kept(source, settings, rng, found, broken, held):
                tick(1)
                if found.kept == settings.crops:
                    break
        found.broken = tuple(broken)
        if not found.kept:
            if not found.tried and found.too_small:
                raise BadInput(
                    f"public-pool: all {found.too_small} images of {source!r} are smaller than a cut of "
                    f"{settings.side} pixels; give larger images, or a smaller --cut or --size."
                )
            raise BadInput([
                f"public-pool: none of {found.tried} patches of {source!r} has more than {settings.key_points} key "
                "points; give larger or more detailed images, a larger --cut, or lower --key-points.",
                *broken[:3],
            ])  # fmt: skip
        shape = [found.kept, settings.channels, settings.size, settings.size]
        about = {
            "format": "frostglass public pool",
            "shape": shape,
            "settings": asdict(settings),
            "statistics": asdict(found),
        }
        write_json(out / POOL, about)
    except BaseException as wrong:  # no pixels without a description, and no folder that was not there
        with suppress(OSError):
            (out / PIXELS).unlink(missing_ok=True)
            for place in made:
                place.rmdir()
        if isinstance(wrong, OSError):
            raise BadInput(f"public-pool: {out} cannot be written ({wrong.strerror or wrong}).") from None
        raise
    return found


def _kept(
    source: str, settings: PoolSettings, rng: Rng, found: PoolStatistics, broken: list[str], held: BinaryIO
) -> Iterator[None]:
    """Writes the patches that pass, one by one."""
    holds = catalogue(source)
    order = rng.at("order").permutation(len(holds.names)).tolist()
    share = -(-settings.crops // len(order))
    judge = _judge()
    judged = np.zeros(len(order), np.int64)  # cuts of each image, so that the second visit brings none of them again
    for visit, quota in enumerate((share, settings.crops)):  # first an even share of each, then whatever is missing
        for row, picture in pictures(holds, order, settings.on_error, broken if visit == 0 else []):
            found.images += visit == 0
            grey, pixels = _grey(picture.pixels), _colours(picture.pixels, settings.channels)
            span = np.array(grey.shape) - settings.side + 1
            if (span < 1).any():
                found.too_small += visit == 0
                continue
            places = _places(rng, visit, row, span, settings.tries)
            if visit:
                before = set(_places(rng, 0, row, span, settings.tries)[: judged[row]])
                places = [place for place in places if place not in before]
            mine = 0
            for top, left in places:
                if mine == quota:
                    break
                judged[row] += 1
                cut = slice(top, top + settings.side), slice(left, left + settings.side)
                points = judge(grey[cut])
                found.tried += 1
                found.mean_key_points += (points - found.mean_key_points) / found.tried
                if points <= settings.key_points:
                    continue
                mine, found.kept = mine + 1, found.kept + 1
                held.write(_shrunk(pixels[cut], settings.size).tobytes())
                yield


def _places(rng: Rng, visit: int, row: int, span: NDArray[np.int64], tries: int) -> list[tuple[int, int]]:
    """(top, left) of the cuts of one visit, each once: a small image has few, and a patch twice hides no more."""
    drawn: list[list[int]] = rng.at("cuts", visit, row).numpy().integers(0, span, (tries, 2)).tolist()
    return list(dict.fromkeys((top, left) for top, left in drawn))


def _judge() -> Callable[[NDArray[np.uint8]], int]:
    import cv2

    sift = cv2.SIFT_create()  # type: ignore[attr-defined, unused-ignore]
    return lambda patch: len(sift.detect(np.ascontiguousarray(patch), None))


def _grey(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    flat = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels @ _LUMA
    return np.asarray((flat * 255).round(), np.uint8)


def _colours(pixels: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    if pixels.shape[2] == channels:
        return pixels
    return np.repeat(pixels, 3, 2) if channels == 3 else (pixels @ _LUMA)[:, :, None].astype(np.float32)


def _shrunk(patch: NDArray[np.float32], size: int) -> NDArray[np.uint8]:
    """[side, side, c] in [0, 1] -> [c, size, size] bytes, by means over areas."""
    import cv2

    if len(patch) != size:
        resized = np.asarray(cv2.resize(patch, (size, size), interpolation=cv2.INTER_AREA), np.float32)
        patch = resized.reshape(size, size, -1)
    return np.ascontiguousarray((patch * 255).round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1))


def open_pool(folder: str | Path, size: int | None = None) -> PublicPool:
    """The pool that `frostglass public-pool` wrote, memory-mapped.

    Args:
        folder: of the pool.
        size: side of the private images; a pool of larger patches is then cropped anew at each use.

    Raises:
        BadInput: no pool there, or one that is damaged.
    """
    folder = Path(folder)
    if not (folder / POOL).is_file():
        raise BadInput(f"public: {folder} holds no pool; `frostglass public-pool IMAGES {folder}` writes one.")
    try:
        held: dict[str, Any] = json.loads((folder / POOL).read_text(encoding="utf-8"))
        shape = tuple(int(n) for n in held["shape"])
        length = (folder / PIXELS).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise BadInput(f"public: {folder} is damaged ({wrong}); make the pool anew.") from None
    if len(shape) != 4 or min(shape) < 1 or length != int(np.prod(shape)):
        raise BadInput(f"public: {folder / PIXELS} has {length} bytes, not those of {shape}; make the pool anew.")
    images: Any = np.memmap(folder / PIXELS, np.uint8, "r", shape=shape)
    return PublicPool(images, crop=size is not None and shape[2] > size)
