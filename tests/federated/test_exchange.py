"""States on the wire and updates: back and forth without loss, and what does not fit named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.update import LocalPlan
from frostglass.defenses.pruning import pruning
from frostglass.federated.exchange import applied, difference, misfits, names_of, protected, statistics_sent
from frostglass.federated.local_client import LocalClient
from frostglass.vision import datasets, networks

PLAN = LocalPlan("delta", lr=0.1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return networks.build("small_bn_cnn", classes=10, channels=1, size=8, rng=Rng.from_seed(0))


def trained(model: nn.Module, plan: LocalPlan = PLAN, n: int = 20) -> tuple[LocalClient, dict[str, torch.Tensor]]:
    held = datasets.load("digits", size=8)
    client = LocalClient("a", model, held.images[:n], held.labels[:n], 10, plan, seed=0)
    return client, client.train(model.state_dict(), 1).state


def test_names(model: nn.Module) -> None:
    names = names_of(model)
    assert set(names.trained) == {n for n, _ in model.named_parameters()}
    assert set(names.trained) | set(names.carried) == set(model.state_dict())


def test_a_delta_applied_is_what_was_returned(model: nn.Module) -> None:
    _, after = trained(model)
    before, names = model.state_dict(), names_of(model)
    back = applied(before, difference(before, after, names.trained), {n: after[n] for n in names.carried})
    for name, value in after.items():
        torch.testing.assert_close(back[name], value)


@pytest.mark.parametrize(("sent", "returned"), [(torch.half, torch.float32), (torch.float32, torch.bfloat16)])
def test_half_precision_on_one_side_does_not_round_the_difference_away(
    sent: torch.dtype, returned: torch.dtype
) -> None:
    before, after = torch.ones(3, dtype=sent), torch.full((3,), 1 + 2**-7 if returned == torch.bfloat16 else 1.0001)
    found = difference({"w": before}, {"w": after.to(returned)}, ("w",))["w"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 1 - after)


def test_no_defence_changes_nothing_and_pruning_leaves_buffers_alone(model: nn.Module) -> None:
    _, after = trained(model)
    key = Insecure(0)
    same, _ = protected(model, model.state_dict(), after, Defense("none", claim="none"), key, examples=20, plan=PLAN)
    for name, value in after.items():
        torch.testing.assert_close(same[name], value)
    sparse, update = protected(model, model.state_dict(), after, pruning(fraction=0.9), key, examples=20, plan=PLAN)
    entries = torch.cat([g.flatten() for g in update.gradients.values()])
    assert float((entries == 0).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert all(torch.equal(sparse[n], after[n]) for n in names_of(model).carried)


class Shared(nn.Module):
    """A layer and a normalisation that stand twice, and a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
        self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.again(self.first(x.flatten(1)).relu()).relu()).relu())


def test_what_has_two_names_leaves_under_both_with_one_value() -> None:
    net = Shared()
    names = names_of(net)
    assert names.tied["second.weight"] == names.tied["again.0.weight"] == "first.0.weight"
    assert {*names.trained, *names.carried, *names.tied} == set(net.state_dict())
    before = {n: t.clone() for n, t in net.state_dict().items()}
    client, after = trained(net)
    for two, one in names.tied.items():
        assert torch.equal(after[two], after[one])
        assert not torch.equal(after[one], before[one]), one
    net.load_state_dict(after)
    assert all(torch.equal(t, after[n]) for n, t in net.state_dict().items()), "the second name undid the training"
    delta = client.train(before, 1).update.gradients
    sparse, update = protected(net, before, after, pruning(fraction=0.9), Insecure(0), examples=20, plan=PLAN)
    assert update.gradients.keys() == delta.keys()
    assert torch.equal(sparse["second.weight"], sparse["first.0.weight"]), "a second name left undefended"
    assert torch.equal(sparse["again.1.running_mean"], after["first.1.running_mean"])


def test_statistics_are_computed_from_buffers(model: nn.Module) -> None:
    client, after = trained(model)
    held = client.train(model.state_dict(), 1).update.bn
    found = statistics_sent(model, model.state_dict(), after, (1, 8, 8), 20)
    assert set(found) == set(held)
    for name, s in found.items():
        assert s.count == held[name].count
        torch.testing.assert_close(s.mean, held[name].mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(s.var, held[name].var, atol=1e-5, rtol=1e-4)


def test_statistics_of_a_cumulative_average() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, momentum=None), nn.Flatten(), nn.Linear(64, 10))
    client, after = trained(model)
    (found,) = statistics_sent(model, model.state_dict(), after, (1, 8, 8), 20).values()
    torch.testing.assert_close(found.mean, client.images.mean((0, 2, 3)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.var, client.images.var((0, 2, 3), correction=0), atol=1e-6, rtol=1e-4)


def test_statistics_without_buffers_are_refused(model: nn.Module) -> None:
    only = dict(model.named_parameters())
    with pytest.raises(BadInput, match="BatchNorm buffers were left out"):
        statistics_sent(model, only, only, (1, 8, 8), 4)


def test_misfits_are_named(model: nn.Module) -> None:
    good = dict(model.state_dict())
    assert misfits(good, model) == []
    first, second, third = list(dict(model.named_parameters()))[:3]
    bad = {n: t for n, t in good.items() if n != first} | {"strange": torch.zeros(1)}
    bad[second] = torch.zeros(3, 3)
    bad[third] = good[third].clone().fill_(float("nan"))
    text = "; ".join(misfits(bad, model))
    for part in (
        f"1 entries are missing, the first {first!r}",
        "'strange'",
        f"{second!r} has shape (3, 3)",
        "not finite",
    ):
        assert part in text
    assert "is torch.int64" in "; ".join(misfits({**good, first: good[first].long()}, model))
