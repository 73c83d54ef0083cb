"""Facts about image sources, and what each kind of hostile input is answered with."""

from __future__ import annotations

import builtins
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frostglass.core.errors import BadInput
from frostglass.vision import datasets, parquet
from frostglass.vision.byte_images import load_bytes
from frostglass.vision.datasets import DATASETS, catalogue, count, labels, load
from frostglass.vision.decoding import MAX_PIXELS, decode


def save(path: Path, *, size=(8, 8), mode="RGB", colour=None, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if colour is not None else 0).save(path, **how)
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def refused(source: str, *words: str, size: int | None = 8, **how) -> str:
    """The one sentence that answers `source`, which must hold `words`."""
    with pytest.raises(BadInput) as caught:
        load(source, size=size, **how)
    assert len(caught.value.problems) == 1
    sentence = caught.value.problems[0]
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence, sentence
    return sentence


class TestPhotos:
    def test_eight_pictures_with_distinct_labels_out_of_ten(self):
        photos = load("photos", size=32)
        assert photos.images.shape == (8, 3, 32, 32)
        assert photos.images.dtype == torch.float32
        assert photos.labels.tolist() == list(range(8))
        assert photos.classes == 10
        assert len(set(photos.names)) == 8
        assert any("arbitrary" in note for note in photos.notes)
        assert photos.source == "photos"

    def test_values_span_the_unit_interval(self):
        images = load("photos", size=64).images
        assert 0 <= float(images.min()) < 0.05
        assert 0.95 < float(images.max()) <= 1
        assert float(images.std(dim=(1, 2, 3)).min()) > 0.1, "a flat picture shows no subject"

    def test_crops_of_one_file_do_not_overlap(self):
        from frostglass.vision.bundled import _PHOTOS

        squares = [(p[2], *p[3:]) for p in _PHOTOS]
        for i, (file, left, top, side) in enumerate(squares):
            for other, x, y, s in squares[:i]:
                apart = x + s <= left or left + side <= x or y + s <= top or top + side <= y
                assert file != other or apart

    def test_same_pixels_every_time(self):
        assert torch.equal(load("photos", size=32).images, load("photos", size=32).images)

    def test_rows_and_limit_choose(self):
        whole, some = load("photos", size=16), load("photos", size=16, rows=[5, 1, 5], limit=2)
        assert some.names == (whole.names[5], whole.names[1])
        assert torch.equal(some.images, whole.images[[5, 1]])
        assert some.labels.tolist() == [5, 1]

    def test_grey_is_luma(self):
        colour, grey = load("photos", size=16), load("photos", size=16, channels=1)
        expected = (colour.images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        torch.testing.assert_close(grey.images, expected)
        assert any("reduced to grey" in note for note in grey.notes)

    def test_without_a_size_the_crops_differ(self):
        refused("photos", "205 x 205", "300 x 300", "give a size", size=None)

    def test_a_file_missing_from_the_wheel_is_named(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        refused("photos", "astronaut.png", "skimage", "reinstall")


class TestDigits:
    def test_all_of_them(self):
        digits = load("digits", size=None)
        assert digits.images.shape == (1797, 1, 8, 8)
        assert float(digits.images.min()) == 0
        assert float(digits.images.max()) == 1
        assert torch.equal(digits.labels.bincount(), torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]))
        assert count("digits") == 1797
        assert torch.equal(labels("digits"), digits.labels)

    def test_enlarged_and_repeated_over_three_channels(self):
        digits = load("digits", size=32, channels=3, limit=4)
        assert digits.images.shape == (4, 3, 32, 32)
        assert torch.equal(digits.images[:, 0], digits.images[:, 2])
        assert "4 of 4 images: grey, repeated over three channels." in digits.notes


