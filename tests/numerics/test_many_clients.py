"""Several clients in one pass give what each gives alone: traces, and their derivatives to the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.numerics.local_update import Trace, local_gradients, local_update
from frostglass.numerics.many_clients import NotTogether
from frostglass.numerics.second_order import second_order_layers
from frostglass.vision import networks

CLIENTS, ROWS, SIZE = 3, 2, 12


def built(name: str) -> nn.Module:
    return networks.build(name, classes=10, channels=3, size=32, options={}, rng=Rng.from_seed(3))


class Normalised(nn.Module):
    """Convolutions of every form, with the norms that look at one image."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, (3, 5), padding=(1, 2), stride=(1, 2), bias=True, padding_mode="reflect")
        self.group = nn.GroupNorm(4, 8)
        self.apart = nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2)
        self.plain = nn.GroupNorm(2, 8, affine=False)
        self.layer = nn.LayerNorm(SIZE // 2)
        self.bare = nn.LayerNorm(SIZE // 2, bias=False)
        self.head = nn.Linear(SIZE // 2, 4, bias=False)
        self.last = nn.Linear(8 * SIZE * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.apart(self.group(self.wide(x)).tanh()))
        return self.last(self.head(self.bare(self.layer(x).tanh())).flatten(1))


class OneNorm(nn.Module):
    """A batch normalisation before a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(3 * SIZE * SIZE, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).flatten(1))


def value_of(trace: Trace) -> Tensor:
    parts = [g.square().sum() + g.sin().sum() for g in trace.gradients.values()]
    parts += [s.mean.square().sum() + s.var.log().sum() for s in trace.bn.values()]
    return torch.stack([*parts, trace.loss, trace.logits.square().sum()]).sum()


def shaken(model: nn.Module) -> nn.Module:
    """In float64, with norms that do something."""
    made = torch.Generator().manual_seed(1)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            for p in module.parameters():
                p.data.normal_(generator=made)
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None and module.running_mean is not None:
            module.running_mean.normal_(generator=made)
            module.running_var.uniform_(0.5, 2, generator=made)
    return model


def drawn(size: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    x = torch.rand(CLIENTS, ROWS, 3, size, size, generator=made, dtype=torch.float64)
    y = torch.rand(CLIENTS, ROWS, 10, generator=made, dtype=torch.float64).softmax(-1)
    return x.requires_grad_(), y


def same_as_alone(model: nn.Module, mode: str, size: int) -> None:
    x, y = drawn(size)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with second_order_layers():
        plan = LocalPlan(mode="train" if mode == "train" else "eval")
        alone = [local_update(model, x[s], y[s], plan, differentiable=True) for s in range(CLIENTS)]
        found = local_gradients(model, x, y, mode)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(dict(one.gradients), dict(other.gradients), rtol=1e-9, atol=1e-12)
        assert one.bn.keys() == other.bn.keys()
        for name, statistics in one.bn.items():
            assert statistics.count == other.bn[name].count
            torch.testing.assert_close(statistics.mean, other.bn[name].mean)
            torch.testing.assert_close(statistics.var, other.bn[name].var)
    values = [torch.stack([value_of(t) for t in traces]) for traces in (found, alone)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0)
    along = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # a mean over clients would pass with equal weights
    slopes = [torch.autograd.grad((along * v).sum(), x)[0] for v in values]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-10 * float(slopes[1].abs().max()))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", ["lenet", "mlp", "small_bn_cnn", "resnet20"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_built_in_networks(name: str, mode: str) -> None:
    same_as_alone(shaken(built(name)), mode, 32)


def test_every_form_of_the_known_layers() -> None:
    same_as_alone(shaken(Normalised()), "train", SIZE)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("frozen", [".weight", ".bias", "norm", "head"])
def test_weights_that_were_not_sent_have_no_rows(frozen: str, mode: str) -> None:
    model = shaken(nn.Sequential(Normalised().double(), nn.Linear(10, 10)) if mode == "eval" else built("small_bn_cnn"))
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name)
    same_as_alone(model, mode, SIZE if mode == "eval" else 32)


def test_a_batch_norm_without_running_statistics_is_each_clients_own() -> None:
    model = shaken(OneNorm(nn.BatchNorm2d(3, track_running_stats=False)))
    same_as_alone(model, "eval", SIZE)


class Standardised(nn.Conv2d):
    """Weight standardisation looks at the weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return self._conv_forward(x, w - w.mean((1, 2, 3), keepdim=True), self.bias)


class Shaped(nn.Linear):
    """Asks the weight for its shape alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight.shape[1]


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "PReLU": lambda: nn.Sequential(nn.PReLU(), nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 10)),
    "a weight that is computed with": lambda: OneNorm(Standardised(3, 3, 3, padding=1)),
    "a weight whose shape is read": lambda: nn.Sequential(nn.Flatten(), Shaped(3 * SIZE * SIZE, 10)),
    "padding by name": lambda: OneNorm(nn.Conv2d(3, 3, 3, padding="same")),
    "a norm over several dimensions": lambda: OneNorm(nn.LayerNorm((SIZE, SIZE))),
    "a batch norm without weights": lambda: OneNorm(nn.BatchNorm2d(3, affine=False)),
    "transposed convolution": lambda: OneNorm(nn.ConvTranspose2d(3, 3, 3, padding=1)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_refused_and_never_wrong(name: str) -> None:
    x, y = drawn(SIZE)
    with pytest.raises(NotTogether):
        local_gradients(UNKNOWN[name]().double(), x, y, "train")


def test_the_mode_ends_with_its_block() -> None:
    x, y = drawn(SIZE)
    model = OneNorm(nn.BatchNorm2d(3)).double()
    local_gradients(model, x, y, "train")
    plain: Any = model(x[0])
    assert plain.shape == (ROWS, 10)
