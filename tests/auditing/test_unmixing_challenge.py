"""Challenges: the format, the commitment, and the scores against their definitions."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from skimage.metrics import structural_similarity

from encoded_scenes import crops
from frostglass.auditing.unmixing_challenge import Settings, load_opening, make_challenge, packed, read_about
from frostglass.auditing.unmixing_challenge_score import score_challenge
from frostglass.auditing.unmixing_inputs import read_encoded
from frostglass.core.errors import BadInput
from frostglass.defenses.sources import PublicPool
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.prng_search import clues_of
from frostglass.numerics.prng_search_challenge import challenge_keys, search_challenge

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")


def images() -> torch.Tensor:
    return (crops(16) * 255).round().to(torch.uint8)


def make(root: Path, name: str = "c", **settings) -> Path:
    asked = Settings(**{"images": 10, "rounds": 5} | settings)
    pool = PublicPool(images()[30:]) if asked.law.private < asked.law.k else None
    make_challenge(asked, images()[:12], torch.arange(12) % 4, 4, pool, root / name, root / f"{name}.opening")
    return root / name


def test_the_defaults_are_those_of_the_public_challenge() -> None:
    asked = Settings()
    assert (asked.images, asked.rounds, asked.law.k, asked.law.private) == (100, 50, 6, 2)
    assert asked.images * asked.rounds == 5000
    assert (asked.law.c1, asked.law.c2, asked.labels) == (0.65, 0.3, "exact")


def test_every_encoding_is_what_its_opening_says(tmp_path) -> None:
    folder = make(tmp_path)
    held, about, opening = read_encoded(folder), read_about(folder), load_opening(tmp_path / "c.opening")
    assert held.images.shape == (50, 3, 16, 16)
    assert about["commitment"] == opening.commitment()
    assert opening.indices.shape == (50, 6)
    assert np.array_equal(np.bincount(opening.indices[:, 0]), [5] * 10), "each image is first once a round"
    assert np.array_equal(np.bincount(opening.indices[:, 1]), [5] * 10), "slot 2 is a permutation"
    assert bool((opening.indices[:, 0] != opening.indices[:, 1]).all())
    mass = np.zeros((50, 4), np.float32)
    np.add.at(mass, (np.arange(50)[:, None], opening.labels[opening.indices[:, :2]]), opening.coefficients[:, :2])
    assert np.allclose(mass, held.targets.numpy(), atol=1e-6)


def test_rows_do_not_stand_in_rounds(tmp_path) -> None:
    opening_rows = [load_opening(make(tmp_path, f"c{i}").with_name(f"c{i}.opening")).indices[:, 0] for i in range(2)]
    assert not np.array_equal(opening_rows[0], np.tile(np.arange(10), 5))
    assert not np.array_equal(opening_rows[0], opening_rows[1])


def test_the_opening_is_the_owners_alone_and_not_in_the_challenge(tmp_path) -> None:
    folder = make(tmp_path)
    assert stat.S_IMODE((tmp_path / "c.opening").stat().st_mode) == 0o600
    assert sorted(p.name for p in folder.iterdir()) == ["challenge.json", "encryption.npy", "label.npy"]
    text = (folder / "challenge.json").read_text()
    assert load_opening(tmp_path / "c.opening").nonce.hex() not in text
    assert "seed" not in read_about(folder)


def test_two_challenges_of_the_same_images_commit_to_different_things(tmp_path) -> None:
    one, two = (read_about(make(tmp_path, name, seed=3)) for name in "ab")
    assert one["commitment"] != two["commitment"], "the nonce differs, or equal keys could be told by equal hashes"
    assert np.array_equal(np.load(tmp_path / "a" / "encryption.npy"), np.load(tmp_path / "b" / "encryption.npy"))
    assert one["insecure"] is True


def test_an_opening_that_was_changed_is_refused(tmp_path) -> None:
    folder = make(tmp_path)
    path = tmp_path / "c.opening"
    opening = load_opening(path)
    np.save(tmp_path / "decryption.npy", np.zeros((50, 16, 16, 3), np.float32))
    swapped = opening.indices.copy()
    swapped[0, :2] = swapped[0, 1::-1]
    path.unlink()
    replace(opening, indices=swapped).save(path)
    with pytest.raises(BadInput, match="not the opening that"):
        score_challenge(folder, tmp_path, path)


@pytest.mark.parametrize("unit", ["one", "signed", "bytes"])
def test_scores_are_those_of_the_definition(tmp_path, unit) -> None:
    """Against scikit-image and plain arithmetic, on a noisy copy of the first private image."""
    folder, opening = make(tmp_path), tmp_path / "c.opening"
    held = load_opening(opening)
    truth = held.images.astype(np.float64) / 255
    noise = np.random.default_rng(1).normal(0, 0.05, (50, 16, 16, 3))
    decrypted = (truth[held.indices[:, 0]] + noise).clip(0, 1)
    kept = {"one": decrypted, "signed": 2 * decrypted - 1, "bytes": (255 * decrypted).round().astype(np.uint8)}[unit]
    np.save(tmp_path / "decryption.npy", kept)
    found = score_challenge(folder, tmp_path, opening)
    used = kept / 255 if unit == "bytes" else decrypted
    ssim, l2 = [], []
    for e in range(50):
        both = [truth[held.indices[e, s]] for s in (0, 1)]
        ssim.append([structural_similarity(used[e], p, channel_axis=2, data_range=1.0) for p in both])
        l2.append([4 * ((used[e] - p) ** 2).mean() for p in both])
    s, d = np.array(ssim), np.array(l2)
    assert found["Max_SSIM"] == pytest.approx(s.max(1).mean(), abs=1e-4)
    assert found["Mean_SSIM"] == pytest.approx(s.mean(), abs=1e-4)
    assert found["Min_L2"] == pytest.approx(d.min(1).mean(), abs=1e-4)
    assert found["Max_L2"] == pytest.approx(d.max(1).mean(), abs=1e-4)
    assert found["Mean_L2"] == pytest.approx(d.mean(), abs=1e-4)


def test_a_negated_submission_is_taken_only_when_asked(tmp_path) -> None:
    folder, opening = make(tmp_path), tmp_path / "c.opening"
    held = load_opening(opening)
    np.save(tmp_path / "decryption.npy", -(held.images[held.indices[:, 0]] / 127.5 - 1))
    plain, either = (score_challenge(folder, tmp_path, opening, either_sign=e) for e in (False, True))
    assert either["Max_SSIM"] == pytest.approx(1, abs=1e-5)
    assert either["negated"] is True
    assert plain["Max_SSIM"] < 0.6


def test_rounding_below_0_leaves_a_submission_in_0_to_1(tmp_path) -> None:
    folder, opening = make(tmp_path), tmp_path / "c.opening"
    held = load_opening(opening)
    given = (held.images[held.indices[:, 0]] / 255).astype(np.float32)
    given[0, 0, 0, 0] = -1e-6
    np.save(tmp_path / "decryption.npy", given)
    assert score_challenge(folder, tmp_path, opening)["Max_SSIM"] > 0.999


def test_an_archive_is_no_submission(tmp_path) -> None:
    folder = make(tmp_path)
    with (tmp_path / "decryption.npy").open("wb") as held:
        np.savez(held, a=np.zeros((50, 16, 16, 3)))
    with pytest.raises(BadInput, match="is an archive"):
        score_challenge(folder, tmp_path / "decryption.npy", tmp_path / "c.opening")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.zeros((49, 16, 16, 3), np.float32), "must be (50, 16, 16, 3)"),
        (np.full((50, 16, 16, 3), 7.0, np.float32), "run from 7"),
        (np.full((50, 16, 16, 3), np.nan, np.float32), "run from nan"),
        (np.array([None] * 50, dtype=object), "cannot be read"),
    ],
)
def test_submissions_that_do_not_fit_are_refused(tmp_path, value, sentence) -> None:
    folder = make(tmp_path)
    np.save(tmp_path / "decryption.npy", value, allow_pickle=True)
    with pytest.raises(BadInput) as wrong:
        score_challenge(folder, tmp_path / "decryption.npy", tmp_path / "c.opening")
    assert sentence in str(wrong.value)


def test_challenges_that_cannot_be_made_leave_nothing(tmp_path) -> None:
    for settings, sentence in (
        ({"images": 13}, "12 images are fewer"),
        ({"images": 1}, "too few; give at least 2 images"),
        ({"generator": "released"}, "--insecure-seed"),
        ({"generator": "other"}, "not known"),
    ):
        with pytest.raises(BadInput, match=sentence):
            make(tmp_path, **settings)
    with pytest.raises(BadInput, match="--public must match"):
        make_challenge(Settings(images=4, rounds=1), images()[:4], torch.zeros(4).long(), 2, None, tmp_path / "x",
                       tmp_path / "x.opening")  # fmt: skip
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        make_challenge(Settings(images=4, rounds=1, law=MixLaw(2, 2)), images()[:4], torch.zeros(4).long(), 2, None,
                       tmp_path / "file" / "c", tmp_path / "x.opening")  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "its opening holds the images and all keys"
    make(tmp_path)
    with pytest.raises(BadInput, match="is in the way"):
        make(tmp_path)


def test_the_opening_never_lands_in_the_folder_to_be_published(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # paths as a person types them, not made absolute
    asked = Settings(images=4, rounds=1, law=MixLaw(2, 2))
    for opening in ("c/opening", "c", "./c/deeper/opening", str(tmp_path / "c" / "opening")):
        with pytest.raises(BadInput, match="the opening outside"):
            make_challenge(asked, images()[:4], torch.zeros(4).long(), 2, None, Path("c"), Path(opening))
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_are_named_before_anything_is_encoded(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("frostglass.auditing.unmixing_challenge._encoded", None)
    with pytest.raises(BadInput, match=r"file/c/encryption.npy cannot be written .*; change OUT"):
        make(tmp_path, "file/c")
    asked = Settings(images=4, rounds=1, law=MixLaw(2, 2))
    with pytest.raises(BadInput, match=r"file/own cannot be written .*; change --opening"):
        make_challenge(asked, images()[:4], torch.zeros(4).long(), 2, None, tmp_path / "c", tmp_path / "file" / "own")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_becomes_too_large_is_no_fault_of_the_program(tmp_path, monkeypatch) -> None:
    """safetensors says so in an error of its own, which is no OSError."""

    def too_large(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr("safetensors.numpy.save_file", too_large)
    with pytest.raises(BadInput, match=r"cannot be written .*File too large"):
        make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_generator_of_2020_can_be_had_for_the_seed_search(tmp_path) -> None:
    import frostglass

    folder = make(tmp_path, seed=321, generator="released", law=MixLaw(4, 2), rounds=20)
    held = read_about(folder)
    assert (held["insecure"], held["generator"]) == (True, "released")
    found = frostglass.unmix(folder, truth=images()[:10].float() / 255, out=tmp_path / "out",
                             attacks=[{"name": "prng_attack", "last": 1000}])  # fmt: skip
    cell = found.scorecard.cells[0]
    assert (cell.info["seed"], cell.info["torch_seed"]) == (321, 321)
    assert cell.summary.ssim_median > 0.75
    scored = score_challenge(folder, tmp_path / "out", tmp_path / "c.opening")
    assert scored["Max_SSIM"] > 0.7
    assert scored["Mean_SSIM"] < scored["Max_SSIM"]


@pytest.mark.parametrize("law", [MixLaw(4, 2), MixLaw(3, 3), MixLaw(2, 2, law="dirichlet")])
def test_a_small_seed_of_our_own_generator_opens_a_challenge(tmp_path, law: MixLaw) -> None:
    import frostglass

    folder = make(tmp_path, seed=123, law=law, rounds=20)
    opening = load_opening(tmp_path / "c.opening")
    keys = challenge_keys(123, 10, 0, 20, law, 3 * 16 * 16)
    assert np.array_equal(keys.indices[:, : law.private], opening.indices[:, : law.private])
    assert np.array_equal(keys.coefficients, opening.coefficients)
    assert keys.flips is not None
    assert np.array_equal(packed(keys.flips), opening.flips)
    found = frostglass.unmix(folder, truth=images()[:10].float() / 255, out=tmp_path / "out",
                             attacks=[{"name": "prng_attack", "last": 256}])  # fmt: skip
    cell = found.scorecard.cells[0]
    assert cell.info["seed"] == 123
    assert cell.summary.ssim_median > 0.75
    assert score_challenge(folder, tmp_path / "out", tmp_path / "c.opening")["Max_SSIM"] > 0.7


@pytest.mark.parametrize("labels", ["quantised", "renormalised"])
def test_coarse_labels_tell_the_seed_of_a_challenge_too(tmp_path, labels) -> None:
    held = read_encoded(make(tmp_path, seed=77, labels=labels, law=MixLaw(4, 2), rounds=20))
    assert held.targets is not None
    clues = clues_of(held.targets.numpy(), MixLaw(4, 2))
    assert search_challenge(clues, MixLaw(4, 2), 10, 20, 0, 100) == 77
    assert search_challenge(clues, MixLaw(4, 2), 10, 20, 78, 300) == -1


def test_masks_are_packed_as_the_mixer_reads_them() -> None:
    from frostglass.numerics.mixing import mask_flips

    flips = np.random.default_rng(0).random((5, 75)) < 0.5
    assert np.array_equal(mask_flips(torch.from_numpy(packed(flips)), 75).numpy(), flips)
