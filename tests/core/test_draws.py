"""A thread that draws apart leaves torch's own generators alone, and draws what torch would draw from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from frostglass.core.draws import apart_draws, draws_apart, kept_draws, seed_of
from frostglass.core.randomness import Rng, global_draws

ONES = torch.ones(40, 30)
KEY = Rng.from_seed(7).key

DRAWS: dict[str, Callable[[], Any]] = {
    "dropout": lambda: nn.functional.dropout(ONES),
    "dropout2d": lambda: nn.functional.dropout2d(ONES[None, None]),
    "alpha_dropout": lambda: nn.functional.alpha_dropout(ONES),
    "rrelu": lambda: nn.functional.rrelu(-ONES, training=True),
    "lstm": lambda: nn.LSTM(30, 4, 2, dropout=0.5)(ONES[None])[0].detach(),
    "attention": lambda: nn.functional.scaled_dot_product_attention(ONES, ONES, ONES, dropout_p=0.5),
    "rand": lambda: torch.rand(5),
    "randn": lambda: torch.randn(5),
    "randint": lambda: torch.randint(9, (5,)),
    "randint from": lambda: torch.randint(3, 9, (5,)),
    "randperm": lambda: torch.randperm(20),
    "rand_like": lambda: torch.rand_like(ONES),
    "randn_like": lambda: torch.randn_like(ONES),
    "randint_like": lambda: torch.randint_like(ONES, 9),
    "randint_like from": lambda: torch.randint_like(ONES, 3, 9),
    "normal": lambda: torch.normal(0.0, 1.0, (5,)),
    "uniform_": lambda: torch.empty(5).uniform_(),
    "bernoulli": lambda: torch.bernoulli(ONES / 2),
    "multinomial": lambda: torch.multinomial(ONES, 5),
    "native_dropout": lambda: torch.native_dropout(ONES, 0.5, True)[0],
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_apart_are_those_of_torch_from_the_same_seed(name: str) -> None:
    torch.manual_seed(seed_of(KEY))
    wanted = DRAWS[name]()
    before = torch.get_rng_state()
    with draws_apart(KEY):
        found = DRAWS[name]()
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator has not moved"
    assert torch.equal(found, wanted)


def test_derivatives_know_what_was_dropped() -> None:
    x = torch.ones(1000, requires_grad=True)
    with draws_apart(KEY):
        y = nn.functional.dropout(x, 0.25)
        (slope,) = torch.autograd.grad(y.square().sum() / 2, x)
    assert torch.equal(slope > 0, y > 0)
    assert 0 < int((y == 0).sum()) < 1000


def test_draws_of_an_address_are_the_same_apart() -> None:
    with global_draws(Rng.from_seed(3), torch.device("cpu")):
        wanted = torch.rand(4)
    with draws_apart(KEY):
        first = torch.rand(2)
        with global_draws(Rng.from_seed(3), torch.device("cpu")):
            assert torch.equal(torch.rand(4), wanted)
        second = torch.rand(2)
    torch.manual_seed(seed_of(KEY))
    assert torch.equal(torch.cat([first, second]), torch.cat([torch.rand(2), torch.rand(2)])), "they go on afterwards"
    assert apart_draws() is None


def test_kept_draws_move_no_generator() -> None:
    before = torch.get_rng_state()
    with kept_draws():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with draws_apart(KEY), kept_draws():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
