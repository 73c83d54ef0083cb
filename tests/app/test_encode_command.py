"""`frostglass encode`, `public-pool`, `cost` and `check-checkpoint` as a person calls them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import call
from documented import misfits
from frostglass.app.commands.encode import read_labels
from frostglass.core.errors import BadInput
from frostglass.defenses.sets.reading import EncodedFolder


@pytest.fixture
def images(tmp_path) -> Path:
    """Two classes of eight pictures."""
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for i in range(8):
            small = Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8))
            small.resize((100, 100), Image.Resampling.BICUBIC).save(folder / f"{label}{i}.png")
    return tmp_path / "images"


def test_from_pictures_to_a_set_that_trains(images, tmp_path, capsys) -> None:
    code, out, _ = call(capsys, "public-pool", images, tmp_path / "pool", "--size", 16, "--cut", 64, "--crops", 20)
    assert code == 0
    assert "patches tried" in out
    out_folder = tmp_path / "set"
    code, out, err = call(
        capsys, "encode", images, out_folder, "--public", tmp_path / "pool", "--size", 16, "--rounds", 2
    )
    assert code == 0, err
    assert "broken" in out
    assert "(epsilon, delta): none" in out
    held = EncodedFolder(out_folder)
    assert len(held) == 32
    assert held.classes == 2
    assert held.manifest["private"] == 2
    assert held.manifest["labels"] == "quantised"
    owner = json.loads((tmp_path / "set.ledger.json").read_text())
    assert owner["classes"] == ["cat", "dog"]
    rows = owner["images"]
    assert {r["name"] for r in rows} >= {"cat/cat0.png", "dog/dog7.png"}
    code, out, _ = call(capsys, "encode", "--verify", out_folder)
    assert code == 0
    assert "32 encodings" in out
    shard = out_folder / "encodings-00000.safetensors"
    shard.write_bytes(shard.read_bytes() + b"x")
    code, out, _ = call(capsys, "encode", "--verify", out_folder)
    assert code == 1
    assert "encodings-00000.safetensors has been changed" in out


def test_json_and_insecure_seed(images, tmp_path, capsys) -> None:
    code, out, _ = call(
        capsys, "encode", images, tmp_path / "set", "--size", 8, "--insecure-seed", 3, "--mask", "abs", "--law",
        "dirichlet", "--label-mode", "exact", "--dtype", "bfloat16", "--json",
    )  # fmt: skip
    assert code == 0
    made = json.loads(out)
    assert misfits("manifest.json", made) == []
    assert made["insecure"] is True
    assert (made["mask"], made["law"], made["labels"], made["dtype"]) == ("abs", "dirichlet", "exact", "bfloat16")
    assert made["cautions"], "no pool, and nothing is said about it"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--k", "40"], "40 distinct private images"),
        (["--c1", "0.1"], "c1"),
        (["--public", "nowhere"], "holds no pool"),
        (["--private", "2"], "give a pool"),
        (["--private", "0"], "private: 0 is not possible"),
        (["--size", "0"], "--size: 0"),
        (["--size", "-3"], "--size: -3"),
        (["--size", "100000000"], "give 4 to 4096"),
        (["--rounds", "0"], "rounds"),
        (["--labels", "nowhere.csv"], "labels"),
        (["--max-exposure", "1"], "max_exposure"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(images, tmp_path, capsys, arguments, sentence) -> None:
    before = set(tmp_path.iterdir())
    code, _, err = call(capsys, "encode", images, tmp_path / "set", "--size", 8, *arguments)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert set(tmp_path.iterdir()) == before


def test_where_nothing_can_be_written_nothing_is_said_to_be_kept(images, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = call(capsys, "encode", images, tmp_path / "file" / "set", "--size", 16)
    assert code == 2
    assert "cannot be written" in err
    assert "--resume" not in err


def test_a_ledger_that_cannot_be_written_is_refused_before_anything_is_encoded(images, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    before = set(tmp_path.iterdir())
    ledger = tmp_path / "file" / "own.json"
    code, _, err = call(capsys, "encode", images, tmp_path / "set", "--size", 16, "--ledger", ledger)
    assert code == 2
    assert err == f"error: encode: {ledger} cannot be written (Not a directory); change --ledger.\n"
    assert set(tmp_path.iterdir()) == before


def test_folders_with_suffixes_in_capitals_are_checked_too(tmp_path, capsys) -> None:
    torch.save({"rng": torch.get_rng_state()}, tmp_path / "A.PT")
    assert call(capsys, "check-checkpoint", tmp_path)[0] == 1


def test_paths_and_folders_in_the_way(images, tmp_path, capsys) -> None:
    assert call(capsys, "encode", images)[0] == 2
    assert call(capsys, "encode", "--verify", images, tmp_path)[0] == 2
    assert "exists" in call(capsys, "encode", images, images, "--size", 8)[2]
    assert "does not exist" in call(capsys, "encode", "./nothing/here", tmp_path / "set")[2]
    assert call(capsys, "encode", "--verify", images)[0] == 2


def test_labels_from_a_table_or_none(images, tmp_path, capsys) -> None:
    flat = images / "cat"
    code, _, err = call(capsys, "encode", flat, tmp_path / "a", "--size", 8)
    assert code == 2
    assert "--labels" in err
    table = tmp_path / "labels.csv"
    table.write_text("name,label\n" + "".join(f"cat{i}.png,{'abc'[i % 3]}\n" for i in range(8)))
    assert call(capsys, "encode", flat, tmp_path / "b", "--size", 8, "--labels", table)[0] == 0
    assert EncodedFolder(tmp_path / "b").classes == 3
    held = json.loads((tmp_path / "b.ledger.json").read_text())
    assert held["classes"] == ["a", "b", "c"]
    assert "classes" not in json.dumps(EncodedFolder(tmp_path / "b").manifest).replace('"classes": 3', "")
    table.write_text("cat0.png,1\n")
    code, _, err = call(capsys, "encode", flat, tmp_path / "c", "--size", 8, "--labels", table)
    assert code == 2
    assert "no label for 7 images" in err
    assert call(capsys, "encode", flat, tmp_path / "d", "--size", 8, "--labels", "none")[0] == 0
    assert EncodedFolder(tmp_path / "d")[0][1].numel() == 0


def test_white_space_around_a_name_does_not_count(tmp_path) -> None:
    """Names were read without it and looked up with it, so that a file ` b.png` could have no label."""
    table = tmp_path / "labels.csv"
    table.write_text("a.png, cat\n b.png,dog \n")
    assert read_labels(table, ["a.png", " b.png"]) == ([0, 1], 2, ["cat", "dog"])
    table.write_text("a.png,cat\n a.png,dog\n")
    with pytest.raises(BadInput, match="both 'cat' and 'dog'"):
        read_labels(table, ["a.png", " a.png"])


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["-1", "0", "1"], "labels: -1 in"),
        (["a", "", "b"], "empty label for cat1.png"),
        (["0", "1100000000"], "1100000000 in"),
        (["0", "9" * 5000], "99999... in"),
    ],
)
def test_labels_that_make_no_classes(images, tmp_path, capsys, labels, sentence) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("".join(f"cat{i}.png,{labels[i % len(labels)]}\n" for i in range(8)))
    code, _, err = call(capsys, "encode", images / "cat", tmp_path / "a", "--size", 8, "--labels", table)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()
    table.write_text("".join(f"cat{i}.png,{i}\n" for i in (*range(8), 7)) + "cat3.png,5\n")
    err = call(capsys, "encode", images / "cat", tmp_path / "a", "--size", 8, "--labels", table)[2]
    assert "gives cat3.png both '3' and '5'" in err


def test_many_images_in_one_encoding(tmp_path, capsys) -> None:
    code, out, err = call(capsys, "encode", "digits", tmp_path / "set", "--k", 100)
    assert code == 0, err
    assert "e+322 tries over all partners" in out  # 1797^99
    assert call(capsys, "cost", "--k", 200, "--private-images", "1e10")[0] == 0


def test_pictures_that_do_not_decode(images, tmp_path, capsys) -> None:
    (images / "dog" / "dog3.png").write_bytes(b"nothing")
    code, _, err = call(capsys, "encode", images, tmp_path / "set", "--size", 8)
    assert code == 2
    assert "dog3.png" in err
    code, _, err = call(capsys, "encode", images, tmp_path / "set", "--size", 8, "--on-error", "skip")
    assert code == 0
    assert "skipped" in err
    assert "dog3.png" in err
    assert len(EncodedFolder(tmp_path / "set")) == 15


def test_cost(capsys) -> None:
    setting = ["--k", 6, "--private-images", 5000, "--public-images", "1.28e6", "--rounds", 50]
    code, out, _ = call(capsys, "cost", *setting)
    assert code == 0
    assert "2.7e+24" in out
    assert "(epsilon, delta): none" in out
    code, out, _ = call(capsys, "cost", *setting, "--json")
    assert json.loads(out)["encodings_per_image"] == 100
    assert misfits("cost --json", json.loads(out)) == []
    assert call(capsys, "cost", "--private-images", "1.5")[0] == 2


# ---- check-checkpoint


def state_dict() -> dict[str, torch.Tensor]:
    return torch.nn.Linear(3, 2).state_dict()


def lightning_like() -> dict[str, object]:
    return {"state_dict": state_dict(), "epoch": 3, "rng": {"torch": torch.get_rng_state()}}


def released() -> dict[str, object]:
    return {"net": state_dict(), "acc": 91.0, "epoch": 7, "rng_state": torch.get_rng_state()}


def hugging_face() -> dict[str, object]:
    import random

    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}


@pytest.mark.parametrize("make", [lightning_like, released, hugging_face])
@pytest.mark.parametrize("legacy", [False, True])
def test_generator_states_are_found(make, legacy, tmp_path, capsys) -> None:
    path = tmp_path / "held.pth"
    torch.save(make(), path, _use_new_zipfile_serialization=not legacy)
    code, out, _ = call(capsys, "check-checkpoint", path)
    assert code == 1
    assert "generator state" in out
    if make is not hugging_face:
        assert "5056 bytes" in out


def test_a_checkpoint_cannot_write_lines_of_its_own_nor_steer_the_terminal(tmp_path, capsys) -> None:
    name = "a\x1b]0;owned\x07\nheld.pt: no generator state found."
    torch.save({name: torch.get_rng_state()}, tmp_path / "held.pt")
    code, out, _ = call(capsys, "check-checkpoint", tmp_path / "held.pt")
    assert code == 1
    assert len(out.splitlines()) == 2
    assert not {"\x1b", "\x07"} & set(out)


def test_names_of_files_in_errors_do_not_steer_the_terminal(tmp_path, capsys) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x\x1b]0;owned\x07\n.png").write_bytes(b"no image")
    code, _, err = call(capsys, "encode", tmp_path, tmp_path / "set", "--k", "2")
    assert code == 2
    assert "is not an image" in err
    assert len(err.splitlines()) == 1
    assert not {"\x1b", "\x07"} & set(err)


def test_states_are_not_counted_where_one_shows_in_several_lines(tmp_path, capsys) -> None:
    """Beside an object a file is read and not loaded: an entry's name, its kind and its words are one state."""
    torch.save({"numpy_rng_state": np.random.get_state(), "args": Path()}, tmp_path / "held.pt")
    code, out, _ = call(capsys, "check-checkpoint", tmp_path / "held.pt")
    assert code == 1
    *lines, last = out.splitlines()
    assert len(lines) == 3
    assert last.startswith("held.pt: keys that were drawn from such a generator")
    assert not re.search(r"\d generator state", last)