class TestFolder:
    def test_flat_folder_in_sorted_order_with_made_up_labels(self, tmp_path):
        for i in reversed(range(12)):
            save(tmp_path / f"{i:02d}.png", colour=(i, 0, 0))
        found = load(f"folder:{tmp_path}", size=None)
        assert found.names == tuple(f"{i:02d}.png" for i in range(12))
        assert found.labels.tolist() == [i % 10 for i in range(12)]
        assert found.classes == 10
        torch.testing.assert_close(found.images[:, 0, 0, 0], torch.arange(12) / 255)
        assert any("arbitrary" in note for note in found.notes)

    def test_one_subfolder_for_each_class(self, tmp_path):
        save(tmp_path / "dog" / "b.jpg")
        save(tmp_path / "cat" / "z.PNG", format="PNG")
        save(tmp_path / "cat" / "a.png")
        (tmp_path / "empty").mkdir()
        found = load(f"folder:{tmp_path}", size=8)
        assert found.names == (f"cat{os.sep}a.png", f"cat{os.sep}z.PNG", f"dog{os.sep}b.jpg")
        assert found.labels.tolist() == [0, 0, 1]
        assert found.classes == 2
        assert any("1 subfolder ignored" in note for note in found.notes)

    def test_images_beside_subfolders_win_and_it_is_said(self, tmp_path):
        save(tmp_path / "a.png")
        save(tmp_path / "sub" / "b.png")
        found = load(f"folder:{tmp_path}", size=8)
        assert found.names == ("a.png",)
        assert any("1 subfolder" in note for note in found.notes)

    def test_other_files_are_ignored_and_counted(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / "._a.png").write_bytes(b"resource fork")
        assert any("2 files ignored" in note for note in load(f"folder:{tmp_path}", size=8).notes)

    def test_only_the_rows_asked_for_are_decoded(self, tmp_path):
        save(tmp_path / "a.png")
        (tmp_path / "b.png").write_bytes(b"broken")
        source = f"folder:{tmp_path}"
        assert count(source) == 2
        assert load(source, size=8, limit=1).names == ("a.png",)
        refused(source, "b.png")

    def test_a_flat_folder_crops_the_centre_square(self, tmp_path):
        wide = np.zeros((8, 24, 3), np.uint8)
        wide[:, 8:16] = 255
        Image.fromarray(wide).save(tmp_path / "a.png")
        found = load(f"folder:{tmp_path}", size=8)
        assert float(found.images.min()) == 1
        assert "1 of 1 images: not square, cropped to the centre square." in found.notes

    def test_a_height_and_a_width_crop_the_centre_in_their_proportions(self, tmp_path):
        band = np.zeros((16, 24, 3), np.uint8)
        band[:, 6:18] = 255  # 16 x 12: the middle of the width, all of the height
        save_at = tmp_path / "a.png"
        Image.fromarray(band).save(save_at)
        source = f"folder:{tmp_path}"
        found = load(source, size=(8, 6))
        assert found.images.shape == (1, 3, 8, 6)
        assert float(found.images.min()) > 0.99
        assert "1 of 1 images: cropped to the centre in proportions 6 : 8." in found.notes
        assert "1 of 1 images: resized to 6 x 8 (bicubic, antialiased)." in found.notes
        kept = load(source, size=(16, 24))
        assert torch.equal(kept.images, load(source, size=None).images)
        assert not any("cropped" in note or "resized" in note for note in kept.notes)
        assert torch.equal(load(source, size=(8, 8)).images, load(source, size=8).images)
        assert torch.equal(load_bytes(source, size=(8, 6)).images, (found.images * 255).round().byte())
        assert load(source, size=(1, 400)).images.shape == (1, 3, 1, 400), "a crop keeps one row at the least"
        refused(source, "size: 0", size=(0, 4))

    def test_resizing_averages_instead_of_sampling(self, tmp_path):
        board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
        Image.fromarray(board).save(tmp_path / "a.png")
        small = load(f"folder:{tmp_path}", size=8).images
        torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0)

    def test_home_and_undecodable_names(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "pets").mkdir()
        content = save(tmp_path / "a.png").read_bytes()
        Path(os.fsdecode(os.fsencode(tmp_path / "pets") + b"/\xff.png")).write_bytes(content)
        found = load("folder:~/pets", size=8)
        assert found.names == ("\\xff.png",)
        found.names[0].encode()


