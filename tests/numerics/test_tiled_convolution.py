"""Convolutions by tiles: against autograd in float64, for every derivative that they have."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frostglass.numerics import distance, tile_kernels, tile_weights
from frostglass.numerics import tiled_convolution as tiles
from frostglass.numerics.compiled import kernel
from frostglass.numerics.panels import flat, matrices, numbers, run
from frostglass.numerics.second_order import first_order_layers, second_order_layers
from frostglass.numerics.tile_weights import Kept, Weights, add_slopes, spread
from tile_panels import drawn, panels

F = torch.nn.functional
CLOSE = 1e-5
"""Of the result's size: float32 by tiles is within 3e-6 of float64 here, where its own sums are within 1e-6."""


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


CASES = [
    # images, inputs, outputs, height, width, pad: whole tiles, cut ones, fewer channels than a block, and more
    (2, 32, 32, 8, 8, 1),
    (3, 5, 40, 7, 9, 1),
    (2, 33, 3, 6, 6, 0),
    (1, 70, 65, 3, 11, 1),
    (2, 1, 1, 3, 3, 0),
    (5, 16, 32, 33, 32, 1),
]
LARGER = tiles.Tiling(1, 4)
edges = pytest.mark.parametrize("edge", [2, 4])


@edges
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
def test_results_and_both_derivatives_are_those_of_a_convolution(case: tuple[int, ...], layout: Any, edge: int) -> None:
    n, i, o, h, w, pad = case
    how = tiles.Tiling(pad, edge)
    x, k, a, b = drawn((n, i, h, w), (o, i, 3, 3), (n, i, h, w), (o, i, 3, 3))
    x, a = (t.contiguous(memory_format=layout) for t in (x, a))
    y = F.conv2d(x.double(), k.double(), padding=pad)
    (g,) = drawn(tuple(y.shape))
    weights = Weights(k, edge)

    exact = [t.double().requires_grad_() for t in (g, x, k)]
    of_x, of_w = torch.autograd.grad(F.conv2d(exact[1], exact[2], padding=pad), exact[1:], exact[0], create_graph=True)
    found_x, found_w = tiles.slopes(g, x, weights, how, True)
    assert off(tiles.convolved(x, weights, how), y) < CLOSE
    assert found_x is not None
    assert found_w is not None
    assert off(found_x, of_x) < CLOSE
    assert off(found_w, of_w) < CLOSE

    for to_x, to_w in ((a, b), (None, b), (a, None)):
        sides = [(s, t) for s, t in ((of_x, to_x), (of_w, to_w)) if t is not None]
        total = torch.stack([(s * t.double()).sum() for s, t in sides]).sum()
        again = torch.autograd.grad(total, exact[:2], retain_graph=True, allow_unused=True)
        for one, other in zip(tiles.second_slopes(g, x, weights, to_x, to_w, how), again, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert off(one, other) < CLOSE


def test_only_what_is_asked_for_is_computed() -> None:
    x, k, g = drawn((2, 32, 8, 8), (32, 32, 3, 3), (2, 32, 8, 8))
    weights = Weights(k, 4)
    assert tiles.slopes(g, x, weights, LARGER, False)[1] is None
    assert tiles.slopes(g, x, None, LARGER, True)[0] is None
    assert tiles.second_slopes(g, x, weights, None, None, LARGER) == (None, None)


@settings(max_examples=40)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 40),
    h=st.integers(3, 10),
    w=st.integers(3, 10),
    pad=st.integers(0, 1),
    edge=st.sampled_from([2, 4]),
)
def test_each_map_and_its_transpose_agree(n: int, c: int, h: int, w: int, pad: int, edge: int) -> None:
    """<M x, y> = <x, M' y>, which is what makes them derivatives of each other."""
    how = tiles.Tiling(pad, edge)
    size = tiles._size(torch.Size((n, c, h, w)), how)
    part = (0, n)
    (x,), wide = drawn((n, c, h, w)), panels(how.points, size.places, c)
    back = torch.zeros(n, h, w, c)
    tiles._cut_back(wide, size, part, back)
    same(tiles._cut(x, size, part), wide, x, back.permute(0, 3, 1, 2))

    (y,) = drawn((n, c, size.out_height, size.out_width))
    joined = torch.empty(n, size.out_height, size.out_width, c)
    tiles._join(wide, size, part, joined)
    same(joined.permute(0, 3, 1, 2), y, wide, tiles._join_back(y, size, part))

    (k,), made = drawn((h, c, 3, 3)), panels(how.points, h, c)
    back = torch.empty(h, c, 3, 3)
    run(tile_kernels.spread_kernels_back, *numbers(made), 0, h, h, c, 0, c, edge, flat(back), 0)
    same(spread(k, edge), made, k, back)


