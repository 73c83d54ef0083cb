"""Kernels of a convolution by tiles: spread, multiplied with tiles, and what their slopes are made of.

Kernels are spread before they are multiplied, W(w) = G w G^T. Spread, those of 256 channels are more than a nearer
cache holds. Where they serve one pass alone, to write and read them takes as long as to make them again: they are
spread a piece at a time, and the piece is multiplied with all tiles at once. What their slopes are made of likewise.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from frostglass.numerics import tile_kernels, tile_products
from frostglass.numerics.panels import flat, matrices, numbers, over, run
from frostglass.numerics.tile_kernels import BLOCK

LARGE = 2**20
"""Numbers of spread kernels from which on they are spread a piece at a time."""


class Weights:
    """Kernels for tiles of edge x edge results.

    Args:
        w: [o, i, 3, 3], on the CPU, in float32.
        edge: 4 or 2.
        keep: spread large ones once too: for more than one pass.
    """

    def __init__(self, w: Float[Tensor, "o i 3 3"], edge: int, *, keep: bool = False) -> None:
        self.w, self.edge = w.detach().contiguous(), edge
        self.whole = spread(self.w, edge) if keep or not is_large(w, edge) else None

    def forward(
        self,
        tiles: Float[Tensor, "points panels_i rows 32"],
        onto: Float[Tensor, "points panels_o rows 32"] | None = None,
    ) -> Float[Tensor, "points panels_o rows 32"]:
        """Tiles of the inputs to those of the outputs: X W^T for each point, added to `onto` where that is given."""
        (points, _, rows, _), (o, i) = tiles.shape, self.w.shape[:2]
        found, add = (matrices(tiles, points, rows, o), 0) if onto is None else (onto, 1)
        (a, a_step), (c, c_step) = numbers(tiles), numbers(found)
        if self.whole is not None:
            b = numbers(self.whole)
            over(points, 1, lambda m, n: run(_MULTIPLY, a, a_step, *b, c, c_step, m, n, rows, i, o, True, add))
            return found

        def outputs(first: int, last: int) -> None:
            for left in range(first * BLOCK, min(last * BLOCK, o), BLOCK):
                wide = min(BLOCK, o - left)
                b = numbers(spread(self.w[left : left + wide], self.edge, alone=True))
                run(_MULTIPLY, a, a_step, *b, c[left * rows :], c_step, 0, points, rows, i, wide, True, add)

        over(-(-o // BLOCK), 1, outputs)
        return found

    def back(self, tiles: Float[Tensor, "points panels_o rows 32"]) -> Float[Tensor, "points panels_i rows 32"]:
        """Tiles of the outputs to those of the inputs: X W for each point."""
        (points, _, rows, _), (o, i) = tiles.shape, self.w.shape[:2]
        found = matrices(tiles, points, rows, i)
        (a, a_step), (c, c_step) = numbers(tiles), numbers(found)
        if self.whole is not None:
            b = numbers(self.whole)
            over(points, 1, lambda m, n: run(_MULTIPLY, a, a_step, *b, c, c_step, m, n, rows, o, i, False, 0))
            return found

        def inputs(first: int, last: int) -> None:
            for left in range(first * BLOCK, min(last * BLOCK, i), BLOCK):
                right = min(left + BLOCK, i)
                b = numbers(spread(self.w, self.edge, (left, right), alone=True))
                run(_MULTIPLY, a, a_step, *b, c[left * rows :], c_step, 0, points, rows, o, right - left, False, 0)

        over(-(-i // BLOCK), 1, inputs)
        return found


class Kept:
    """`Weights` that stay the same, made once; as long as the caller keeps this, so are they.

    Weights are told apart by identity and by PyTorch's count of their changes. Spread they take four times their
    memory, or twice where tiles are small.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], tuple[Tensor, int, Weights]] = {}

    def of(self, w: Float[Tensor, "o i 3 3"], edge: int) -> Weights:
        """As its constructor makes them, to be kept."""
        found = self._held.get((id(w), edge))
        if found is None or found[1] != w._version:
            found = self._held[id(w), edge] = (w, w._version, Weights(w, edge, keep=True))
        return found[2]


def is_large(w: Float[Tensor, "o i 3 3"], edge: int) -> bool:
    """Whether kernels are spread a piece at a time."""
    return (edge + 2) ** 2 * w.shape[0] * w.shape[1] >= LARGE


def spread(
    w: Float[Tensor, "o i 3 3"], edge: int, inputs: tuple[int, int] | None = None, *, alone: bool = False
) -> Float[Tensor, "points panels o 32"]:
    """W(w).

    Args:
        w: contiguous.
        edge: of the tiles.
        inputs: from which (a multiple of BLOCK) to which; None for all.
        alone: on the calling thread only.
    """
    o, i = w.shape[:2]
    left, right = inputs or (0, i)
    made = matrices(w, (edge + 2) ** 2, o, right - left)
    of, to = flat(w), numbers(made)

    def some(first: int, last: int) -> None:
        run(tile_kernels.spread_kernels, of, first, last, o, i, left, right, edge, *to)

    some(0, o) if alone else over(o, 1, some)
    return made


def add_slopes(
    wide: Float[Tensor, "points panels_o rows 32"],
    tiles: Float[Tensor, "points panels_i rows 32"],
    edge: int,
    slopes: Float[Tensor, "o i 3 3"],
    *,
    first: bool,
) -> None:
    """slopes += W'(Y'(g) X(x)), the gradient of the kernels for some images.

    Args:
        wide, tiles: Y'(g) of the outputs and X(x) of the inputs.
        edge: of the tiles.
        slopes: contiguous; written where these are the first images.
        first: whether they are.
    """
    (points, _, rows, _), (o, i), add = tiles.shape, slopes.shape[:2], int(not first)
    a, (b, b_step), to = numbers(wide), numbers(tiles), flat(slopes)
    if not is_large(slopes, edge):
        c = numbers(matrices(tiles, points, o, i))
        over(points, 1, lambda m, n: run(_ACROSS, *a, b, b_step, *c, m, n, rows, o, i, 0))
        over(o, 1, lambda m, n: run(_BACK, *c, m, n, o, i, 0, i, edge, to, add))
        return

    def inputs(first: int, last: int) -> None:
        for left in range(first * BLOCK, min(last * BLOCK, i), BLOCK):
            right = min(left + BLOCK, i)
            c = numbers(matrices(tiles, points, o, right - left))
            run(_ACROSS, *a, b[left * rows :], b_step, *c, 0, points, rows, o, right - left, 0)
            run(_BACK, *c, 0, o, o, i, left, right, edge, to, add)

    over(-(-i // BLOCK), 1, inputs)


_MULTIPLY, _ACROSS, _BACK = tile_products.multiply, tile_products.multiply_across, tile_kernels.spread_kernels_back