@pytest.mark.parametrize("hidden", [
    lambda: {"x": torch.get_rng_state()},
    lambda: {"x": list(np.random.RandomState(0).get_state()[1].tolist())},
    lambda: {"x": __import__("random").getstate()},
    lambda: {"x": np.random.default_rng(0).bit_generator.state},
    lambda: {"cuda_rng_state": torch.zeros(16, dtype=torch.uint8)},
    lambda: {"generator": torch.Generator()},
    lambda: {"rng_state_all": [torch.zeros(7)]},
])  # fmt: skip
def test_states_under_any_name(hidden, tmp_path, capsys) -> None:
    torch.save({"model": state_dict(), **hidden()}, tmp_path / "held.pt")
    assert call(capsys, "check-checkpoint", tmp_path / "held.pt")[0] == 1


def test_clean_checkpoints_pass_and_seeds_are_mentioned(tmp_path, capsys) -> None:
    import pickle

    from safetensors.torch import save_file

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16))
    optimizer = torch.optim.Adam(net.parameters())
    torch.save(
        {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "args": {"seed": 7}}, tmp_path / "a.ckpt"
    )
    code, out, _ = call(capsys, "check-checkpoint", tmp_path / "a.ckpt")
    assert code == 0
    assert "a seed (7)" in out
    save_file(dict(net.state_dict()), tmp_path / "b.safetensors")
    assert call(capsys, "check-checkpoint", tmp_path / "b.safetensors")[0] == 0
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"epoch": 3, "losses": [0.1, 0.2]}))
    assert call(capsys, "check-checkpoint", tmp_path)[0] == 0
    save_file({"rng_state": torch.get_rng_state()}, tmp_path / "d.safetensors")
    code, out, _ = call(capsys, "check-checkpoint", tmp_path)
    assert code == 1
    assert "d.safetensors: rng_state" in out


