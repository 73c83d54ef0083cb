"""An audit of encodings from end to end: what is written, what is scored, what is said, and what a kill leaves."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import frostglass
from encoded_scenes import crops
from frostglass.attacks.encodings import unmixing_steps
from frostglass.auditing.metrics.registry import METRICS, Metric
from frostglass.auditing.unmixing import Given, run_unmix
from frostglass.auditing.unmixing_card import load_unmix_scorecard
from frostglass.auditing.unmixing_files import decryption
from frostglass.auditing.unmixing_inputs import from_tensors, read_encoded
from frostglass.auditing.unmixing_plan import AUTO, load_unmix_plan, parse_unmix_plan
from frostglass.auditing.unmixing_report import exposure_bars, write_unmix_report
from frostglass.core.errors import BadInput
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sets.writing import SetWriter
from frostglass.numerics.keystream import Secret

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

QUICK = [{"name": "prng_attack", "last": 512}, {"name": "unmix_statistical", "rounds": 6}, {"name": "demask"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """set/: 6 images, 20 rounds, k = 2; images/: the six as PNG.

    Keys are as those of the system, that is from no seed, but the same in every run: six rounds of the attack are few,
    and now and then keys need more.
    """
    root = tmp_path_factory.mktemp("unmixing")
    x, y = (crops(16, 6) * 255).round().to(torch.uint8), torch.arange(6) % 3
    numbers = itertools.count()
    fixed = classmethod(lambda cls, _=None: cls(hashlib.sha256(b"unmixing %d" % next(numbers)).digest()))
    with patch.object(Secret, "draw", fixed):
        SetWriter(InstaHide(k=2, labels="exact"), x, y, 3, root / "set", rounds=20).write()
    for i, image in enumerate(x):
        folder = root / "images" / str(int(y[i]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def report(made: Path) -> Any:
    return frostglass.unmix(made / "set", truth=made / "images", attacks=QUICK, out=made / "out")


def test_images_are_recovered_scored_and_written(made: Path, report: Any) -> None:
    cells = {c.attack: c for c in report.scorecard.cells}
    assert cells["unmix_statistical"].summary.over_threshold.count == 6
    assert cells["unmix_statistical"].summary.ssim_median > 0.95
    assert cells["prng_attack"].info["found"] == "nothing"
    assert report.scorecard.headline.startswith("Broken: 6 of 6")
    key = cells["unmix_statistical"].id
    pngs = sorted((made / "out" / "recovered" / key).glob("*.png"))
    assert len(pngs) == 6
    shown = np.asarray(Image.open(pngs[0]), np.float32) / 255
    kept = load_file(made / "out" / "reconstruction.safetensors")[key]
    assert np.allclose(shown, kept[0].permute(1, 2, 0).numpy(), atol=0.003)
    assert np.load(made / "out" / "recovered" / f"{key}.npy").shape == (6, 16, 16, 3)
    assert not (made / "out" / "decryption.npy").exists(), "that is for challenges"


def test_a_metric_that_breaks_is_named_in_the_cells_and_the_run_is_kept(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    METRICS.names()
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))
    METRICS.register("theirs")(lambda: Metric("theirs", lambda found, truth: found[7]))
    plan = parse_unmix_plan(
        {"encoded": str(made / "set"), "truth": str(made / "images"), "attack": [{"name": "demask"}],
         "report": {"metrics": ["theirs"]}}
    )  # fmt: skip
    out = tmp_path / "out"
    (cell,) = run_unmix(plan, out, device=torch.device("cpu")).scorecard.cells
    assert cell.status == "failed"
    assert cell.error is not None
    assert cell.error.startswith("metric 'theirs': raised IndexError: index 7")
    METRICS._entries.pop("theirs")
    METRICS.register("theirs")(lambda: Metric("theirs", lambda found, truth: found.flatten(1).mean(1)))
    (cell,) = run_unmix(plan, out, device=torch.device("cpu"), resume=True).scorecard.cells
    assert cell.status == "done"
    assert "theirs" in cell.images[0].extra


@pytest.mark.parametrize(("judged", "known"), [("theirs", False), ("psnr", True)])
def test_guessing_has_no_count_by_a_metric_that_breaks(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: str, known: bool
) -> None:
    def for_one(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        if len(found) > 1:
            raise KeyError("weights")
        return found.flatten(1).mean(1)

    METRICS.names()
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))
    METRICS.register("theirs")(lambda: Metric("theirs", for_one))
    plan = parse_unmix_plan(
        {"encoded": str(made / "set"), "truth": str(made / "images"), "attack": [{"name": "demask"}],
         "report": {"metrics": ["psnr", "theirs"], "threshold": {"metric": judged, "value": 0.01}}}
    )  # fmt: skip
    card = run_unmix(plan, tmp_path / "out", device=torch.device("cpu")).scorecard
    assert [cell.status for cell in card.cells] == ["failed"]
    assert (card.guess is not None) == known
    assert card.guess is None or card.guess.over_threshold.count == card.guess.images


def test_the_words_know_ledger_keys_and_limits(report: Any) -> None:
    told = "\n".join(report.scorecard.findings)
    assert re.search(r"an image stands in \d+ to \d+, typically \d+ encodings", told)
    assert "no seed found; searched seeds 0 to 511" in told
    assert "(epsilon, delta): none" in told
    assert "insecure_seed" not in told
    assert "demask" not in report.scorecard.headline
    text = str(report)
    assert "unmix_statist" in text
    assert "Report:" in text


def test_the_page_stands_alone_and_shows_what_was_found(made: Path, report: Any) -> None:
    page = report.html.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") >= 12
    for words in ("Broken: 6 of 6", "Private and recovered", "Exposure: encodings that an image is in", "best case"):
        assert words in page
    for image in report.scorecard.cells[1].images:
        assert image.sha256[:12] in page
    before = page
    assert write_unmix_report(made / "out").read_text(encoding="utf-8") == before


def test_the_scorecard_comes_back_and_the_run_is_in_the_journal(made: Path, report: Any) -> None:
    card = load_unmix_scorecard(made / "out" / "scorecard.json")
    assert card == report.scorecard
    kinds = [json.loads(line)["kind"] for line in (made / "out" / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "run_started"
    assert kinds.count("cell_finished") == 3
    assert "progress" in kinds
    with pytest.raises(BadInput, match="is no scorecard"):
        load_unmix_scorecard(made / "out" / "events.jsonl")


def test_without_the_truth_nothing_is_scored(made: Path, tmp_path: Path) -> None:
    found = frostglass.unmix(made / "set", attacks=QUICK[1:2], out=tmp_path / "out")
    cell = found.scorecard.cells[0]
    assert cell.summary is None
    assert not cell.images
    assert "6 by unmix_statistical" in found.scorecard.headline
    assert "nobody can score" in found.scorecard.headline
    page = found.html.read_text(encoding="utf-8")
    assert "Recovered image 6" in page
    assert "so nothing is scored here" in page


def test_attacks_never_see_the_truth(made: Path, tmp_path: Path) -> None:
    """With it, with its negative and without, to the last bit: scoring alone turns the set to the better sign."""
    without = frostglass.unmix(made / "set", attacks=QUICK[1:2], out=tmp_path / "out")
    scores = []
    for name, truth in {"a": crops(16, 6), "b": 1 - crops(16, 6)}.items():
        found = frostglass.unmix(made / "set", truth=truth, attacks=QUICK[1:2], out=tmp_path / name)
        assert torch.equal(found.images["01-unmix-statistical"], without.images["01-unmix-statistical"])
        assert found.scorecard.cells[0].objective == without.scorecard.cells[0].objective
        scores.append(found.scorecard.cells[0].summary.ssim_median)
    assert min(scores) > 0.9


def test_hidden_pictures_are_nowhere_on_the_page(made: Path, tmp_path: Path) -> None:
    found = frostglass.unmix(made / "set", truth=made / "images", attacks=QUICK[1:2], show_images=False,
                             out=tmp_path / "out")  # fmt: skip
    assert "data:image/png" not in found.html.read_text(encoding="utf-8")
    assert not list((tmp_path / "out").rglob("*.png"))


def test_open_choice_lists_what_does_not_apply(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frostglass.auditing.unmixing_plan.AUTO", ("mixup_attack", "averaging", "demask"))
    assert "unmix_statistical" in AUTO
    found = frostglass.unmix(made / "set", truth=made / "images", out=tmp_path / "out")
    states = {c.attack: c.status for c in found.scorecard.cells}
    assert states == {"mixup_attack": "skipped", "averaging": "skipped", "demask": "done"}
    assert "--public POOL" in found.html.read_text(encoding="utf-8")
    assert "no proof of privacy" in found.scorecard.headline or "No attack" in found.scorecard.headline


def test_a_named_attack_that_does_not_apply_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--public POOL"):
        frostglass.unmix(made / "set", attacks=["mixup_attack"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"attack": [{"name": "unmix_statistcal"}]}, "did you mean 'unmix_statistical'"),
        ({"attack": [{"name": "thaw"}]}, "reads gradients, not encodings"),
        ({"attack": [{"name": "demask", "views": "many"}]}, "is not a whole number"),
        ({"report": {"metrics": ["iip"]}}, "report.metrics"),
        ({"report": {"metrics": ["psnr"], "threshold": {"metric": "fft2d", "value": 1}}}, "report.threshold.metric"),
        ({"atack": []}, "did you mean 'attack'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as wrong:
        parse_unmix_plan({"encoded": "set"} | values)
    assert sentence in str(wrong.value)


def test_a_plan_names_the_same_run(made: Path, tmp_path: Path, report: Any) -> None:
    plan = made / "plan.toml"
    plan.write_text('encoded = "set"\ntruth = "images"\n[[attack]]\nname = "unmix_statistical"\nrounds = 6\n')
    loaded = load_unmix_plan(plan, ["seed=0"])
    assert Path(loaded.encoded) == made / "set"
    found = frostglass.unmix(plan, out=tmp_path / "out")
    ours = next(c for c in found.scorecard.cells if c.attack == "unmix_statistical")
    assert ours.summary is not None
    assert ours.summary.over_threshold.count == 6
    again = load_unmix_plan(tmp_path / "out" / "plan.toml")
    assert again.digest() == loaded.digest(), "the resolved plan is itself a plan"


def test_a_killed_run_goes_on_to_the_same_end(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(out: Path, **more: Any) -> Any:
        attack = [{"name": "unmix_statistical", "rounds": 3, "starts": 2}, {"name": "demask"}]
        return frostglass.unmix(made / "set", truth=made / "images", attacks=attack, out=out, **more)

    straight = go(tmp_path / "a")
    real, done = unmixing_steps.Unmix.step, []

    class Killed(BaseException):
        pass

    def step(self: Any, *arguments: Any) -> Any:
        if len(done) == 2:
            raise Killed
        done.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(unmixing_steps.Unmix, "step", step)
    with pytest.raises(Killed):
        go(tmp_path / "b")
    monkeypatch.setattr(unmixing_steps.Unmix, "step", real)
    with pytest.raises(BadInput, match="add --resume"):
        go(tmp_path / "b")
    resumed = go(tmp_path / "b", resume=True)
    assert all(torch.equal(straight.images[k], resumed.images[k]) for k in straight.images)
    rows = [json.loads(line) for line in (tmp_path / "b" / "events.jsonl").read_text().splitlines()]
    assert any(r["kind"] == "attack_started" and r["step"] > 0 for r in rows)


def test_a_run_does_not_go_on_with_other_files_than_it_began_with(made: Path, tmp_path: Path) -> None:
    names, count = tmp_path / "groups.npy", len(read_encoded(made / "set").images)

    def go(groups: list[int], *, resume: bool = False) -> Any:
        np.save(names, np.resize(groups, count))
        return frostglass.unmix(made / "set", groups=names, attacks=["averaging"], out=tmp_path / "out", resume=resume)

    go([0, 1, 2])
    go([0, 1, 2], resume=True)
    with pytest.raises(BadInput, match="not those that"):
        go([2, 1, 0, 0], resume=True)


def test_another_set_in_the_same_folder_is_refused(made: Path, tmp_path: Path, report: Any) -> None:
    with pytest.raises(BadInput, match="belongs to another plan"):
        frostglass.unmix(made / "set", attacks=["demask"], out=made / "out", resume=True)


def test_an_attack_that_breaks_leaves_the_others_running(made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: Any, *_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(unmixing_steps.Unmix, "step", broken)
    found = frostglass.unmix(made / "set", truth=made / "images", attacks=QUICK[1:], out=tmp_path / "out")
    assert [c.status for c in found.scorecard.cells] == ["failed", "done"]
    assert "out of luck" in found.html.read_text(encoding="utf-8")


def test_truth_that_does_not_fit_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="5 images, and the set has 6"):
        frostglass.unmix(made / "set", truth=crops(16, 5))
    with pytest.raises(BadInput, match="truth: shape"):
        frostglass.unmix(made / "set", truth=crops(8, 6))
    with pytest.raises(BadInput, match=r"truth: shape \(0, 3, 16, 16\) must be \[n, 3, 16, 16\]\."):
        frostglass.unmix(made / "set", truth=crops(16, 6)[:0])
    for wrong, told in (
        (crops(16, 6) * torch.nan, "torch.float32 values from nan to nan"),
        (crops(16, 6) * 2, "torch.float32 values from .* must be floating point, finite and in"),
        ((crops(16, 6) * 255).byte(), "torch.uint8 values from .* divide bytes by 255"),
    ):
        with pytest.raises(BadInput, match=f"truth: {told}"):
            frostglass.unmix(made / "set", truth=wrong)
    with monkeypatch.context() as fewer:
        fewer.setattr("frostglass.auditing.unmixing.MOST_TRUTH", 5)
        with pytest.raises(BadInput, match="--truth: 6 images are more than the 5"):
            frostglass.unmix(made / "set", truth=made / "images")
    with pytest.raises(BadInput, match="given from Python"):
        frostglass.unmix(parse_unmix_plan({"encoded": "python"}))


def test_images_that_are_not_square_are_scored_by_a_folder_of_them(tmp_path: Path) -> None:
    x = (crops(16, 6)[..., :12] * 255).round().to(torch.uint8)
    SetWriter(InstaHide(k=2, labels="exact"), x, torch.arange(6) % 2, 2, tmp_path / "set", rounds=1).write()
    (tmp_path / "images").mkdir()
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
    from_files, given = (
        frostglass.unmix(tmp_path / "set", truth=truth, attacks="demask").scorecard.cells[0]
        for truth in (tmp_path / "images", x.float() / 255)
    )
    assert from_files.images
    assert [row.ssim for row in from_files.images] == [row.ssim for row in given.images]


def test_a_truth_of_more_images_than_the_set_hides_no_success(made: Path) -> None:
    more = crops(16, 20)  # the six of the set, and fourteen others
    found = frostglass.unmix(made / "set", truth=more, attacks=QUICK[1])
    cell = found.scorecard.cells[0]
    assert found.scorecard.headline.startswith("Broken: 6 of 6")
    assert [row.id for row in cell.images] == [f"image {i}" for i in range(6)]
    assert "--truth holds 20 images and the set 6" in " ".join(cell.warnings)
    assert cell.summary.ssim_median > 0.95


def test_scores_stand_beside_what_guessing_gives(made: Path) -> None:
    found = frostglass.unmix(made / "set", truth=made / "images", attacks="demask")
    guess = found.scorecard.guess
    assert guess is not None
    assert guess.over_threshold.count == 0
    assert guess.ssim_median is not None
    assert 0 < guess.ssim_median < 0.5
    assert "without any attack, gives a median SSIM" in found.scorecard.findings[1]
    alike = crops(16, 1).expand(6, -1, -1, -1)
    same = frostglass.unmix(made / "set", truth=alike, attacks="demask").scorecard
    assert same.guess.over_threshold.count == 6
    assert "such images are alike" in same.findings[1]


def test_images_picked_by_the_truth_are_called_so(made: Path) -> None:
    encoder = InstaHide(k=3, private=1, public=crops(16)[30:], labels="exact", mask="none", insecure_seed=4)
    rows = np.tile(np.arange(4), 10)
    encoded = encoder.encode_rows(crops(16, 4), torch.arange(4) % 2, rows, 0, 2)
    held = replace(
        from_tensors(encoded.images, encoded.targets), manifest={"images": 4, "k": 3, "private": 1, "mask": "none"}
    )
    pool = crops(16)[30:] * 2 - 1
    plan = parse_unmix_plan({"encoded": "python", "truth": "python", "attack": [{"name": "mixup_attack"}]})
    with patch("frostglass.auditing.unmixing_view._pool", lambda folder, shape: pool):
        plan = plan.model_copy(update={"pool": "x"})
        found = run_unmix(plan, made / "picked", device=torch.device("cpu"), given=Given(held, crops(16, 4)))
    cell = found.scorecard.cells[0]
    assert cell.info["recovered"] > 4
    assert "cannot pick so" in cell.warnings[0]


@pytest.mark.parametrize("metric", ["ms_ssim", "lpips"])
def test_a_threshold_that_cannot_be_computed_is_refused(made: Path, metric: str) -> None:
    """Else no image would ever reach it, which reads as if nothing was recovered."""
    plan = {"encoded": str(made / "set"), "truth": str(made / "images"), "attack": [{"name": "demask"}],
            "report": {"metrics": ["psnr", "ssim", metric], "threshold": {"metric": metric, "value": 0.5}}}  # fmt: skip
    with pytest.raises(BadInput, match=metric):
        frostglass.unmix(parse_unmix_plan(plan))


def test_every_row_of_a_submission_is_judged_alike() -> None:
    x = crops(16, 10)
    rows = torch.arange(2049) % 9 + 1
    assert int(rows[-1]) != 0
    made = decryption(x[rows], x)
    assert torch.equal(made[-1], x[rows[-1]]), "a last part of one row has no mean of its own"


def test_tensors_without_a_manifest(tmp_path: Path) -> None:
    encoder = InstaHide(k=2, labels="exact", insecure_seed=4)
    made = encoder.encode_rows(crops(16, 4), torch.arange(4) % 2, np.tile(np.arange(4), 20), 0, 2)
    found = frostglass.unmix(
        made.images, targets=made.targets, truth=crops(16, 4), known={"images": 4, "per_class": [2, 2]},
        attacks=["unmix_statistical"], out=tmp_path / "out",
    )  # fmt: skip
    assert found.scorecard.cells[0].summary.over_threshold.count == 4
    told = "\n".join(found.scorecard.findings)
    assert "no exposure ledger" in told
    assert (tmp_path / "out" / "decryption.npy").exists()


def test_an_insecure_manifest_is_called_open(tmp_path: Path) -> None:
    x = (crops(16, 4) * 255).round().to(torch.uint8)
    SetWriter(
        InstaHide(k=2, labels="exact", insecure_seed=99), x, torch.arange(4) % 2, 2, tmp_path / "set", rounds=20
    ).write()
    found = frostglass.unmix(tmp_path / "set", truth=x.float() / 255, out=tmp_path / "out",
                             attacks=[{"name": "prng_attack", "last": 256}])  # fmt: skip
    assert found.scorecard.cells[0].info["seed"] == 99
    assert found.scorecard.cells[0].summary.ssim_median > 0.99
    assert any("Keys: OPEN" in line for line in found.scorecard.findings)
    other = frostglass.unmix(tmp_path / "set", known={"images": 3}, attacks=[{"name": "prng_attack", "last": 256}],
                             out=tmp_path / "other").scorecard  # fmt: skip
    assert other.cells[0].status == "done", "a wrong number of images does not hide that the seed was found"
    assert any("Keys: OPEN" in line for line in other.findings)
    assert "80 encodings are no whole number of rounds of 3 images" in other.cells[0].info["mask"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_of_absolute_values_with_known_keys_comes_back_up_to_one_sign(tmp_path: Path, channels: int) -> None:
    x = (crops(16, 6)[:, :channels] * 255).round().to(torch.uint8)
    encoder = InstaHide(k=2, labels="exact", mask="abs", insecure_seed=9)
    SetWriter(encoder, x, torch.arange(6) % 2, 2, tmp_path / "set", rounds=20).write()
    found = frostglass.unmix(tmp_path / "set", truth=x.float() / 255, out=tmp_path / "out",
                             attacks=[{"name": "prng_attack", "last": 16}])  # fmt: skip
    cell = found.scorecard.cells[0]
    assert (cell.info["seed"], cell.info["sign_free"]) == (9, True)
    assert cell.summary.ssim_median > 0.9


def test_one_sign_for_the_whole_set_and_only_where_it_is_open(made: Path) -> None:
    """Negating the recovered set changes no score; the seed attack knows the sign and gets no second chance."""
    assert unmixing_steps.Unmix("u", 1, 1, 10).sign_free
    from frostglass.attacks.registry import ATTACKS

    assert not getattr(ATTACKS["prng_attack"].make(), "sign_free", False)
    assert not getattr(ATTACKS["demask"].make(), "sign_free", False)


def test_bars_cover_the_histogram() -> None:
    assert exposure_bars({}) == []
    assert [b["images"] for b in exposure_bars({"3": 2, "5": 1})] == [2, 0, 1]
    wide = exposure_bars({str(i): 1 for i in range(1, 401)})
    assert len(wide) <= 41
    assert sum(b["images"] for b in wide) == 400
