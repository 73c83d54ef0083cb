"""Public pools: which patches are kept, what is said about them, and what an encoder reads."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.public_pool import PoolSettings, make_pool, open_pool
from frostglass.vision.byte_images import load_bytes

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

RNG = Rng.from_seed(0)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two detailed pictures and a flat one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        blobs = Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        blobs.resize((160, 160), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    Image.new("RGB", (160, 160), (90, 120, 30)).save(folder / "flat.png")
    return folder


def test_detailed_patches_are_kept_and_flat_ones_dropped(pictures, tmp_path) -> None:
    import cv2

    settings = PoolSettings(size=64, cut=64, crops=10)
    found = make_pool(f"folder:{pictures}", tmp_path / "pool", settings, RNG)
    assert found.kept == 10
    assert found.images == 3
    assert found.tried > 10, "the flat picture was not tried"
    pool = open_pool(tmp_path / "pool")
    assert pool.images.shape == (10, 3, 64, 64)
    assert isinstance(pool.images, np.memmap)
    grey = [cv2.cvtColor(np.ascontiguousarray(p.transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY) for p in pool.images]
    assert min(len(cv2.SIFT_create().detect(g, None)) for g in grey) > 40
    held = json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert held["statistics"]["tried"] == found.tried
    assert "kept" in " ".join(found.lines())
    again = make_pool(f"folder:{pictures}", tmp_path / "again", settings, RNG)
    assert again == found
    assert (tmp_path / "again" / "pool.uint8").read_bytes() == (tmp_path / "pool" / "pool.uint8").read_bytes()


def test_no_patch_is_in_a_pool_twice(tmp_path) -> None:
    folder, draw = tmp_path / "small", np.random.default_rng(0)
    folder.mkdir()
    for side in (64, 65):  # one place for a cut, and four
        pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{side}.png")
    found = make_pool(f"folder:{folder}", tmp_path / "pool", PoolSettings(crops=50, key_points=-1), RNG)
    patches = np.asarray(open_pool(tmp_path / "pool").images).reshape(found.kept, -1)
    assert found.kept == len(np.unique(patches, axis=0)) == found.tried == 5


def test_larger_cuts_are_shrunk_and_grey_pools_are_grey(pictures, tmp_path) -> None:
    settings = PoolSettings(size=16, crops=6, cut=64, channels=1)
    assert make_pool(f"folder:{pictures}", tmp_path / "pool", settings, RNG).kept == 6
    assert open_pool(tmp_path / "pool").images.shape == (6, 1, 16, 16)


def test_an_encoder_reads_the_pool_from_disk(pictures, tmp_path) -> None:
    make_pool(f"folder:{pictures}", tmp_path / "pool", PoolSettings(size=32, cut=64, crops=12), RNG)
    for size, crop in ((32, False), (20, True)):
        private = np.random.default_rng(1).integers(0, 256, (30, 3, size, size), dtype=np.uint8)
        pool = open_pool(tmp_path / "pool", size)
        assert pool.crop is crop
        given = torch.from_numpy(private) if crop else private
        made = InstaHide(k=4, private=2, public=pool).encode_rows(given, torch.arange(30) % 3, range(30), num_classes=3)
        assert made.images.shape == (30, 3, size, size)
        assert (made.targets.sum(1) < 1).all()
    with pytest.raises(BadInput, match="channels"):
        InstaHide(k=4, private=2, public=open_pool(tmp_path / "pool")).begin(private[:, :1], torch.zeros(30).long(), 2)
    few = InstaHide(k=20, private=2, c2=0.0, public=open_pool(tmp_path / "pool"))
    with pytest.raises(BadInput, match="too few"):
        few.begin(np.zeros((30, 3, 32, 32), np.uint8), torch.zeros(30).long(), 2)


def test_bad_pools_and_sources(pictures, tmp_path) -> None:
    with pytest.raises(BadInput, match="public-pool"):
        open_pool(tmp_path / "nothing")
    make_pool(f"folder:{pictures}", tmp_path / "pool", PoolSettings(size=32, cut=64, crops=4), RNG)
    with pytest.raises(BadInput, match="holds a pool already"):
        make_pool(f"folder:{pictures}", tmp_path / "pool", PoolSettings(), RNG)
    pixels = tmp_path / "pool" / "pool.uint8"
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(BadInput, match="bytes"):
        open_pool(tmp_path / "pool")
    (tmp_path / "pool" / "pool.json").write_text("[]")
    with pytest.raises(BadInput, match="damaged"):
        open_pool(tmp_path / "pool")
    with pytest.raises(BadInput, match="none of"):
        make_pool(f"folder:{pictures}", tmp_path / "none", PoolSettings(size=8, cut=8, crops=4), RNG)
    assert not (tmp_path / "none").exists()
    with pytest.raises(BadInput) as caught:
        PoolSettings(size=1, crops=0, cut=0, channels=2)
    with pytest.raises(BadInput, match="tries: 100000000000 must be at most 100000"):
        PoolSettings(tries=10**11)
    assert len(caught.value.problems) == 4
    with pytest.raises(BadInput, match=r"are smaller than a cut of 100000 pixels; give larger images, or a smaller"):
        make_pool(f"folder:{pictures}", tmp_path / "huge", PoolSettings(size=16, cut=100_000, crops=4), RNG)
    small = make_pool(f"folder:{pictures}", tmp_path / "small", PoolSettings(size=32, cut=160, crops=1), RNG)
    assert small.kept == 1


def test_two_processes_do_not_make_one_pool(pictures, tmp_path) -> None:
    """The first that was interrupted took the pixels of the other's pool with it."""
    settings = PoolSettings(size=32, cut=64, crops=4)

    def other(kept: int) -> None:
        with pytest.raises(BadInput, match="public-pool: another process is at work in"):
            make_pool(f"folder:{pictures}", tmp_path / "pool", settings, RNG)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pool(f"folder:{pictures}", tmp_path / "pool", settings, RNG, other)
    assert not (tmp_path / "pool").exists()


