"""The one client step, against torch's own optimisers and by known identities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.numerics.fedavg import drawn_order, own_order
from frostglass.numerics.local_update import in_mode, local_update, soft_cross_entropy
from frostglass.vision import networks
from victims import photo_batch


def victim() -> nn.Module:
    options = {"width": 4}
    return networks.build("small_bn_cnn", classes=10, channels=3, size=16, options=options, rng=Rng.from_seed(2))


def test_the_gradient_is_autograds_and_the_model_is_untouched() -> None:
    model, batch = victim().train(), photo_batch(16, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace = local_update(model, batch.images, batch.targets, LocalPlan())
    other = copy.deepcopy(model)
    torch.nn.functional.cross_entropy(other(batch.images), batch.targets.argmax(1)).backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(trace.gradients[name], p.grad)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, buffer in other.named_buffers():
        if name in trace.buffers:
            torch.testing.assert_close(trace.buffers[name], buffer)


PLANS = {
    "sgd": LocalPlan("delta", local_steps=2, epochs=2, lr=0.05),
    "momentum": LocalPlan("delta", local_steps=2, epochs=2, lr=0.05, momentum=0.9),
    "decay": LocalPlan("delta", local_steps=4, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": LocalPlan("delta", local_steps=4, lr=0.01, optimizer="adam"),
    "adam decay": LocalPlan("delta", local_steps=3, lr=0.01, optimizer="adam", weight_decay=0.1),
    "minibatches": LocalPlan("delta", epochs=3, lr=0.05, momentum=0.9, minibatch=2),
    "adam minibatches": LocalPlan("delta", epochs=2, lr=0.01, optimizer="adam", minibatch=2),
}


def trained_by_torch(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, plan: LocalPlan, order: Sequence[torch.Tensor]
) -> nn.Module:
    other = copy.deepcopy(model).train(plan.mode == "train")
    settings = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(other.parameters(), **settings)
        if plan.optimizer == "adam"
        else torch.optim.SGD(other.parameters(), momentum=plan.momentum, **settings)
    )
    for rows in order:
        optimizer.zero_grad()
        soft_cross_entropy(other(images[rows]), targets[rows]).backward()
        optimizer.step()
    return other


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_delta_is_what_torchs_optimisers_leave_behind(name: str, mode: str, differentiable: bool) -> None:
    """Weights and running buffers, in float64 to round-off; the attacker's simulation is the client's step."""
    plan = replace(PLANS[name], mode=mode)  # type: ignore[arg-type]
    model, batch = victim().double(), photo_batch(16, 5)
    images, targets = batch.images.double(), batch.targets.double()
    order = drawn_order(plan, 5, Rng.from_seed(4)) or own_order(plan, 5)
    trace = local_update(model, images, targets, plan, order=order, differentiable=differentiable)
    other = trained_by_torch(model, images, targets, plan, order)
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(trace.gradients[name], p.detach() - q.detach(), atol=1e-11, rtol=1e-7)
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(trace.buffers[name], buffer)


class OneLayerTwice(nn.Module):
    """Its layers have two names each, as those of a network that also lists its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3 * 16 * 16, 10)
        self.blocks = nn.ModuleList([self.inner, self.norm])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 10] logits."""
        for block in (self.inner, self.norm, *self.blocks):
            x = torch.sigmoid(block(x))
        return torch.Tensor(self.head(x.flatten(1)))


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam decay"])
def test_a_layer_with_two_names_is_trained_as_torch_does_and_left_as_it_was(name: str, differentiable: bool) -> None:
    model, plan = OneLayerTwice().double().train(), PLANS[name]
    batch, parameters, before = photo_batch(16, 3), list(model.parameters()), copy.deepcopy(model.state_dict())
    images, targets = batch.images.double(), batch.targets.double()
    trained = trained_by_torch(model, images, targets, plan, own_order(plan, 3))
    trace = local_update(model, images, targets, plan, differentiable=differentiable)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for key, weight in trained.named_parameters():
        torch.testing.assert_close(trace.gradients[key], before[key] - weight.detach(), atol=1e-11, rtol=1e-7)
    for key, buffer in trained.named_buffers():
        torch.testing.assert_close(trace.buffers[key], buffer)


def test_minibatches_leave_out_nothing_and_lie_as_the_images_do_unless_an_order_is_given() -> None:
    model, batch = victim(), photo_batch(16, 5)
    plan = LocalPlan("delta", epochs=2, lr=0.05, minibatch=2)
    same = local_update(model, batch.images, batch.targets, plan)
    told = local_update(
        model, batch.images, batch.targets, plan, order=[torch.tensor(r) for r in [[0, 1], [2, 3], [4]] * 2]
    )
    other = local_update(
        model, batch.images, batch.targets, plan, order=[torch.tensor(r) for r in [[4, 1], [2, 0], [3]] * 2]
    )
    assert plan.steps_for(5) == 6
    for name, g in same.gradients.items():
        assert torch.equal(g, told.gradients[name])
    assert any(not torch.allclose(g, other.gradients[n], rtol=1e-3) for n, g in same.gradients.items())


@pytest.mark.parametrize("plan", [PLANS["momentum"], PLANS["adam decay"], PLANS["minibatches"]])
def test_long_simulations_differentiate_alike_without_keeping_their_graph(
    plan: LocalPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = victim().double(), photo_batch(16, 4)
    found = []
    for remembered in (1000, 2):
        monkeypatch.setattr("frostglass.numerics.local_update.REMEMBERED", remembered)
        images, targets = batch.images.double().requires_grad_(True), batch.targets.double().requires_grad_(True)
        trace = local_update(model, images, targets, plan, differentiable=True)
        value = sum(g.square().sum() for g in trace.gradients.values()) + sum(s.mean.sum() for s in trace.bn.values())
        found.append((*torch.autograd.grad(value, [images, targets]), *trace.buffers.values()))
    for whole, piecewise in zip(*found, strict=True):
        torch.testing.assert_close(whole, piecewise, rtol=1e-8, atol=1e-12)


def test_a_smooth_derivative_leaves_adams_step_as_it_is_and_reaches_the_image() -> None:
    model, batch = victim().double(), photo_batch(16, 2)
    plan = LocalPlan("delta", lr=0.01, optimizer="adam")
    sizes = []
    for smooth in (0.0, 0.5):
        images = batch.images.double().requires_grad_(True)
        trace = local_update(model, images, batch.targets.double(), plan, differentiable=True, smooth=smooth)
        exact = local_update(model, batch.images.double(), batch.targets.double(), plan)
        for name, g in trace.gradients.items():
            torch.testing.assert_close(g, exact.gradients[name])
        value = sum(
            (g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in trace.gradients.values()
        )
        sizes.append(float(torch.autograd.grad(value, images)[0].norm()))
    assert all(torch.isfinite(torch.tensor(sizes)))
    assert sizes[1] > 10 * sizes[0]  # the sign of a gradient has no slope


def test_the_simulation_is_differentiable_through_several_steps() -> None:
    model, batch = victim().double(), photo_batch(16, 2)
    images = batch.images.double().requires_grad_(True)
    plan = LocalPlan(kind="delta", local_steps=3, lr=0.1)
    trace = local_update(model, images, batch.targets.double(), plan, differentiable=True)
    value = sum(g.square().sum() for g in trace.gradients.values())
    gradient = torch.autograd.grad(value, images)[0]
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def at(step: float) -> float:
        moved = (images + step * direction).detach()
        done = local_update(model, moved, batch.targets.double(), plan)
        return float(sum(g.square().sum() for g in done.gradients.values()))

    assert float((gradient * direction).sum()) == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-3)


def test_batch_statistics_are_those_of_the_layer_inputs() -> None:
    model, batch = victim().train(), photo_batch(16, 4)
    trace = local_update(model, batch.images, batch.targets, LocalPlan())
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    bn = model.get_submodule(first)
    kept: list[torch.Tensor] = []
    handle = bn.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        copy.deepcopy(model)(batch.images)
        model.eval()(batch.images)
    handle.remove()
    x = kept[-1]
    torch.testing.assert_close(trace.bn[first].mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(trace.bn[first].var, x.var((0, 2, 3), correction=0))
    assert trace.bn[first].count == x.numel() // x.shape[1]


def test_mode_and_hooks_do_not_outlive_a_call() -> None:
    model, batch = victim().eval(), photo_batch(16, 2)
    local_update(model, batch.images, batch.targets, LocalPlan(mode="train"))
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="inside"), in_mode(model, "train"):
        raise RuntimeError("inside")
    assert not any(m.training for m in model.modules())


def test_rows_of_less_mass_give_the_logit_gradient_m_p_minus_y() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.3, 0.2, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0.25, 0.25, 0]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(soft_cross_entropy(logits, y), logits)
    expected = (y.sum(1, keepdim=True) * torch.softmax(logits, 1) - y) / 3
    torch.testing.assert_close(gradient, expected.detach())
