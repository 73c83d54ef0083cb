"""Scoring: one-to-one by least error, nothing made up where nothing was found, and the schema that holds it."""

from __future__ import annotations

import json
import math
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from frostglass.auditing import scorecard
from frostglass.auditing.metrics.psnr import CEILING
from frostglass.auditing.metrics.registry import METRICS, Metric, NotAvailable
from frostglass.auditing.plan import ThresholdPlan
from frostglass.auditing.score import score, summarise
from frostglass.auditing.scorecard import Cell, ImageScore, Scorecard, load_scorecard
from frostglass.auditing.simulate import Round, Truth
from frostglass.auditing.unmixing_card import UnmixScorecard
from frostglass.core.batch import Batch, Domain, Sealed, one_hot
from frostglass.core.errors import BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.threat import Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.assign import assign, pairwise_mse

N = 4
TRUTH = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))
ENCODED = Domain(-1, 1, (0.0,) * 3, (1.0,) * 3)


def batch(images: Tensor = TRUTH, domain: Domain | None = None, labels: tuple[int, ...] = (0, 1, 1, 3)) -> Batch:
    return Batch(images, one_hot(list(labels), 5), domain or Domain(), tuple(f"image {i}" for i in range(len(images))))


def a_round(trained: Batch | None = None, labels: Tensor | None = None) -> Round:
    private = batch()
    held = trained or private
    seen = Observation(nn.Linear(1, 1), (), held.domain, "train", (3, 8, 8), 5, labels=labels)
    return Round(seen, Sealed(Truth(private, held)), None, LocalPlan())


def found(images: Tensor, proved: list[bool] | None = None, **more: Any) -> Reconstruction:
    return Reconstruction(images, torch.tensor(proved or [False] * len(images), dtype=torch.bool), 0.5, **more)


def scores(images: Tensor, **more: Any) -> list[ImageScore]:
    return score(found(images, **more), a_round(), ["psnr", "ssim"]).private


def test_matching_is_the_best_of_all_permutations() -> None:
    for seed in range(10):
        rows = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        cost = pairwise_mse(rows, TRUTH)
        best = min(sum(float(cost[p[i], i]) for i in range(N)) for p in permutations(range(N)))
        order = assign(rows, TRUTH)
        assert sum(float(cost[order[i], i]) for i in range(N)) == pytest.approx(best)


def test_the_order_of_the_rows_does_not_matter() -> None:
    order = [2, 0, 3, 1]
    held = score(found(TRUTH[order], [True, False, False, False]), a_round(), [])
    assert held.order.tolist() == [1, 3, 0, 2]
    assert [r.psnr for r in held.private] == [CEILING] * N
    assert [r.proved for r in held.private] == [False, False, True, False]


def test_fewer_rows_leave_images_unmatched() -> None:
    rows = scores(TRUTH[[3, 1]])
    assert [r.psnr is None for r in rows] == [True, False, True, False]
    assert [r.ssim is None for r in rows] == [True, False, True, False]


def test_more_rows_than_images_and_none() -> None:
    assert [r.psnr for r in scores(torch.cat([torch.rand(3, 3, 8, 8), TRUTH]))] == [CEILING] * N
    assert all(r.psnr is None and not r.proved for r in scores(torch.zeros(0, 3, 8, 8)))


def test_rows_that_are_not_finite_match_nothing() -> None:
    rows = TRUTH.clone()
    rows[1, 0, 0, 0], rows[2] = math.nan, math.inf
    assert [r.psnr is None for r in scores(rows, proved=[True] * N)] == [False, True, True, False]
    assert [r.proved for r in scores(rows, proved=[True] * N)] == [True, False, False, True]


def test_one_row_is_never_counted_twice() -> None:
    rows = scores(TRUTH[[0]].repeat(N, 1, 1, 1))
    assert sum(r.psnr == CEILING for r in rows) == 1


