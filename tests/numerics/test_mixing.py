"""Coefficients, partners and masks keep their laws; every path computes the same encodings."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure
from frostglass.numerics import key_rows, mixing
from frostglass.numerics.compiled import kernel, rounded
from frostglass.numerics.fused_mixing import mix_more_rows, mix_most_rows, mix_rows, to_bytes
from frostglass.numerics.key_rows import (
    KeyRows,
    MixLaw,
    acceptance,
    draw_coefficients,
    draw_distinct,
    draw_mask,
    draw_partner_permutations,
)
from frostglass.numerics.keystream import Keystream, Secret
from frostglass.numerics.mixing_vectors import GRID, LANES, LINE

PATHS = ("torch", "fused")
SIZES = [1, 7, 8 * LANES - 9, 8 * LANES, 8 * LANES + 8, 8 * LINE, 8 * LINE + 8, 8 * (LINE + 2 * LANES) + 3, 16 * LINE]
"""Pixels of an image, whose eighth is pixels alone, groups of them, lines, and some of each."""


def stream(seed: int = 0) -> Keystream:
    return Secret.draw(Insecure(seed)).stream("test")


# ---- coefficients


def test_folded_normal_has_the_checked_moments() -> None:
    """instahide.md 1.2: acceptance .93 and .56-.57, one lambda .25 +- .15, E[private mass] .435, P(< .05) .075."""
    inside, cross = MixLaw(4, 4), MixLaw(6, 2)
    assert acceptance(inside) == pytest.approx(0.93, abs=0.005)
    assert 0.555 <= acceptance(cross) <= 0.575
    rows = draw_coefficients(stream(), inside, 60_000)
    assert rows.mean(0) == pytest.approx([0.25] * 4, abs=0.003)
    assert rows.std() == pytest.approx(0.15, abs=0.005)
    rows = draw_coefficients(stream(1), cross, 60_000)
    assert rows[:, :2].sum(1).mean() == pytest.approx(0.435, abs=0.003)
    assert (rows[:, 0] < 0.05).mean() == pytest.approx(0.075, abs=0.005)


def test_dirichlet_is_that_of_gradattack() -> None:
    """Dirichlet(3, 1, 1, 1): means 1/2, 1/6, 1/6, 1/6 before rejection; without a bound nothing is rejected."""
    law = MixLaw(4, 4, c1=1.0, law="dirichlet")
    rows = draw_coefficients(stream(), law, 40_000)
    assert acceptance(law) == 1.0
    assert rows.mean(0) == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=0.003)
    assert stats.kstest(rows[:, 0], stats.beta(3, 3).cdf).pvalue > 1e-4


@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.floats(0.2, 1.0),
    st.floats(0.0, 0.9),
    st.sampled_from(["folded_normal", "dirichlet"]),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_bounds_hold_exactly(k: int, private: int, c1: float, c2: float, law: str, seed: int) -> None:
    mix_law = MixLaw(k, private, c1, c2, law)
    try:
        mix_law.check()
    except BadInput:
        assume(False)
    rows = draw_coefficients(stream(seed), mix_law, 50)
    assert rows.shape == (50, k)
    assert rows.dtype == np.float32
    assert rows.max() <= c1
    assert (rows >= 0).all()
    assert np.array_equal(rows * GRID, np.rint(rows * GRID))
    assert (rows.sum(1) == 1).all()
    if private < k:
        assert (rows[:, :private].sum(1, dtype=np.float64) >= c2).all()


@pytest.mark.parametrize(
    ("law", "reason"),
    [
        (MixLaw(4, 4, c1=0.2), "outside"),
        (MixLaw(4, 4, c1=1.5), "outside"),
        (MixLaw(4, 4, c1=0.25), "fewer than one draw in 1000"),
        (MixLaw(6, 1, c1=0.4, c2=0.5), "cannot be reached"),
        (MixLaw(6, 2, c2=1.2), "not a share"),
        (MixLaw(8, 1, c1=0.65, c2=0.64), "fewer than one draw in 1000"),
        (MixLaw(4, 5), "not possible"),
        (MixLaw(0, 0), "not possible"),
        (MixLaw(4, 4, first=0.7), "cannot be reached"),
        (MixLaw(10**9, 2), "more than the 1024"),  # and at once: nothing of that size is drawn to find out
    ],
)
def test_impossible_laws_are_refused_beforehand(law: MixLaw, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        law.check()


@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from([1e-9, 1.0, 1e9]))
def test_shares_on_the_grid_sum_to_one_and_are_off_by_less_than_a_step(k: int, seed: int, size: float) -> None:
    weights = size * np.random.default_rng(seed).random((40, k)) ** 8
    rows, exact = key_rows.on_grid(weights), weights / weights.sum(1, keepdims=True)
    assert (rows.sum(1) == 1).all()
    assert (rows >= 0).all()
    assert np.array_equal(rows * GRID, np.rint(rows * GRID))
    assert np.abs(rows - exact).max() < 1.001 / GRID


def test_rounding_to_the_grid_favours_no_slot() -> None:
    weights = np.random.default_rng(0).random((200_000, 5))
    off = (key_rows.on_grid(weights) - weights / weights.sum(1, keepdims=True)) * GRID
    assert np.abs(off.mean(0) / (off.std(0) / len(off) ** 0.5)).max() < 4


@given(st.integers(2, 9), st.integers(0, 99), st.floats(0, 0.3), st.sampled_from([np.float32, np.float64]))
def test_compiled_shares_are_those_of_numpy_within_bounds(k: int, seed: int, first: float, kind: type) -> None:
    weights = np.random.default_rng(seed).normal(size=(200, k)).astype(kind)
    weights[seed % 200] = 0  # no direction, no shares
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = key_rows.on_grid(np.abs(weights.astype(np.float64)))
    for law in (MixLaw(k, k, c1=1), MixLaw(k, 1 + seed % k, c1=0.5, c2=0.2, first=first)):
        assert np.array_equal(law.shares(weights), plain[law.accepts(plain)])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_shares_are_the_same_where_the_loop_is_not_compiled(kind: type, monkeypatch) -> None:
    """Sums of float32 would put about one share in 1000 on another multiple."""
    weights, law = np.random.default_rng(0).normal(size=(3000, 6)).astype(kind), MixLaw(6, 2, c2=0.2)
    compiled = law.shares(weights)
    monkeypatch.setattr(key_rows, "kernel", inspect.unwrap)  # as under NUMBA_DISABLE_JIT
    assert np.array_equal(law.shares(weights), compiled)


@pytest.mark.parametrize("law", ["folded_normal", "dirichlet"])
def test_a_large_first_share_has_the_distribution_of_rejection(law: str, monkeypatch) -> None:
    wanted = MixLaw(4, 1, c2=0.0, law=law, first=0.45)
    direct = draw_coefficients(stream(), wanted, 20_000)
    monkeypatch.setattr(key_rows, "acceptance_above", lambda law: 0.0)
    rejected = draw_coefficients(stream(1), wanted, 20_000)
    for part in (lambda r: r[:, 0], lambda r: r[:, 1], lambda r: r[:, 3], lambda r: r[:, 1:].max(1)):
        assert stats.ks_2samp(part(direct), part(rejected)).pvalue > 1e-3


def test_a_large_first_share_of_many_images_is_drawn_at_once(monkeypatch) -> None:
    """At k = 8 rejection takes 1100 candidates for a row, and candidates are drawn in parts of bounded size."""
    monkeypatch.setattr(key_rows, "_AT_ONCE", 1 << 12)
    for k in (7, 8, 100):
        law = MixLaw(k, 1, c2=0.0, first=0.5)
        law.check()
        rows = draw_coefficients(stream(), law, 3000)
        assert rows.shape == (3000, k)
        assert law.accepts(rows).all()
        assert np.allclose(rows.sum(1), 1, atol=1e-5)
        assert len(np.unique(rows, axis=0)) == 3000


# ---- partners


@given(st.integers(1, 7), st.integers(0, 40), st.integers(1, 60), st.integers(0, 99))
def test_partners_are_distinct_even_if_there_are_no_more(slots: int, spare: int, count: int, seed: int) -> None:
    rows = draw_distinct(stream(seed), slots + spare, slots, count)
    assert rows.shape == (count, slots)
    assert ((rows >= 0) & (rows < slots + spare)).all()
    assert all(len(set(r)) == slots for r in rows.tolist())


def test_partners_are_drawn_the_same_way_without_a_compiler(monkeypatch) -> None:
    compiled = draw_distinct(stream(3), 50, 5, 40)
    monkeypatch.setattr(key_rows, "fastest", lambda loop: loop)
    assert np.array_equal(draw_distinct(stream(3), 50, 5, 40), compiled)


def test_partners_of_the_largest_population_are_unbiased() -> None:
    """A product of a word with 3 * 2^30 has no draw for a quarter of all words: they are passed over, not bent."""
    rows = draw_distinct(stream(), 3 << 30, 2, 40_000)
    assert rows.shape == (40_000, 2)
    assert np.abs((rows < 1 << 30).mean(0) - 1 / 3).max() < 0.01
    assert draw_distinct(stream(), (1 << 31) + 1000, 31, 50).shape == (50, 31)  # half of all words
    with pytest.raises(BadInput, match="the most is"):
        draw_distinct(stream(), 1 << 32, 2, 1)


def test_every_ordered_choice_is_equally_likely() -> None:
    rows = draw_distinct(stream(), 4, 3, 24_000)
    counts = [int((rows == want).all(1).sum()) for want in itertools.permutations(range(4), 3)]
    assert stats.chisquare(counts).pvalue > 1e-4


@given(st.integers(1, 6), st.integers(1, 200), st.integers(0, 99))
def test_partner_permutations_never_collide(slots: int, spare: int, seed: int) -> None:
    n = slots + spare
    orders = draw_partner_permutations(stream(seed), n, slots)
    assert all(np.array_equal(np.sort(o), np.arange(n)) for o in orders)
    table = np.concatenate([np.arange(n)[None], orders])
    assert all(len(set(column)) == slots + 1 for column in table.T.tolist())


def test_independent_permutations_would_collide() -> None:
    """The defect is real: about C(6, 2) = 15 repeats an epoch, so the test above is not empty."""
    source = stream()
    table = np.stack([source.permutation(2000) for _ in range(6)])
    assert 4 <= sum(len(set(column)) < 6 for column in table.T.tolist()) <= 35


@pytest.mark.parametrize("draw", [lambda s: draw_distinct(s, 3, 4, 1), lambda s: draw_partner_permutations(s, 4, 4)])
def test_too_few_images_are_refused(draw) -> None:
    with pytest.raises(BadInput, match="cannot be drawn"):
        draw(stream())


# ---- mixing


def keys_for(b: int, k: int, inside: int, n: int, m: int, d: int, seed: int, bits: bool = True) -> KeyRows:
    s = stream(seed)
    index = draw_distinct(s, n, inside, b)
    if inside < k:
        index = np.concatenate([index, draw_distinct(s, m, k - inside, b)], 1)
    weights = draw_coefficients(s, MixLaw(k, k, c1=1.0), b)
    return KeyRows(index, weights, draw_mask(s, b, d) if bits else None)


def table(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.randint(0, 256, (n, d), dtype=torch.uint8)
    return made if dtype == torch.uint8 else made.to(dtype) / 255


@given(
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from([*SIZES, 35, 192]),
    st.sampled_from([torch.uint8, torch.float32]),
    st.sampled_from(["sign", "abs", "none"]),
    st.integers(0, 99),
)
@settings(max_examples=80)
def test_all_paths_agree(k: int, outside: int, d: int, dtype: torch.dtype, mask: str, seed: int) -> None:
    inside = max(1, k - outside)
    private, public = table(12, d, dtype), table(9, d, dtype) if inside < k else None
    keys = keys_for(5, k, inside, 12, 9, d, seed)
    want = mixing.mix_reference(private, public, inside, keys, mask)
    for path in PATHS:
        got = mixing.mix(private, public, inside, keys, mask, torch.empty(5, d), path)
        assert torch.allclose(got.double(), want, atol=1e-5, rtol=0)
        clear = want.abs() > 1e-5
        assert torch.equal(got.signbit()[clear], want.signbit()[clear])
        half = mixing.mix(private, public, inside, keys, mask, torch.empty(5, d, dtype=torch.bfloat16), path)
        assert torch.equal(half, got.bfloat16())  # rounded to nearest even, bit for bit
    assert want.abs().max() <= 1 + 1e-6


def test_the_mask_is_keystream_bits_alike_on_every_path() -> None:
    """Mixing a constant 1 leaves nothing but the mask."""
    d, bits = 35, stream().bytes(4 * 5).reshape(4, 5)
    keys = KeyRows(np.zeros((4, 1), np.int64), np.ones((4, 1), np.float32), bits)
    want = 1 - 2 * np.array([[(row[i % 5] >> (i // 5)) & 1 for i in range(d)] for row in bits.astype(int)])
    for path in (*PATHS, "reference"):
        got = mixing.mix(torch.full((1, d), 255, dtype=torch.uint8), None, 1, keys, "sign", torch.empty(4, d), path)
        assert torch.allclose(got, torch.from_numpy(want).float(), atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_abs_is_the_absolute_value_of_sign_exactly(path) -> None:
    private, keys = table(20, 48, torch.uint8), keys_for(30, 4, 4, 20, 0, 48, 1)
    sign, mag, none = (
        mixing.mix(private, None, 4, keys, m, torch.empty(30, 48), path) for m in ("sign", "abs", "none")
    )
    assert torch.equal(sign.abs(), mag)
    assert torch.equal(none.abs(), mag)
    flips = mixing.mask_flips(torch.from_numpy(keys.bits), 48)
    assert torch.equal(torch.where(flips, -none, none), sign)
    assert 0.4 < flips.float().mean() < 0.6


def test_memory_maps_mix_like_memory(tmp_path) -> None:
    private = table(20, 48, torch.uint8)
    np.save(tmp_path / "x.npy", private.numpy())
    mapped, keys = np.load(tmp_path / "x.npy", mmap_mode="r"), keys_for(6, 4, 4, 20, 0, 48, 1)
    for path in PATHS:
        both = [mixing.mix(t, None, 4, keys, "sign", torch.empty(6, 48), path) for t in (private, mapped)]
        assert torch.equal(*both)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_mapped_public_pool_mixes_with_private_tensors(tmp_path, dtype) -> None:
    """torch and numpy name the same dtype differently; what they hold is alike."""
    private, public = table(20, 48, dtype), table(30, 48, dtype)
    np.save(tmp_path / "pool.npy", public.numpy())
    mapped, keys = np.load(tmp_path / "pool.npy", mmap_mode="r"), keys_for(6, 5, 2, 20, 30, 48, 1)
    for path in PATHS:
        both = [mixing.mix(private, t, 2, keys, "sign", torch.empty(6, 48), path) for t in (public, mapped)]
        assert torch.equal(*both)
    with pytest.raises(BadInput, match="do not mix"):
        mixing.mix(private.double(), mapped, 2, keys, "sign", torch.empty(6, 48))


def test_float64_batches_mix_in_float64() -> None:
    private, keys = table(20, 48, torch.float64), keys_for(6, 4, 4, 20, 0, 48, 1)
    got = mixing.mix_torch(private, None, 4, keys, "none", torch.device("cpu"))
    assert torch.allclose(got, mixing.mix_reference(private, None, 4, keys, "none"), atol=1e-6)
    assert got.dtype == torch.float64


def test_without_numba_torch_does_the_work(monkeypatch) -> None:
    private, keys = table(20, 48, torch.uint8), keys_for(6, 4, 4, 20, 0, 48, 1)
    labels = np.arange(20) % 3
    want = mixing.mix(private, None, 4, keys, "sign", torch.empty(6, 48)), mixing.mix_targets(labels, 3, 2, keys)
    monkeypatch.setattr(mixing, "kernel", lambda _: None)
    assert torch.allclose(mixing.mix(private, None, 4, keys, "sign", torch.empty(6, 48)), want[0], atol=1e-6)
    assert torch.allclose(mixing.mix_targets(labels, 3, 2, keys), want[1])
    with pytest.raises(BadInput, match="numba on a CPU"):
        mixing.mix(private, None, 4, keys, "sign", torch.empty(6, 48), "fused")


ALL_BYTES = np.arange(256, dtype=np.uint8)
SPELLINGS = [
    torch.from_numpy(ALL_BYTES).float().div(255).numpy(),  # as ToTensor does it
    torch.from_numpy(ALL_BYTES).float().mul(1 / 255).numpy(),
    (ALL_BYTES / 255).astype(np.float32),
    ALL_BYTES.astype(np.float32) * np.float32(1 / 255),
]


@pytest.mark.parametrize("run", [to_bytes, kernel(to_bytes)])
def test_floats_that_are_bytes_are_known_however_they_were_divided(run) -> None:
    for values in SPELLINGS:
        found = np.empty(256, np.uint8)
        assert run(values, found)
        assert (found == ALL_BYTES).all()


@given(at=st.integers(0, 9999), byte=st.integers(0, 255), off=st.sampled_from([-1e-3, -1e-6, 1e-6, 1e-3]))
@settings(max_examples=40)
def test_one_float_that_is_no_byte_makes_a_table_of_floats(at: int, byte: int, off: float) -> None:
    values = np.full((10, 1000), np.float32(100 / 255))
    values.reshape(-1)[at] = byte / 255 + off
    assert mixing.as_source(values, "auto", alone=True).dtype == np.float32
    values.reshape(-1)[at] = byte / 255
    made = mixing.as_source(values, "auto", alone=True)
    assert made.dtype == np.uint8
    assert made.reshape(-1)[at] == byte


def test_floats_stay_what_they_are_where_bytes_would_not_do() -> None:
    values = torch.from_numpy(SPELLINGS[0]).view(4, 64)
    assert mixing.as_source(values, "auto", alone=False).dtype == np.float32  # they are mixed with a table of floats
    assert mixing.as_source(values, "torch", alone=True) is values


@pytest.mark.parametrize(("run", "k"), [(mix_rows, 3), (mix_more_rows, 5), (mix_most_rows, 7)])
@pytest.mark.parametrize("d", [19, 8 * LANES + 8, 8 * LINE])
def test_the_kernel_is_plain_python_too(run, k: int, d: int) -> None:
    """The uncompiled function gives the bits of the compiled one (without fused multiply-add: to 1e-6)."""
    private, keys = table(8, d, torch.uint8).numpy(), keys_for(3, k, k, 8, 0, d, 1)
    given = private, private, k, keys.indices, keys.coefficients, np.float32(1 / 127.5), np.float32(-1), keys.bits
    made = {dtype: [np.empty((3, d), dtype) for _ in range(2)] for dtype in (np.uint32, np.uint16)}
    for both in made.values():
        for each, out in zip((run, kernel(run)), both, strict=True):
            each(*given, out, None)
    plain, fused = (out.view(np.float32) for out in made[np.uint32])
    assert np.allclose(plain, fused, atol=1e-6)
    halves = [torch.from_numpy(out).view(torch.bfloat16) for out in made[np.uint16]]
    assert torch.equal(halves[0], torch.from_numpy(plain).bfloat16())
    assert torch.equal(halves[1], torch.from_numpy(fused).bfloat16())


@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 6, 9])
def test_what_is_written_past_the_caches_has_the_same_bits(monkeypatch, k: int, dtype, source) -> None:
    """Where places are not aligned nothing is written that way: an eighth of 65, memory from the second value on."""
    for d, off in ((8 * LINE, 0), (8 * LANES, 0), (8 * (LINE + 1), 0), (8 * LINE, 1)):
        private, public = table(20, d, source), table(9, d, source)
        keys, found = keys_for(6, k, 2, 20, 9, d, 1), []
        for size in (1 << 25, 0):
            monkeypatch.setattr(mixing, "_CACHE", size)
            out = torch.zeros(6 * d + off, dtype=dtype)[off:].view(6, d)
            found.append(mixing.mix(private, public if k > 2 else None, 2, keys, "sign", out, "fused"))
        assert torch.equal(*(each.view(torch.uint8) for each in found))


@pytest.mark.parametrize("source", [torch.uint8, torch.float32])
def test_rounding_of_whole_rows_is_that_of_torch(source) -> None:
    """One image at weight 1: what is mixed is every float32 that a pixel can be, at many scales, both signs."""
    d = 8 * LINE
    images = table(64, d, source)
    scales = torch.rand(64, generator=torch.Generator().manual_seed(0)).numpy().astype(np.float32)
    scales = np.rint(scales * GRID) / GRID if source == torch.uint8 else scales
    keys = KeyRows(np.arange(64)[:, None], scales[:, None], draw_mask(stream(), 64, d))
    exact, half = (
        mixing.mix(images, None, 1, keys, "sign", torch.empty(64, d, dtype=t), "fused")
        for t in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("k", [2, 4, 5, 8])
def test_bytes_by_other_coefficients_are_left_to_torch(k: int) -> None:
    """The compiled loops weigh bytes by whole numbers; nothing that they would round is given to them."""
    private, keys = table(12, 70, torch.uint8), keys_for(5, k, k, 12, 0, 70, 1)
    moved = keys.coefficients.copy()
    moved[-1, :2] += np.array([1, -1], np.float32) / (4 * GRID)
    for wrong in (moved, -keys.coefficients, 2 * keys.coefficients + 1):
        other = KeyRows(keys.indices, wrong, keys.bits)
        with pytest.raises(BadInput, match="steps of 2\\^-14"):
            mixing.mix(private, None, k, other, "sign", torch.empty(5, 70), "fused")
        floats = private.float() / 255
        mixing.mix(floats, None, k, other, "sign", torch.empty(5, 70), "fused")
    other = KeyRows(keys.indices, moved, keys.bits)
    want = mixing.mix_reference(private, None, k, other, "sign")
    assert torch.allclose(mixing.mix(private, None, k, other, "sign", torch.empty(5, 70)).double(), want, atol=1e-6)


def test_bytes_are_summed_exactly_on_every_path() -> None:
    """Fused and plain loops round once, torch twice: apart by no more than the last place."""
    private, keys = table(50, 8 * LINE + 24, torch.uint8), keys_for(64, 6, 6, 50, 0, 8 * LINE + 24, 1)
    sums = np.einsum(
        "bk,bkd->bd", keys.coefficients.astype(np.float64), private.numpy()[keys.indices].astype(np.float64)
    )
    want = (sums * np.float64(np.float32(1 / 127.5)) - 1).astype(np.float32)
    got = mixing.mix(private, None, 6, keys, "none", torch.empty(want.shape), "fused").numpy()
    assert np.array_equal(got, want)
    by_torch = mixing.mix(private, None, 6, keys, "none", torch.empty(want.shape), "torch").numpy()
    assert np.abs(by_torch - want).max() <= 2**-23


def test_ties_of_whole_rows_go_to_even() -> None:
    """1 + n 2^-8 lies between two bfloat16: up to the even one, whichever that is, on both sides of zero."""
    d = 8 * LINE
    pixels = torch.arange(d).remainder(257).float() / 256
    ties = (1 + torch.arange(d).remainder(255) / 256).view(1, d)
    keys = KeyRows(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), stream().bytes(d // 8).reshape(1, -1))
    images = torch.where(torch.arange(d) % 2 == 0, (ties + 1) / 2, pixels)  # 2 x - 1 gives the ties exactly
    exact, half = (
        mixing.mix(images, None, 1, keys, "sign", torch.empty(1, d, dtype=t), "fused")
        for t in (torch.float32, torch.bfloat16)
    )
    cut = exact.view(torch.int32) & 0xFFFF
    assert int((cut == 0x8000).sum()) > d // 8
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("k", [2, 4, 6, 8])
def test_a_product_and_its_sum_are_rounded_alike_in_lines_and_in_lanes(k: int) -> None:
    """What a pixel becomes does not hang on where in its row it stands."""
    d = 8 * LINE
    private, keys = table(9, d, torch.uint8), keys_for(5, k, k, 9, 0, d, 1, bits=False)
    whole = mixing.mix(private, None, k, keys, "none", torch.empty(5, d), "fused")
    for part in (8 * LANES, 8 * LANES + 8, 8 * (LANES + 2 * LANES), 19):
        got = mixing.mix(private[:, :part].contiguous(), None, k, keys, "none", torch.empty(5, part), "fused")
        assert torch.equal(got, whole[:, :part])


NARROW = """
import sys
import numpy as np, torch
from frostglass.numerics import mixing
from frostglass.numerics.key_rows import KeyRows
given = np.load(sys.argv[1])
for name, (dtype, table) in {
    f"{dtype}_{kind}": (dtype, given[kind]) for dtype in ("float32", "bfloat16") for kind in ("bytes", "floats")
}.items():
    keys = KeyRows(given["indices"], given["coefficients"], given["bits"])
    out = torch.empty(len(keys.indices), table.shape[1], dtype=getattr(torch, dtype))
    made = mixing.mix(table, None, keys.indices.shape[1], keys, "sign", out, "fused")
    np.save(sys.argv[2] + name + ".npy", made.view(torch.uint8).numpy())
