"""Exact recovery from one ReLU layer's gradient: what is proved, and what must never be."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from frostglass.numerics.label_solve import labels_from
from frostglass.numerics.spear import SpearResult, SpearState, assemble, prepare, search


def mlp(inputs: int, hidden: int = 192, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, 10))
    return net.to(dtype)


def batch(
    count: int, size: int = 300, seed: int = 0, common: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Correlated images: a shared one plus smooth noise of their own."""
    g = torch.Generator().manual_seed(seed)
    own = torch.randn(count, size, generator=g, dtype=torch.float64).cumsum(1) / size**0.5
    shared = torch.randn(1, size, generator=g, dtype=torch.float64).cumsum(1) / size**0.5
    return (own + common * shared).to(dtype)


def gradient(net: nn.Sequential, x: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    y = torch.randint(0, 10, (len(x),), generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))


def attack(
    net: nn.Sequential, grad: tuple[Tensor, ...], count: int | None, calls: int = 6, seed: int = 0
) -> tuple[SpearResult, SpearState]:
    problem = prepare(net[0].weight.detach(), net[0].bias.detach(), grad[0], grad[1], count)
    g, state = torch.Generator().manual_seed(seed), None
    for _ in range(calls):
        state = search(problem, state, g, 48)
        result = assemble(problem, state)
        if result.found == problem.size:
            break
    assert state is not None
    return result, state


def error(result: SpearResult, x: Tensor) -> Tensor:
    """Relative distance of every private image to the nearest proved input."""
    rows = result.inputs[result.proved]
    return torch.cdist(x.double(), rows).amin(1) / x.double().norm(dim=1)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_recovers_the_batch_without_knowing_its_size(count: int, dtype: torch.dtype, limit: float) -> None:
    net, x = mlp(300, dtype=dtype), batch(count, dtype=dtype)
    result, _ = attack(net, gradient(net, x), None)
    assert result.found == count
    assert result.missing == 0
    assert float(error(result, x).max()) < limit


def test_recovers_a_larger_batch_and_its_pre_gradient() -> None:
    net, x = mlp(300, hidden=384), batch(16)
    grad = gradient(net, x)
    result, _ = attack(net, grad, 16)
    assert result.found == 16
    assert float(error(result, x).max()) < 1e-4
    rebuilt = result.pre_gradient @ result.inputs
    assert torch.allclose(rebuilt.float(), grad[0], rtol=1e-3, atol=1e-5 * float(grad[0].abs().max()))
    assert torch.allclose(result.pre_gradient.sum(1).float(), grad[1], atol=1e-4 * float(grad[1].abs().max()))


def test_recovers_images_of_a_trained_network() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.from_numpy(t) for t in datasets.load_digits(return_X_y=True))
    x = x.float() / 8 - 1
    net = mlp(64, hidden=256)
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for i in range(60):
        pick = torch.randint(0, 1000, (128,), generator=torch.Generator().manual_seed(i))
        optimiser.zero_grad()
        F.cross_entropy(net(x[pick]), y[pick]).backward()
        optimiser.step()
    images = x[1200:1204]
    result, _ = attack(net, gradient(net, images), 4)
    assert result.found == 4
    assert float(error(result, images).max()) < 1e-3


def test_photographs() -> None:
    data = pytest.importorskip("skimage.data")
    photos = [torch.from_numpy(p).float() for p in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())]
    x = torch.stack([F.interpolate(p.permute(2, 0, 1)[None], (64, 64), mode="area")[0] for p in photos])
    x = ((x / 255 - 0.45) / 0.25).flatten(1)
    net = mlp(x.shape[1], hidden=256)
    result, _ = attack(net, gradient(net, x), 4)
    assert result.found == 4
    assert float((torch.cdist(x.double(), result.inputs).amin(1).square() / x.shape[1]).max()) < 1e-9  # over 90 dB


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 10), hidden=st.sampled_from([24, 48, 96]))
def test_what_is_proved_is_true(seed: int, count: int, hidden: int) -> None:
    """Few units and strongly correlated images give many spurious directions: no proved row may be one of them."""
    net, x = mlp(60, hidden=hidden, seed=seed), batch(count, 60, seed=seed, common=6.0)
    result, _ = attack(net, gradient(net, x), count, calls=2, seed=seed)
    assert result.found == int(result.proved.sum())
    assert bool(torch.isfinite(result.inputs).all())
    for row in result.inputs[result.proved]:
        assert float((x.double() - row).norm(dim=1).min() / row.norm()) < 1e-2


def test_another_model_is_never_proved() -> None:
    net, other, x = mlp(300), mlp(300, seed=1), batch(6)
    grad = gradient(net, x)
    result, _ = attack(other, grad, 6)
    assert result.found == 0
    assert not bool(result.proved.any())


def test_a_sum_of_two_layers_gradients_is_not_proved() -> None:
    """FedAvg over two steps or two models: each column of dL/dz mixes two patterns."""
    net, other = mlp(300), mlp(300, seed=1)
    grad = tuple(a + b for a, b in zip(gradient(net, batch(4)), gradient(other, batch(4, seed=1)), strict=True))
    result, _ = attack(net, grad, None, calls=3)
    assert result.found == 0


