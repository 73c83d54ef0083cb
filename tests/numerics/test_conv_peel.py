"""A convolution's input from its weight gradient, under every norm, against gradients by autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from frostglass.core.randomness import Rng
from frostglass.numerics.conv_fit import ConvFit, forward, gradient_below, mismatch, scale_of
from frostglass.numerics.conv_layer import ConvLayer, Norm, column
from frostglass.numerics.conv_peel import CERTIFIED, PeelProblem, design, determined, peel

NORMS: tuple[Norm, ...] = ("none", "fixed", "batch", "group")


def draw(*shape: int, key: str) -> Tensor:
    return Rng.from_seed(4, key).normal(shape).double()


def a_layer(norm: Norm, stride: int = 1, kernel: int = 3, outputs: int = 24, inputs: int = 6) -> ConvLayer:
    weight = draw(outputs, inputs, kernel, kernel, key="w") / (inputs * kernel**2) ** 0.5
    ones, zeros = torch.ones(outputs).double(), torch.zeros(outputs).double()
    gamma, beta = (ones, zeros) if norm == "none" else (1 + 0.2 * draw(outputs, key="g"), 0.2 * draw(outputs, key="b"))
    bias = 0.1 * draw(outputs, key="bias") if norm == "none" else None
    pads = (kernel // 2, kernel // 2)
    return ConvLayer(weight, bias, (stride, stride), pads, (1, 1), norm, gamma, beta, zeros, ones, groups=12)


def observed(layer: ConvLayer, x: Tensor) -> tuple[ConvLayer, Tensor, Tensor, Tensor, Tensor]:
    """(layer with its statistics, outputs, gradient at them, gradient of the weight, gradient at the convolution)."""
    raw = layer.conv(x).detach()
    if layer.norm == "batch":
        var, mean = torch.var_mean(raw, (0, 2, 3), correction=0)
        layer = replace(layer, mean=mean, var=var)
    weight = layer.weight.clone().requires_grad_(True)
    z = replace(layer, weight=weight).conv(x)
    if layer.norm == "batch":  # the statistics are part of the graph, as in a client's step
        var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        xhat = (z - column(mean)) * column((var + layer.eps).rsqrt())
    else:
        xhat = layer.standardise(z)
    outputs = layer.scaled(xhat).relu()
    above = draw(*outputs.shape, key="above")
    grad_weight, dz = torch.autograd.grad((outputs * above).sum(), [weight, z])
    return layer, outputs.detach(), above, grad_weight, dz


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 5), (1, 1)])
def test_backward_and_design_agree_with_autograd(norm: Norm, stride: int, kernel: int) -> None:
    x = draw(3, 6, 8, 8, key="x").relu()
    layer, outputs, above, grad_weight, dz = observed(a_layer(norm, stride, kernel), x)
    raw = layer.conv(x)
    deviation = layer.statistics(raw)[1] if norm == "group" else None
    found = layer.backward(above * (outputs > 0), layer.standardise(raw), deviation)
    torch.testing.assert_close(found, dz)
    product = design(dz, layer, (8, 8)) @ x.permute(0, 2, 3, 1).reshape(-1, 6)
    torch.testing.assert_close(product.view(24, kernel, kernel, 6).permute(0, 3, 1, 2), grad_weight)
    torch.testing.assert_close(layer.gradient_of_weight(x, dz), grad_weight)
    direction = draw(*layer.weight.shape, key="direction")
    pull = layer.adjoint_of_weight(direction, dz, x)
    torch.testing.assert_close((pull * x).sum(), (direction * grad_weight).sum())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_input_is_exact(norm: Norm, stride: int) -> None:
    # a 5 x 5 kernel at stride 2 reaches every input often enough; under BatchNorm the iteration must find the rest
    x = draw(2, 6, 6, 6, key="x").relu()
    layer, outputs, above, grad_weight, dz = observed(a_layer(norm, stride, 3 if stride == 1 else 5, 48), x)
    guess = layer.statistics(layer.conv(x))[1].mean(0, keepdim=True).expand(2, -1) if norm == "group" else None
    found = peel(PeelProblem(layer, outputs, above, grad_weight, (6, 6), True, guess), 1e-6)
    assert found.residual < CERTIFIED
    if norm == "group":  # the scale of each image's input is not in the gradient
        ratio = (found.inputs * x).sum((1, 2, 3), keepdim=True) / x.square().sum((1, 2, 3), keepdim=True)
        x = x * ratio
    assert float((found.inputs - x).norm() / x.norm()) < 1e-4
    if norm != "group":
        assert float((found.dz - dz).norm() / dz.norm()) < 1e-4


def test_statistics_of_a_batch_norm_need_not_be_seen() -> None:
    x = draw(2, 6, 6, 6, key="x").relu()
    layer, outputs, above, grad_weight, dz = observed(a_layer("batch", outputs=48), x)
    blind = replace(layer, norm="own", mean=torch.zeros_like(layer.mean), var=torch.ones_like(layer.var))
    found = peel(PeelProblem(blind, outputs, above, grad_weight, (6, 6), True), 1e-6)
    assert found.residual < CERTIFIED
    ratio = (found.inputs * x).sum() / x.square().sum()
    assert float((found.inputs / ratio - x).norm() / x.norm()) < 1e-4
    assert float((found.dz * ratio - dz).norm() / dz.norm()) < 1e-4


def test_channels_without_gradient_do_not_disturb_unseen_statistics() -> None:
    x = draw(2, 6, 6, 6, key="x").relu()
    dead = a_layer("batch", outputs=48)
    dead = replace(dead, beta=torch.where(torch.arange(48) < 3, -100.0, dead.beta))
    layer, outputs, above, grad_weight, _ = observed(dead, x)
    assert float(grad_weight[:3].abs().max()) == 0
    found = peel(PeelProblem(replace(layer, norm="own"), outputs, above, grad_weight, (6, 6), True), 1e-6)
    assert found.residual < CERTIFIED


def test_a_first_convolution_gives_its_images_with_their_signs() -> None:
    x = draw(2, 6, 6, 6, key="x")
    layer, outputs, above, grad_weight, _ = observed(a_layer("fixed", outputs=48), x)
    found = peel(PeelProblem(layer, outputs, above, grad_weight, (6, 6), False), 1e-6)
    assert found.residual < CERTIFIED
    assert float((found.inputs - x).abs().max()) < 1e-6


def test_a_noised_gradient_is_not_certified() -> None:
    x = draw(2, 6, 6, 6, key="x").relu()
    layer, outputs, above, grad_weight, _ = observed(a_layer("fixed", outputs=48), x)
    noised = grad_weight + 1e-2 * grad_weight.square().mean().sqrt() * draw(*grad_weight.shape, key="noise")
    assert peel(PeelProblem(layer, outputs, above, noised, (6, 6), True), 1e-6).residual > 10 * CERTIFIED


def test_more_places_than_equations_are_not_determined() -> None:
    assert determined(a_layer("none", outputs=64), 9, (8, 8))
    assert not determined(a_layer("none", outputs=64), 10, (8, 8))


def test_a_stride_leaves_places_that_one_tap_alone_reaches() -> None:
    # 3 x 3 at stride 2: the 64 even places of 16 x 16 meet one tap, so 48 equations, although there are 432 for 256
    assert not determined(a_layer("none", 2, 3, outputs=48), 1, (16, 16))
    assert determined(a_layer("none", 2, 3, outputs=64), 1, (16, 16))
    assert determined(a_layer("none", 2, 5, outputs=48), 3, (16, 16))
    assert not determined(a_layer("none", 2, 1, outputs=999), 1, (16, 16))


@pytest.mark.parametrize("norm", NORMS)
def test_the_fit_is_zero_at_the_truth_and_its_gradient_is_that_of_the_loss(norm: Norm) -> None:
    x = draw(2, 3, 8, 8, key="image")
    first = a_layer("fixed", 1, 3, 6, 3)
    middle = first.scaled(first.standardise(first.conv(x))).relu()
    layer, outputs, above, grad_weight, dz = observed(a_layer(norm, 2), middle)
    active = outputs > 0
    fit = ConvFit((first, layer), outputs, active, above * active, grad_weight)
    candidate = forward(fit, x)
    scale = scale_of(fit, candidate.y, known=True)
    below = gradient_below(fit, candidate, scale, known=True)
    torch.testing.assert_close(below, dz)
    _, hinge, linear = mismatch(fit, candidate, below, scale)
    assert float(hinge) < 1e-20
    assert float(linear) < 1e-20

    def value(at: Tensor) -> Tensor:
        made = forward(fit, at)
        away = torch.where(active, made.y - outputs * scale, made.y.relu()).square().sum() / outputs.square().sum()
        left = layer.gradient_of_weight(made.inputs, below) - grad_weight
        return away / scale.square().mean() + left.square().sum() / grad_weight.square().sum()

    other = (x + 0.1 * draw(*x.shape, key="off")).requires_grad_(True)
    expected = torch.autograd.grad(value(other), other)[0]
    loss, _, _ = mismatch(fit, forward(fit, other), below, scale)
    torch.testing.assert_close(torch.autograd.grad(loss, other)[0], expected)
