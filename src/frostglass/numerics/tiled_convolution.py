"""3 x 3 convolutions on a CPU in a quarter of the multiplications, with all their first and second derivatives.

    conv(x, w) = A^T [(G w G^T) . (B^T x B)] A      for every 6 x 6 tile of x, which gives 4 x 4 numbers of the result

(Lavin and Gray 2016, arXiv:1509.09308, F(4 x 4, 3 x 3): 36 multiplications where 144 were; where that leaves too few
tiles for its kernels, F(2 x 2, 3 x 3): 16 for 36.) The product is taken for all tiles, channels and images at once, as
a matrix product for each point of a tile. It is linear in each of its arguments, so that its derivatives are the same
products between transposed maps (`tile_kernels`):

    X(x) = B^T x B    W(w) = G w G^T    Y(m) = A^T m A        conv = Y(X(x) W(w))
    gradient of x     X'(Y'(g) W(w))                          gradient of w     W'(Y'(g) X(x))

Rounding is two to eight times that of an ordinary convolution in float32, at most 5e-6 of the result. What is gained
grows with the channels; images should lie as torch.channels_last, as all results here do.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.numerics import tile_kernels
from frostglass.numerics.compiled import kernel
from frostglass.numerics.panels import flat, matrices, numbers, over, run
from frostglass.numerics.tile_weights import Weights, add_slopes

GROUP = 2**19
"""Images are taken so many at a time that their tiles are about as many numbers: 2 MiB stay near the processor."""
EDGES = (4, 2)
"""Results on a side of a tile, the better first."""


class Tiling(NamedTuple):
    """Padding on every side of the images, and one of `EDGES`."""

    pad: int
    edge: int

    @property
    def points(self) -> int:
        """Numbers in a tile."""
        return (self.edge + 2) ** 2


class _Size(NamedTuple):
    """Of images, of the result, and of the grid of tiles."""

    images: int
    height: int
    width: int
    how: Tiling
    out_height: int
    out_width: int
    down: int
    across: int

    @property
    def places(self) -> int:
        return self.images * self.down * self.across

    def places_of(self, part: tuple[int, int]) -> int:
        return (part[1] - part[0]) * self.down * self.across

    def groups(self, outputs: int, inputs: int) -> list[tuple[int, int]]:
        """Of images, alike in size; of no fewer numbers than the kernels, all of which each group goes through."""
        tiles = self.places * self.how.points * max(outputs, inputs)
        most = max(GROUP * torch.get_num_threads(), self.how.points * outputs * inputs)
        parts = min(self.images, -(-tiles // most))
        return list(pairwise(self.images * t // parts for t in range(parts + 1)))


def _size(x_shape: torch.Size, how: Tiling) -> _Size:
    b, _, h, w = x_shape
    oh, ow = h + 2 * how.pad - 2, w + 2 * how.pad - 2
    return _Size(b, h, w, how, oh, ow, -(-oh // how.edge), -(-ow // how.edge))


CHANNELS = 32
"""Channels in and out from which on tiles are faster than oneDNN."""


def tiling(
    x: Tensor, w: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> Tiling | None:
    """The tiles for a convolution, given as for conv2d; None if it is not one of these, or would not gain."""
    if not (
        w.shape[2:] == (3, 3)
        and w.ndim == x.ndim == 4
        and w.shape[1] == x.shape[1]  # of others PyTorch says what is wrong; loops would read beyond their arrays
        and stride == (1, 1)
        and padding in ((0, 0), (1, 1))
        and dilation == (1, 1)
        and groups == 1
        and x.dtype == w.dtype == torch.float32
        and x.device.type == "cpu"
        and min(w.shape[:2]) >= CHANNELS
        and min(x.shape[2:]) >= 3
        and kernel(tile_kernels.cut_tiles) is not None
    ):
        return None
    for edge in EDGES:
        how = Tiling(padding[0], edge)
        if _size(x.shape, how).places >= _fewest(w, how):
            return how
    return None


def _fewest(w: Tensor, how: Tiling) -> float:
    """Places from which on they gain (`bench/convolution.py`): spread kernels beyond a cache cost a pass over them.

    Little work is done before its loops have begun. Small tiles gain nothing with 64 channels.
    """
    kernels = w.shape[0] * w.shape[1]
    numbers = how.points * kernels
    if how.edge == 2:
        return 16 if 2**18 <= numbers <= 2**22 else float("inf")
    return max(8, 2**15 / kernels) if numbers <= 2**18 else 16 if numbers <= 2**22 else 24


def convolved(x: Float[Tensor, "b i h w"], weights: Weights, how: Tiling) -> Float[Tensor, "b o p q"]:
    """conv(x, w)."""
    size = _size(x.shape, how)
    y = x.new_empty(size.images, size.out_height, size.out_width, len(weights.w))
    for part in size.groups(*weights.w.shape[:2]):
        _join(weights.forward(_cut(x, size, part)), size, part, y)
    return y.permute(0, 3, 1, 2)


def slopes(
    g: Float[Tensor, "b o p q"], x: Float[Tensor, "b i h w"], weights: Weights | None, how: Tiling, of_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of conv(x, w) times g: (of x, of w); of x where w is given, of w where asked for."""
    size, (i, o) = _size(x.shape, how), (x.shape[1], g.shape[1])
    of_x = None if weights is None else x.new_zeros(size.images, size.height, size.width, i)
    to_w = x.new_empty(o, i, 3, 3) if of_w else None
    for part in size.groups(o, i):
        wide = _join_back(g, size, part)
        if of_x is not None and weights is not None:
            _cut_back(weights.back(wide), size, part, of_x)
        if to_w is not None:
            add_slopes(wide, _cut(x, size, part), how.edge, to_w, first=part[0] == 0)
    return None if of_x is None else of_x.permute(0, 3, 1, 2), to_w


