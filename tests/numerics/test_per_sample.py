"""Streamed inner products and norms against gradients that autograd takes one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.numerics.local_update import local_update
from frostglass.numerics.per_sample import agrees, products, streamable
from frostglass.vision import networks
from victims import Reused

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("mlp", {"hidden": (24, 16)}, "train", False),
    ("lenet", {}, "train", False),
    ("small_bn_cnn", {"width": 4, "norm": "group"}, "train", False),
    ("small_bn_cnn", {"width": 4, "norm": "none"}, "train", False),
    ("small_bn_cnn", {"width": 4}, "eval", False),
    ("small_bn_cnn", {"width": 4}, "train", True),
    ("resnet20", {}, "train", True),
]


def model_of(name: str, options: dict[str, Any], size: int = 8) -> nn.Module:
    made = networks.build(name, classes=5, channels=3, size=size, options=options, rng=Rng.from_seed(2)).double()
    for module in made.modules():  # running statistics that a mistake would show in
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return made


def images_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    return Rng.from_seed(3).uniform((2, 3, 8, 8)).double(), torch.eye(5).double()[:2]


def compared(model: nn.Module, mode: str, alone: bool, channels: int = 3, size: int = 8) -> None:
    x = Rng.from_seed(3).uniform((5, channels, size, size)).double()
    y = torch.nn.functional.one_hot(torch.arange(5) % 5, 5).double()
    y[1] *= 0.6  # a soft label that lost mass
    plan = LocalPlan(mode=mode)  # type: ignore[arg-type]
    single = [local_update(model, x[i : i + 1], y[i : i + 1], plan).gradients for i in range(5)]
    along = [
        {n: Rng.from_seed(4).at(n).normal(g.shape).double() for n, g in single[0].items()},
        {n: g for k, (n, g) in enumerate(single[2].items()) if k % 2},
    ]
    dots, squares = products(model, x, y, along, mode, alone=alone)
    for i, g in enumerate(single):
        for d, v in enumerate(along):
            exact = sum(float((g[n] * v[n]).sum()) for n in v)
            assert float(dots[i, d]) == pytest.approx(exact, rel=1e-8, abs=1e-12)
        exact = sum(float(t.square().sum()) for t in g.values())
        assert float(squares[i]) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(("name", "options", "mode", "alone"), CASES)
def test_products_are_those_of_single_gradients(name: str, options: dict[str, Any], mode: str, alone: bool) -> None:
    model = model_of(name, options)
    assert streamable(model, mode, alone=alone)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    training = [m.training for m in model.modules()]
    compared(model, mode, alone)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    assert training == [m.training for m in model.modules()]
    assert agrees(model, *images_and_targets(), mode, alone=alone)
    assert agrees(model.float(), *(t.float() for t in images_and_targets()), mode, alone=alone)
    assert not any(m._forward_hooks for m in model.modules())


class Odd(nn.Module):
    """Groups, strides, dilation, a layer passed twice, layer norm, sequences, in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1, bias=True)
        self.grouped = nn.Conv2d(4, 4, 3, 1, 2, dilation=2, groups=2)
        self.norm = nn.LayerNorm([4])
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.conv(x), inplace=True)
        tokens = self.norm(self.grouped(x).flatten(2).transpose(1, 2))
        tokens = self.twice(torch.tanh(self.twice(tokens)))
        return self.head(tokens.mean(1))


def test_odd_layers_and_repeated_use(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr("frostglass.numerics.per_sample.BUDGET", 100)  # pieces of a few images
    model = Odd().double()
    assert streamable(model, "train", alone=False)
    compared(model, "train", False)


def test_a_layer_that_reads_one_vector_an_image_twice() -> None:
    torch.manual_seed(1)
    twice = nn.Linear(8, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), twice, nn.Tanh(), twice, nn.Linear(8, 5)).double()
    assert streamable(model, "train", alone=False)
    compared(model, "train", False)


def test_networks_whose_images_mix_are_not_streamed() -> None:
    for affine in (True, False):
        batch = nn.BatchNorm2d(4, affine=affine, track_running_stats=False)  # by the batch in eval mode too
        own = nn.Sequential(nn.Conv2d(3, 4, 3), batch, nn.Flatten(), nn.Linear(144, 5)).double()
        assert not streamable(own, "eval", alone=True)
        assert streamable(own, "train", alone=True)
        compared(own, "train", True)
    assert not streamable(model_of("small_bn_cnn", {"width": 4}), "train", alone=False)
    assert not streamable(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 2)), "train", alone=True)
    assert not streamable(nn.Sequential(nn.Embedding(3, 4)), "eval", alone=True)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert not streamable(tied, "eval", alone=True)


class Standardised(nn.Conv2d):
    """A convolution whose forward is its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Compared(nn.Module):
    """A network that takes the mean of the batch off every image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1) - x.flatten(1).mean(0))


def test_what_is_no_layer_of_its_own_is_found_by_comparing() -> None:
    torch.manual_seed(1)
    standardised = nn.Sequential(Standardised(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    for model in (Reused(192, 5), standardised, Compared()):
        assert streamable(model, "eval", alone=False)  # by its layers it is one
        assert not agrees(model.double(), *images_and_targets(), "eval", alone=False)
    assert agrees(Odd().double(), *images_and_targets(), "train", alone=False)
