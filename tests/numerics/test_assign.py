"""Matching of images: one-to-one and optimal."""

from __future__ import annotations

import itertools

import pytest
import torch

from frostglass.core.randomness import Rng
from frostglass.numerics.assign import assign, pairwise_mse


def test_a_permutation_is_undone() -> None:
    truth = Rng.from_seed(0).normal((6, 1, 4, 4))
    order = Rng.from_seed(1).permutation(6)
    found = truth[order] + 0.01 * Rng.from_seed(2).normal(truth.shape)
    assert torch.equal(order[assign(found, truth)], torch.arange(6))


def test_the_matching_is_one_to_one_and_the_cheapest_of_all() -> None:
    found, truth = Rng.from_seed(3).normal((4, 1, 3, 3)), Rng.from_seed(4).normal((4, 1, 3, 3))
    cost = pairwise_mse(found, truth)
    matched = assign(found, truth)
    assert sorted(matched.tolist()) == [0, 1, 2, 3]
    least = min(sum(float(cost[r, c]) for c, r in enumerate(p)) for p in itertools.permutations(range(4)))
    assert sum(float(cost[r, c]) for c, r in enumerate(matched.tolist())) == pytest.approx(least)


def test_missing_and_broken_rows_are_matched_to_nothing() -> None:
    truth = torch.rand(3, 1, 2, 2)
    found = truth.clone()
    found[1, 0, 0, 0] = float("nan")
    assert assign(found, truth).tolist() == [0, -1, 2]
    assert assign(found[:0], truth).tolist() == [-1, -1, -1]
