"""Copies of networks that keep something of their last pass, which `copy.deepcopy` refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import frostglass
from frostglass.numerics.called import called_with, copied


class Keeping(nn.Module):
    """Keeps its activations, as networks do whose inside is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 8), nn.Linear(8, 3)
        self.activations: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3] logits."""
        hidden = torch.sigmoid(self.inner(x.flatten(1)))
        self.activations["hidden"] = [hidden]
        return torch.Tensor(self.head(hidden))


def weight_normalised() -> nn.Module:
    inner = torch.nn.utils.weight_norm(nn.Linear(64, 8))
    return nn.Sequential(nn.Flatten(), inner, nn.Sigmoid(), torch.nn.utils.spectral_norm(nn.Linear(8, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("make", [Keeping, weight_normalised])
def test_what_a_network_keeps_of_its_last_pass_is_copied_without_its_graph(make: type[nn.Module]) -> None:
    model, images = make().eval(), torch.rand(2, 1, 8, 8)
    answer = model(images)
    twin = copied(model)
    torch.testing.assert_close(twin(images), answer)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    torch.testing.assert_close(called_with(twin, doubled, images), called_with(model, doubled, images))
    assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("make", [Keeping, weight_normalised])
def test_a_network_that_keeps_something_of_its_last_pass_is_audited(make: type[nn.Module]) -> None:
    model, images = make(), torch.rand(4, 1, 8, 8)
    model(images).sum().backward()
    attacks = [{"name": "thaw", "steps": 2}, {"name": "dlg", "steps": 2}]
    known = ["examples", "labels"]
    found = frostglass.audit(model=model, images=images, labels=[0, 1, 2, 0], attacks=attacks, grants=known, batch=2)
    assert [(cell.status, cell.error) for cell in found.scorecard.cells] == [("done", None)] * 2
