"""Encoded sets as they are found: both formats, and every way in which one can be wrong, a sentence each."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoded_scenes import crops
from frostglass.attacks.encodings.given import encodings_of, targets_of
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.unmixing_inputs import from_tensors, read_encoded
from frostglass.auditing.unmixing_plan import UnmixPlan, files_digest, parse_unmix_plan
from frostglass.auditing.unmixing_view import settings_of, view_of
from frostglass.core.errors import BadInput
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sets.manifest import sha256_of
from frostglass.defenses.sets.writing import SetWriter

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")


def arrays(folder, encodings=None, labels=None):
    folder.mkdir()
    x = np.random.default_rng(0).uniform(-1, 1, (12, 8, 8, 3)).astype(np.float32) if encodings is None else encodings
    np.save(folder / "encryption.npy", x)
    if labels is not None:
        np.save(folder / "label.npy", labels)
    return folder


def encoded_set(path):
    x, y = (crops(8, 6) * 255).to(torch.uint8), torch.arange(6) % 3
    SetWriter(InstaHide(k=2, labels="exact"), x, y, 3, path, rounds=4, shard_rows=10).write()
    return path


def test_a_set_of_our_own_is_read_with_its_manifest(tmp_path) -> None:
    held = read_encoded(encoded_set(tmp_path / "set"))
    assert held.images.shape == (24, 3, 8, 8)
    assert held.targets is not None
    assert held.targets.shape == (24, 3)
    view = view_of(parse_unmix_plan({"encoded": "x"}), held)
    assert (view.images, view.law.k, view.law.private) == (6, 2, 2)
    assert set(view.grants) == {"messages", "domain", "examples", "defence"}


def test_arrays_are_read_channels_last_or_first(tmp_path) -> None:
    labels = np.full((12, 4), 0.1, np.float32)
    last = read_encoded(arrays(tmp_path / "a", labels=labels))
    flipped = np.load(tmp_path / "a" / "encryption.npy").transpose(0, 3, 1, 2)
    first = read_encoded(arrays(tmp_path / "b", flipped))
    assert torch.equal(last.images, first.images)
    assert first.targets is None
    assert last.targets is not None
    assert last.digest != first.digest, "labels are part of what was attacked"


def test_encodings_beyond_one_are_scaled_and_said_so(tmp_path) -> None:
    held = read_encoded(arrays(tmp_path / "a", np.full((2, 4, 4, 3), -2.5, np.float32)))
    assert float(held.images.abs().max()) == 1.0
    assert "divided" in held.notes[0]


@pytest.mark.parametrize(
    ("encodings", "labels", "sentence"),
    [
        (np.array([np.zeros((8, 8, 3)), np.zeros((4, 4, 3))], dtype=object), None, "holds Python objects"),
        (np.zeros((12, 8, 8), np.float32), None, "must be [encodings, height, width, channels]"),
        (np.zeros((0, 8, 8, 3), np.float32), None, "must be [encodings, height, width, channels]"),
        (np.zeros((12, 8, 8, 5), np.float32), None, "neither its last nor its second axis"),
        (np.full((12, 8, 8, 3), np.nan, np.float32), None, "not finite"),
        (np.array(["a"] * 4).reshape(1, 2, 2, 1), None, "give numbers"),
        (None, np.zeros((11, 4), np.float32), "has shape (11, 4) for 12 encodings"),
        (None, np.zeros((12, 0), np.float32), "has shape (12, 0) for 12 encodings"),
        (None, -np.ones((12, 4), np.float32), "not negative"),
        (None, np.full((12, 4), 0.5, np.float32), "sum to at most 1"),
        (None, np.array([{"a": 1}] * 12, dtype=object), "label.npy holds Python objects"),
        (None, np.full(12, 0.5), "give class numbers or"),
        (None, np.full(12, 10**10), "more than 100000"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path, encodings, labels, sentence) -> None:
    with pytest.raises(BadInput) as wrong:
        read_encoded(arrays(tmp_path / "a", encodings, labels))
    assert sentence in str(wrong.value)
    assert len(wrong.value.problems) == 1


def test_a_pickle_is_never_run(tmp_path) -> None:
    """The file would create a marker if it were unpickled."""
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    folder = tmp_path / "a"
    folder.mkdir()
    np.save(folder / "encryption.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="Python objects"):
        read_encoded(folder)
    assert not marker.exists()


def test_files_that_are_not_arrays_are_refused(tmp_path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "encryption.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(BadInput, match="cannot be read"):
        read_encoded(folder)


def test_folders_without_a_set_are_refused(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="neither"):
        read_encoded(tmp_path / "empty")
    with pytest.raises(BadInput, match="is no folder"):
        read_encoded(tmp_path / "none")


def test_a_manifest_that_does_not_verify_is_refused(tmp_path) -> None:
    path = encoded_set(tmp_path / "set")
    shard = path / "encodings-00001.safetensors"
    held = bytearray(shard.read_bytes())
    held[-1] ^= 1
    shard.write_bytes(bytes(held))
    with pytest.raises(BadInput, match=r"encodings-00001\.safetensors has been changed"):
        read_encoded(path)


def test_targets_that_no_label_can_be_are_refused_wherever_they_come_from(tmp_path) -> None:
    for broken in (torch.full((2, 4), torch.nan), torch.full((2, 4), -0.1), torch.full((2, 4), 7.0)):
        with pytest.raises(BadInput, match="rows of targets must be finite, not negative"):
            from_tensors(torch.zeros(2, 3, 8, 8), broken)
    path = encoded_set(tmp_path / "set")
    manifest = json.loads((path / "manifest.json").read_text())
    shard, booked = path / "encodings-00001.safetensors", manifest["shards"][1]
    images = load_file(shard)["images"]
    for targets, sentence in ((torch.full((10, 3), torch.nan), "must be finite"), (torch.zeros(10, 2), "of 3 targets")):
        save_file({"images": images, "targets": targets}, shard)
        booked["sha256"] = sha256_of(shard)
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BadInput, match=sentence):
            read_encoded(path)


def test_other_images_are_brought_to_the_shape_of_encodings_that_are_not_square() -> None:
    plan = parse_unmix_plan({"encoded": "x", "auxiliary": "digits"})
    given = view_of(plan, from_tensors(torch.zeros(6, 3, 8, 6), None)).seen.auxiliary
    assert given is not None
    assert given.shape == (1797, 3, 8, 6)


def test_tensors_are_checked() -> None:
    x = torch.zeros(2, 3, 4, 4)
    for wrong, told in (
        (x + 3, r"torch\.float32 values from 3 to 3 must be floating point, finite and in \[-1, 1\]"),
        ((x + 200).byte(), r"torch\.uint8 values from 200 to 200 .* x / 127\.5 - 1 of bytes"),
        (x * torch.nan, "torch.float32 values from nan to nan"),
        (x.to(torch.complex64), "torch.complex64 values must be floating point"),
    ):
        with pytest.raises(BadInput, match=f"^encoded: {told}"):
            from_tensors(wrong, None)
    with pytest.raises(BadInput, match="must be \\[2, classes\\]"):
        from_tensors(torch.zeros(2, 3, 4, 4), torch.zeros(3, 2))
    with pytest.raises(BadInput, match="give a folder, or tensors"):
        from_tensors("nothing of the kind", None)
    with pytest.raises(BadInput, match="1 or 3 channels"):
        from_tensors(torch.zeros(2, 2, 4, 4), None)
    with pytest.raises(BadInput, match=r"targets: shape \(2, 0\)"):
        from_tensors(torch.zeros(2, 3, 4, 4), torch.zeros(2, 0))


def test_labels_that_are_no_numbers_are_refused(tmp_path) -> None:
    for kind in ("U1", "complex64", "datetime64[s]"):
        with pytest.raises(BadInput, match=r"label\.npy holds .* give class numbers or rows of mass"):
            read_encoded(arrays(tmp_path / kind, labels=np.zeros((12, 3), kind)))


def test_labels_that_unmixing_cannot_use_are_told_by_what_is_wrong_with_them(tmp_path) -> None:
    unmix = ATTACKS["unmix_statistical"].make()
    blank = read_encoded(arrays(tmp_path / "a", labels=np.zeros((12, 3), np.float32)))
    assert unmix.check(see(blank, k=2, images=4).seen) == [
        "every label is a row of zeros, which names no class; give --known labels=none."
    ]
    many = read_encoded(arrays(tmp_path / "b", labels=np.arange(12)))
    assert unmix.check(see(many, k=2, images=4).seen) == [
        "images: labels name 12 classes, more than the 4 private images; correct it."
    ]


def see(held, **known):
    plan = {"encoded": "x", "known": known}
    return view_of(parse_unmix_plan(plan), held)


def test_what_is_withheld_is_not_there() -> None:
    x, y = torch.zeros(6, 3, 8, 8), torch.full((6, 2), 0.25)
    held = from_tensors(x, y)
    assert see(held).seen.messages[0].targets is not None
    assert see(held, labels="none").seen.messages[0].targets is None
    view = see(held, labels="classes", k=4, private=2)
    rows = view.seen.messages[0].targets
    assert torch.allclose(rows, rows[0, 0].expand(6, 2)), "classes without coefficients: the same mass each"
    assert 0.4 < float(rows[0].sum()) < 0.8
    assert see(held).seen.defence is None
    assert see(held).seen.examples is None
    assert "k is not known: 2 private images" in see(held).notes[0]


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        ({"images": 7}, "6 encodings are fewer than the 7 private images"),
        ({"per_class": [1, 1, 1]}, "3 counts for 2 classes"),
        ({"per_class": [-1, 3]}, "known.per_class: -1 is no number of images; give counts from 0"),
        ({"per_class": [1, 1], "images": 3}, "sum to 2 and there are 3"),
        ({"k": 2, "private": 3}, "3 private images among k = 2"),
        ({"private": 2}, "known.k: missing"),
        ({"k": 4, "c1": 0.1}, "c1"),
        ({"labels": "some"}, "known.labels"),
        ({"imges": 3}, "did you mean 'images'"),
    ],
)
def test_grants_that_contradict_the_set_are_refused(known, sentence) -> None:
    with pytest.raises(BadInput) as wrong:
        see(from_tensors(torch.zeros(6, 3, 8, 8), torch.full((6, 2), 0.25)), **known)
    assert sentence in str(wrong.value)


def labelled(private: int, classes: int, mass: float) -> torch.Tensor:
    rows = torch.stack([torch.randperm(classes)[:private] for _ in range(40)])
    return torch.zeros(40, classes).scatter_(1, rows, mass / private)


def test_k_alone_leaves_private_slots_to_the_labels() -> None:
    x = torch.rand(40, 3, 8, 8)
    view = see(from_tensors(x, labelled(2, 10, 0.5)), k=6)
    assert (view.law.k, view.law.private) == (6, 2)
    assert "2 private images in one encoding are assumed" in " ".join(view.notes)
    assert see(from_tensors(x, labelled(2, 10, 1.0)), k=6).law.private == 2, "renormalised"
    assert see(from_tensors(x, labelled(4, 10, 1.0)), k=4).law.private == 4, "inside"
    assert see(from_tensors(x, labelled(2, 2, 1.0)), k=4).law.private == 4, "two classes cannot tell"
    assert see(from_tensors(x, None), k=4).law.private == 4
    assert see(from_tensors(x, labelled(2, 10, 0.5)), k=6, labels="none").law.private == 6, "withheld is not peeked at"
    assert see(from_tensors(x, labelled(2, 10, 0.5)), k=6, private=3).law.private == 3


def test_what_a_manifest_says_of_the_same_k_still_holds() -> None:
    told = {"k": 6, "private": 2, "c1": 0.8, "c2": 0.2}
    held = replace(from_tensors(torch.rand(40, 3, 8, 8), labelled(2, 2, 0.5)), manifest=told)
    law = see(held, k=6).law
    assert (law.private, law.c1, law.c2) == (2, 0.8, 0.2)
    assert see(held, c1=0.9).law.c1 == 0.9
    assert see(held, k=4).law.c1 == 0.65, "another encoder than the manifest's"


def test_the_words_claim_no_grant_that_is_not_used() -> None:
    bare, held = (
        from_tensors(torch.rand(6, 3, 8, 8), None),
        from_tensors(torch.rand(6, 3, 8, 8), torch.full((6, 2), 0.2)),
    )
    assert dict(see(bare).words)["images of each class"].startswith("not used")
    assert dict(see(held, labels="none", per_class=[1, 2]).words)["images of each class"].startswith("not used")
    assert dict(see(held, per_class=[1, 2]).words)["images of each class"] == "given"


@pytest.mark.parametrize("stored", ["0 to 1", "0 to 255", "bytes"])
def test_masked_encodings_that_were_moved_to_0_to_1_are_moved_back(tmp_path, stored) -> None:
    x = np.random.default_rng(0).normal(0, 0.35, (12, 8, 8, 3)).clip(-1, 1).astype(np.float32)
    unit = (x + 1) / 2
    kept = {"0 to 1": unit, "0 to 255": 255 * unit, "bytes": (255 * unit).round().astype(np.uint8)}[stored]
    held = read_encoded(arrays(tmp_path / "a", kept))
    assert np.allclose(held.images.permute(0, 2, 3, 1).numpy(), x, atol=0.01)
    assert "moved to [-1, 1]" in held.notes[-1]


def test_absolute_values_stay_and_are_called_so(tmp_path) -> None:
    x = np.abs(np.random.default_rng(0).normal(0, 0.35, (12, 8, 8, 3)).clip(-1, 1)).astype(np.float32)
    held = read_encoded(arrays(tmp_path / "a", x))
    assert np.array_equal(held.images.permute(0, 2, 3, 1).numpy(), x)
    assert "read as absolute values" in held.notes[-1]


@pytest.mark.parametrize("changed", [{"private_images": "x"}, {"k": "six"}, {"rounds": -1}, {"mask": "other"}])
def test_a_damaged_challenge_is_named(tmp_path, changed) -> None:
    folder = arrays(tmp_path / "a")
    about = {"format": "frostglass challenge", "commitment": "0", "k": 2, "private": 2, **changed}
    (folder / "challenge.json").write_text(json.dumps(about))
    with pytest.raises(BadInput, match=f"damaged \\(at {next(iter(changed))}"):
        read_encoded(folder)


def test_groups_leave_the_order_of_the_set_alone(tmp_path) -> None:
    x, y = torch.rand(6, 3, 8, 8), torch.rand(6, 2) / 2
    np.save(tmp_path / "g.npy", np.array([1, 0, 1, 0, 2, 0]))
    plan = parse_unmix_plan({"encoded": "x", "groups": str(tmp_path / "g.npy")})
    seen = view_of(plan, from_tensors(x, y)).seen
    assert [len(m.images) for m in seen.messages] == [3, 2, 1]
    assert torch.equal(encodings_of(seen), x), "seeds are searched by rows in their order"
    assert torch.equal(targets_of(seen), y)


def test_all_encodings_may_be_of_one_image(tmp_path) -> None:
    np.save(tmp_path / "g.npy", np.zeros(6, int))
    plan = parse_unmix_plan({"encoded": "x", "groups": str(tmp_path / "g.npy")})
    seen = view_of(plan, from_tensors(torch.rand(6, 3, 8, 8), None)).seen
    assert ATTACKS["averaging"].make().check(seen) == []


def test_archives_are_no_arrays(tmp_path) -> None:
    folder = arrays(tmp_path / "a")
    for name in ("a/encryption.npy", "g.npy"):
        with (tmp_path / name).open("wb") as held:
            np.savez(held, a=np.zeros(6, int))
    with pytest.raises(BadInput, match="is an archive"):
        read_encoded(folder)
    plan = parse_unmix_plan({"encoded": "x", "groups": str(tmp_path / "g.npy")})
    with pytest.raises(BadInput, match="is an archive"):
        view_of(plan, from_tensors(torch.rand(6, 3, 8, 8), None))


def test_counts_by_class_without_labels_are_refused() -> None:
    with pytest.raises(BadInput, match="no labels"):
        see(from_tensors(torch.zeros(6, 3, 8, 8), None), per_class=[2, 1])


def test_bounds_that_are_given_hold_against_the_manifest_though_they_are_the_defaults() -> None:
    manifest = {"k": 4, "private": 4, "c1": 0.5, "c2": 0.1}
    taken, _ = settings_of(parse_unmix_plan({"encoded": "x"}).known, manifest)
    assert (taken["c1"], taken["c2"]) == (0.5, 0.1)
    with pytest.raises(BadInput, match=r"known.c1: 0.9 says nothing without k.*give known.k too"):
        settings_of(parse_unmix_plan({"encoded": "x", "known": {"c1": 0.9}}).known, {})
    given, law = settings_of(parse_unmix_plan({"encoded": "x", "known": {"c1": 0.65, "c2": 0.3}}).known, manifest)
    assert (given["c1"], given["c2"]) == (0.65, 0.3)
    assert law is not None
    assert law.c1 == 0.65
    silent, _ = settings_of(parse_unmix_plan({"encoded": "x"}).known, {"k": 4})
    assert (silent["c1"], silent["c2"]) == (0.65, 0.3)


def test_a_network_that_was_fitted_anew_is_another_input(tmp_path) -> None:
    network = tmp_path / "similarity.safetensors"
    network.write_bytes(b"first")
    plan = UnmixPlan(encoded="x", attack=[{"name": "unmix_learned", "network": str(network)}])
    before = files_digest(plan)
    network.write_bytes(b"second")
    assert files_digest(plan) not in ("", before)
    assert files_digest(UnmixPlan(encoded="x", attack=[{"name": "demask"}])) == ""
