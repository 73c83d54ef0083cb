"""Generators of images: a small one that is fitted to a folder, an untrained one, and those that a user brings.

A generator is an `nn.Module` with `latent_shape` that maps [b, *latent_shape] to images [b, c, h, w] in [0, 1].
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.errors import BadInput, close_match
from frostglass.core.files import written_beside
from frostglass.core.randomness import Rng
from frostglass.vision.networks import torch_draws_from

KIND = "frostglass generator 1"
"""What the metadata of a generator's file says; the number grows with the architecture."""

_SHAPE = ("latent", "channels", "size", "width")


class Decoder(nn.Module):
    """The decoder of a small VAE: a linear layer to 4 x 4 or so, then doublings up to the size wanted.

    Args:
        latent: length of a latent; its prior is N(0, I).
        channels, size: of the images; sizes that are no power of two times 4 to 7 are cropped from the next larger one.
        width: half the channels before the last doubling, a quarter of those on smaller grids.
    """

    def __init__(self, *, latent: int, channels: int, size: int, width: int) -> None:
        super().__init__()
        wrong = [f"{w} = {v}" for w, v in zip(_SHAPE, (latent, channels, size, width), strict=True) if v < 1]
        if wrong or size < 8:
            raise BadInput(f"generator: {', '.join(wrong) or f'size = {size}'} is too small (sizes start at 8).")
        self.settings = {"latent": latent, "channels": channels, "size": size, "width": width}
        self.latent_shape = (latent,)
        self.image_shape = (channels, size, size)
        self.doublings = doublings_of(size)
        self.base = -(-size // 2**self.doublings)
        widths = widths_of(width, self.doublings)
        self.first = nn.Linear(latent, widths[0] * self.base**2)
        self.norm = group_norm(widths[0])
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            blocks += [nn.SiLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), group_norm(outputs)]
        # the last doubling by rearrangement: convolutions at full size would take most of the time
        blocks += [nn.SiLU(), nn.Conv2d(widths[-1], 4 * channels, 3, 1, 1), nn.PixelShuffle(2)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        """Images in [0, 1]."""
        grid = self.first(z).unflatten(1, (-1, self.base, self.base))
        side = self.image_shape[-1]
        images: Tensor = torch.sigmoid(self.blocks(self.norm(grid))[..., :side, :side])
        return images


def doublings_of(size: int) -> int:
    """How often a grid of 4 to 7 pixels a side is doubled."""
    return max(1, (size // 4).bit_length() - 1)


def widths_of(width: int, doublings: int) -> list[int]:
    """Channels from the smallest grid to the one before the last doubling."""
    return [width * min(4, 2 ** (doublings - i)) for i in range(doublings)]


def group_norm(channels: int) -> nn.Module:
    """With eight groups, or as many as divide the channels."""
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if channels % g == 0), channels)


class Untrained(nn.Module):
    """A small hourglass whose weights are the variable of a search (deep image prior, Ulyanov et al. 2018).

    Fixed noise goes in; what such a network can draw in a few hundred steps looks more like a photograph than noise
    does. One image of noise for each row: the rows share the weights.

    Args:
        channels, size: of the images.
        width: channels inside.
    """

    def __init__(self, *, channels: int, size: tuple[int, int], width: int = 32, depth: int = 2) -> None:
        super().__init__()
        if width < 4 or not 1 <= depth <= 5:
            raise BadInput(f"generator: width = {width} must be from 4, and depth = {depth} from 1 to 5.")
        self.latent_shape = (width, *size)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for _ in range(depth):
            down.append(nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), group_norm(width), nn.LeakyReLU(0.2)))
            up.append(nn.Sequential(nn.Conv2d(2 * width, width, 3, 1, 1), group_norm(width), nn.LeakyReLU(0.2)))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.last = nn.Conv2d(width, channels, 1)

    def forward(self, noise: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        """Images in [0, 1]."""
        levels = [noise]
        for layer in self.down:
            levels.append(layer(levels[-1]))
        x = levels.pop()
        for layer in self.up:
            skip = levels.pop()
            wide = nn.functional.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = layer(torch.cat([wide, skip], 1))
        images: Tensor = torch.sigmoid(self.last(x))
        return images


def save_generator(decoder: Decoder, path: str | Path, **about: str) -> Path:
    """Writes a decoder with its sizes, so that loading needs no options; whole or not at all.

    Args:
        decoder: fitted.
        path: ends in .safetensors; folders are made.
        about: further texts for the file's metadata (what it was fitted on).

    Raises:
        BadInput: another extension, or a place that cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"generator: {path} must end in .safetensors; change the extension.")
    tensors = {name: value.detach().cpu().contiguous() for name, value in decoder.state_dict().items()}
    # one entry: safetensors writes several in an arbitrary order, and the same fit should give the same file
    metadata = {"frostglass": json.dumps({"kind": KIND, **decoder.settings, **about}, sort_keys=True)}
    try:
        with written_beside(path) as beside:
            save_file(tensors, beside, metadata=metadata)
    except OSError as problem:
        raise BadInput(f"generator: {path} cannot be written ({problem.strerror}); choose another place.") from None
    return path


def load_generator(path: str | Path) -> Decoder:
    """A decoder as `save_generator` wrote it, in eval mode, its parameters frozen.

    Raises:
        BadInput: no such file, or no generator of this version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise BadInput(f"generator: {path} is no file; write one with `frostglass fit-generator IMAGES --out {path}`.")
    try:
        with safe_open(path, framework="pt") as held:
            metadata = json.loads((held.metadata() or {}).get("frostglass", "{}"))
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (it is no dict)
        if metadata.get("kind") != KIND:
            raise BadInput(f"generator: {path} is no {KIND!r} file; fit one with `frostglass fit-generator`.")
        with torch.random.fork_rng(devices=[]):  # what it draws is replaced at once: the generator stays as it was
            decoder = Decoder(**{name: int(metadata[name]) for name in _SHAPE})
        decoder.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as problem:
        line = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise BadInput(f"generator: {path} is damaged ({line}); fit it again.") from None
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise BadInput(f"generator: {path} holds values that are not finite; fit it again.")
    return decoder.eval().requires_grad_(False)


@functools.lru_cache(maxsize=4)
def from_factory(name: str) -> nn.Module:
    """The generator that "package.module:factory" returns, called without arguments; in eval mode, frozen.

    The current directory is searched too. Weights that the factory draws follow from its name, so that the same plan
    gives the same result, and torch's global generator is left as it was.

    Raises:
        BadInput: it does not import, raises, or returns something that is no generator of images in [0, 1].
    """
    try:
        with torch_draws_from(Rng.from_seed(0, "generator", name)):
            made: Any = _found(name)()
    except BadInput:
        raise
    except Exception as problem:
        line = (str(problem).splitlines() or [""])[0]
        raise BadInput(f"generator: {name!r} raised {type(problem).__name__}: {line}.") from problem
    shape = getattr(made, "latent_shape", None)
    if not isinstance(made, nn.Module) or not isinstance(shape, tuple | list | torch.Size):
        raise BadInput(
            f"generator: {name!r} must return a torch.nn.Module with `latent_shape`, a tuple; it returned "
            f"{type(made).__name__}."
        )
    made = made.eval().requires_grad_(False)
    like = next(iter(made.parameters()), torch.zeros(()))
    try:
        with torch.no_grad():
            out = made(like.new_zeros(1, *shape))
    except Exception as problem:
        line = (str(problem).splitlines() or [""])[0]
        raise BadInput(f"generator: {name!r} does not take a latent [1, {tuple(shape)}] ({line}).") from problem
    if not isinstance(out, Tensor) or out.ndim != 4 or len(out) != 1 or not bool(out.isfinite().all()):
        raise BadInput(f"generator: {name!r} must map latents to finite images [b, c, h, w].")
    if float(out.min()) < -1e-3 or float(out.max()) > 1 + 1e-3:
        raise BadInput(f"generator: {name!r} gives values from {float(out.min()):.3g} to {float(out.max()):.3g}; it "
                       "must give images in [0, 1], as (x + 1) / 2 makes of [-1, 1].")  # fmt: skip
    return made


def _found(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that no file there hides an installed package
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module)
    except Exception as problem:
        raise BadInput(
            f"generator: the module of {name!r} does not import ({type(problem).__name__}: {problem}); correct the "
            "name (searched: installed packages and the current directory)."
        ) from problem
    for part in path.split("."):
        if not hasattr(found, part):
            raise BadInput(f"generator: {module!r} has no {part!r}; {close_match(part, vars(found))}.")
        found = getattr(found, part)
    if not callable(found):
        raise BadInput(f"generator: {name!r} is of type {type(found).__name__}; name a function.")
    return found