class TestModes:
    """Each kind of picture is converted to what it shows, and the notes say how many there were."""

    def one(self, tmp_path, image, name="a.png", **how):
        image.save(tmp_path / name, **how)
        return load(f"folder:{tmp_path}", size=None)

    def test_grey_alone_stays_grey(self, tmp_path):
        found = self.one(tmp_path, Image.new("L", (4, 4), 51))
        assert found.images.shape == (1, 1, 4, 4)
        assert float(found.images[0, 0, 0, 0]) == pytest.approx(0.2)

    def test_grey_among_colours_is_repeated(self, tmp_path):
        save(tmp_path / "b.png", size=(4, 4))
        found = self.one(tmp_path, Image.new("L", (4, 4), 51))
        assert found.images.shape == (2, 3, 4, 4)
        assert "1 of 2 images: grey, repeated over three channels." in found.notes

    def test_black_and_white(self, tmp_path):
        assert float(self.one(tmp_path, Image.new("1", (4, 4), 1)).images.min()) == 1

    def test_alpha_is_placed_on_white(self, tmp_path):
        found = self.one(tmp_path, Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
        assert float(found.images.min()) == 1
        assert "1 of 1 images: transparent, placed on white." in found.notes

    def test_half_transparent_grey(self, tmp_path):
        found = self.one(tmp_path, Image.new("LA", (4, 4), (0, 128)))
        assert found.images.shape[1] == 1
        assert float(found.images.mean()) == pytest.approx(0.5, abs=0.01)

    def test_opaque_alpha_needs_no_note(self, tmp_path):
        found = self.one(tmp_path, Image.new("RGBA", (4, 4), (255, 0, 0, 255)))
        assert found.images[0, :, 0, 0].tolist() == [1, 0, 0]
        assert not any("transparent" in note for note in found.notes)

    def test_palette(self, tmp_path):
        found = self.one(tmp_path, Image.new("RGB", (4, 4), (0, 255, 0)).quantize(4))
        assert found.images[0, :, 0, 0].tolist() == [0, 1, 0]
        assert any("palette" in note for note in found.notes)

    def test_cmyk(self, tmp_path):
        found = self.one(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg", quality=100)
        torch.testing.assert_close(found.images[0, :, 0, 0], torch.tensor([1.0, 0, 0]), atol=0.03, rtol=0)
        assert any("CMYK" in note for note in found.notes)

    def test_sixteen_bit_grey(self, tmp_path):
        found = self.one(tmp_path, Image.fromarray(np.full((4, 4), 32768, np.uint16)))
        assert float(found.images[0, 0, 0, 0]) == pytest.approx(32768 / 65535)
        assert any("16 bits" in note for note in found.notes)

    @pytest.mark.parametrize("ending", ["png", "tif", "ppm"])
    def test_sixteen_bit_colour(self, tmp_path, ending):
        import cv2

        cv2.imwrite(str(tmp_path / f"a.{ending}"), np.full((4, 4, 3), 0x8000, np.uint16))
        found = load(f"folder:{tmp_path}", size=None)
        assert float(found.images.mean()) == pytest.approx(128 / 255)
        assert any("upper 8" in note for note in found.notes)

    def test_exif_rotation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter clockwise
        image = np.zeros((8, 16, 3), np.uint8)
        image[:, :8] = 255  # the left half becomes the upper one
        found = self.one(tmp_path, Image.fromarray(image), exif=exif)
        assert found.images.shape == (1, 3, 16, 8)
        assert float(found.images[:, :, :8].min()) == 1
        assert float(found.images[:, :, 8:].max()) == 0
        assert any("EXIF" in note for note in found.notes)

    @pytest.mark.parametrize(("name", "how"), [("a.gif", {}), ("a.tif", {}), ("a.jpg", {"format": "MPO"})])
    def test_first_of_several_frames(self, tmp_path, name, how):
        second = Image.new("RGB", (8, 8), "black")
        found = self.one(
            tmp_path, Image.new("RGB", (8, 8), "white"), name, save_all=True, append_images=[second], **how
        )
        assert float(found.images.min()) > 0.98
        assert any("frames" in note for note in found.notes)

    def test_floats_in_the_unit_interval(self, tmp_path):
        found = self.one(tmp_path, Image.fromarray(np.full((4, 4), 0.25, np.float32)), "a.tif")
        assert float(found.images.max()) == 0.25

    @pytest.mark.parametrize("value", [7.0, float("nan")])
    def test_floats_of_unknown_scale(self, tmp_path, value):
        Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tif")
        refused(f"folder:{tmp_path}", "a.tif", "floating point", "8 or 16 bits")


class TestHostileFolders:
    def test_missing(self, tmp_path):
        refused(f"folder:{tmp_path}/none", "none", "does not exist")

    def test_no_path(self):
        refused("folder", "folder:PATH")
        refused("folder:", "folder:PATH")

    def test_a_file_instead(self, tmp_path):
        refused(f"folder:{save(tmp_path / 'a.png')}", "a.png", "is a file")

    def test_empty(self, tmp_path):
        refused(f"folder:{tmp_path}", str(tmp_path), "no image")

    def test_text_only(self, tmp_path):
        (tmp_path / "readme.txt").write_text("x")
        refused(f"folder:{tmp_path}", "no image", ".png")

    @pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
    def test_no_image_inside(self, tmp_path, content):
        (tmp_path / "a.png").write_bytes(content)
        refused(f"folder:{tmp_path}", "a.png", "not an image", "replace or remove")

    @pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "tif"])
    def test_truncated(self, tmp_path, ending):
        rng = np.random.default_rng(0)
        buffer = BytesIO()
        noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
        noise.save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending))
        content = buffer.getvalue()
        (tmp_path / f"a.{ending}").write_bytes(content[: len(content) // 2])
        refused(f"folder:{tmp_path}", f"a.{ending}", "replace or remove")

    def test_bytes_flipped_at_random_never_escape_as_another_error(self):
        rng = np.random.default_rng(1)
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP"):
            buffer = BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(buffer, format=kind)
            for _ in range(60):
                damaged = bytearray(buffer.getvalue())
                for position in rng.integers(0, len(damaged), 4):
                    damaged[position] = rng.integers(256)
                try:
                    picture = decode(bytes(damaged), "it")
                except BadInput:
                    continue
                assert picture.pixels.min() >= 0
                assert picture.pixels.max() <= 1

    @pytest.mark.parametrize("size", [(MAX_PIXELS // 1000 + 1, 1000), (60_000, 60_000)])
    def test_decompression_bomb_is_refused_by_its_header(self, tmp_path, size):
        (tmp_path / "bomb.png").write_bytes(png_header(*size))
        refused(f"folder:{tmp_path}", "bomb.png", "limit of 50,000,000", "shrink or remove")

    def test_mixed_sizes_without_a_size(self, tmp_path):
        save(tmp_path / "a.png", size=(8, 8))
        save(tmp_path / "b.png", size=(9, 8))
        refused(f"folder:{tmp_path}", "a.png", "8 x 8", "b.png", "9 x 8", "give a size", size=None)
        assert len(load(f"folder:{tmp_path}", size=4)) == 2

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "a.png")
        refused(f"folder:{tmp_path}", "a.png", "no regular file")

    def test_links_in_a_circle(self, tmp_path):
        save(tmp_path / "cat" / "a.png")
        (tmp_path / "cat" / "up").symlink_to(tmp_path)
        (tmp_path / "self").symlink_to(tmp_path)
        (tmp_path / "again").symlink_to(tmp_path / "cat")
        (tmp_path / "void").symlink_to(tmp_path / "void")
        found = load(f"folder:{tmp_path}", size=8)
        assert found.names == (f"again{os.sep}a.png",)
        assert any("link" in note for note in found.notes)

    def test_an_image_that_links_to_itself(self, tmp_path):
        (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
        refused(f"folder:{tmp_path}", "a.png", "cannot be read")

    def test_a_link_to_nothing(self, tmp_path):
        (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
        refused(f"folder:{tmp_path}", "a.png", "cannot be read")

    def test_unreadable_file(self, tmp_path, monkeypatch):
        save(tmp_path / "a.png")
        whole = builtins.open

        def denied(file, *rest, **how):
            if str(file).endswith("a.png"):
                raise PermissionError(13, "Permission denied")
            return whole(file, *rest, **how)

        monkeypatch.setattr(builtins, "open", denied)
        refused(f"folder:{tmp_path}", "a.png", "Permission denied", "permissions")

    def test_unreadable_folder(self, tmp_path, monkeypatch):
        def denied(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "scandir", denied)
        refused(f"folder:{tmp_path}", str(tmp_path), "Permission denied")

    def test_a_folder_in_one_that_may_not_be_entered(self, monkeypatch):
        def denied(path, **how):
            raise PermissionError(13, "Permission denied", str(path))

        with monkeypatch.context() as locked:  # tests may run as root, whom no permission stops
            locked.setattr(Path, "stat", denied)
            refused("folder:locked/photos", "locked/photos", "Permission denied", "permissions")

    def test_a_name_that_no_folder_can_have(self):
        refused(f"folder:{'n' * 300}", "nnn", "too long", "correct the path")


class TestSettings:
    def test_unknown_source_names_the_closest(self):
        refused("photo", "'photo'", "did you mean 'photos'")
        refused("folders:/x", "did you mean 'folder'")

    def test_a_path_where_none_is_wanted(self):
        refused("photos:/tmp", "does not take")

    @pytest.mark.parametrize(
        ("how", "word"),
        [
            ({"size": 0}, "size"),
            ({"size": 8.5}, "size"),
            ({"size": True}, "size"),
            ({"limit": 0}, "limit"),
            ({"channels": 2}, "channels"),
            ({"rows": [8]}, "rows: 8"),
            ({"rows": [-1]}, "rows: -1"),
            ({"rows": []}, "rows"),
            ({"rows": [0.5]}, "rows"),
        ],
    )
    def test_out_of_range(self, how, word):
        refused("photos", word, **how)

    def test_more_memory_than_sense(self):
        refused("digits", "GiB", "give a smaller size", size=5000)

    def test_every_source_has_a_summary(self):
        assert DATASETS.names() == ["digits", "folder", "parquet", "photos"]
        assert all(entry.summary for entry in DATASETS)


def encoded(colour: int) -> bytes:
    buffer = BytesIO()
    Image.new("L", (4, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


class TestParquet:
    pa = pytest.importorskip("pyarrow", reason="needs the extra frostglass[parquet]")

    def write(self, path: Path, columns: dict, *, groups: int = 3) -> str:
        import pyarrow.parquet as pq

        pq.write_table(self.pa.table(columns), path, row_group_size=groups)
        return f"parquet:{path}"

    def rows(self, n: int = 10) -> dict:
        return {"img": [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(n)], "label": list(range(n))}

    def test_rows_in_the_order_asked_across_row_groups(self, tmp_path):
        source = self.write(tmp_path / "a.parquet", self.rows())
        found = load(source, size=None, rows=[9, 0, 4, 9])
        assert found.labels.tolist() == [9, 0, 4, 9]
        assert found.names == ("9.png", "0.png", "4.png", "9.png")
        torch.testing.assert_close(found.images[:, 0, 0, 0] * 255, torch.tensor([9.0, 0, 4, 9]))
        assert (count(source), found.classes) == (10, 10)

    def test_only_the_rows_asked_for_are_decoded(self, tmp_path, monkeypatch):
        source = self.write(tmp_path / "a.parquet", self.rows())
        seen = []
        monkeypatch.setattr(parquet, "decode", lambda content, name: seen.append(name) or decode(content, name))
        load(source, size=None, limit=2)
        assert [name[:5] for name in seen] == ["row 0", "row 1"]

    def test_plain_bytes_under_another_name(self, tmp_path):
        source = self.write(tmp_path / "a.parquet", {"image": [encoded(0), encoded(255)], "label": [1, 0]})
        found = load(source, size=None)
        assert found.names == ("row-0", "row-1")
        assert found.images.mean((1, 2, 3)).tolist() == [0, 1]

    def test_missing_pyarrow_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
        refused("parquet:a.parquet", "pip install 'frostglass[parquet]'")

    def test_hostile_files(self, tmp_path):
        refused(f"parquet:{tmp_path}/none.parquet", "none.parquet", "does not exist")
        refused(f"parquet:{tmp_path}", "is a folder")
        bad = tmp_path / "bad.parquet"
        bad.write_bytes(b"PAR1 nothing of the sort PAR1")
        refused(f"parquet:{bad}", "bad.parquet", "cannot be read as Parquet")
        bad.write_bytes(b"")
        refused(f"parquet:{bad}", "bad.parquet", "cannot be read as Parquet")

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"label": None}, "it needs img or image, and label"),
            ({"img": None}, "it needs img or image, and label"),
            ({"img": ["text"] * 10}, "encoded images"),
            ({"label": ["cat"] * 10}, "integers"),
            ({"label": [0] * 9 + [-1]}, "-1"),
            ({"label": [0] * 9 + [10**9]}, "100000 are the most"),
            ({"label": [0] * 9 + [None]}, "1 labels"),
            ({"img": [{"bytes": b"x", "path": "a"}] * 10}, "not an image"),
            ({"img": [{"bytes": None, "path": "a"}] * 9 + [{"bytes": b"", "path": ""}]}, "no image bytes"),
        ],
    )
    def test_hostile_columns(self, tmp_path, change, word):
        columns = {name: cells for name, cells in {**self.rows(), **change}.items() if cells is not None}
        refused(self.write(tmp_path / "a.parquet", columns), "a.parquet", word)

    def test_no_rows(self, tmp_path):
        columns = {"img": self.pa.array([], self.pa.binary()), "label": self.pa.array([], self.pa.int64())}
        refused(self.write(tmp_path / "a.parquet", columns), "no rows")

    def test_damage_behind_a_good_footer(self, tmp_path):
        source = self.write(tmp_path / "a.parquet", self.rows())
        path = tmp_path / "a.parquet"
        content = bytearray(path.read_bytes())
        content[4:60] = b"\xff" * 56
        path.write_bytes(bytes(content))
        refused(source, "a.parquet")

    @pytest.mark.data
    def test_cifar(self, data_root):
        source = f"parquet:{data_root}/cifar10/train-00000-of-00001.parquet"
        found = load(source, size=None, rows=[49_999, 3])
        assert (count(source), found.classes) == (50_000, 10)
        assert found.images.shape == (2, 3, 32, 32)
        assert torch.equal(labels(source).bincount(), torch.full((10,), 5000))


def test_a_new_source_is_a_function():
    @DATASETS.register("test-only")
    def made_up() -> datasets.Catalogue:
        """One white pixel."""
        from frostglass.vision.decoding import Picture

        return datasets.Catalogue(["it"], [0], 2, lambda rows: (Picture(np.ones((1, 1, 1), np.float32)) for _ in rows))

    try:
        assert load("test-only", size=2, channels=3).images.tolist() == torch.ones(1, 3, 2, 2).tolist()
    finally:
        del DATASETS._entries["test-only"]


def test_what_names_no_source_was_meant_as_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="there is no folder 'nothere', and it is not a known source"):
        catalogue("nothere")
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInput, match="write 'folder:mine'"):
        catalogue("mine")
    with pytest.raises(BadInput, match="'foldr:mine' is not a known source; did you mean 'folder'"):
        catalogue("foldr:mine")


@pytest.mark.parametrize("size", [(8,), (8, 8, 8), ()])
def test_a_size_of_no_two_sides_is_refused(size) -> None:
    with pytest.raises(BadInput, match=r"size: \(.*\) must be a side in pixels, or \(height, width\)"):
        load("digits", size=size, limit=2)