def test_same_seed_same_result_and_state_is_tensors() -> None:
    net, x = mlp(300), batch(6)
    grad = gradient(net, x)
    first, second = attack(net, grad, 6)[1], attack(net, grad, 6)[1]
    for field in fields(SpearState):
        value = getattr(first, field.name)
        assert isinstance(value, Tensor)
        assert torch.equal(value, getattr(second, field.name))


def test_a_saved_state_continues_as_if_never_stopped() -> None:
    net, x = mlp(300), batch(9)
    grad = gradient(net, x)
    problem = prepare(net[0].weight.detach(), net[0].bias.detach(), grad[0], grad[1], 9)
    g = torch.Generator().manual_seed(0)
    half = search(problem, None, g, 8)
    copy = SpearState(**{f.name: getattr(half, f.name).clone() for f in fields(SpearState)})
    resumed = torch.Generator()
    resumed.set_state(g.get_state())
    straight, again = search(problem, half, g, 8), search(problem, copy, resumed, 8)
    assert torch.equal(straight.directions, again.directions)
    assert int(again.calls) == 2
    assert int(again.samples) == 16


def test_order_of_the_batch_does_not_matter() -> None:
    net, x = mlp(300), batch(6)
    y = torch.arange(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for images, labels in ((x, y), (x[order], y[order])):
        grad = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()))
        result, _ = attack(net, grad, 6)
        assert float(error(result, x).max()) < 1e-4


def test_repeated_images_are_reported_as_missing() -> None:
    net, x = mlp(300), batch(5)
    doubled = torch.cat([x, x[1:3]])
    result, _ = attack(net, gradient(net, doubled), 7)
    assert result.missing == 2
    assert result.inputs.shape == (5, 300)
    assert result.found == 5
    assert float(error(result, x).max()) < 1e-4


@pytest.mark.parametrize("noise", [1e-5, 1e-4, 1e-3])
def test_noise_lowers_precision_not_success(noise: float) -> None:
    net, x = mlp(300), batch(6)
    grad = gradient(net, x)
    torch.manual_seed(0)
    noisy = tuple(t + noise * t.square().mean().sqrt() * torch.randn_like(t) for t in grad)
    result, _ = attack(net, noisy, None)
    assert result.found == 6
    assert float(error(result, x).max()) < 100 * noise
    assert float(result.deviation.max()) < 100 * noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_defence(dtype: torch.dtype) -> None:
    net, x = mlp(300), batch(6)
    result, _ = attack(net, tuple(t.to(dtype) for t in gradient(net, x)), None)
    assert result.found == 6
    assert float(error(result, x).max()) < 5e-2


def test_noise_alone_is_never_proved() -> None:
    net = mlp(300)
    torch.manual_seed(0)
    result, _ = attack(net, tuple(torch.randn_like(p) for p in net.parameters()), 4, calls=2)
    assert result.found == 0


def test_a_batch_as_large_as_the_layer_finds_nothing() -> None:
    net, x = mlp(300, hidden=16), batch(20)
    result, _ = attack(net, gradient(net, x), 20, calls=2)
    assert result.found == 0
    assert bool(torch.isfinite(result.inputs).all())


def test_dead_units_do_not_disturb() -> None:
    net, x = mlp(300), batch(4)
    with torch.no_grad():
        net[0].bias[:60] = -100.0
    result, _ = attack(net, gradient(net, x), None)
    assert result.found == 4


def test_bad_input_is_refused_with_a_reason() -> None:
    net, x = mlp(300), batch(2)
    w, b = net[0].weight.detach(), net[0].bias.detach()
    gw, gb = gradient(net, x)[:2]
    broken = gw.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        prepare(w, b, broken, gb, 2)
    with pytest.raises(ValueError, match="zero"):
        prepare(w, b, gw * 0, gb * 0, 2)
    with pytest.raises(ValueError, match="bias"):
        prepare(w, b, gw, None, 2)
    with pytest.raises(ValueError, match="batch"):
        prepare(w, b, gw, gb, 0)


def test_labels_follow_exactly_from_the_recovered_batch() -> None:
    net, x = mlp(300), batch(8)
    y = torch.tensor([3, 3, 1, 0, 9, 9, 9, 2])
    grad = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    result, _ = attack(net, grad, 8)
    with torch.no_grad():
        features = net[:4](result.inputs.float())
        solved = labels_from(grad[-2], grad[-1], features, net[4](features).softmax(1))
    nearest = torch.cdist(result.inputs, x.double()).argmin(1)
    assert torch.equal(solved.labels, y[nearest])
    assert float(solved.confidence.min()) > 0.99
    wrong = labels_from(grad[-2], grad[-1], torch.randn_like(features).relu(), torch.full_like(solved.targets, 0.1))
    assert float(wrong.confidence.max()) < 0.9


def test_labels_refuse_features_that_do_not_separate() -> None:
    same = torch.ones(3, 5)
    with pytest.raises(ValueError, match="separate"):
        labels_from(torch.ones(10, 5), torch.ones(10), same, torch.full((3, 10), 0.1))
