"""Update rules and schedules against torch and against the papers' descriptions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frostglass.attacks.inversion import rules, schedules
from frostglass.attacks.inversion.lbfgs import lbfgs
from frostglass.core.randomness import Rng


def info(t: int, steps: int = 100) -> rules.StepInfo:
    return rules.StepInfo(t, steps, Rng.from_seed(0).at("step", t))


def test_adam_is_torchs_adam() -> None:
    target = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = torch.zeros_like(target).requires_grad_(True)
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    ours, rule = torch.zeros_like(target), rules.chain(rules.adam(), rules.scale(0.1))
    state = rule.init(ours)
    for t in range(25):
        optimizer.zero_grad()
        ((theirs - target) ** 4).sum().backward()
        optimizer.step()
        change, state = rule.apply(4 * (ours - target) ** 3, state, info(t))
        ours = ours + change
    torch.testing.assert_close(ours, theirs.detach())


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def slope(z: Tensor) -> Tensor:
    """Of every seed."""
    z = z.detach().requires_grad_(True)
    return torch.autograd.grad(sum(rosenbrock(row) / 100 for row in z.flatten(1)), z)[0]


@pytest.mark.parametrize("history", [3, 100])
def test_lbfgs_is_torchs_lbfgs_for_every_seed(history: int) -> None:
    start = 0.1 * torch.randn(2, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule, ours = lbfgs(lr=0.5, iterations=6, history=history), start.clone()
    state = rule.init(ours)
    theirs = [row.clone().requires_grad_(True) for row in start]
    optimizers = [torch.optim.LBFGS([x], lr=0.5, max_iter=6, history_size=history) for x in theirs]
    for t in range(6):
        change, state = rule.apply(slope(ours), state, rules.StepInfo(t, 6, Rng.from_seed(0), None, ours, slope))
        ours = ours + change
        for x, optimizer in zip(theirs, optimizers, strict=True):

            def closure(x: Tensor = x, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = rosenbrock(x.flatten()) / 100
                loss.backward()
                return loss

            optimizer.step(closure)
    torch.testing.assert_close(ours, torch.stack([x.detach() for x in theirs]), rtol=1e-7, atol=1e-9)


def test_lbfgs_stays_at_a_minimum_and_says_what_it_lacks() -> None:
    rule, z = lbfgs(), torch.ones(1, 1, 4)
    change, _ = rule.apply(slope(z), rule.init(z), rules.StepInfo(0, 1, Rng.from_seed(0), None, z, slope))
    assert not change.any()
    with pytest.raises(ValueError, match="gradient function"):
        rule.apply(slope(z), rule.init(z), info(0))


def test_with_zero_gradient_the_pixels_move_by_lr_times_noise() -> None:
    """Published code adds the noise to the gradient, where Adam normalises it away; it belongs on the pixels."""
    rule = rules.chain(rules.adam(), rules.pixel_noise(0.2), rules.scale(0.1))
    zero = torch.zeros(4, 3, 64, 64)
    change, _ = rule.apply(zero, rule.init(zero), info(0))
    assert float(change.std()) == pytest.approx(0.1 * 0.2, rel=0.02)
    assert float(change.mean()) == pytest.approx(0, abs=1e-3)


def test_noise_is_new_at_every_step_and_seed_and_repeats_with_the_key() -> None:
    rule = rules.pixel_noise(1.0)
    zero = torch.zeros(2, 1, 8, 8)
    first, again, later = (rule.apply(zero, (), info(t))[0] for t in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first[0], first[1])
    second = rules.StepInfo(3, 100, Rng.from_seed(0).at("step", 3), seeds=(1,))
    assert torch.equal(rule.apply(zero[:1], (), second)[0][0], first[1])  # wherever a seed lives, its draws are its own


def test_sign_and_clip() -> None:
    g = torch.tensor([[[[3.0, -4.0]]], [[[0.3, 0.4]]]])
    assert torch.equal(rules.sign().apply(g, (), info(0))[0], g.sign())
    clipped = rules.clip_norm(1.0).apply(g, (), info(0))[0]
    assert clipped.flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 0.5])


def test_coarse_to_fine_moves_blocks_first_and_pixels_later() -> None:
    g = torch.randn(1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rule = rules.coarse_to_fine(2, 0.25)
    early, late = (rule.apply(g, (), info(t))[0] for t in (24, 25))
    assert torch.equal(early[..., ::2, ::2], early[..., 1::2, 1::2])
    assert float(early[0, 0, 0, 0, 0]) == pytest.approx(float(g[0, 0, 0, :2, :2].mean()))
    assert torch.equal(late, g)


def test_schedules_reach_their_stated_values() -> None:
    decay = schedules.step_decay(0.1, at=(3 / 8, 5 / 8, 7 / 8), factor=0.1)
    values = [decay(t, 4800) for t in (0, 1799, 1800, 3000, 4200)]
    assert values == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001])
    wave = schedules.cosine(0.1, warmup=50)
    assert wave(0, 1000) < 0.01
    assert wave(50, 1000) == pytest.approx(0.1)
    assert wave(999, 1000) < 1e-5
    assert all(wave(t + 1, 1000) <= wave(t, 1000) for t in range(50, 999))
