"""Ranks among non-members on cases worked out by hand, and what reaches a scorecard."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.auditing import nonmembers
from frostglass.auditing.cells import outcome
from frostglass.auditing.metrics import lpips as lpips_file
from frostglass.auditing.metrics.fft2d import fft2d_values
from frostglass.auditing.metrics.psnr import psnr_values
from frostglass.auditing.metrics.registry import METRICS
from frostglass.auditing.nonmembers import LEAST_NULL, MOST_NULL, NonMembers, non_members, null_rank
from frostglass.auditing.plan import Plan, parse_plan
from frostglass.auditing.prepare import Prepared, prepare
from frostglass.auditing.run import run_plan
from frostglass.auditing.score import score
from frostglass.auditing.scorecard import NullRank, OverThreshold, Summary
from frostglass.auditing.simulate import Round, Truth
from frostglass.auditing.wording import null_words
from frostglass.core.batch import Batch, Domain, Sealed, one_hot
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.threat import Observation
from frostglass.core.update import LocalPlan
from frostglass.vision import datasets, networks
from scenes import outcome_of, small

CPU = torch.device("cpu")


def noisy(images: Tensor, amount: float = 0.1, key: int = 0) -> Tensor:
    return (images + amount * Rng.from_seed(key).normal(images.shape)).clamp(0, 1)


def cnn(size: int, channels: int = 3) -> nn.Module:
    return networks.build("small_bn_cnn", classes=10, channels=channels, size=size, rng=Rng.from_seed(3))


# ------------------------------------------------------------------------------------------------------ null of a score


def source(images: Tensor, labels: list[int]) -> NonMembers:
    names = tuple(f"image {i}" for i in range(len(images)))
    digests = tuple(nonmembers._digest(i) for i in images)
    rows = range(len(images))
    return NonMembers(images, torch.tensor(labels), names, digests, tuple(rows), frozenset(rows), nn.Linear(1, 1))


def flat(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()


def test_a_rank_counts_the_non_members_that_are_at_least_as_close() -> None:
    """The reconstruction is 0.5; the original 0.6; the 99 others are 0.51, 0.52, 0.4 (a tie) and 96 times 0.9."""
    found, truth = flat(0.5)[0], flat(0.6)
    others = source(flat(0.51, 0.52, 0.4, *[0.9] * 96), [7] * 99)
    scores = {"psnr": float(psnr_values(flat(0.5).double(), flat(0.4).double()))}
    held = null_rank(found.double(), scores, 7, others, range(99))
    assert held == NullRank(n0=99, p={"psnr": 0.04})
    distance = {"fft2d": float(fft2d_values(found[None], truth))}
    lower = null_rank(found, distance, 7, others, range(99))
    assert lower is not None
    assert lower.p == {"fft2d": 0.03}  # a distance, of logarithms: 0.4 is further from 0.5 than 0.6 is


def test_too_few_of_the_class_give_no_rank_but_one_among_any_that_says_so() -> None:
    others = source(flat(*[0.9] * 60, *[0.1] * 60), [1] * 60 + [2] * 60)
    held = null_rank(flat(0.5)[0], {"psnr": 30.0, "ssim": math.nan}, 1, others, range(120))
    assert held == NullRank(n0=60, any_n0=120, any_p={"psnr": round(1 / 121, 6)})
    assert null_words(held) == "n/a (n0 = 60); any class: PSNR 0.008 (n0 = 120)"
    enough = null_rank(flat(0.5)[0], {"psnr": 5.0}, 1, source(flat(*[0.9] * 99), [1] * 99), range(99))
    assert null_words(enough) == "PSNR 1.000 (n0 = 99)"
    assert null_rank(flat(0.5)[0], {"psnr": 30.0}, 1, others, []) is None
    assert null_words(None) == "–"


def test_metrics_with_a_chance_level_of_their_own_take_no_rank() -> None:
    held = null_rank(flat(0.5)[0], {"iip_pixels": 1.0, "psnr": 30.0}, 0, source(flat(*[0.9] * 99), [0] * 99), range(99))
    assert held is not None
    assert set(held.p) == {"psnr"}


def test_a_large_source_is_compared_with_a_bounded_number() -> None:
    images = Rng.from_seed(0).uniform((300, 1, 8, 8))
    held = null_rank(images[0], {"psnr": 10.0}, 0, source(images, [0] * 300), range(300))
    assert held is not None
    assert held.n0 == MOST_NULL
    assert nonmembers.most_null(torch.zeros(1, 3, 224, 224)) == LEAST_NULL


def test_the_batch_itself_is_never_its_own_null() -> None:
    """Neither by name (augmentation changes the pixels) nor by content (the source may hold an image twice)."""
    images = Rng.from_seed(0).uniform((6, 1, 8, 8))
    images[4] = images[0]
    others = source(images, [0] * 6)
    flipped = torch.stack([images[0], images[1].flip(-1)])
    batch = Batch(flipped, one_hot([0, 0], 2), Domain(), ("image 0", "image 1"))
    assert others.outside(batch) == [2, 3, 5]
    context = others.context(flipped.double(), [2, 3, 5], torch.arange(2))
    assert torch.equal(context.pool, torch.cat([flipped, images[[2, 3, 5]]]))


def ready(plan: Plan) -> Prepared:
    return prepare(plan, 0, CPU)


def test_digits_have_non_members_of_their_class(tmp_path: Path) -> None:
    plan = parse_plan(small(data={"source": "digits", "size": 8, "channels": 1}))
    prepared = ready(plan)
    held = non_members(prepared, plan.report)
    assert held is not None
    assert len(held.images) == len(set(held.names)) >= 4 + MOST_NULL
    wanted = set(prepared.data.labels.tolist())
    assert all(int((held.labels == k).sum()) >= LEAST_NULL for k in wanted)
    names = {n: i for i, n in enumerate(datasets.catalogue("digits").names)}
    rows = [names[n] for n in held.names]
    torch.testing.assert_close(held.images, datasets.load("digits", size=8, channels=1, rows=rows).images)
    share = [int(held.labels[i]) in wanted for i in held.common]
    assert len(share) == 4 + MOST_NULL
    assert sum(share) < 0.7 * len(share), "those of any class are drawn whatever the class"


def test_without_null_and_pool_nothing_is_read() -> None:
    assert non_members(ready(parse_plan(small())), parse_plan(small(report={"null": False})).report) is None
    pooled = parse_plan(small(report={"null": False, "metrics": ["psnr", "ssim", "iip_pixels"]}))
    assert non_members(ready(pooled), pooled.report) is not None


def test_a_source_that_can_no_longer_be_read_costs_the_null_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parse_plan(small(data={"source": "digits", "size": 8, "channels": 1}))
    prepared = ready(plan)

    def gone(*_: Any, **__: Any) -> None:
        raise BadInput("digits: gone.")

    monkeypatch.setattr(nonmembers.datasets, "load", gone)
    held = non_members(prepared, plan.report)
    assert held is not None
    assert len(held.images) == 4
    assert held.note.endswith("as others cannot be read (digits: gone.)")


# ------------------------------------------------------------------------------------------------------- in scorecards


def a_round(images: Tensor) -> Round:
    batch = Batch(images, one_hot([0] * len(images), 5), Domain(), tuple(f"image {i}" for i in range(len(images))))
    seen = Observation(nn.Linear(1, 1), (), batch.domain, "train", tuple(images.shape[1:]), 5)
    return Round(seen, Sealed(Truth(batch, batch)), None, LocalPlan())


def found(images: Tensor) -> Reconstruction:
    return Reconstruction(images, torch.zeros(len(images), dtype=torch.bool), 0.5)


def test_scores_follow_their_images_through_matching() -> None:
    """K = 4, one row missing, the others in another order, and pool metrics with the right original each."""
    images = Rng.from_seed(0).uniform((110, 1, 8, 8))
    others = replace(source(images, [0] * 110), model=cnn(8, 1))
    rows = noisy(images[:4], 0.02)[[3, 0, 2]]
    held = score(found(rows), a_round(images[:4]), ["iip_pixels", "iip_features", "registered_psnr"], others)
    assert [r.extra["iip_pixels"] for r in held.private] == [1.0, None, 1.0, 1.0]
    assert [r.extra["iip_features"] for r in held.private] == [1.0, None, 1.0, 1.0]
    assert held.private[1].null is None
    for i in (0, 2, 3):
        row, null = held.private[i], held.private[i].null
        assert null is not None
        assert (null.n0, null.any_n0) == (106, None)
        assert null.p == {"psnr": round(1 / 107, 6), "ssim": round(1 / 107, 6), "registered_psnr": round(1 / 107, 6)}
        assert row.psnr is not None
        assert (row.extra["registered_psnr"] or 0) >= row.psnr
    assert held.notes["iip_pixels"].startswith("nearest by cosine among a pool of 110 originals; chance level 0.91 %")


def test_a_reconstruction_that_resembles_nothing_ranks_in_the_middle() -> None:
    images = Rng.from_seed(0).uniform((200, 1, 8, 8))
    ranks = []
    for i in range(40):
        guess = Rng.from_seed(1).at(i).uniform((1, 1, 8, 8))
        held = score(found(guess), a_round(images[i : i + 1]), [], source(images, [0] * 200)).private[0].null
        assert held is not None
        ranks.append(held.p["psnr"])
    assert 0.3 < sum(ranks) / len(ranks) < 0.7


def test_without_other_images_pool_metrics_are_not_available() -> None:
    images = Rng.from_seed(0).uniform((2, 1, 8, 8))
    held = score(found(images), a_round(images), ["iip_pixels"])
    assert [r.extra["iip_pixels"] for r in held.private] == [None, None]
    assert held.notes["iip_pixels"].startswith("n/a: it compares with a pool")
    assert all(r.null is None for r in held.private)


def test_a_run_with_every_small_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips_file, "find_spec", lambda name: None)
    names = ["psnr", "ssim", "registered_psnr", "fft2d", "iip_pixels", "iip_features"]
    digits = {"source": "digits", "size": 32, "channels": 1}
    plan = small(report={"metrics": [*names, "lpips"]}, data=digits, model={"name": "small_bn_cnn", "options": {}})
    plan["scenario"][0]["attack"][0] |= {"steps": 2, "every": 1}
    plan["scenario"][0]["client"]["batches"] = 1
    for out in ("a", "b"):
        run_plan(parse_plan(plan), tmp_path / out, device=CPU)
    assert outcome_of(tmp_path / "a")[0] == outcome_of(tmp_path / "b")[0]
    (cell,) = json.loads((tmp_path / "a" / "scorecard.json").read_text())["cells"]
    for row in cell["images"]:
        assert row["extra"]["lpips"] is None
        assert all(isinstance(row["extra"][n], float) for n in names[2:])
        assert row["null"]["n0"] >= LEAST_NULL
        assert set(row["null"]["p"]) == {"psnr", "ssim", "registered_psnr", "fft2d"}
        assert all(0 < p <= 1 for p in row["null"]["p"].values())
    assert cell["metric_notes"]["lpips"].startswith("n/a: the package lpips is not installed")
    assert "pool of 258 originals; chance level 0.39 %" in cell["metric_notes"]["iip_features"]
    assert set(cell["summary"]["extra_means"]) == set(names[2:])
    page = (tmp_path / "a" / "report.html").read_text()
    for words in ("p among non-members", "pool of 258 originals; chance level", "n/a: the package lpips", "(n0 = 1"):
        assert words in page
    plain = run_plan(parse_plan(small(report={"null": False})), tmp_path / "c", device=CPU)
    assert all(i.null is None for i in plain.cells[0].images)
    assert "p among non-members" not in (tmp_path / "c" / "report.html").read_text()


def test_images_too_small_for_a_metric_are_refused_before_compute(tmp_path: Path) -> None:
    plan = small(report={"metrics": ["psnr", "ssim", "ms_ssim", "lpips"]})
    with pytest.raises(BadInput) as wrong:
        run_plan(parse_plan(plan), tmp_path / "run", device=CPU)
    assert wrong.value.problems == (
        "small: report.metrics: 'ms_ssim' needs images of at least 176 pixels a side, and these have 8; raise "
        "data.size, or leave it out.",
        "small: report.metrics: 'lpips' needs images of at least 31 pixels a side, and these have 8; raise data.size, "
        "or leave it out.",
    )
    assert not (tmp_path / "run").exists()


def test_a_threshold_on_a_metric_that_is_not_available_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing would reach it, and the report would read as if nothing had been recovered."""
    monkeypatch.setattr(lpips_file, "find_spec", lambda name: None)
    report = {"metrics": ["psnr", "lpips"], "threshold": {"metric": "lpips", "value": 0.1}}
    with pytest.raises(BadInput, match=r"small: report.threshold.metric: 'lpips' is not available \(the package lpips"):
        run_plan(parse_plan(small(report=report, data={"size": 32})), tmp_path / "run", device=CPU)


