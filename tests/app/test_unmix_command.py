"""`frostglass unmix`, `challenge` and `fit-similarity` as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import call
from encoded_scenes import crops
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sets.writing import SetWriter
from frostglass.numerics.similarity_network import Shape, SimilarityNetwork, save_network

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unmix-command")
    x, y = (crops(16, 12) * 255).round().to(torch.uint8), torch.arange(12) % 3
    SetWriter(InstaHide(k=2, labels="exact", insecure_seed=1), x[:6], y[:6], 3, root / "set", rounds=20).write()
    for name, count in (("images", 6), ("more", 12)):
        for i in range(count):
            folder = root / name / str(int(y[i]))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return root


def test_one_command_recovers_the_images(made, tmp_path, capsys) -> None:
    code, out, err = call(
        capsys, "unmix", made / "set", "--out", tmp_path / "out", "--truth", made / "images", "--attack",
        "unmix_statistical:rounds=6",
    )  # fmt: skip
    assert code == 0, err
    assert "Broken: 6 of 6 private images" in out
    assert "(epsilon, delta): none" in out
    assert "unmix_statistical on set" in err
    page = tmp_path / "out" / "report.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert call(capsys, "report", tmp_path / "out")[0] == 0
    assert page.read_text(encoding="utf-8") == before


def test_json_is_all_of_stdout(made, tmp_path, capsys) -> None:
    code, out, _ = call(
        capsys, "unmix", made / "set", "--out", tmp_path / "out", "--attack", "demask:views=7", "--json"
    )
    assert code == 0
    assert json.loads(out)["cells"][0]["info"]["views"] == 7


def test_grants_are_given_in_words(made, tmp_path, capsys) -> None:
    code, out, _ = call(
        capsys, "unmix", made / "set", "--out", tmp_path / "out", "--attack", "demask", "--json", "--known",
        "labels=classes,per_class=[2,2,2]", "--known", "k=2,private=2",
    )  # fmt: skip
    assert code == 0
    card = json.loads(out)
    assert card["known"]["labels"] == "their classes, without coefficients"
    assert card["known"]["images of each class"] == "given"
    assert "labels" in card["cells"][0]["grants"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--attack", "unmix_statistical:rouns=3"], "did you mean 'rounds'"),
        (["--known", "images"], "must read key=value"),
        (["--known", "images=99999"], "fewer than the 99999 private images"),
        (["--set", "seed=3"], "--set overrides a plan"),
        (["--attack", "averaging"], "--groups FILE.npy"),
        (["--public", "nowhere"], "holds no pool"),
        (["--truth", "nowhere"], "nowhere"),
    ],
)
def test_bad_requests_are_one_sentence_and_leave_nothing(made, tmp_path, capsys, arguments, sentence) -> None:
    code, _, err = call(capsys, "unmix", made / "set", "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_and_options_of_a_set_do_not_mix(made, tmp_path, capsys) -> None:
    plan = tmp_path / "p.toml"
    plan.write_text(f'encoded = "{(made / "set").as_posix()}"\n[[attack]]\nname = "demask"\n')
    code, _, err = call(capsys, "unmix", plan, "--out", tmp_path / "out", "--truth", made / "images")
    assert code == 2
    assert "--truth goes with a set" in err
    for more in (["--hide-images"], ["--seed", "0"], ["--attack", "demask"], ["--known", "k=2"]):
        code, _, err = call(capsys, "unmix", plan, "--out", tmp_path / "out", *more)
        assert code == 2, "what is not read must not be taken"
        assert f"{more[0]} goes with a set" in err
    assert not (tmp_path / "out").exists()
    code, _, err = call(capsys, "unmix", plan, "--out", tmp_path / "out", "--set", "seed=3")
    assert code == 0, err
    assert "seed = 3" in (tmp_path / "out" / "plan.toml").read_text()


def test_groups_let_averaging_run(tmp_path, capsys) -> None:
    x = crops(16, 6)
    made = InstaHide(k=3, private=1, public=crops(16)[20:], labels="exact", insecure_seed=1)
    rows = np.repeat(np.arange(6), 10)
    encoded = made.encode_rows(x, torch.zeros(6, dtype=torch.long), rows, 0, 1)
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "encryption.npy", encoded.images.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "groups.npy", rows)
    code, out, err = call(
        capsys, "unmix", folder, "--out", tmp_path / "out", "--groups", tmp_path / "groups.npy", "--attack",
        "averaging", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["cells"][0]["info"]["groups"] == 6


def test_a_challenge_is_made_attacked_and_scored(made, tmp_path, capsys) -> None:
    folder = tmp_path / "challenge"
    code, out, err = call(
        capsys, "challenge", "make", made / "more", folder, "--private-images", 6, "--rounds", 20, "--k", 2,
        "--private", 2, "--size", 16, "--insecure-seed", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "120 encodings of 6 images" in out
    assert "Commitment: " in out
    code, _, err = call(capsys, "unmix", folder, "--out", tmp_path / "out", "--attack", "unmix_statistical:rounds=6")
    assert code == 0, err
    code, out, err = call(capsys, "challenge", "score", folder, tmp_path / "out", "--either-sign", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["Max_SSIM"] > 0.9
    assert found["Min_L2"] < found["Mean_L2"] < found["Max_L2"]
    code, out, _ = call(capsys, "challenge", "score", folder, tmp_path / "out", "--either-sign")
    assert code == 0
    assert "Max_SSIM" in out
    code, _, err = call(capsys, "challenge", "score", folder, tmp_path / "none")
    assert code == 2
    assert "does not exist" in err


def test_a_network_is_fitted_and_used(made, tmp_path, capsys) -> None:
    others = tmp_path / "others"
    others.mkdir()
    for i, image in enumerate((crops(16) * 255).round().to(torch.uint8)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(others / f"{i:02d}.png")
    Image.new("L", (20, 16)).save(others / "grey.png")
    network = tmp_path / "n.safetensors"
    code, out, err = call(
        capsys, "fit-similarity", others, "--out", network, "--k", 2, "--private", 2, "--size", 16, "--steps", 5,
        "--batch", 8, "--width", 4, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "AUC" in out
    assert "note: 1 of 73 images: not square, cropped to the centre square." in err
    code, out, err = call(
        capsys, "unmix", made / "set", "--out", tmp_path / "out", "--attack",
        f"unmix_learned:network={network},rounds=4", "--truth", made / "images",
    )  # fmt: skip
    assert code == 0, err
    assert "unmix_learned" in out
    save_network(SimilarityNetwork(Shape(size=8, width=4)), tmp_path / "small.safetensors")
    code, _, err = call(
        capsys, "unmix", made / "set", "--out", tmp_path / "none", "--attack",
        f"unmix_learned:network={tmp_path / 'small.safetensors'}",
    )  # fmt: skip
    assert code == 2
    assert "unmix_learned: network: it was fitted to 3 x 8 x 8 and the encodings are 3 x 16 x 16; fit one" in err
    assert not (tmp_path / "none").exists()
    code, _, err = call(capsys, "fit-similarity", others, "--out", tmp_path / "n.pt")
    assert code == 2
    assert "must end in .safetensors" in err
    (tmp_path / "folder.safetensors").mkdir()
    for out, sentence in (("folder.safetensors", "is a folder"), ("n.safetensors/deeper.safetensors", "cannot be")):
        code, _, err = call(capsys, "fit-similarity", others, "--out", tmp_path / out, "--steps", 10**9)
        assert code == 2
        assert sentence in err, "said before the fit, not after it"
    assert call(capsys, "fit-similarity", others, "--out", tmp_path / "m.safetensors", "--limit", -5)[0] == 2
    assert call(capsys, "fit-similarity", others, "--out", tmp_path / "new" / "n.safetensors", "--k", 0)[0] == 2
    assert not (tmp_path / "new").exists()


def test_a_size_that_is_not_possible_is_refused(made, tmp_path, capsys) -> None:
    code, _, err = call(capsys, "challenge", "make", made / "more", tmp_path / "c", "--private-images", 6, "--k", 2,
                        "--private", 2, "--size", 0)  # fmt: skip
    assert code == 2
    assert "--size: 0 pixels" in err