def same(mx: Tensor, y: Tensor, x: Tensor, my: Tensor) -> None:
    left, right = ((s.double() * t.double()).sum() for s, t in ((mx, y), (x, my)))
    assert float((left - right).abs()) <= CLOSE * float(mx.double().norm() * y.double().norm())


@edges
def test_groups_of_images_give_what_all_at_once_give(edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, k, g, b = drawn((5, 32, 9, 8), (32, 32, 3, 3), (5, 32, 9, 8), (32, 32, 3, 3))
    how, weights = tiles.Tiling(1, edge), Weights(k, edge)

    def everything() -> list[Tensor]:
        found = [tiles.convolved(x, weights, how), *tiles.slopes(g, x, weights, how, True)]
        return [t for t in [*found, *tiles.second_slopes(g, x, weights, x, b, how)] if t is not None]

    whole = everything()
    monkeypatch.setattr(tiles._Size, "groups", lambda self, *_: [(n, n + 1) for n in range(self.images)])
    for one, other in zip(everything(), whole, strict=True):
        assert off(one, other) < CLOSE


@pytest.mark.parametrize(
    ("images", "channels", "size", "groups"), [(8, 64, 32, 3), (2, 64, 32, 1), (3, 32, 256, 3), (64, 256, 8, 1)]
)
def test_groups_are_about_as_large_as_a_cache_and_no_smaller_than_kernels(
    images: int, channels: int, size: int, groups: int
) -> None:
    parts = tiles._size(torch.Size((images, channels, size, size)), LARGER).groups(channels, channels)
    assert len(parts) == groups
    assert [n for first, last in parts for n in range(first, last)] == list(range(images))


@edges
@pytest.mark.parametrize("large", [False, True], ids=["whole", "by pieces"])
def test_several_threads_give_the_same_bits(edge: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_weights, "LARGE", 1 if large else 2**20)
    x, k, g = drawn((5, 65, 9, 8), (66, 65, 3, 3), (5, 66, 9, 8))
    size = tiles._size(x.shape, tiles.Tiling(1, edge))

    def everything() -> list[Tensor]:
        weights, to_w = Weights(k, edge), torch.empty(66, 65, 3, 3)
        cut, wide = tiles._cut(x, size, (0, 5)), tiles._join_back(g, size, (0, 5))
        add_slopes(wide, cut, edge, to_w, first=True)
        return [cut, wide, to_w, weights.forward(cut), weights.back(wide), spread(k, edge)]

    one = everything()
    torch.set_num_threads(3)
    for a, b in zip(everything(), one, strict=True):
        assert torch.equal(a, b)


def test_what_fills_up_a_panel_is_no_part_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, k, g, b = drawn((2, 33, 5, 5), (34, 33, 3, 3), (2, 34, 5, 5), (34, 33, 3, 3))

    def everything(fill: float) -> list[Tensor]:
        def filled(like: Tensor, points: int, rows: int, columns: int) -> Tensor:
            made = matrices(like, points, rows, columns)
            made[:, -1, :, columns % 32 :] = fill
            return made

        for module in (tiles, tile_weights):
            monkeypatch.setattr(module, "matrices", filled)
        weights = Weights(k, 4)
        found = [tiles.convolved(x, weights, LARGER), *tiles.slopes(g, x, weights, LARGER, True)]
        found += tiles.second_slopes(g, x, weights, x, b, LARGER)
        return [t for t in found if t is not None]

    for one, other in zip(everything(float("nan")), everything(0), strict=True):
        assert torch.equal(one, other)


@edges
@pytest.mark.parametrize("channels", [3, 32], ids=["few channels", "a whole block"])
def test_compiled_kernels_do_what_the_plain_functions_do(edge: int, channels: int) -> None:
    how = tiles.Tiling(1, edge)
    (x,) = drawn((1, channels, 3, 3))
    size = tiles._size(x.shape, how)
    grid = size.height, size.width, channels, 1, edge, size.down, size.across
    flat = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy()).reshape(-1)
    found, back = np.zeros(how.points * size.places * 32, np.float32), np.zeros_like(flat)
    cut, cut_back = (inspect.unwrap(f) for f in (tile_kernels.cut_tiles, tile_kernels.cut_tiles_back))
    with np.errstate(over="ignore"):
        cut(flat, 0, size.places, *grid, found, size.places * 32, size.places)
        cut_back(found, size.places * 32, size.places, 0, size.places, *grid, back)
    shaped = torch.from_numpy(found).view(how.points, 1, size.places, 32)
    assert torch.allclose(shaped, tiles._cut(x, size, (0, 1)), rtol=1e-5, atol=1e-5)
    compiled = torch.zeros(1, 3, 3, channels)
    tiles._cut_back(shaped, size, (0, 1), compiled)
    assert np.allclose(back, compiled.numpy().reshape(-1), rtol=1e-4, atol=1e-4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 40, 3, 1, 1), nn.BatchNorm2d(40), nn.ReLU()]
    return nn.Sequential(
        *body, nn.Conv2d(40, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)
    )


