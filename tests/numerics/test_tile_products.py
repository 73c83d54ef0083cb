"""Products of matrices that lie in panels, and kernels by tiles: against matrix products in float64."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frostglass.numerics import tile_products, tile_weights
from frostglass.numerics.compiled import RUN, kernel
from frostglass.numerics.panels import numbers
from frostglass.numerics.tile_weights import Kept, Weights, add_slopes, spread
from tile_panels import drawn, panels, unpacked

pytest.importorskip("numba")


turn = tile_products.turn


def turning(source, target):  # type: ignore[no-untyped-def]
    turn(source, np.uint64(3), target, np.uint64(5))


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


SIZES = [(1, 1, 1), (4, 32, 32), (6, 33, 15), (9, 7, 47), (5, 100, 70), (13, 64, 16)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])
def test_products_are_those_of_matrices(size: tuple[int, int, int], plain: bool) -> None:
    rows, inner, columns = size
    a, b, turned, c, across = (
        panels(2, *shape)
        for shape in ((rows, inner), (inner, columns), (columns, inner), (rows, columns), (inner, columns))
    )
    made = inspect.unwrap if plain else kernel
    multiply, multiply_across = made(tile_products.multiply), made(tile_products.multiply_across)
    assert multiply is not None
    assert multiply_across is not None

    def lie(*given: Tensor) -> list[Any]:
        return [part for m in given for part in numbers(m)]

    left, right, other, first = (unpacked(m, n) for m, n in ((a, inner), (b, columns), (turned, inner), (c, columns)))
    first = first.clone()
    multiply(*lie(a, b, c), 0, 2, rows, inner, columns, False, 0)
    assert off(unpacked(c, columns), left.double() @ right.double()) < 1e-6
    c.copy_(panels(2, rows, columns))
    multiply(*lie(a, turned, c), 0, 2, rows, inner, columns, True, 1)
    assert off(unpacked(c, columns), first + left.double() @ other.double().transpose(1, 2)) < 1e-6

    multiply_across(*lie(a, c, across), 1, 2, rows, inner, columns, 0)
    wanted = left.double().transpose(1, 2) @ unpacked(c, columns).double()
    assert off(unpacked(across, columns)[1], wanted[1]) < 1e-6
    assert torch.equal(across[0], panels(2, inner, columns)[0])  # a point that was not asked for
    multiply_across(*lie(a, c, across), 1, 2, rows, inner, columns, 1)
    assert off(unpacked(across, columns)[1], 2 * wanted[1]) < 1e-6


@pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])
def test_a_square_is_turned(plain: bool) -> None:
    source = np.arange(8 * RUN, dtype=np.float32)
    found = np.zeros(8 * RUN, np.float32)

    run = inspect.unwrap(turning) if plain else kernel(turning)
    assert run is not None
    run(source, found)
    square = source.reshape(8, RUN)[:, 3:11]
    assert np.array_equal(found.reshape(8, RUN)[:, 5:13], square.T)
    assert np.count_nonzero(found) == np.count_nonzero(square)


@pytest.mark.parametrize("edge", [2, 4])
@pytest.mark.parametrize("large", [False, True], ids=["whole", "by pieces"])
def test_weights_multiply_tiles_as_their_spread_kernels_do(
    edge: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_weights, "LARGE", 1 if large else 2**20)
    points, rows, o, i = (edge + 2) ** 2, 6, 70, 37
    (w,) = drawn((o, i, 3, 3))
    inputs, outputs = panels(points, rows, i), panels(points, rows, o)
    weights, matrix = Weights(w, edge), unpacked(spread(w, edge), i).double()
    assert (weights.whole is None) is large
    forward = unpacked(inputs, i).double() @ matrix.transpose(1, 2)
    assert off(unpacked(weights.forward(inputs), o), forward) < 1e-6
    onto = panels(points, rows, o)
    assert weights.forward(inputs, onto) is onto
    assert off(unpacked(onto, o), unpacked(outputs, o) + forward) < 1e-6
    assert off(unpacked(weights.back(outputs), i), unpacked(outputs, o).double() @ matrix) < 1e-6

    found = torch.full((o, i, 3, 3), float("nan"))
    add_slopes(outputs, inputs, edge, found, first=True)
    of_matrix = unpacked(outputs, o).double().transpose(1, 2) @ unpacked(inputs, i).double()
    exact = w.double().requires_grad_()
    linear = torch.einsum("xa,yb,oiab->xyoi", *[_G[edge]] * 2, exact).flatten(0, 1)
    (wanted,) = torch.autograd.grad(linear, exact, of_matrix)
    assert off(found, wanted) < 1e-6
    add_slopes(outputs, inputs, edge, found, first=False)
    assert off(found, 2 * wanted) < 1e-6


_G = {
    2: torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2,
    4: torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64)
    / 24,
}
"""Lavin and Gray (2016), sections 4.1 and 4.3."""


def test_kernels_of_many_channels_are_spread_by_pieces() -> None:
    assert Weights(torch.empty(128, 128, 3, 3), 4).whole is not None
    assert Weights(torch.empty(256, 256, 3, 3), 4).whole is None
    assert Weights(torch.empty(512, 512, 3, 3), 2).whole is None
    assert Kept().of(torch.empty(512, 512, 3, 3), 2).whole is not None  # for many passes


def test_weights_are_kept_for_as_long_as_they_stay_the_same() -> None:
    k, other = drawn((4, 3, 3, 3), (4, 3, 3, 3))
    kept = Kept()
    first, small = kept.of(k, 4), kept.of(k, 2)
    assert kept.of(k, 4) is first
    assert kept.of(k, 2) is small
    assert kept.of(other, 4) is not first
    k.mul_(2)
    for edge, before in ((4, first), (2, small)):
        now = kept.of(k, edge).whole
        assert now is not None
        assert before.whole is not None
        assert torch.allclose(now, 2 * before.whole)
