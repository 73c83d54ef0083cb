"""Keys come from one secret through AES-CTR, one way, in separate streams; draws are unbiased; nothing is kept."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, OsKey
from frostglass.numerics.keystream import Keystream, Secret, normals_from

KEY = bytes(range(32))


def stream(name: str = "test", seed: int = 0) -> Keystream:
    return Secret.draw(Insecure(seed)).stream(name)


def test_the_stream_is_aes_256_ctr() -> None:
    """FIPS 197, appendix C.3: AES-256 of key 00..1f; counter mode from zero encrypts the zero block first."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    ecb = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    assert ecb.update(bytes.fromhex("00112233445566778899aabbccddeeff")).hex() == "8ea2b7ca516745bfeafc49904b496089"
    want = b"".join(ecb.update(i.to_bytes(16, "big")) for i in range(5000))
    assert Keystream(KEY).bytes(80_000).tobytes() == want


@given(st.lists(st.integers(0, 70_000), max_size=5))
def test_reading_in_parts_never_rewinds(parts: list[int]) -> None:
    whole = stream().bytes(sum(parts))
    source = stream()
    pieces = [source.bytes(n) for n in parts]
    assert np.array_equal(np.concatenate([*pieces, np.empty(0, np.uint8)]), whole)


def test_paths_and_purposes_give_unrelated_streams() -> None:
    secret = Secret(KEY)
    firsts = [
        secret.stream("indices"),
        secret.stream("mask"),
        secret.at("ab", "c").stream("mask"),
        secret.at("a", "bc").stream("mask"),
        secret.at("a", "b", "c").stream("mask"),
        secret.at(1).stream("mask"),
        secret.at("1").stream("mask"),
        Keystream(KEY),
    ]
    assert len({s.bytes(16).tobytes() for s in firsts}) == len(firsts)


def test_the_os_gives_256_new_bits_and_insecure_repeats() -> None:
    assert Secret.draw().stream("a").bytes(32).tobytes() != Secret.draw(OsKey()).stream("a").bytes(32).tobytes()
    assert np.array_equal(stream(seed=5).bytes(32), stream(seed=5).bytes(32))
    # torch's CPU generator cannot tell these two seeds apart
    assert not np.array_equal(stream(seed=5).bytes(32), stream(seed=5 + 2**32).bytes(32))


def test_no_default_generator_is_read_or_moved() -> None:
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # beartype itself reads `random`
    source = stream()
    got = source.normals(10), source.integers(7, 10), source.permutation(10), source.bytes(10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert pickle.dumps(np.random.get_state()) == before[1]
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    source = stream()
    again = source.normals(10), source.integers(7, 10), source.permutation(10), source.bytes(10)
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("make", [lambda: Secret(KEY), lambda: Keystream(KEY)])
def test_key_material_is_not_pickled_copied_or_printed(make) -> None:
    held = make()
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="key material"):
            leak(held)
    assert "..." in repr(held)
    assert KEY.hex()[:8] not in repr(held)
    assert str(KEY[:4])[2:-1] not in repr(held)


def test_wiped_secrets_are_gone() -> None:
    secret = Secret(KEY)
    source = secret.stream("a")
    secret.wipe()
    source.wipe()
    assert bytes(secret._key) == bytes(32)
    with pytest.raises(RuntimeError, match="wiped"):
        secret.stream("a")
    with pytest.raises(RuntimeError, match="wiped"):
        source.bytes(1)
    with pytest.raises(ValueError, match="32 bytes"):
        Secret(b"short")


@given(st.integers(1, 2**32 - 1), st.integers(0, 300), st.integers(0, 2**64))
def test_integers_are_in_range(high: int, count: int, seed: int) -> None:
    drawn = stream(seed=seed).integers(high, count)
    assert len(drawn) == count
    assert ((drawn >= 0) & (drawn < high)).all()


@pytest.mark.parametrize("high", [0, -1, 2**32])
def test_impossible_ranges_are_refused(high: int) -> None:
    with pytest.raises(BadInput, match="not possible"):
        stream().integers(high, 1)


def test_integers_are_unbiased() -> None:
    assert stats.chisquare(np.bincount(stream().integers(7, 70_000), minlength=7)).pvalue > 1e-4
    # A remainder modulo 3 * 2^30 would hit the lowest third of the range half of the time.
    low = (stream().integers(3 << 30, 60_000) < (1 << 30)).mean()
    assert abs(low - 1 / 3) < 0.01


def test_uniforms_normals_and_exponentials_follow_their_laws() -> None:
    assert stats.kstest(stream().uniforms(40_000), "uniform").pvalue > 1e-4
    assert stats.kstest(stream().normals(40_001), "norm").pvalue > 1e-4
    assert stats.kstest(stream().exponentials(40_000), "expon").pvalue > 1e-4
    assert len(stream().normals(7)) == 7


def test_normals_are_finite_for_every_word() -> None:
    words = np.array([0, 1, 1 << 31, 2**32 - 1], np.uint32)
    drawn = normals_from(np.repeat(words, 4), np.tile(words, 4))
    assert drawn.dtype == np.float32
    assert np.isfinite(drawn).all()
    assert 6.5 < np.abs(drawn).max() < 6.7


def test_permutations_are_uniform() -> None:
    source = stream()
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(3000):
        order = tuple(source.permutation(3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    assert stream().permutation(0).tolist() == []