def test_scores_are_those_of_the_unit_range_whatever_the_domain() -> None:
    """An encoding lives in [-1, 1]: half its squared error there is what an image in [0, 1] would have."""
    encoded = batch(TRUTH * 2 - 1, ENCODED)
    noisy = (TRUTH + 0.1 * torch.rand(TRUTH.shape)).clamp(0, 1)
    plain = scores(noisy)
    held = score(found(noisy * 2 - 1, [True] * N), a_round(encoded), [])
    assert [r.psnr for r in held.encoding] == pytest.approx([r.psnr for r in plain], abs=1e-4)
    assert [r.ssim for r in held.encoding] == pytest.approx([r.ssim for r in plain], abs=1e-4)
    assert [r.psnr for r in held.private] == pytest.approx([r.psnr for r in plain], abs=1e-4)
    assert all(r.proved for r in held.encoding)
    assert not any(r.proved for r in held.private), "what was proved is an encoding, not a private image"
    assert {r.target for r in held.encoding} == {"encoding"}


def test_without_an_encoding_there_are_no_encoding_scores() -> None:
    held = score(found(TRUTH), a_round(), [])
    assert held.encoding == []
    assert torch.equal(held.order, held.encoding_order)


def test_rows_beyond_the_range_are_clamped_before_they_are_scored() -> None:
    assert [r.psnr for r in scores(TRUTH.round() + (TRUTH.round() - 0.5) * 4)] == [
        r.psnr for r in scores(TRUTH.round())
    ]


def test_an_image_is_identified_without_being_shown() -> None:
    one, other = scores(TRUTH), scores(TRUTH * 0.5)
    assert [r.sha256 for r in one] == [r.sha256 for r in other]
    assert len({r.sha256 for r in one}) == N


def test_tiny_images_have_no_similarity_rather_than_an_error() -> None:
    metric = METRICS["ssim"].make()
    for side in (1, 2):
        assert metric.score(torch.rand(2, 3, side, side), torch.rand(2, 3, side, side)).isnan().all()
    assert metric.score(torch.rand(2, 1, 3, 9), torch.rand(2, 1, 3, 9)).isfinite().all()


def test_labels_that_were_restored() -> None:
    counts = torch.tensor([1.0, 1, 0, 2, 0])
    held = score(found(TRUTH, label_counts=counts), a_round(), []).labels
    assert (held.source, held.restored) == ("restored", [0, 1, 3, 3])
    assert held.set_accuracy == 1
    assert held.count_accuracy == pytest.approx(0.75)
    assert held.no_gradient_guess == pytest.approx(1 - (0.2 + 1.2 + 0.8 + 0.2 + 0.8) / 8)


def test_labels_that_were_granted_or_not_used() -> None:
    told = one_hot([0, 1, 1, 3], 5)
    assert score(found(TRUTH, targets=told), a_round(labels=told), []).labels.source == "granted"
    unused = score(found(TRUTH), a_round(labels=told), []).labels
    assert (unused.source, unused.restored, unused.set_accuracy) == ("unused", None, None)


def test_mixed_labels_are_not_listed_as_whole_ones() -> None:
    trained = Batch(TRUTH * 2 - 1, one_hot([0, 1, 1, 3], 5) * 0.6 + 0.08, ENCODED, tuple("abcd"))
    held = score(found(TRUTH, label_counts=torch.ones(5)), a_round(trained), []).labels
    assert held.restored is None
    assert held.count_accuracy is not None


def row(psnr: float | None, ssim: float | None = 0.1, proved: bool = False) -> ImageScore:
    held = None if psnr is None else ssim
    return ImageScore(id="x", sha256="0", psnr=psnr, ssim=held, proved=proved, extra={"far": psnr})


THRESHOLD = ThresholdPlan(metric="psnr", value=20.0)


def test_a_summary_counts_the_unmatched_as_below_every_score() -> None:
    held = summarise([[row(30), row(None)], [row(10), row(20, proved=True)]], THRESHOLD)
    assert held is not None
    assert (held.images, held.matched, held.batches, held.proved) == (4, 3, 2, 1)
    assert (held.psnr_mean, held.psnr_median, held.psnr_worst, held.psnr_best) == (20, 15, None, 30)
    assert held.over_threshold.count == 2
    assert held.psnr_batch_means == [30, 15]


