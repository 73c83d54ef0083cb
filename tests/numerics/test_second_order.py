"""Derivatives written by hand, against autograd's own and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from frostglass.core.randomness import Rng
from frostglass.numerics import distance
from frostglass.numerics.many_clients import many_clients
from frostglass.numerics.second_order import first_order_layers, second_order_layers
from frostglass.numerics.second_order_norm import channel_statistics
from frostglass.numerics.tile_weights import Kept
from frostglass.vision import networks

F = torch.nn.functional


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=made, dtype=dtype) for s in shapes]


def plain_cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    x, y = distance.flatten(a), distance.flatten(b)
    return 1 - x.dot(y) / (x.norm() * y.norm())


def test_cosine_has_the_derivatives_of_the_plain_formula() -> None:
    a = [t.requires_grad_() for t in drawn((3, 2), (4,))]
    b = [t.requires_grad_() for t in drawn((3, 2), (4,), (1,))[:2]]
    b = [(t + 1).detach().requires_grad_() for t in b]

    def both(*tensors: Tensor) -> Tensor:
        return distance.cosine(tensors[:2], tensors[2:])

    assert torch.autograd.gradcheck(both, (*a, *b))
    assert torch.autograd.gradgradcheck(both, (*a, *b))
    assert float(both(*a, *b).detach()) == pytest.approx(float(plain_cosine(a, b).detach()), rel=1e-12)
    with torch.no_grad():
        assert float(both(*a, *b)) == pytest.approx(float(plain_cosine(a, b)), rel=1e-12)


def test_cosine_in_single_precision_agrees_with_the_plain_formula_and_repeats() -> None:
    shapes = [(64, 32, 3, 3), (64,), (10, 64)]
    goal = drawn(*shapes, dtype=torch.float32)
    near = [0.5 * g + g.flip(0) for g in goal]

    def slopes(measure: Any) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.clone().requires_grad_() for x in near]
        value = measure(leaves, goal)
        return value.detach(), list(torch.autograd.grad(value, leaves))

    value, found = slopes(distance.cosine)
    again, repeated = slopes(distance.cosine)
    plain, wanted = slopes(plain_cosine)
    assert float(value) == pytest.approx(float(plain), abs=1e-6)
    assert torch.equal(value, again)
    for x, y, z in zip(found, repeated, wanted, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-6 * float(z.abs().max()))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_cosine_of_gradients_of_any_size(size: float) -> None:
    """A confident network's gradients are that small: the square of the product of their norms is no float32."""
    made = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 7, generator=made), torch.randn(5, 7, generator=made)
    assert float(distance.cosine([size * a], [size * b])) == pytest.approx(float(distance.cosine([a], [b])), abs=1e-6)
    assert float(distance.cosine([size * a], [size * a])) == pytest.approx(0, abs=1e-6)
    x = (size * a).requires_grad_(True)
    (slope,) = torch.autograd.grad(distance.cosine([x], [size * b]), x)
    y = a.clone().requires_grad_(True)
    (wanted,) = torch.autograd.grad(distance.cosine([y], [b]), y)
    torch.testing.assert_close(slope * size, wanted, rtol=1e-4, atol=1e-6)


def test_cosine_to_nothing_is_one_and_flat() -> None:
    a = torch.zeros(3, requires_grad=True)
    value = distance.cosine([a], [torch.ones(3)])
    assert float(value.detach()) == 1
    (slope,) = torch.autograd.grad(value, a)
    assert bool(slope.isfinite().all())
    assert float(distance.cosine_distance(torch.zeros(3), torch.zeros(3))) == 1