"""


@pytest.mark.parametrize(
    "told",
    [
        {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"},
        pytest.param({"NUMBA_ENABLE_AVX": "0"}, marks=pytest.mark.slow),
    ],
    ids=["haswell", "no AVX"],
)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names processors of this kind")
def test_processors_with_smaller_vectors_make_the_same_bits(tmp_path: Path, told: dict[str, str]) -> None:
    """What is done without instructions for bfloat16, in a process of its own, as what is compiled stays so."""
    d = 8 * (LINE + 2 * LANES) + 8
    keys = keys_for(4, 4, 4, 9, 0, d, 1)
    tables = {"bytes": table(9, d, torch.uint8).numpy(), "floats": table(9, d, torch.float32).numpy()}
    given = tmp_path / "given.npz"
    np.savez(given, indices=keys.indices, coefficients=keys.coefficients, bits=keys.bits, **tables)
    environment = os.environ | told | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", NARROW, str(given), f"{tmp_path}/"], check=True, env=environment)
    for dtype in (torch.float32, torch.bfloat16):
        for kind, pixels in tables.items():
            out = mixing.mix(pixels, None, 4, keys, "sign", torch.empty(4, d, dtype=dtype), "fused")
            found = np.load(tmp_path / f"{str(dtype).removeprefix('torch.')}_{kind}.npy")
            assert np.array_equal(found, out.view(torch.uint8).numpy()), (dtype, kind)


def test_bfloat16_by_integers_is_that_of_torch() -> None:
    """For processors that do not round by themselves: ties, both signs, zeros, the largest numbers, and many others."""
    some = [0x0, 0x80000000, 0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF, 0x3F808001, 0x3FFFFFFF, 0x7F7F7FFF]
    bits = np.concatenate([np.array(some, np.uint32), stream().bytes(40_000).view("<u4") & np.uint32(0xBFFFFFFF)])
    want = torch.from_numpy(bits.view(np.int32)).view(torch.float32).bfloat16().view(torch.uint16).numpy()
    compiled = numba.njit(inspect.unwrap(rounded))
    assert [int(compiled(b)) for b in bits] == want.tolist()
    assert [int(rounded(b)) for b in bits[:1000]] == want[:1000].tolist()


def test_tables_that_do_not_go_together_are_refused() -> None:
    keys = keys_for(2, 4, 2, 5, 5, 48, 0)
    for public in (table(5, 47, torch.uint8), table(5, 48, torch.float32)):
        with pytest.raises(BadInput, match="do not mix"):
            mixing.mix(table(5, 48, torch.uint8), public, 2, keys, "abs", torch.empty(2, 48))


def test_key_rows_are_not_pickled_copied_or_printed() -> None:
    keys = keys_for(2, 4, 2, 5, 5, 48, 0)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="key material"):
            leak(keys)
    assert repr(keys) == "KeyRows(2 secret rows)"


# ---- labels


def test_targets_take_the_private_share_of_each_class() -> None:
    keys = KeyRows(np.array([[0, 2, 1, 0]]), np.array([[0.4, 0.2, 0.3, 0.1]], np.float32))
    for path in PATHS:
        got = mixing.mix_targets(np.array([1, 0, 1]), 3, 2, keys, path)
        assert got[0].tolist() == pytest.approx([0, 0.6, 0])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_quantised_labels_are_quarters_of_about_the_same_mass(k: int, private: int, seed: int) -> None:
    private = min(private, k)
    keys = keys_for(20, k, k, 8, 0, 8, seed, bits=False)
    exact = mixing.mix_targets(np.arange(8) % 4, 4, private, keys)
    coarse = mixing.coarse_targets(exact, "quantised")
    assert torch.equal(coarse * 4, (coarse * 4).round())
    assert torch.equal(coarse.sum(1), (exact.double().sum(1) * 4).round().float() / 4)
    assert (coarse >= 0).all()
    assert (coarse - exact).abs().max() < 0.25 + 1e-6


def test_label_modes() -> None:
    exact = torch.tensor([[0.3, 0.1, 0.0]])
    assert mixing.coarse_targets(exact, "exact") is exact
    assert torch.allclose(mixing.coarse_targets(exact, "renormalised"), torch.tensor([[0.75, 0.25, 0.0]]))
    assert mixing.coarse_targets(exact, "quantised").tolist() == [[0.25, 0.25, 0.0]]