def second_slopes(
    g: Float[Tensor, "b o p q"],
    x: Float[Tensor, "b i h w"],
    weights: Weights,
    a: Float[Tensor, "b i h w"] | None,
    b: Float[Tensor, "o i 3 3"] | None,
    how: Tiling,
) -> tuple[Tensor | None, Tensor | None]:
    """What `slopes` times (a, b) gives once more: (of g, of x) = (conv(a, w) + conv(x, b), gradient of x for b)."""
    if b is None:
        return None if a is None else convolved(a, weights, how), None
    size, other = _size(x.shape, how), Weights(b, how.edge)
    of_g = x.new_empty(size.images, size.out_height, size.out_width, len(b))
    of_x = x.new_zeros(size.images, size.height, size.width, x.shape[1])
    for part in size.groups(*b.shape[:2]):
        sums = other.forward(_cut(x, size, part))
        if a is not None:
            weights.forward(_cut(a, size, part), sums)
        _join(sums, size, part, of_g)
        _cut_back(other.back(_join_back(g, size, part)), size, part, of_x)
    return of_g.permute(0, 3, 1, 2), of_x.permute(0, 3, 1, 2)


_Part: TypeAlias = tuple[int, int]
"""First and last image of a group."""


def _cut(x: Tensor, size: _Size, part: _Part) -> Tensor:
    """X of some images: [points, panels of c, places, 32]."""
    c, places = x.shape[1], size.places_of(part)
    tiles = matrices(x, size.how.points, places, c)
    of, to = flat(_rows(x[part[0] : part[1]])), (*numbers(tiles), places)
    grid = size.height, size.width, c, *size.how, size.down, size.across
    over(places, 1, lambda m, n: run(tile_kernels.cut_tiles, of, m, n, *grid, *to))
    return tiles


def _cut_back(tiles: Tensor, size: _Size, part: _Part, x: Tensor) -> None:
    """X', added to images that lie as [b, h, w, c]."""
    c, places = x.shape[3], size.places_of(part)
    of, to = (*numbers(tiles), places), flat(x[part[0] : part[1]])
    grid = size.height, size.width, c, *size.how, size.down, size.across
    image = size.down * size.across
    over(places, image, lambda m, n: run(tile_kernels.cut_tiles_back, *of, m, n, *grid, to))


def _join(tiles: Tensor, size: _Size, part: _Part, y: Tensor) -> None:
    """Y, into images that lie as [b, h, w, c]."""
    c, places = y.shape[3], size.places_of(part)
    of, to = (*numbers(tiles), places), flat(y[part[0] : part[1]])
    grid = size.out_height, size.out_width, c, size.how.edge, size.down, size.across
    over(places, 1, lambda m, n: run(tile_kernels.join_tiles, *of, m, n, *grid, to))


def _join_back(g: Tensor, size: _Size, part: _Part) -> Tensor:
    """Y' of some images: [points, panels of c, places, 32]."""
    c, places = g.shape[1], size.places_of(part)
    tiles = matrices(g, size.how.points, places, c)
    of, to = flat(_rows(g[part[0] : part[1]])), (*numbers(tiles), places)
    grid = size.out_height, size.out_width, c, size.how.edge, size.down, size.across
    over(places, 1, lambda m, n: run(tile_kernels.join_tiles_back, of, m, n, *grid, *to))
    return tiles


def _rows(x: Tensor) -> Tensor:
    """[b, h, w, c], in this order in memory."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
