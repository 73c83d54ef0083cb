"""One picture file to float pixels: every mode of Pillow, and every way in which a file can be broken or hostile."""

from __future__ import annotations

import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError

from frostglass.core.errors import BadInput

MAX_PIXELS = 50_000_000
"""Largest picture that is decoded, in pixels; the header says so before a pixel is."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may recognise. Not its whole list: some plugins start other programs (EPS starts Ghostscript)."""

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""File name endings, in lower case, that promise one of `FORMATS`."""

TRAITS = {
    "transparency": "transparent, placed on white",
    "palette": "with a palette, expanded to colours",
    "CMYK": "in CMYK, converted to RGB without a colour profile",
    "other colours": "in a colour space other than RGB, converted without a colour profile",
    "16 bits": "with 16 bits a channel, read as fractions of the full scale",
    "16 bits cut": "with 16 bits a channel, of which the upper 8 were read",
    "floats": "with floating point pixels, taken as they are",
    "rotation": "turned upright as their EXIF orientation says",
    "frames": "with several frames, of which the first was taken",
}
"""What `Picture.traits` may hold, as the end of a sentence about how many images it was true of."""

_ORIENTATION = 0x0112  # the EXIF tag
_GREY = ("1", "L", "LA", "La")


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Args:
        pixels: [h, w, 1 or 3] in [0, 1].
        traits: keys of `TRAITS`: what had to be converted.
    """

    pixels: Float[np.ndarray, "h w c"]
    traits: tuple[str, ...] = ()


def decode(content: bytes | Path, name: str) -> Picture:
    """The picture in a file, or in the bytes of one.

    Args:
        content: an encoded image (one of `FORMATS`), or the path of one.
        name: how errors call it.

    Raises:
        BadInput: one sentence: not a regular file, unreadable, no image, above `MAX_PIXELS`, truncated or damaged,
            or with pixels whose range nothing tells.
    """
    try:
        if isinstance(content, Path) and not stat.S_ISREG(content.stat().st_mode):
            raise BadInput(f"dataset: {name} is no regular file; remove it or give its extension to images only.")
        with (
            warnings.catch_warnings()
        ):  # Pillow warns of large sizes and odd metadata: the one is refused, the other harmless
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
                _refuse_large(image.size, name)
                return _convert(image, name)
    except BadInput:
        raise
    except UnidentifiedImageError:
        raise BadInput(
            f"dataset: {name} is not an image ({', '.join(FORMATS)} are read); replace or remove it."
        ) from None
    except Image.DecompressionBombError as problem:  # raised by Pillow itself while it opens the very largest
        raise BadInput(
            f"dataset: {name} is larger than the limit of {MAX_PIXELS:,} pixels ({problem}); shrink or remove it."
        ) from None
    except OSError as problem:
        if problem.errno is not None:
            raise BadInput(
                f"dataset: {name} cannot be read ({problem.strerror}); remove it or change its permissions."
            ) from None
        raise BadInput(f"dataset: {name} is truncated or damaged ({problem}); replace or remove it.") from None
    except Exception as problem:  # decoders raise whatever the bytes drive them into
        raise BadInput(
            f"dataset: {name} is damaged ({type(problem).__name__}: {problem}); replace or remove it."
        ) from None


def _refuse_large(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"dataset: {name} has {width} x {height} pixels, above the limit of {MAX_PIXELS:,}; shrink or remove it."
        )


def _convert(image: Image.Image, name: str) -> Picture:
    traits = []
    deep = _deep(image)  # first: PNG loads its pixels to look for an orientation, and forgets their depth then
    if getattr(image, "is_animated", False):
        traits.append("frames")
    upright = _orientation(image) == 1
    image.load()
    if not upright:
        traits.append("rotation")
        ImageOps.exif_transpose(image, in_place=True)  # does nothing where Pillow has turned it by itself (TIFF)
    if image.mode == "F" or image.mode.startswith("I"):
        pixels, trait = _wide(image, name)
        return Picture(pixels[:, :, None], (*traits, trait))
    if deep:
        traits.append("16 bits cut")
    grey = image.mode in _GREY
    if image.mode in ("P", "PA"):
        traits.append("palette")
    elif image.mode == "CMYK":
        traits.append("CMYK")
    elif not grey and image.mode not in ("RGB", "RGBX", "RGBA", "RGBa"):
        traits.append("other colours")
    plain, see_through = _on_white(image)
    if see_through:
        traits.append("transparency")
    pixels = np.asarray(plain.convert("L" if grey else "RGB"), np.float32) / 255
    return Picture(pixels[:, :, None] if grey else pixels, tuple(traits))


def _deep(image: Image.Image) -> bool:
    """Whether the file keeps 16 bits a channel, to be asked before the pixels are loaded."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(a, str) and ";16" in a for a in arguments):
            return True
        if image.format == "PPM" and any(isinstance(a, int) and a > 255 for a in arguments):
            return True
    return False


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata around good pixels: nothing to turn by
        return 1
    return value if value in range(1, 9) else 1


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """(the image without transparency, whether a pixel had any)."""
    if not image.has_transparency_data:
        return image, False
    layers = image.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return layers, False
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers), True


def _wide(image: Image.Image, name: str) -> tuple[Float[np.ndarray, "h w"], str]:
    """Grey pixels of more than 8 bits, and the trait that says so."""
    values = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return values / 65535, "16 bits"
    if image.mode == "F" and bool(np.isfinite(values).all()) and values.min() >= 0 and values.max() <= 1:
        return values, "floats"
    kind = "floating point" if image.mode == "F" else "32-bit integer"
    raise BadInput(
        f"dataset: {name} has {kind} pixels from {values.min():g} to {values.max():g}, whose full scale nothing tells; "
        "save it with 8 or 16 bits a channel."
    )
