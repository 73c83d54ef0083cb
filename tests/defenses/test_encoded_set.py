"""Offline encoded sets: what is in them and what is not, kills and resumes, tampering, and the secret row order."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from frostglass.core.errors import BadInput
from frostglass.defenses.encoded_dataset import soft_collate
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sets import writing
from frostglass.defenses.sets.manifest import problems_of, read_manifest
from frostglass.defenses.sets.reading import EncodedFolder
from frostglass.defenses.sets.writing import SetWriter

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

N = 40


def photos(n: int = N, side: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def writer(out: Path, n: int = N, **settings: Any) -> SetWriter:
    """Each image is a class of its own, so that exact labels show who was mixed."""
    own = {"rounds", "names", "ledger", "with_targets", "shard_rows"}
    encoder = InstaHide(**{"k": 4, **{k: v for k, v in settings.items() if k not in own}})
    kept = {"shard_rows": 16, **{k: v for k, v in settings.items() if k in own}}
    return SetWriter(encoder, photos(n), torch.arange(n), n, out, **kept)


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def killed_after(shards: int, monkeypatch: pytest.MonkeyPatch, *, half: bool = False) -> None:
    real, done = SetWriter._shard, []

    def shard(self: SetWriter, path: Path, rows: Any, number: int) -> None:
        if len(done) == shards:
            if half:
                path.write_bytes(b"half a shard")
            raise Killed
        done.append(number)
        real(self, path, rows, number)

    monkeypatch.setattr(SetWriter, "_shard", shard)


def test_a_set_is_read_without_the_private_images(tmp_path) -> None:
    made = writer(tmp_path / "set", rounds=2, labels="renormalised").write()
    held = EncodedFolder(tmp_path / "set")
    assert len(held) == made["encodings"] == 2 * N
    assert held.classes == N
    assert held.shape == (3, 4, 4)
    assert (held.domain.low, held.domain.high) == (-1.0, 1.0)
    images, targets = next(iter(DataLoader(held, len(held), collate_fn=soft_collate)))
    assert images.shape == (2 * N, 3, 4, 4)
    assert images.abs().max() <= 1
    torch.testing.assert_close(targets.sum(1), torch.ones(2 * N))
    assert len(set(map(bytes, images.numpy()))) == 2 * N, "an encoding was written twice"
    workers = DataLoader(held, 16, num_workers=2, collate_fn=soft_collate)
    torch.testing.assert_close(torch.cat([x for x, _ in workers]), images)
    torch.testing.assert_close(pickle.loads(pickle.dumps(held))[5][0], images[5])
    with pytest.raises(IndexError):
        held[2 * N]
    assert "(epsilon, delta)" in repr(held)


def test_bfloat16_abs_and_no_targets(tmp_path) -> None:
    made = writer(tmp_path / "set", dtype=torch.bfloat16, mask="abs", with_targets=False).write()
    assert made["labels"] == "none"
    assert made["pixels"] == [0.0, 1.0]
    image, target = EncodedFolder(tmp_path / "set", dtype=None)[0]
    assert image.dtype == torch.bfloat16
    assert image.min() >= 0
    assert target.numel() == 0
    assert EncodedFolder(tmp_path / "set")[0][0].dtype == torch.float32


def test_the_set_holds_no_key_no_name_and_no_count_of_an_image(tmp_path) -> None:
    names = [f"patient-{i}.png" for i in range(N)]
    job = writer(tmp_path / "set", names=names, rounds=3)
    made = job.write()
    for path in (tmp_path / "set").iterdir():
        content = path.read_bytes()
        assert b"patient" not in content
        assert job.digest.encode() not in content
        assert photos()[0].numpy().tobytes() not in content
    text = json.dumps(made)
    assert {p.name for p in (tmp_path / "set").iterdir()} == {"manifest.json", *(s["file"] for s in made["shards"])}
    assert sum(made["exposure_histogram"].values()) == N
    assert sum(int(count) * images for count, images in made["exposure_histogram"].items()) == 3 * N * 4
    assert "broken" in made["warning"]
    assert made["guarantee"] == "no (epsilon, delta)"
    assert any("claimed brute-force work" in line for line in made["cost"])
    assert not {"key", "indices", "coefficients", "seed", "names", "ids"} & set(made)
    assert "insecure_seed" not in text
    assert made["insecure"] is False
    assert made["library"].startswith("frostglass ")


def test_only_the_owner_can_read_ledger_and_resume_state(tmp_path, monkeypatch) -> None:
    killed_after(2, monkeypatch)
    job = writer(tmp_path / "set", names=[f"n{i}" for i in range(N)])
    with pytest.raises(Killed):
        job.write()
    assert stat.S_IMODE(job.state.stat().st_mode) == 0o600
    assert stat.S_IMODE(job.staging.stat().st_mode) == 0o700
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    again = writer(tmp_path / "set", names=[f"n{i}" for i in range(N)])
    for name in (".set.resume", "set.ledger.json"):  # as a kill leaves them that comes while they are written
        (tmp_path / f".{name}.xyz.part").touch()
    made = again.write(resume=True)
    assert stat.S_IMODE(again.ledger.stat().st_mode) == 0o600
    assert {p.name for p in tmp_path.iterdir()} == {"set", "set.ledger.json"}, "something of the resume state is left"
    rows = json.loads(again.ledger.read_text())["images"]
    assert [r["first"] for r in rows] == [1] * N
    assert [r["name"] for r in rows] == [f"n{i}" for i in range(N)]
    counts = np.bincount([r["first"] + r["partner"] for r in rows])
    assert {str(c): int(n) for c, n in enumerate(counts) if n} == made["exposure_histogram"]


@pytest.mark.parametrize("half", [False, True])
def test_a_killed_encoding_goes_on_with_new_keys(tmp_path, monkeypatch, half) -> None:
    killed_after(2, monkeypatch, half=half)
    with pytest.raises(Killed):
        writer(tmp_path / "set", rounds=2).write()
    assert not (tmp_path / "set").exists(), "an unfinished set reads as whole"
    monkeypatch.undo()
    with pytest.raises(BadInput, match="--resume"):
        writer(tmp_path / "set", rounds=2).write()
    finished = {p.name: p.read_bytes() for p in (tmp_path / ".set.partial").glob("encodings-0000[01]*")}
    writer(tmp_path / "set", rounds=2).write(resume=True)
    held = EncodedFolder(tmp_path / "set")
    assert len(held) == 2 * N
    assert all((tmp_path / "set" / name).read_bytes() == content for name, content in finished.items())
    assert len({bytes(held[i][0].numpy()) for i in range(2 * N)}) == 2 * N, "a key row was used twice"
    first = [r["first"] for r in json.loads((tmp_path / "set.ledger.json").read_text())["images"]]
    assert first == [2] * N


def test_two_processes_do_not_write_one_set(tmp_path) -> None:
    refused = []

    def second(_: int) -> None:
        for resume in (False, True):
            with pytest.raises(BadInput, match="another process is at work"):
                writer(tmp_path / "set").write(resume=resume)
            refused.append(resume)

    writer(tmp_path / "set").write(tick=second)
    assert refused[:2] == [False, True]
    assert problems_of(tmp_path / "set", read_manifest(tmp_path / "set")) == []


@pytest.mark.parametrize("limit", [None, 6])
def test_sets_that_are_written_at_the_same_time_are_counted_in_one_ledger(tmp_path, limit) -> None:
    ledger, four = tmp_path / "ledger.json", 4  # images, each of them in each of four encodings

    def second(rows: int) -> None:
        if not ledger.exists():
            writer(tmp_path / "other", four, ledger=ledger, max_exposure=limit).write()

    first = writer(tmp_path / "set", four, ledger=ledger, max_exposure=limit)
    if limit is None:
        first.write(tick=second)
    else:  # either alone keeps to it, both together do not
        with pytest.raises(BadInput, match="max_exposure"):
            first.write(tick=second)
    held = json.loads(ledger.read_text())
    sets = 1 if limit else 2
    assert (tmp_path / "set").exists() == (limit is None)
    assert len(held["sets"]) == sets
    assert {row["first"] + row["partner"] for row in held["images"]} == {four * sets}


def test_an_insecure_set_is_marked_and_resuming_does_not_repeat_its_keys(tmp_path, monkeypatch) -> None:
    killed_after(1, monkeypatch)
    with pytest.raises(Killed):
        writer(tmp_path / "set", insecure_seed=3, rounds=2).write()
    monkeypatch.undo()
    made = writer(tmp_path / "set", insecure_seed=3, rounds=2).write(resume=True)
    assert made["insecure"] is True
    assert '"insecure_seed"' not in json.dumps(made)
    held = EncodedFolder(tmp_path / "set")
    assert len({bytes(held[i][0].abs().numpy()) for i in range(2 * N)}) == 2 * N
    for name in ("a", "b"):
        writer(tmp_path / name, insecure_seed=3).write()
    assert torch.equal(EncodedFolder(tmp_path / "a")[7][0], EncodedFolder(tmp_path / "b")[7][0])


def test_resume_refuses_other_images_settings_and_changed_shards(tmp_path, monkeypatch) -> None:
    killed_after(2, monkeypatch)
    with pytest.raises(Killed):
        writer(tmp_path / "set").write()
    monkeypatch.undo()
    with pytest.raises(BadInput, match="other images or settings"):
        writer(tmp_path / "set", k=3).write(resume=True)
    with pytest.raises(BadInput, match="other images or settings"):
        writer(tmp_path / "set", n=N + 1).write(resume=True)
    path = tmp_path / ".set.partial" / "encodings-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="encodings-00001"):
        writer(tmp_path / "set").write(resume=True)
    assert (tmp_path / ".set.resume").exists(), "a refusal must not throw finished work away"


def test_a_kill_after_the_last_renaming_leaves_a_whole_set(tmp_path, monkeypatch) -> None:
    real = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda p, missing_ok=False: (_ for _ in ()).throw(Killed()) if p.name == ".set.resume"
        else real(p, missing_ok),
    )  # fmt: skip
    with pytest.raises(Killed):
        writer(tmp_path / "set").write()
    monkeypatch.undo()
    assert writer(tmp_path / "set").write(resume=True)["encodings"] == N
    assert not (tmp_path / ".set.resume").exists()


@pytest.mark.parametrize("limit", [None, 8])
def test_a_kill_before_the_last_renaming_counts_nothing_twice(tmp_path, monkeypatch, limit) -> None:
    """The ledger is written by then: resuming must not take this set for an earlier one."""
    own = {"partners": "iid", "max_exposure": limit, "k": 2, "n": 400}
    ledger = tmp_path / "own.json"
    monkeypatch.setattr(Path, "rename", lambda path, to: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        writer(tmp_path / "set", ledger=ledger, **own).write()
    monkeypatch.undo()
    rows = json.loads(ledger.read_text())["images"]
    made = writer(tmp_path / "set", ledger=ledger, **own).write(resume=True)
    assert json.loads(ledger.read_text())["images"] == rows
    assert {r["first"] for r in rows} == {1}
    assert "exposure_histogram_with_earlier_sets" not in made
    if limit is None:
        again = writer(tmp_path / "more", ledger=ledger, **own).write()
        assert "exposure_histogram_with_earlier_sets" in again
        assert {r["first"] for r in json.loads(ledger.read_text())["images"]} == {2}
        assert json.loads(ledger.read_text())["sets"][0] not in json.dumps([made, again])


def test_a_full_disk_within_safetensors_says_so(tmp_path, monkeypatch) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        kind = "I/O error: No space left on device (os error 28)"
        raise SafetensorError(f"Error while serializing: {kind}")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(BadInput, match=r"resume cannot be written \(No space left on device\); make room, or"):
        writer(tmp_path / "set").write()


def test_the_file_that_cannot_be_written_is_named_and_another_one_goes_on(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/own.json cannot be written .*name another --ledger.*--resume") as refused:
        writer(tmp_path / "set", ledger=tmp_path / "file" / "own.json").write()
    assert len(refused.value.problems) == 1
    finished = {p.name: p.read_bytes() for p in (tmp_path / ".set.partial").glob("encodings-*")}
    writer(tmp_path / "set", ledger=tmp_path / "own.json").write(resume=True)
    assert {name: (tmp_path / "set" / name).read_bytes() for name in finished} == finished


def test_resume_refuses_another_pool_of_the_same_shape(tmp_path, monkeypatch) -> None:
    black, white = (torch.full((30, 3, 4, 4), v, dtype=torch.uint8) for v in (0, 255))
    killed_after(1, monkeypatch)
    with pytest.raises(Killed):
        writer(tmp_path / "set", private=2, public=black).write()
    monkeypatch.undo()
    with pytest.raises(BadInput, match="other images or settings"):
        writer(tmp_path / "set", private=2, public=white).write(resume=True)
    writer(tmp_path / "set", private=2, public=black).write(resume=True)


def test_a_link_that_leads_nowhere_is_in_the_way(tmp_path) -> None:
    (tmp_path / "set").symlink_to(tmp_path / "gone")
    with pytest.raises(BadInput, match="set exists; name a new folder"):
        writer(tmp_path / "set").write()
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_rounds_of_the_encoder_do_not_count_earlier_sets(tmp_path) -> None:
    ledger = tmp_path / "own.json"
    for name in ("one", "two"):
        encoder = InstaHide(rounds=1)
        SetWriter(encoder, photos(), torch.arange(N), N, tmp_path / name, ledger=ledger).write()
    assert {r["first"] for r in json.loads(ledger.read_text())["images"]} == {2}


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch) -> None:
    real, calls = writing.sha256_of, []

    def full(path: Path) -> str:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(writing, "sha256_of", full)
    with pytest.raises(BadInput, match=r"No space left on device.*--resume"):
        writer(tmp_path / "set").write()
    monkeypatch.undo()
    assert writer(tmp_path / "set").write(resume=True)["encodings"] == N


def test_max_exposure_ends_it_with_nothing_kept_and_counts_earlier_sets(tmp_path) -> None:
    ledger = tmp_path / "exposure.json"
    writer(tmp_path / "one", ledger=ledger).write()
    two = writer(tmp_path / "two", ledger=ledger).write()
    both = two["exposure_histogram_with_earlier_sets"]
    assert sum(int(c) * n for c, n in both.items()) == 2 * N * 4
    with pytest.raises(BadInput, match="max_exposure"):
        writer(tmp_path / "three", ledger=ledger, max_exposure=2).write()
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "exposure.json"}
    with pytest.raises(BadInput, match="other images"):
        writer(tmp_path / "four", n=N + 1, ledger=ledger).write()
    counted = json.loads(ledger.read_text())
    for count in (-1, float("inf"), 10**30):
        counted["images"][0]["first"] = count
        ledger.write_text(json.dumps(counted))
        with pytest.raises(BadInput, match="no exposure ledger"):
            writer(tmp_path / "five", ledger=ledger).write()
    ledger.write_text("{}")
    with pytest.raises(BadInput, match="no exposure ledger"):
        writer(tmp_path / "five", ledger=ledger).write()


def test_bad_settings(tmp_path) -> None:
    out = tmp_path / "set"
    with pytest.raises(BadInput, match="rounds"):
        writer(out, rounds=0)
    with pytest.raises(BadInput, match="shard_rows"):
        writer(out, shard_rows=0)
    with pytest.raises(BadInput, match="permutations give exact counts"):
        writer(out, partners="permutation")
    with pytest.raises(BadInput, match="outside it"):
        writer(out, ledger=out / "ledger.json")
    out.mkdir()
    with pytest.raises(BadInput, match="exists"):
        writer(out).write()
    with pytest.raises(BadInput, match="exists"):
        writer(out).write(resume=True)


@pytest.mark.parametrize("how", ["flip", "cut", "missing", "link", "stray"])
def test_a_tampered_shard_is_named(tmp_path, how) -> None:
    folder = tmp_path / "set"
    writer(folder).write()
    path, named = folder / "encodings-00001.safetensors", "encodings-00001"
    content = path.read_bytes()
    if how == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif how == "cut":
        path.write_bytes(content[:-1])
    elif how == "missing":
        path.unlink()
    elif how == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        (folder / ".DS_Store").write_bytes(b"a file manager was here")
        (folder / "key.bin").write_bytes(b"")
        named = "key.bin"
    (problem,) = problems_of(folder, read_manifest(folder))
    assert named in problem
    with pytest.raises(BadInput, match=named):
        EncodedFolder(folder)


@pytest.mark.parametrize("change", [
    {"format": "other"}, {"version": 2}, {"encodings": 7}, {"shards": "all"}, {"shape": [3]}, {"classes": None},
    {"shards": [{"file": "../../etc/passwd", "rows": N, "sha256": ""}]},
    {"images": -5}, {"images": "many"}, {"rounds": 0}, {"k": True}, {"mask": "zap"}, {"dtype": "foo"},
    {"labels": "foo"}, {"exposure_histogram": 3}, {"exposure_histogram": {"a": 1}}, {"exposure_histogram": {"3": -1}},
    {"exposure_histogram": {"3": 10**12}}, {"exposure_histogram_with_earlier_sets": {"-2": 1}},
])  # fmt: skip
def test_a_damaged_manifest_is_refused(tmp_path, change) -> None:
    writer(tmp_path / "set").write()
    path = tmp_path / "set" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match="encoded set"):
        EncodedFolder(tmp_path / "set")
    path.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        EncodedFolder(tmp_path / "set")
    path.unlink()
    with pytest.raises(BadInput, match="holds no manifest"):
        EncodedFolder(tmp_path / "set")
    with pytest.raises(BadInput, match="no folder"):
        EncodedFolder(tmp_path / "nothing")


def sources(folder: Path) -> np.ndarray:
    """[rows, N]: which images each row mixes, as its exact label tells."""
    held = EncodedFolder(folder)
    return np.stack([held[i][1].numpy() > 0 for i in range(len(held))])


def test_row_position_does_not_predict_shared_images(tmp_path, monkeypatch) -> None:
    """Rows at any distance share images as often as any two rows; and no block of N rows holds a whole round."""
    n, rounds = 100, 20
    firsts: list[int] = []
    real = InstaHide.encode_rows
    monkeypatch.setattr(
        InstaHide, "encode_rows", lambda self, x, y, rows, *a: (firsts.extend(rows), real(self, x, y, rows, *a))[1]
    )
    writer(tmp_path / "set", n=n, rounds=rounds, shard_rows=256).write()
    mixed = sources(tmp_path / "set").astype(np.float64)
    shared = mixed @ mixed.T > 0
    total = len(mixed)
    every = shared[np.triu_indices(total, 1)].mean()
    error = np.sqrt(every * (1 - every) / total)
    for distance in (1, 2, 5, n - 1, n, n + 1, 2 * n, 256):
        near = np.diagonal(shared, distance).mean()
        assert abs(near - every) < 5 * error * np.sqrt(total / (total - distance)), distance
    # in round-major order each block of n rows would hold n different first images; in one random order about 1 - 1/e
    blocks = [len(set(firsts[i : i + n])) for i in range(0, total, n)]
    assert max(blocks) < 0.85 * n
    # the position of a row says nothing about which image comes first
    correlation = np.corrcoef(np.arange(total), firsts)[0, 1]
    assert abs(correlation) < 4 / np.sqrt(total)


def test_row_position_says_nothing_after_a_resume_either(tmp_path, monkeypatch) -> None:
    n, rounds, given = 100, 20, {"n": 100, "rounds": 20, "shard_rows": 256}
    killed_after(2, monkeypatch)
    with pytest.raises(Killed):
        writer(tmp_path / "set", **given).write()
    monkeypatch.undo()
    firsts: list[int] = []
    real = InstaHide.encode_rows
    monkeypatch.setattr(
        InstaHide, "encode_rows", lambda self, x, y, rows, *a: (firsts.extend(rows), real(self, x, y, rows, *a))[1]
    )
    writer(tmp_path / "set", **given).write(resume=True)
    total = len(firsts)
    assert total == n * rounds - 2 * 256
    assert abs(np.corrcoef(np.arange(total), firsts)[0, 1]) < 4.5 / np.sqrt(total), "sorted, or nearly so"
    blocks = [len(set(firsts[i : i + n])) for i in range(0, total - n, n)]
    assert 0.5 * n < min(blocks), "rows of one image stand together"  # about 1 - 1/e of them
    assert max(blocks) < 0.85 * n, "round by round"
    repeats = np.mean(np.array(firsts[1:]) == firsts[:-1])
    assert repeats < 0.05


def test_round_major_order_would_be_caught(tmp_path, monkeypatch) -> None:
    """The test above proves something: the order that it forbids fails it."""
    n, rounds = 100, 20
    monkeypatch.setattr(SetWriter, "_order", lambda self, progress: np.tile(np.arange(n), rounds))
    writer(tmp_path / "set", n=n, rounds=rounds, shard_rows=256).write()
    mixed = sources(tmp_path / "set").astype(np.float64)
    shared = mixed @ mixed.T > 0
    assert np.diagonal(shared, n).mean() > 0.98  # a share below half a step of the grid is 0: one image in some 10,000
    assert shared[np.triu_indices(len(mixed), 1)].mean() < 0.5


def test_files_are_readable_by_others_when_the_set_is_whole(tmp_path) -> None:
    before = os.umask(0o022)
    try:
        writer(tmp_path / "set").write()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "set").stat().st_mode) == 0o755
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o644 for p in (tmp_path / "set").iterdir())


@pytest.mark.parametrize("change", [{"classes": 7}, {"shape": [3, 4, 5]}])
def test_shards_that_are_not_as_the_manifest_says_are_refused_when_they_are_read(tmp_path, change) -> None:
    made = writer(tmp_path / "set").write()
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(made | change))
    with pytest.raises(BadInput, match=r"encodings-00000\.safetensors is not of the shape in the manifest"):
        EncodedFolder(tmp_path / "set")[0]