def test_what_a_kill_left_of_a_pool_goes(pictures, tmp_path) -> None:
    (tmp_path / "pool").mkdir()
    for name in (".pool.uint8.abc.part", ".pool.json.abc.part"):
        (tmp_path / "pool" / name).write_bytes(b"half")
    make_pool(f"folder:{pictures}", tmp_path / "pool", PoolSettings(size=32, cut=64, crops=4), RNG)
    assert {p.name for p in (tmp_path / "pool").iterdir()} == {"pool.json", "pool.uint8"}


def test_a_pool_whose_description_cannot_be_written_leaves_nothing(pictures, tmp_path, monkeypatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("frostglass.defenses.public_pool.write_json", full)
    with pytest.raises(BadInput, match="cannot be written"):
        make_pool(f"folder:{pictures}", tmp_path / "a" / "pool", PoolSettings(size=32, cut=64, crops=4), RNG)
    assert not (tmp_path / "a").exists()


@pytest.fixture
def broken(pictures) -> Path:
    (pictures / "b.png").write_bytes((pictures / "b.png").read_bytes()[:200])
    (pictures / "c.png").write_bytes(b"no image")
    return pictures


def test_images_that_do_not_decode_stop_or_are_skipped_and_named(broken, tmp_path) -> None:
    source = f"folder:{broken}"
    with pytest.raises(BadInput, match=r"b\.png|c\.png"):
        make_pool(source, tmp_path / "pool", PoolSettings(size=32, cut=64, crops=4), RNG)
    assert not (tmp_path / "pool").exists()
    (tmp_path / "pool").mkdir()
    with pytest.raises(BadInput, match=r"b\.png|c\.png"):
        make_pool(source, tmp_path / "pool", PoolSettings(size=32, cut=64, crops=4), RNG)
    assert not list((tmp_path / "pool").iterdir())
    found = make_pool(source, tmp_path / "pool", PoolSettings(size=32, cut=64, crops=4, on_error="skip"), RNG)
    assert found.kept == 4
    assert sorted(s.split(".png")[0][-1] for s in found.broken) == ["b", "c"]
    with pytest.raises(BadInput, match=r"b\.png"):
        load_bytes(source, size=8)
    held = load_bytes(source, size=8, on_error="skip")
    assert held.names == ("a.png", "flat.png")
    assert len(held.skipped) == 2
    assert held.images.dtype == torch.uint8
    (broken / "a.png").unlink(), (broken / "flat.png").unlink()
    with pytest.raises(BadInput, match="none of the 2"):
        load_bytes(source, size=8, on_error="skip")


def test_bytes_agree_with_floats(pictures) -> None:
    from frostglass.vision.datasets import load

    for size, channels in ((None, 3), (20, None), (20, 1)):
        whole = load(f"folder:{pictures}", size=size, channels=channels)
        held = load_bytes(f"folder:{pictures}", size=size, channels=channels)
        assert (held.images.float() / 255 - whole.images).abs().max() < 1.01 / 255
        assert torch.equal(held.labels, whole.labels)
        assert held.names == whole.names
        assert held.classes == whole.classes
    Image.new("RGB", (50, 60)).save(pictures / "z.png")
    with pytest.raises(BadInput, match="size"):
        load_bytes(f"folder:{pictures}", size=None)