def matching(model: nn.Module, x: Tensor, goal: list[Tensor]) -> Tensor:
    loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
    return distance.cosine(torch.autograd.grad(loss, list(model.parameters()), create_graph=True), goal)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which convolutions went by tiles."""
    made: list[str] = []
    for name in ("convolved", "slopes", "second_slopes"):
        real = getattr(tiles, name)

        def told(*args: Any, _real: Any = real, _name: str = name, **kw: Any) -> Any:
            made.append(_name)
            return _real(*args, **kw)

        monkeypatch.setattr(tiles, name, told)
    return made


def test_a_matching_loss_has_the_gradient_that_float64_has(calls: list[str]) -> None:
    model = network().eval()
    (x,) = drawn((2, 3, 16, 16))
    goal = [torch.randn_like(p) for p in model.parameters()]
    before = [p.clone() for p in model.parameters()]
    with second_order_layers():
        z = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(matching(model, z, goal), z)
    assert calls.count("convolved") == 2  # not the first, which has three channels
    assert calls.count("second_slopes") == 2
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    exact = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(matching(model.double(), exact, [g.double() for g in goal]), exact)
    assert off(found, wanted) < 1e-4
    assert float(F.cosine_similarity(found.double().flatten(), wanted.flatten(), 0)) > 1 - 1e-8


def test_one_backward_pass_has_the_gradients_of_float64(calls: list[str]) -> None:
    model = network().eval()
    (x,) = drawn((2, 3, 16, 16))
    with first_order_layers(Kept()):
        z = x.clone().requires_grad_()
        loss = F.cross_entropy(model(z), torch.tensor([0, 1]))
    found = torch.autograd.grad(loss, [*model.parameters(), z])
    assert calls.count("slopes") == 2
    model.double()
    exact = x.double().requires_grad_()
    loss = F.cross_entropy(model(exact), torch.tensor([0, 1]))
    for one, other in zip(found, torch.autograd.grad(loss, [*model.parameters(), exact]), strict=True):
        assert off(one, other) < 1e-4 or float(other.norm()) < 1e-6


X, W = (4, 32, 16, 16), (32, 32, 3, 3)
FORM = (1, 1), (1, 1), (1, 1), 1


@pytest.mark.parametrize(
    ("x", "w", "form"),
    [
        (X, (32, 32, 5, 5), FORM),
        (X, W, ((2, 2), *FORM[1:])),
        (X, W, ((1, 1), (2, 2), *FORM[2:])),
        (X, W, (*FORM[:2], (2, 2), 1)),
        ((4, 64, 16, 16), W, (*FORM[:3], 2)),
        ((4, 3, 16, 16), (32, 3, 3, 3), FORM),
        ((1, 32, 6, 4), W, FORM),
    ],
    ids=["5 x 5", "stride", "padding", "dilation", "groups", "three channels", "few places"],
)
def test_other_convolutions_are_left_to_torch(x: Any, w: Any, form: Any) -> None:
    assert tiles.tiling(torch.empty(X), torch.empty(W), *FORM) == LARGER
    assert tiles.tiling(torch.empty(x), torch.empty(w), *form) is None


@pytest.mark.parametrize(
    ("channels", "images", "edge"),
    [
        (256, 4, 2),
        (256, 8, 2),
        (256, 16, 4),
        (256, 2, None),
        (64, 8, 4),
        (64, 4, None),
        (512, 8, 2),
        (512, 24, 4),
        (32, 16, None),
        (32, 32, 4),
    ],
)
def test_small_images_take_small_tiles_where_these_gain(channels: int, images: int, edge: int | None) -> None:
    x, w = torch.empty(images, channels, 4, 4), torch.empty(channels, channels, 3, 3)
    assert tiles.tiling(x, w, *FORM) == (edge and tiles.Tiling(1, edge))


def test_other_numbers_and_devices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.empty(X), torch.empty(W)
    assert tiles.tiling(x, w, *FORM)
    assert not tiles.tiling(x.double(), w.double(), *FORM)
    assert not tiles.tiling(x.to("meta"), w.to("meta"), *FORM)
    monkeypatch.setattr(tiles, "kernel", lambda _: None)  # numba is not installed
    assert not tiles.tiling(x, w, *FORM)


@pytest.mark.parametrize("channels", [W[1] - 1, W[1] + 1, 2 * W[1]])
def test_kernels_of_other_channels_than_the_images_are_refused_as_by_torch(channels: int) -> None:
    x, w = torch.zeros(X[0], channels, *X[2:]), nn.Parameter(torch.zeros(W))
    with second_order_layers(), pytest.raises(RuntimeError, match="to have"):
        F.conv2d(x, w, padding=1)


def test_weights_that_are_results_are_left_to_torch(calls: list[str]) -> None:
    x, w = drawn(X, W)
    x, w = x.requires_grad_(), nn.Parameter(w)
    with second_order_layers():
        F.conv2d(x, w * 2, padding=1)
        assert calls == []
        F.conv2d(x, w, padding=1)
    assert calls == ["convolved"]
    assert kernel(tile_kernels.cut_tiles) is not None


def test_another_default_dtype_changes_nothing() -> None:
    x, k, g = drawn((2, 32, 8, 8), (32, 32, 3, 3), (2, 32, 8, 8))
    wanted = tiles.slopes(g, x, Weights(k, 4), LARGER, True)
    torch.set_default_dtype(torch.float64)
    try:
        found = tiles.slopes(g, x, Weights(k, 4), LARGER, True)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


class Flattening(nn.Module):
    """Flattens by `view`, as much code does; that fails on images that lie as channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(32 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.view(x.size(0), 3, 16, 16))
        return self.head(y.view(y.size(0), -1))  # type: ignore[no-any-return]