def test_layer_norms_have_the_derivatives_of_the_plain_formula() -> None:
    a = [t.requires_grad_() for t in drawn((3, 2), (4,))]
    b = [(t.detach().flip(0) + 1).requires_grad_() for t in a]

    def both(*tensors: Tensor) -> Tensor:
        return distance.layer_norms(tensors[:2], tensors[2:])

    assert torch.autograd.gradcheck(both, (*a, *b))
    assert torch.autograd.gradgradcheck(both, (*a, *b))
    plain = torch.stack([(x - y).norm() for x, y in zip(a, b, strict=True)]).sum()
    assert float(both(*a, *b).detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    for wanted, found in ((a, torch.autograd.grad(plain, a, retain_graph=True)), (b, torch.autograd.grad(plain, b))):
        for x, y in zip(torch.autograd.grad(both(*a, *b), wanted), found, strict=True):
            torch.testing.assert_close(x, y)


def test_layer_norms_give_their_slopes_again_and_leave_their_arguments_alone() -> None:
    a, b = (t.requires_grad_() for t in drawn((3, 2), (3, 2)))
    before = a.detach().clone(), b.detach().clone()
    total = 3 * distance.layer_norms([a], [b])
    one = torch.autograd.grad(total, (a, b), retain_graph=True)
    torch.testing.assert_close(one[0], 3 * (before[0] - before[1]) / (before[0] - before[1]).norm())
    assert torch.equal(one[1], -one[0])
    for again, first in zip(torch.autograd.grad(total, (a, b)), one, strict=True):
        assert torch.equal(again, first)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_layer_norms_are_flat_where_a_layer_is_matched() -> None:
    """Both slopes are 0 there: an attack that starts at the truth stays, instead of at NaN."""
    a = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(distance.layer_norms([a], [torch.ones(3)]), a, create_graph=True)
    (again,) = torch.autograd.grad(slope.sum(), a)
    assert not slope.detach().any()
    assert not again.any()


FORMS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": (0, 2), "dilation": (1, 2)},
    {"groups": 2, "padding": 1, "stride": (1, 2)},
    {"padding": "same"},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_is_differentiated_twice_to_inputs_and_to_weights_that_are_results(
    form: dict[str, Any], bias: bool
) -> None:
    groups = form.get("groups", 1)
    x, seed, offset, goal = drawn((2, 4, 6, 7), (6, 4 // groups, 3, 3), (6,), (6, 4 // groups, 3, 3))
    leaf = seed.clone().requires_grad_()

    def slope_of(x: Tensor, seed: Tensor) -> Tensor:
        """A client of two steps: the second one's weights are results of the first, and depend on x."""
        w = leaf
        for _ in range(2):
            loss = F.conv2d(x, w, offset if bias else None, **form).tanh().square().sum()
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            w = w - 0.1 * g + 0 * seed
        return (w - goal).square().sum()

    x.requires_grad_()
    (wanted,) = torch.autograd.grad(slope_of(x, seed), x)
    with second_order_layers():
        value = slope_of(x, seed)
    (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def statistics_of(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return drawn(shape[1:2])[0], drawn(shape[1:2])[0].abs() + 0.5


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (7, 3), (5, 3, 4)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("results", [True, False])
def test_a_batch_norm_is_differentiated_twice_to_inputs_and_to_weights_that_are_results(
    shape: tuple[int, ...], training: bool, results: bool
) -> None:
    x, along, w0, b0 = drawn(shape, shape, shape[1:2], shape[1:2])
    x.requires_grad_()

    def slope_of() -> tuple[Tensor, Tensor, Tensor]:
        mean, var = statistics_of(shape)
        w, b = w0.clone().requires_grad_(), b0.clone().requires_grad_()
        weight, bias = (w + x.mean(), b + x.square().mean()) if results else (w, b)
        y = F.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3)
        loss = (y.tanh() * along).square().sum()
        of_x, of_w, of_b = torch.autograd.grad(loss, [x, weight, bias], create_graph=True)
        value = (of_x * along).square().sum() + of_w.square().sum() + (of_b * w0).sin().sum()
        return torch.autograd.grad(value, x)[0], mean, var

    wanted = slope_of()
    with second_order_layers():
        found = slope_of()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_differentiated_once_is_pytorchs(training: bool) -> None:
    shape = (4, 3, 5, 6)
    leaves = [t.requires_grad_() for t in drawn(shape, (3,), (3,))]

    def run() -> list[Tensor]:
        x, w, b = leaves
        mean, var = statistics_of(shape)
        y = F.batch_norm(x, mean, var, w, b, training)
        return [y.detach(), mean, var, *torch.autograd.grad(y.tanh().sum(), leaves)]

    wanted = run()
    with first_order_layers(Kept()):
        assert "_Norm" in type(F.batch_norm(leaves[0], *statistics_of(shape), *leaves[1:], training).grad_fn).__name__
        found = run()
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lacks", ["weights", "running", "values", "bits"])
def test_what_the_batch_norm_does_not_cover_is_left_to_pytorch(lacks: str) -> None:
    x = drawn((1, 3) if lacks == "values" else (4, 3))[0]
    mean, var = (None, None) if lacks == "running" else statistics_of((1, 3))
    w, b = (None, None) if lacks == "weights" else drawn((3,), (3,))
    if lacks == "bits":
        x, mean, var, w, b = (t.bfloat16() for t in (x, *statistics_of((1, 3)), *drawn((3,), (3,))))
    with second_order_layers():
        if lacks == "values":
            with pytest.raises(ValueError, match="more than 1 value"):
                F.batch_norm(x, mean, var, w, b, True)
            return
        found = F.batch_norm(x, mean, var, w, b, True)
    assert torch.equal(found, F.batch_norm(x, mean, var, w, b, True))


def test_statistics_are_those_of_the_formula_with_both_derivatives() -> None:
    x = (3 + drawn((4, 2, 3, 3))[0]).requires_grad_()
    for ours, theirs in zip(channel_statistics(x), (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(channel_statistics, (x,))
    assert torch.autograd.gradgradcheck(channel_statistics, (x,))


def test_statistics_far_from_zero_keep_their_variance_in_single_precision() -> None:
    x = drawn((8, 2, 16, 16), dtype=torch.float32)[0] + 1000
    torch.testing.assert_close(channel_statistics(x)[1], x.double().var((0, 2, 3)).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_whole_network_gives_the_same_second_derivative_and_leaves_no_mode_behind(mode: str) -> None:
    model = networks.build("resnet20", classes=10, channels=3, size=16, rng=Rng.from_seed(0)).double()
    model.train(mode == "train")
    x = drawn((2, 3, 16, 16))[0].sigmoid().requires_grad_()
    weights = list(model.parameters())

    def squared() -> Tensor:
        loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
        return sum(g.square().sum() for g in torch.autograd.grad(loss, weights, create_graph=True))  # type: ignore[return-value]

    (wanted,) = torch.autograd.grad(squared(), x)
    with second_order_layers():
        value = squared()
    (found,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-11 * float(wanted.abs().max()))
    assert "_Convolution" not in type(F.conv2d(x, weights[0], padding=1).grad_fn).__name__


def test_without_a_graph_convolutions_are_pytorchs_own() -> None:
    x, w = drawn((1, 2, 5, 5), (3, 2, 3, 3))
    with torch.no_grad(), second_order_layers():
        assert torch.equal(F.conv2d(x, w), torch.conv2d(x, w))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layers", [second_order_layers, lambda: many_clients((), 1)])
def test_a_hard_sigmoid_is_differentiated_twice(layers: Any, inplace: bool) -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64).add(0.1).requires_grad_(True)
    w = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    with layers():
        y = torch.nn.functional.hardsigmoid(x * w, inplace=inplace)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((slope * w).sum(), x)
    torch.testing.assert_close(y, torch.nn.functional.hardsigmoid(x * w))
    inside = ((x * w).abs() < 3).double()
    torch.testing.assert_close(slope, 2 * y * w / 6 * inside)
    torch.testing.assert_close(second, 2 * w.pow(3) / 36 * inside)
