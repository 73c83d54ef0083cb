"""The one client step, against torch's own optimisers and by known identities."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from victims import photo_batch

from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.numerics.local_update import in_mode, local_update, soft_cross_entropy
from frostglass.vision import networks


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


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.01)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_delta_is_what_torchs_sgd_leaves_behind(momentum: float, decay: float, mode: str) -> None:
    model, batch = victim(), photo_batch(16, 3)
    plan = LocalPlan(kind="delta", mode=mode, local_steps=2, epochs=2, lr=0.05, momentum=momentum, weight_decay=decay)  # type: ignore[arg-type]
    trace = local_update(model, batch.images, batch.targets, plan)
    other = copy.deepcopy(model).train(mode == "train")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=momentum, weight_decay=decay)
    for _ in range(4):
        optimizer.zero_grad()
        soft_cross_entropy(other(batch.images), batch.targets).backward()
        optimizer.step()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(trace.gradients[name], p.detach() - q.detach(), atol=1e-6, rtol=1e-4)


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