def test_networks_that_flatten_by_view_work_as_ever(calls: list[str]) -> None:
    torch.manual_seed(0)
    model = Flattening()
    (x,) = drawn((2, 3, 16, 16))
    goal = [torch.randn_like(p) for p in model.parameters()]
    with second_order_layers():
        z = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(matching(model, z, goal), z)
    with first_order_layers(Kept()):
        again = x.clone().requires_grad_()
        once = F.cross_entropy(model(again), torch.tensor([0, 1]))
    assert calls.count("convolved") == 2
    model.double()
    exact = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(matching(model, exact, [g.double() for g in goal]), exact)
    assert off(found, wanted) < 1e-4
    same = F.cross_entropy(model(exact), torch.tensor([0, 1]))
    assert float(once.detach()) == pytest.approx(float(same.detach()), rel=1e-5)
    with second_order_layers(), pytest.raises(RuntimeError, match="invalid"):
        x.view(5, 7)


def test_kernels_compile_after_others_were_compiled(tmp_path: Path) -> None:
    """What they call is told to the compiler when they are compiled, not when the first kernel of the process is."""
    program = """
import numpy as np
from frostglass.numerics.compiled import kernel
from frostglass.numerics.fused_mixing import mix_labels
labels, rows, out = np.zeros(1, np.int64), np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32)
kernel(mix_labels)(labels, 1, rows, out + 1, out)
import torch
from frostglass.numerics.tile_weights import Weights
print(tuple(Weights(torch.ones(2, 3, 3, 3), 4).whole.shape), out.item())
"""
    nothing_compiled = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=nothing_compiled
    )
    assert done.stdout == "(36, 1, 2, 32) 1.0\n", done.stderr
