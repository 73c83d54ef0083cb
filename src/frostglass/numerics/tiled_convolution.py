"""3 x 3 convolutions on a CPU in a quarter of the multiplications, with all their first and second derivatives.

    conv(x, w) = A^T [(G w G^T) . (B^T x B)] A      for every 6 x 6 tile of x, which gives 4 x 4 numbers of the result

(Lavin and Gray 2016, arXiv:1509.09308, F(4 x 4, 3 x 3): 36 multiplications where 144 were; where that leaves too few
tiles for its kernels, F(2 x 2, 3 x 3): 16 for 36.) The product is taken for all tiles, channels and images at once, as
a matrix product for each point of a tile. It is linear in each of its arguments, so that its derivatives are the same
products between transposed maps (`tile_kernels`):

    X(x) = B^T x B    W(w) = G w G^T    Y(m) = A^T m A        conv = Y(X(x) W(w))
    gradient of x     X'(Y'(g) W(w))                          gradient of w     W'(Y'(g) X(x))

Rounding is two to five times that of an ordinary convolution in float32, at most 5e-6 of the result. What is gained
grows with the channels; images should lie as torch.channels_last, as all results here do.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from frostglass.numerics import tile_kernels
from frostglass.numerics.compiled import kernel

GROUP = 2**19
"""Images are taken so many at a time that their tiles are about as many numbers: 2 MiB stay near the processor."""
GAP = 48
"""Numbers between one point's matrix and the next: at a distance of a power of two all would share a cache's lines."""


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


class Kept:
    """Spread kernels of weights that stay the same, made once; as long as the caller keeps this, so are they.

    Weights are told apart by identity and by PyTorch's count of their changes. Spread kernels take four times the
    memory of the weights, or twice where tiles are small.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}

    def spread(self, w: Float[Tensor, "o i 3 3"], edge: int) -> Float[Tensor, "points o i"]:
        """W(w), for tiles of edge x edge results."""
        found = self._held.get((id(w), edge))
        if found is None or found[1] != w._version:
            found = self._held[id(w), edge] = (w, w._version, _spread(w.detach(), edge))
        return found[2]

    def forget(self, w: Tensor) -> None:
        """Lets the spread kernels of a weight go."""
        for edge in EDGES:
            self._held.pop((id(w), edge), None)


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

    def groups(self, channels: int) -> list[tuple[int, int]]:
        """Of images, alike in size."""
        tiles = self.places * self.how.points * channels
        parts = min(self.images, -(-tiles // (GROUP * torch.get_num_threads())))
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

    Small tiles gain nothing with 64 channels, and with 512 some per cent of a ResNet-18's time for as many of memory.
    """
    numbers = how.points * w.shape[0] * w.shape[1]
    if how.edge == 2:
        return 16 if 2**18 <= numbers < 2**22 else float("inf")
    return 8 if numbers <= 2**18 else 16 if numbers <= 2**22 else 24


def convolved(
    x: Float[Tensor, "b i h w"], spread: Float[Tensor, "points o i"], how: Tiling
) -> Float[Tensor, "b o p q"]:
    """conv(x, w), with w spread (`Kept`)."""
    size = _size(x.shape, how)
    y = x.new_empty(size.images, size.out_height, size.out_width, spread.shape[1])
    for part in size.groups(x.shape[1]):
        _join(torch.bmm(_cut(x, size, part), spread.transpose(1, 2)), size, part, y)
    return y.permute(0, 3, 1, 2)


def slopes(
    g: Float[Tensor, "b o p q"],
    x: Float[Tensor, "b i h w"],
    spread: Float[Tensor, "points o i"] | None,
    how: Tiling,
    of_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of conv(x, w) times g: (of x, of w); of x where w is given spread, of w where asked for."""
    size, (i, o) = _size(x.shape, how), (x.shape[1], g.shape[1])
    of_x = None if spread is None else x.new_zeros(size.images, size.height, size.width, i)
    sums = x.new_empty(how.points, o, i) if of_w else None
    for part in size.groups(max(i, o)):
        wide = _join_back(g, size, part)
        if of_x is not None:
            assert spread is not None
            _cut_back(torch.bmm(wide, spread), size, part, of_x)
        if sums is not None:
            sums.baddbmm_(wide.transpose(1, 2), _cut(x, size, part), beta=float(part[0] > 0))
    return None if of_x is None else of_x.permute(0, 3, 1, 2), None if sums is None else _spread_back(sums)


def second_slopes(
    g: Float[Tensor, "b o p q"],
    x: Float[Tensor, "b i h w"],
    spread: Float[Tensor, "points o i"],
    a: Float[Tensor, "b i h w"] | None,
    b: Float[Tensor, "o i 3 3"] | None,
    how: Tiling,
) -> tuple[Tensor | None, Tensor | None]:
    """What `slopes` times (a, b) gives once more: (of g, of x) = (conv(a, w) + conv(x, b), gradient of x for b)."""
    if b is None:
        return None if a is None else convolved(a, spread, how), None
    size, other = _size(x.shape, how), _spread(b, how.edge)
    of_g = x.new_empty(size.images, size.out_height, size.out_width, len(b))
    of_x = x.new_zeros(size.images, size.height, size.width, x.shape[1])
    for part in size.groups(max(b.shape[:2])):
        sums = torch.bmm(_cut(x, size, part), other.transpose(1, 2))
        if a is not None:
            sums.baddbmm_(_cut(a, size, part), spread.transpose(1, 2))
        _join(sums, size, part, of_g)
        _cut_back(torch.bmm(_join_back(g, size, part), other), size, part, of_x)
    return of_g.permute(0, 3, 1, 2), of_x.permute(0, 3, 1, 2)


_Part: TypeAlias = tuple[int, int]
"""First and last image of a group."""


def _cut(x: Tensor, size: _Size, part: _Part) -> Tensor:
    """X of some images: [points, places, c]."""
    c, places = x.shape[1], size.places_of(part)
    tiles = _matrices(x, size.how.points, places, c)
    of, to = _flat(_rows(x[part[0] : part[1]])), _points(tiles)
    grid = size.height, size.width, c, *size.how, size.down, size.across
    _over(places, 1, lambda m, n: _run(tile_kernels.cut_tiles, of, m, n, *grid, to, tiles.stride(0)))
    return tiles


def _cut_back(tiles: Tensor, size: _Size, part: _Part, x: Tensor) -> None:
    """X', added to images that lie as [b, h, w, c]."""
    c, places = x.shape[3], size.places_of(part)
    of, to = _points(tiles), _flat(x[part[0] : part[1]])
    grid = size.height, size.width, c, *size.how, size.down, size.across
    image, apart = size.down * size.across, tiles.stride(0)
    _over(places, image, lambda m, n: _run(tile_kernels.cut_tiles_back, of, apart, m, n, *grid, to))


def _join(tiles: Tensor, size: _Size, part: _Part, y: Tensor) -> None:
    """Y, into images that lie as [b, h, w, c]."""
    c, places = y.shape[3], size.places_of(part)
    of, to = _points(tiles), _flat(y[part[0] : part[1]])
    grid = size.out_height, size.out_width, c, size.how.edge, size.down, size.across
    _over(places, 1, lambda m, n: _run(tile_kernels.join_tiles, of, tiles.stride(0), m, n, *grid, to))


def _join_back(g: Tensor, size: _Size, part: _Part) -> Tensor:
    """Y' of some images: [points, places, c]."""
    c, places = g.shape[1], size.places_of(part)
    tiles = _matrices(g, size.how.points, places, c)
    of, to = _flat(_rows(g[part[0] : part[1]])), _points(tiles)
    grid = size.out_height, size.out_width, c, size.how.edge, size.down, size.across
    _over(places, 1, lambda m, n: _run(tile_kernels.join_tiles_back, of, m, n, *grid, to, tiles.stride(0)))
    return tiles


def _spread(w: Tensor, edge: int) -> Tensor:
    """W: [points, o, i]."""
    o, i = w.shape[:2]
    spread = _matrices(w, (edge + 2) ** 2, o, i)
    of, to = _flat(w.contiguous()), _points(spread)
    _over(o, 1, lambda m, n: _run(tile_kernels.spread_kernels, of, m, n, i, edge, to, spread.stride(0)))
    return spread


def _spread_back(spread: Tensor) -> Tensor:
    """W': [o, i, 3, 3]."""
    points, o, i = spread.shape
    edge = math.isqrt(points) - 2
    w = spread.new_empty(o, i, 3, 3)
    of, to = _points(spread), _flat(w)
    _over(o, 1, lambda m, n: _run(tile_kernels.spread_kernels_back, of, spread.stride(0), m, n, i, edge, to))
    return w


def _matrices(like: Tensor, points: int, rows: int, columns: int) -> Tensor:
    """[points, rows, columns], to be written; `GAP` apart."""
    step = rows * columns + GAP
    return like.new_empty(points * step).as_strided((points, rows, columns), (step, columns, 1))


def _points(matrices: Tensor) -> NDArray[np.float32]:
    """All of them one after another, with what lies between them."""
    points = matrices.shape[0]
    reach = matrices.stride(0) * (points - 1) + matrices[0].numel()
    flat: NDArray[np.float32] = matrices.detach().as_strided((reach,), (1,)).numpy()
    return flat


def _rows(x: Tensor) -> Tensor:
    """[b, h, w, c], in this order in memory."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def _flat(x: Tensor) -> NDArray[np.float32]:
    flat: NDArray[np.float32] = x.detach().reshape(-1).numpy()
    return flat


def _run(function: Callable[..., None], *args: Any) -> None:
    run = kernel(function)
    assert run is not None
    run(*args)


def _over(count: int, step: int, work: Callable[[int, int], None]) -> None:
    """work(first, last) for parts of range(count), of whole steps, on as many threads as PyTorch uses."""
    threads = min(torch.get_num_threads(), count // step)
    ends = [count // step * t // threads * step for t in range(threads + 1)]
    others = [_threads(os.getpid(), threads - 1).submit(work, *ends[t : t + 2]) for t in range(1, threads)]
    work(*ends[:2])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=2)
def _threads(process: int, count: int) -> ThreadPoolExecutor:  # noqa: ARG001 - threads do not survive a fork
    return ThreadPoolExecutor(count, "tiles")
