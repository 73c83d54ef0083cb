"""Label rules: known answers and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from frostglass.numerics import labels


@given(st.lists(st.floats(-3, 10), min_size=2, max_size=12), st.integers(1, 48))
@example([0.0, 2.2e-311], 1)
@example([1e308, 1e308], 3)
def test_largest_remainder_gives_whole_counts_that_add_up(values: list[float], total: int) -> None:
    counts = labels.largest_remainder(torch.tensor(values, dtype=torch.float64), total)
    assert int(counts.sum()) == total
    assert bool((counts >= 0).all())
    assert bool((counts == counts.round()).all())


@given(st.lists(st.integers(0, 6), min_size=2, max_size=10).filter(lambda c: sum(c) > 0))
def test_counts_follow_from_the_bias_gradient_identity(counts: list[int]) -> None:
    n = torch.tensor(counts, dtype=torch.float64)
    k = int(n.sum())
    posterior = torch.full_like(n, 1 / len(n))
    gradient = posterior - n / k
    assert torch.equal(labels.label_counts(gradient, k), n)


def test_row_minimum_takes_the_lowest_even_when_none_is_negative() -> None:
    """A saturated softmax leaves a gradient of exactly 0 for the true class and positive ones elsewhere."""
    g = torch.tensor([[0.1, 0.2], [0.0, 0.0], [0.3, 0.1]])
    assert labels.row_minimum(g, 1).tolist() == [1]
    with pytest.raises(ValueError, match="distinct"):
        labels.row_minimum(g, 4)


def test_accuracies_and_the_guess_without_a_gradient() -> None:
    truth = torch.tensor([2.0, 1.0, 0.0, 1.0])
    assert labels.count_accuracy(truth, truth) == 1
    assert labels.count_accuracy(torch.tensor([1.0, 1, 1, 1]), truth) == pytest.approx(0.75)
    assert labels.set_accuracy(torch.tensor([4.0, 0, 0, 0]), truth) == pytest.approx(1 / 3)
    assert labels.no_gradient_guess(truth) == pytest.approx(0.75)


def test_targets_list_every_counted_label_once() -> None:
    rows = labels.counts_to_targets(torch.tensor([2.0, 0.0, 1.0]))
    assert rows.argmax(1).tolist() == [0, 0, 2]


def test_sum_rule_and_single_label_take_the_least_even_when_none_is_negative() -> None:
    g = torch.tensor([[0.1, 0.2], [0.0, 0.0], [0.3, 0.1]])
    assert labels.sum_rule(g, 2).tolist() == [1, 0]
    assert labels.single_label(g) == 1
    assert labels.single_label(g, torch.tensor([0.0, 0.1, 0.1])) == 0
    with pytest.raises(ValueError, match="distinct"):
        labels.sum_rule(g, 4)


class Heads(nn.Module):
    """One hidden layer, and an auxiliary head that is registered last; `how` says what the logits are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.norm = how, nn.Linear(12, 6), nn.BatchNorm1d(6)
        self.head, self.auxiliary, self.drop = nn.Linear(6, 4), nn.Linear(6, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.first(x.flatten(1))).relu())
        if self.how == "tokens":
            return self.head(h[:, None].expand(-1, 3, -1)).mean(1)
        logits = self.head(h)
        return logits + self.head(-h) if self.how == "twice" else logits.log_softmax(1)


@pytest.mark.parametrize(("how", "layer"), [("once", "head"), ("tokens", None), ("twice", None)])
def test_the_classifier_is_the_layer_that_makes_the_logits_not_the_last_registered(how: str, layer: str | None) -> None:
    model = Heads(how).train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    assert labels.classifier_layer(model, 4, (3, 2, 2)) == layer
    assert labels.classifier_layer(model, 5, (3, 2, 2)) is None
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not any(m._forward_pre_hooks for m in model.modules())
