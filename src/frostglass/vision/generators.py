"""Generators of images: a small one that is fitted to a folder, an untrained one, and those that a user brings.

A generator is an `nn.Module` with `latent_shape` that maps [b, *latent_shape] to images [b, c, h, w] in [0, 1].
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.errors import BadInput, close_match
from frostglass.core.files import written_beside
from frostglass.core.randomness import Rng
from frostglass.vision.networks import torch_draws_from
from frostglass.vision.weights import read_weights

KIND = "frostglass generator 1"
"""What the metadata of a generator's file says; the number grows with the architecture."""

_SHAPE = ("latent", "channels", "size", "width")


class Decoder(nn.Module):
    """The decoder of a small VAE: a linear layer to 4 x 4 or so, then doublings up to the size wanted.

    Args:
        latent: length of a latent; its prior is N(0, I).
        channels, size: of the images; sizes that are no power of two times 4 to 7 are cropped from the next larger one.
        width: channels at the last doubling; four times as many at the first.
    """

    def __init__(self, *, latent: int, channels: int, size: int, width: int) -> None:
        super().__init__()
        wrong = [f"{w} = {v}" for w, v in zip(_SHAPE, (latent, channels, size, width), strict=True) if v < 1]
        if wrong or size < 8:
            raise BadInput(f"generator: {', '.join(wrong) or f'size = {size}'} is too small (sizes start at 8).")
        self.settings = {"latent": latent, "channels": channels, "size": size, "width": width}
        self.latent_shape = (latent,)
        self.image_shape = (channels, size, size)
        self.doublings = max(1, (size // 4).bit_length() - 1)
        self.base = -(-size // 2**self.doublings)
        widths = [width * min(4, 2 ** (self.doublings - i)) for i in range(self.doublings + 1)]
        self.first = nn.Linear(latent, widths[0] * self.base**2)
        self.norm = nn.GroupNorm(min(8, widths[0]), widths[0])
        blocks: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            blocks += [nn.SiLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), _norm(outputs)]
        self.blocks = nn.Sequential(*blocks, nn.SiLU(), nn.Conv2d(widths[-1], channels, 3, 1, 1))

    def forward(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        """Images in [0, 1]."""
        grid = self.first(z).unflatten(1, (-1, self.base, self.base))
        side = self.image_shape[-1]
        images: Tensor = torch.sigmoid(self.blocks(self.norm(grid))[..., :side, :side])
        return images


class Encoder(nn.Module):
    """The decoder's mirror image: images to mean and log variance of their latent."""

    def __init__(self, *, latent: int, channels: int, size: int, width: int) -> None:
        super().__init__()
        doublings = max(1, (size // 4).bit_length() - 1)
        widths = [width * min(4, 2**i) for i in range(doublings + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, 1, 1)]
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [nn.SiLU(), nn.Conv2d(inputs, outputs, 4, 2, 1), _norm(outputs)]
        side = size
        for _ in range(doublings):
            side //= 2
        self.body = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        self.head = nn.Linear(widths[-1] * side * side, 2 * latent)

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """(mean, log variance), [b, d] each."""
        mean, spread = self.head(self.body(images - 0.5)).chunk(2, dim=1)
        return mean, spread.clamp(-10, 4)


def _norm(channels: int) -> nn.Module:
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
            down.append(nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), _norm(width), nn.LeakyReLU(0.2)))
            up.append(nn.Sequential(nn.Conv2d(2 * width, width, 3, 1, 1), _norm(width), nn.LeakyReLU(0.2)))
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


@dataclass(frozen=True)
class FitSettings:
    """How a generator is fitted.

    Args:
        latent: length of a latent.
        width: channels at the last doubling.
        steps: of Adam.
        batch: images a step.
        lr: peak learning rate, which falls to 0 along a cosine.
    """

    latent: int = 256
    width: int = 32
    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3

    def __post_init__(self) -> None:
        least = {"latent": 1, "width": 1, "steps": 1, "batch": 1}
        wrong = [f"generator.{n}: {getattr(self, n)} must be from {v}." for n, v in least.items() if getattr(self, n) < v]
        if not self.lr > 0:
            wrong.append(f"generator.lr: {self.lr} must be above 0.")
        if wrong:
            raise BadInput(wrong)
