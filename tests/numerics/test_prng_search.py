"""Seed search against the generators themselves: found where it is there, not found where it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from encoded_scenes import crops
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sets.writing import SetWriter
from frostglass.numerics import key_rows
from frostglass.numerics.key_rows import MixLaw, draw_coefficients
from frostglass.numerics.keystream import Secret
from frostglass.numerics.mixing import coarse_targets
from frostglass.numerics.prng_search import (
    MASS,
    PARTS,
    SKIP,
    clues_of,
    fits,
    label_mode,
    search_permutation,
    search_released,
)
from frostglass.numerics.prng_search_own import own_keys, search_own, shard_path
from frostglass.numerics.prng_search_released import released_coefficients, released_keys
from frostglass.numerics.prng_search_solve import consistent, second_classes, solve_images

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

CROSS = MixLaw(6, 2)


def labels(indices: np.ndarray, coefficients: np.ndarray, private: int, classes: int = 10) -> np.ndarray:
    """[E, classes] published labels; image i has class i % classes."""
    out = np.zeros((len(indices), classes), np.float32)
    np.add.at(out, (np.arange(len(out))[:, None], indices[:, :private] % classes), coefficients[:, :private])
    return out


@pytest.mark.parametrize("mode", ["exact", "quantised", "renormalised"])
def test_the_released_generators_seed_is_found(mode: str) -> None:
    keys = released_keys(12_345, 60, 80, 2, CROSS, 0)
    targets = coarse_targets(torch.from_numpy(labels(keys.indices, keys.coefficients, 2)), mode).numpy()
    clues = clues_of(targets, CROSS)
    assert clues.labels == label_mode(targets, CROSS) == mode
    assert search_released(clues, CROSS, 60, 12_000, 12_500) == 12_345
    assert search_released(clues, CROSS, 60, 0, 12_345) == -1
    assert search_released(clues, CROSS, 60, 12_346, 20_000) == -1


@pytest.mark.parametrize("law", [MixLaw(2, 2), MixLaw(4, 4), MixLaw(4, 2)])
def test_other_laws_are_found_too_and_nothing_else(law: MixLaw) -> None:
    keys = released_keys(777, 40, 50, 4, law, 0)
    clues = clues_of(labels(keys.indices, keys.coefficients, law.private, 40), law)
    assert search_released(clues, law, 40, 0, 4000) == 777
    assert search_released(clues, law, 40, 778, 4000) == -1


def test_coefficients_are_those_of_numpys_legacy_generator() -> None:
    """The first round, row by row, from numpy itself."""
    drawn = np.abs(np.random.RandomState(5).normal(0, 1, (30, 6)))
    drawn = (drawn / drawn.sum(1, keepdims=True)).astype(np.float32)
    made = released_coefficients(5, 30, 1, CROSS)
    ok = CROSS.accepts(drawn)
    assert np.array_equal(made[ok], drawn[ok])
    assert 0 < ok.sum() < 30
    assert bool(CROSS.accepts(made).all())


def test_a_seed_of_the_permutations_of_its_own_is_found() -> None:
    keys = released_keys(9, 60, 80, 1, CROSS, 0, torch_seed=4321)
    targets = labels(keys.indices, keys.coefficients, 2)
    assert not consistent(9, targets, 60, CROSS)
    first, second = second_classes(9, targets, 60, CROSS)
    assert (first >= 0).mean() > 0.8
    assert bool((first[first >= 0] == (np.arange(60) % 10)[first >= 0]).all())
    assert search_permutation(first, second, 0, 6000) == 4321
    assert search_permutation(first, second, 0, 4321) == -1


def test_the_same_seed_for_both_is_consistent() -> None:
    keys = released_keys(31, 60, 80, 1, CROSS, 0)
    assert consistent(31, labels(keys.indices, keys.coefficients, 2), 60, CROSS)


def test_seeds_beyond_32_bits_and_other_laws_are_refused() -> None:
    with pytest.raises(BadInput, match="32 bits"):
        released_coefficients(1 << 32, 4, 1, CROSS)
    with pytest.raises(BadInput, match="folded_normal"):
        released_coefficients(1, 4, 1, MixLaw(4, 2, law="dirichlet"))
    with pytest.raises(BadInput, match="public"):
        released_keys(1, 40, 10, 1, CROSS, 0)


def test_one_hot_labels_and_too_many_classes_are_refused() -> None:
    assert label_mode(np.eye(4, dtype=np.float32), CROSS) is None
    with pytest.raises(BadInput, match="no coefficients"):
        clues_of(np.eye(4, dtype=np.float32), CROSS)
    with pytest.raises(BadInput, match="names 3 classes"):
        clues_of(np.full((4, 3), 0.3, np.float32), CROSS)
    gaps = np.array([[0.31, 0.22, 0], [0, 0, 0], [0, 0.41, 0]], np.float32)
    assert clues_of(gaps, CROSS).kinds.tolist() == [PARTS, SKIP, MASS], "a missing label says nothing"


@pytest.mark.parametrize("settings", [{"k": 4}, {"k": 6, "private": 2}, {"k": 4, "law": "dirichlet"},
                                      {"k": 4, "private": 2, "labels": "quantised"}])  # fmt: skip
def test_our_own_encoders_insecure_seed_is_found_and_replayed(tmp_path, settings) -> None:
    """Found among thousands, and its keys give every pixel of every encoding."""
    x, y = (crops(8, 24) * 255).to(torch.uint8), torch.arange(24) % 6
    pool = (crops(8)[30:] * 255).to(torch.uint8) if "private" in settings else None
    encoder = InstaHide(**{"labels": "exact", "public": pool, "insecure_seed": 1700} | settings)
    made = SetWriter(encoder, x, y, 6, tmp_path / "set", rounds=8, shard_rows=80).write()
    shards = [s["rows"] for s in made["shards"]]
    from frostglass.auditing.unmixing_inputs import read_encoded

    held = read_encoded(tmp_path / "set")
    assert held.targets is not None
    clues = clues_of(held.targets.numpy(), encoder.law)
    assert search_own(clues, encoder.law, shards, 0, 2048) == 1700
    assert search_own(clues, encoder.law, shards, 1701, 2500) == -1
    keys = own_keys(1700, 24, 0 if pool is None else len(pool), shards, encoder.law, 192, True)
    table = torch.cat([x, x[:0] if pool is None else pool]).flatten(1).float() / 127.5 - 1
    index = keys.indices.copy()
    index[:, encoder.law.private :] += 24
    mixed = (torch.from_numpy(keys.coefficients)[..., None] * table[index]).sum(1)
    mixed = torch.where(torch.from_numpy(keys.flips), -mixed, mixed)
    assert torch.allclose(mixed, held.images.flatten(1), atol=1e-5)


def test_a_key_of_the_system_is_not_found() -> None:
    encoder = InstaHide(k=4, labels="exact")
    made = encoder.encode_rows(crops(8, 20), torch.arange(20), np.arange(20), 0, 20)
    clues = clues_of(made.targets.numpy(), encoder.law)
    assert search_own(clues, encoder.law, [20], 0, 1 << 12) == -1
    assert search_released(clues, encoder.law, 20, 0, 1 << 16) == -1


def test_screening_agrees_with_the_encoders_own_draws() -> None:
    law = MixLaw(5, 3)
    secret = Secret.draw(Insecure(12)).at(*shard_path(0))
    rows = draw_coefficients(secret.stream("coefficients"), law, 4096)
    targets = np.zeros((60, 60), np.float32)
    targets[np.arange(60)[:, None], (np.arange(60)[:, None] + np.arange(3)) % 60] = rows[:60, :3]
    clues = clues_of(targets, law)
    assert fits(rows[:60, :3], clues)
    assert not fits(rows[1:61, :3], clues)
    assert search_own(clues, law, [60], 0, 40) == 12


def test_screening_knows_that_candidates_are_drawn_in_parts(monkeypatch) -> None:
    """As they are for shards of many encodings, or where few rows are accepted."""
    monkeypatch.setattr(key_rows, "_AT_ONCE", 1 << 13)
    law = MixLaw(5, 3)
    rows = draw_coefficients(Secret.draw(Insecure(12)).at(*shard_path(0)).stream("coefficients"), law, 4096)
    targets = np.zeros((20, 20), np.float32)
    targets[np.arange(20)[:, None], (np.arange(20)[:, None] + np.arange(3)) % 20] = rows[:20, :3]
    assert search_own(clues_of(targets, law), law, [20], 0, 40) == 12


@pytest.mark.parametrize(("labels", "shard_rows"), [("exact", 1), ("quantised", 4)])
def test_a_first_shard_of_few_rows_names_no_wrong_seed(tmp_path, labels, shard_rows) -> None:
    """Few rows alone fit many seeds; those of the shards behind it tell them apart."""
    x, y = (crops(8, 24) * 255).to(torch.uint8), torch.arange(24)
    encoder = InstaHide(k=2, labels=labels, insecure_seed=1700)
    made = SetWriter(encoder, x, y, 24, tmp_path / "set", rounds=4, shard_rows=shard_rows).write()
    from frostglass.auditing.unmixing_inputs import read_encoded

    held = read_encoded(tmp_path / "set")
    assert held.targets is not None
    clues, shards = clues_of(held.targets.numpy(), encoder.law), [s["rows"] for s in made["shards"]]
    assert 0 <= search_own(clues, encoder.law, shards[:1], 0, 1 << 15) != 1700
    assert search_own(clues, encoder.law, shards, 0, 2048) == 1700


@pytest.mark.parametrize("mask", ["sign", "none", "abs"])
def test_images_follow_from_known_keys(mask: str) -> None:
    x = crops(8, 10).flatten(1) * 2 - 1
    keys = released_keys(3, 10, 0, 12, MixLaw(2, 2), 192)
    mixed = (torch.from_numpy(keys.coefficients)[..., None] * x[keys.indices]).sum(1)
    assert keys.flips is not None
    y = {"sign": torch.where(torch.from_numpy(keys.flips), -mixed, mixed), "none": mixed, "abs": mixed.abs()}[mask]
    solved = solve_images(y, keys, 10, mask)
    if mask == "abs":  # the sign of each pixel, jointly over all images, is not in the data
        assert solved.residual < 0.1
        assert solved.open_signs
        return
    assert not solved.open_signs
    assert float((solved.images - x).abs().max()) < 0.05
    assert solved.residual < 0.01