def test_one_file_of_a_folder_that_cannot_be_read_hides_no_other(tmp_path, capsys) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"cut")
    torch.save({"epoch": 3}, tmp_path / "b.pt")
    code, out, err = call(capsys, "check-checkpoint", tmp_path)
    assert code == 2
    assert "in what could be read" in out
    assert "a.safetensors" in err
    assert len(err.splitlines()) == 1
    torch.save({"rng_state": torch.get_rng_state()}, tmp_path / "c.pt")
    code, out, err = call(capsys, "check-checkpoint", tmp_path)
    assert code == 1
    assert "c.pt: rng_state" in out
    assert "a.safetensors" in err


def test_nothing_in_a_file_is_run(tmp_path, capsys) -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Boom(), "rng_state": torch.get_rng_state()}, tmp_path / "bad.pt")
    code, _, _ = call(capsys, "check-checkpoint", tmp_path / "bad.pt")
    assert code == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x04broken", b"PK\x03\x04cut"])
def test_what_is_no_checkpoint(tmp_path, capsys, content) -> None:
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        code, _, err = call(capsys, "check-checkpoint", tmp_path / name)
        assert code == 2
        assert "check-checkpoint" in err
    assert call(capsys, "check-checkpoint", tmp_path / "nothing.pt")[0] == 2
    (tmp_path / "empty").mkdir()
    assert call(capsys, "check-checkpoint", tmp_path / "empty")[0] == 2
