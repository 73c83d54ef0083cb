"""Randomness has an address: equal paths draw equally, no path reveals another, keys are wider than torch's seeds."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostglass.core.randomness import Insecure, OsKey, Rng
from frostglass.core.threat import Knows

ROOT = Rng.from_seed(0)
steps = st.one_of(st.text(), st.integers(), st.binary())


@given(st.lists(steps, max_size=4), st.lists(steps, max_size=4))
def test_different_paths_have_different_keys(one: list[str | int | bytes], other: list[str | int | bytes]) -> None:
    assert (ROOT.at(*one).key == ROOT.at(*other).key) == ([(type(s), s) for s in one] == [(type(s), s) for s in other])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("ab",), ("a", "b")),
        (("1",), (1,)),
        (("str:a",), (b"str:a",)),
        (("a",), (b"a",)),
        (("",), ()),
        ((12, 3), (1, 23)),
    ],
)
def test_neighbouring_paths_do_not_collide(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
    assert ROOT.at(*one).key != ROOT.at(*other).key


def test_a_path_in_two_pieces_is_not_the_path_in_one() -> None:
    assert ROOT.at("a").at("b").key != ROOT.at("a", "b").key


def test_numbers_and_words_of_other_types_lead_to_the_same_place() -> None:
    assert ROOT.at(int(np.int64(3))).key == ROOT.at(3).key
    assert ROOT.at(Knows.LABELS).key == ROOT.at("labels").key


def test_seeds_and_contexts_do_not_collide() -> None:
    keys = [Rng.from_seed(*a).key for a in [(1,), (11,), (1, "1"), (1, "a", "b"), (1, "ab"), (-1,), (2**200,)]]
    assert len(set(keys)) == len(keys)


def test_the_way_down_is_one_way() -> None:
    below = ROOT.at("attack")
    assert ROOT.key not in below.key
    assert ROOT.key.hex() not in repr(vars(below))
    assert set(inspect.signature(Rng).parameters) == {"key"}, "a key below holds its parent"


def test_a_key_is_not_printed_and_has_32_bytes() -> None:
    assert repr(ROOT) == "Rng()"
    for wrong in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="32 bytes"):
            Rng(wrong)


def test_same_address_same_draw_whatever_was_drawn_before() -> None:
    first = ROOT.at("x").normal((5,))
    ROOT.at("x").normal((100,))
    torch.randn(7)
    assert torch.equal(ROOT.at("x").normal((5,)), first)
    assert not torch.equal(ROOT.at("y").normal((5,)), first)


def test_draws_have_their_distribution() -> None:
    normal, uniform = ROOT.at("n").normal((20_000,)), ROOT.at("u").uniform((20_000,))
    assert abs(float(normal.mean())) < 0.03
    assert float(normal.std()) == pytest.approx(1, abs=0.03)
    assert 0 <= float(uniform.min()) < 0.01
    assert 0.99 < float(uniform.max()) < 1
    assert ROOT.permutation(50).sort().values.tolist() == list(range(50))
    assert set(ROOT.integers(3, (500,)).tolist()) == {0, 1, 2}
    assert ROOT.normal((2, 3), like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_torchs_generator_carries_more_than_the_32_bits_of_its_seed() -> None:
    """Two keys whose 63-bit seeds agree modulo 2^32: `manual_seed` alone would give them one stream."""
    ends = bytes(4) + bytes([1, 2, 3, 4]) + bytes(24)
    one, other = Rng(bytes(4) + ends[4:]), Rng(bytes([0, 0, 0, 9]) + ends[4:])
    seeds = [int.from_bytes(r.key[:8], "big") & (2**63 - 1) for r in (one, other)]
    assert seeds[0] != seeds[1]
    assert seeds[0] % 2**32 == seeds[1] % 2**32
    plain = [torch.randn(8, generator=torch.Generator().manual_seed(s % 2**32)) for s in seeds]
    assert torch.equal(*plain)
    draws = [torch.randn(8, generator=r.generator()) for r in (one, other)]
    assert not torch.equal(*draws)
    assert torch.equal(draws[0], torch.randn(8, generator=one.generator()))


def test_torchs_generator_depends_on_every_bit_of_the_key() -> None:
    keys = [bytes(i) + b"\x01" + bytes(31 - i) for i in range(32)]
    first = {tuple(torch.randint(2**31, (4,), generator=Rng(k).generator()).tolist()) for k in keys}
    assert len(first) == 32


def test_torchs_generator_state_is_sound() -> None:
    generator = ROOT.generator()
    drawn = torch.rand(10_000, generator=generator)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert len(drawn.unique()) > 9_900


def test_keys_of_the_operating_system_are_fresh_and_insecure_ones_repeat() -> None:
    system, known = OsKey(), Insecure(3)
    assert system.rng().key != system.rng().key
    assert known.rng().key == Insecure(3).rng().key != Insecure(4).rng().key
    assert Insecure(ROOT).rng() is ROOT
    assert (system.insecure, known.insecure) == (False, True)