def test_a_distance_reads_at_most() -> None:
    METRICS.names()
    over = OverThreshold(metric="fft2d", value=0.1, count=1)
    held = Summary(
        images=1, matched=1, batches=1, psnr_mean=1, psnr_median=1, psnr_worst=1, psnr_best=1, ssim_mean=1,
        ssim_median=1, ssim_worst=1, ssim_best=1, proved=0, over_threshold=over,
    )  # fmt: skip
    assert outcome("thaw", held, None) == "1 of 1 images recognisable (FFT2D at most 0.1)"


def test_a_large_file_is_read_in_part(data_root: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    file = data_root / "cifar10" / "train-00000-of-00001.parquet"
    plan = parse_plan(small(data={"source": f"parquet:{file}", "size": 32}))
    prepared = ready(plan)
    held = non_members(prepared, plan.report)
    assert held is not None
    classes = prepared.data.labels.unique().tolist()
    assert len(held.images) == 4 + MOST_NULL + MOST_NULL * len(classes)
    batch = Batch(prepared.data.images[:2], one_hot(prepared.data.labels[:2], 10), Domain(), prepared.data.names[:2])
    outside = held.outside(batch)
    assert len(outside) == len(held.images) - 2
    label = int(prepared.data.labels[0])
    rank = null_rank(batch.images[0].double(), {"psnr": 150.0, "ssim": 1.0}, label, held, outside)
    assert rank == NullRank(n0=MOST_NULL, p={"psnr": round(1 / 257, 6), "ssim": round(1 / 257, 6)})
