"""Scoring: the one place that opens the truth, after the attack has finished and chosen."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frostglass.auditing.metrics.registry import METRICS
from frostglass.auditing.plan import ThresholdPlan
from frostglass.auditing.scorecard import ImageScore, Labels, OverThreshold, Summary
from frostglass.auditing.simulate import Round, Truth
from frostglass.core.batch import Batch
from frostglass.core.reconstruction import Reconstruction
from frostglass.numerics import labels as label_rules
from frostglass.numerics.assign import assign


@dataclass(frozen=True)
class Scored:
    """One message's reconstruction beside its truth.

    Args:
        private: a score per private image.
        encoding: a score per encoding, empty if the defence encodes nothing.
        labels: how right the labels were.
        truth: what was opened, for pictures (only if the plan shows images) and for the objective at the truth.
        order, encoding_order: rows of the reconstruction matched to private images and to encodings, -1 for none.
    """

    private: list[ImageScore]
    encoding: list[ImageScore]
    labels: Labels
    truth: Truth
    order: Tensor
    encoding_order: Tensor


def score(result: Reconstruction, played: Round, metrics: Sequence[str]) -> Scored:
    """Opens the truth of `played` and compares.

    Args:
        result: what the attack returned.
        played: the round it attacked.
        metrics: names; PSNR and SSIM are always computed.
    """
    truth = played.truth.open_for_scoring()
    encoded = truth.trained is not truth.private and not torch.equal(truth.trained.images, truth.private.images)
    low, high = truth.trained.domain.low, truth.trained.domain.high
    found = (result.images.double().cpu() - low) / (high - low)
    private, order = _scores(found, result, _unit_range(truth.private), truth.private, metrics, "private")
    encoding: list[ImageScore] = []
    encoding_order = order
    if encoded:
        goal = _unit_range(truth.trained)
        encoding, encoding_order = _scores(found, result, goal, truth.trained, metrics, "encoding")
        private = [p.model_copy(update={"proved": False}) for p in private]  # proved rows are encodings, not images
    return Scored(private, encoding, _labels(result, played, truth), truth, order, encoding_order)


def _unit_range(batch: Batch) -> Tensor:
    return ((batch.images.double() - batch.domain.low) / (batch.domain.high - batch.domain.low)).cpu()


def _scores(
    found: Tensor, result: Reconstruction, goal: Tensor, batch: Batch, metrics: Sequence[str], target: str
) -> tuple[list[ImageScore], Tensor]:
    order = assign(found, goal)
    hit = (order >= 0).nonzero().flatten()
    values: dict[str, Tensor] = {}
    for name in dict.fromkeys(["psnr", "ssim", *metrics]):
        column = torch.full((len(goal),), math.nan, dtype=torch.float64)
        if len(hit):
            column[hit] = METRICS[name].make().score(found[order[hit]].clamp(0, 1), goal[hit]).double()
        values[name] = column
    rows = []
    for i, name in enumerate(batch.ids):
        got = {m: (None if math.isnan(float(v[i])) else round(float(v[i]), 6)) for m, v in values.items()}
        proved = bool(order[i] >= 0 and result.proved[order[i]])
        digest = hashlib.sha256(batch.images[i].cpu().contiguous().numpy().tobytes()).hexdigest()
        psnr, ssim = got.pop("psnr"), got.pop("ssim")
        rows.append(ImageScore(id=name, sha256=digest, psnr=psnr, ssim=ssim, proved=proved, target=target, extra=got))
    return rows, order


def _labels(result: Reconstruction, played: Round, truth: Truth) -> Labels:
    counts = truth.trained.targets.sum(0).cpu()
    guess = label_rules.no_gradient_guess(counts)
    if result.label_counts is not None:
        found = result.label_counts.to(counts)
        whole = bool((counts == counts.round()).all())
        restored = torch.repeat_interleave(torch.arange(len(found)), found.round().long()).tolist()
        return Labels(
            source="restored",
            restored=restored if whole else None,
            set_accuracy=label_rules.set_accuracy(found, counts),
            count_accuracy=label_rules.count_accuracy(found, counts),
            no_gradient_guess=guess,
        )
    if played.seen.labels is not None and result.targets is not None:
        return Labels(source="granted", no_gradient_guess=guess)
    return Labels(source="unused", no_gradient_guess=guess)


def summarise(batches: Sequence[Sequence[ImageScore]], threshold: ThresholdPlan) -> Summary | None:
    """Over all images of a cell; an image that was not matched counts as the worst and is no success."""
    rows = [row for batch in batches for row in batch]
    if not rows:
        return None
    psnr = [r.psnr for r in rows if r.psnr is not None]
    ssim = [r.ssim for r in rows if r.ssim is not None]
    missing = len(psnr) < len(rows)
    means = [[r.psnr for r in batch if r.psnr is not None] for batch in batches]
    return Summary(
        images=len(rows),
        matched=len(psnr),
        batches=len(batches),
        psnr_mean=_rounded(statistics.fmean(psnr)) if psnr else None,
        psnr_median=_median(psnr, len(rows)),
        psnr_worst=None if missing or not psnr else min(psnr),
        psnr_best=max(psnr, default=None),
        ssim_mean=_rounded(statistics.fmean(ssim)) if ssim else None,
        ssim_median=_median(ssim, len(rows)),
        ssim_worst=None if missing or not ssim else min(ssim),
        ssim_best=max(ssim, default=None),
        proved=sum(r.proved for r in rows),
        over_threshold=OverThreshold(
            metric=threshold.metric, value=threshold.value, count=sum(_reaches(r, threshold) for r in rows)
        ),
        psnr_batch_means=[_rounded(statistics.fmean(m)) for m in means if m],
    )


def _reaches(row: ImageScore, threshold: ThresholdPlan) -> bool:
    held = {"psnr": row.psnr, "ssim": row.ssim, **row.extra}.get(threshold.metric)
    if held is None:
        return False
    higher = METRICS[threshold.metric].make().higher_is_closer
    return held >= threshold.value if higher else held <= threshold.value


def _median(matched: Sequence[float], images: int) -> float | None:
    """With the unmatched below every score; None if the median is one of them."""
    middle = statistics.median([-math.inf] * (images - len(matched)) + list(matched))
    return _rounded(middle) if math.isfinite(middle) else None


def _rounded(value: float) -> float:
    return round(value, 6)