@pytest.mark.parametrize(
    ("psnrs", "median"),
    [([None], None), ([5.0], 5.0), ([None, 5.0], None), ([None, 4.0, 5.0], 4.0), ([None, None, 5.0], None)],
)
def test_a_median_is_missing_exactly_where_it_falls_on_an_unmatched_image(
    psnrs: list[float | None], median: float | None
) -> None:
    held = summarise([[row(p) for p in psnrs]], THRESHOLD)
    assert held is not None
    assert held.psnr_median == median
    assert (held.psnr_mean is None) == all(p is None for p in psnrs)
    json.dumps(held.model_dump(mode="json"), allow_nan=False)


def test_no_images_no_summary() -> None:
    assert summarise([], THRESHOLD) is None
    assert summarise([[]], THRESHOLD) is None


def test_a_threshold_on_a_distance_counts_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    METRICS.names()
    monkeypatch.setattr(METRICS, "_entries", dict(METRICS._entries))

    @METRICS.register()
    def far() -> Metric:
        """A distance: lower is closer."""
        return Metric("far", lambda a, b: a.flatten(1).mean(1), higher_is_closer=False)

    held = summarise([[row(1.0), row(5.0), row(None)]], ThresholdPlan(metric="far", value=2.0))
    assert held is not None
    assert held.over_threshold.count == 1
    extra = score(found(TRUTH), a_round(), ["far"]).private[0].extra
    assert extra["far"] == pytest.approx(float(TRUTH[0].mean()), abs=1e-6)


def test_a_metric_that_raises_is_told_by_its_name() -> None:
    def lost(found: Tensor, truth: Tensor) -> Tensor:
        raise KeyError("weights")

    def absent(found: Tensor, truth: Tensor) -> Tensor:
        raise NotAvailable("no weights here")

    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(BadInput, match="metric 'lost': raised KeyError: 'weights'; return a number for each pair"):
        Metric("lost", lost).values(x, x)
    with pytest.raises(NotAvailable, match="no weights here"):
        Metric("absent", absent).values(x, x)


MODELS = [scorecard.Scorecard, Cell, scorecard.Labels, ImageScore, scorecard.Summary, scorecard.OverThreshold]
MODELS += [scorecard.Verdict, scorecard.AuditVerdict, scorecard.PitfallCheck, UnmixScorecard]


def test_docs_explain_every_field_of_the_scorecard() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "scorecard.md").read_text(encoding="utf-8")
    for model in MODELS:
        section = re.split(r"^## ", text.split(f"\n## {model.__name__}\n")[1], flags=re.M)[0]
        documented = dict(re.findall(r"^\| `(\w+)` \| .+? \| (.+) \|$", section, re.M))
        known = Scorecard.model_fields if model is UnmixScorecard else {}  # told once, above
        own = {n: f.description for n, f in model.model_fields.items() if n not in known}
        assert documented == own, model.__name__


def a_card() -> Scorecard:
    private = scores(TRUTH[:3] * 0.9)
    cell = Cell(
        id="01-x", title="x", scenario="x", attack="thaw", defense="none", defense_claim="none", model="mlp",
        mode="train", threat="server", grants=["model"], upper_bound=False, batch=4, batches=1, update="gradient",
        status="done", labels=scorecard.Labels(source="unused"), images=private,
        summary=summarise([private], THRESHOLD),
    )  # fmt: skip
    return Scorecard(
        name="ü", seed=2**62, headline="h", frostglass="0", environment={}, plan_sha256="0", show_images=False,
        cells=[cell], limits=[],
    )  # fmt: skip


def test_a_scorecard_reads_back_as_itself(tmp_path: Path) -> None:
    card = a_card()
    path = tmp_path / "scorecard.json"
    path.write_text(json.dumps(card.model_dump(mode="json"), allow_nan=False), encoding="utf-8")
    assert load_scorecard(path) == card
    assert json.loads(path.read_text())["schema_version"] == scorecard.SCHEMA_VERSION


def test_its_json_schema_is_closed() -> None:
    schema = Scorecard.model_json_schema()
    objects = [schema, *schema["$defs"].values()]
    assert all(o["additionalProperties"] is False for o in objects)
    with pytest.raises(ValidationError):
        Scorecard.model_validate(a_card().model_dump() | {"more": 1})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": "9.0"}', "\x00"])
def test_a_file_that_is_no_scorecard_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scorecard.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"no scorecard of version 1\.0"):
        load_scorecard(path)
