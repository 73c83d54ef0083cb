"""Scoring: the one place that opens the truth, after the attack has finished and chosen."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from frostglass.auditing.metrics.registry import ALWAYS_SCORED, METRICS, MetricContext, NotAvailable
from frostglass.auditing.nonmembers import NonMembers, null_rank
from frostglass.auditing.plan import ReportPlan, ThresholdPlan
from frostglass.auditing.scorecard import ImageScore, Labels, OverThreshold, Summary
from frostglass.auditing.simulate import Round, Truth
from frostglass.core.batch import Batch, Domain, Sealed
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
        truth: what was opened, for pictures (only if the plan shows images) and for the objective at the truth; None
            where a recorded message has none.
        domain: of the reconstruction's pixels.
        order, encoding_order: rows of the reconstruction matched to private images and to encodings, -1 for none.
        notes: what belongs beside a metric, or why it is n/a, by its name.
        identified: of an attack that chose among candidates, whether the choice is right; None of any other.
        candidates: how many it chose among; chance is 1 / candidates.
    """

    private: list[ImageScore]
    encoding: list[ImageScore]
    labels: Labels
    truth: Truth | None
    order: Tensor
    encoding_order: Tensor
    domain: Domain
    notes: dict[str, str] = field(default_factory=dict)
    identified: bool | None = None
    candidates: int | None = None


def score(
    result: Reconstruction,
    played: Round,
    metrics: Sequence[str],
    others: NonMembers | None = None,
    *,
    null: bool = True,
) -> Scored:
    """Opens the truth of `played` and compares. A recorded message without one keeps what the attack proved by itself.

    Args:
        result: what the attack returned.
        played: the round it attacked.
        metrics: names; PSNR and SSIM are always computed.
        others: other images of the source, for pools and nulls; without them such metrics are n/a.
        null: rank the scores of private images among `others`.
    """
    if played.truth is None:
        return _unscored(result, played)
    truth = played.truth.open_for_scoring()
    encoded = truth.trained is not truth.private and not torch.equal(truth.trained.images, truth.private.images)
    low, high = truth.trained.domain.low, truth.trained.domain.high
    found = (result.images.double().cpu() - low) / (high - low)
    goal = _unit_range(truth.private)
    order = assign(found, goal)
    outside = [] if others is None else others.outside(truth.private)
    context = None
    if others is not None and any(METRICS[name].make().needs_context for name in metrics):
        context = others.context(goal, outside, (order >= 0).nonzero().flatten())
    values, notes = _values(found, goal, order, metrics, context)
    private = _rows(values, order, result, truth.private, "private")
    if others is not None and null:
        private = _ranked(private, values, found, order, truth.private, others, outside)
    if others is not None and others.note:
        notes["null"] = others.note
    if (
        not truth.exact
    ):  # nobody knows which of these images were in the message: those that nothing matched say nothing
        private = [row for row, j in zip(private, order.tolist(), strict=True) if j >= 0]
        hit = (order >= 0).nonzero().flatten()
        truth, order = replace(truth, private=truth.private.take(hit.tolist()), pool=len(truth.private)), order[hit]
    if truth.encoded:
        private = [p.model_copy(update={"proved": False}) for p in private]
    encoding: list[ImageScore] = []
    encoding_order = order
    if encoded:
        goal = _unit_range(truth.trained)
        encoding_order = assign(found, goal)
        values, _ = _values(found, goal, encoding_order, metrics, None)
        encoding = _rows(values, encoding_order, result, truth.trained, "encoding")
        private = [p.model_copy(update={"proved": False}) for p in private]  # proved rows are encodings, not images
    chose = truth.place is not None and "choice" in result.info
    return Scored(
        private, encoding, _labels(result, played, truth), truth, order, encoding_order, truth.trained.domain, notes,
        identified=int(result.info["choice"]) == truth.place if chose else None,
        candidates=int(result.info["candidates"]) if chose else None,
    )  # fmt: skip


def score_of_guess(sealed: Sealed[Truth], metrics: Sequence[str], threshold: ThresholdPlan) -> Summary | None:
    """What guessing scores: for every private image the mean of the others (grey for a single one).

    Nobody needs an attack for images of such a score. It is generous: an attacker rarely knows that mean.
    """
    batch = sealed.open_for_scoring().private
    goal = _unit_range(batch)
    n = len(goal)
    mean = (goal.sum(0) - goal) / (n - 1) if n > 1 else torch.full_like(goal, 0.5)
    order = torch.arange(n)
    values, _ = _values(mean, goal, order, metrics, None)
    guess = Reconstruction(mean.float(), torch.zeros(n, dtype=torch.bool), math.nan)
    return summarise([_rows(values, order, guess, batch, "private")], threshold)


def closest(scored: Scored, count: int) -> Scored:
    """`scored` with `count` of the private images: those matched best, where more were given than a message holds."""
    if scored.truth is None or len(scored.private) <= count:
        return scored
    psnr = [-math.inf if row.psnr is None else row.psnr for row in scored.private]
    kept = sorted(sorted(range(len(psnr)), key=lambda i: -psnr[i])[:count])
    private = scored.truth.private.take(kept)
    return replace(
        scored,
        private=[scored.private[i] for i in kept],
        truth=replace(scored.truth, private=private, trained=private, pool=len(psnr)),
        order=scored.order[kept],
    )


def _unscored(result: Reconstruction, played: Round) -> Scored:
    """What can be said without private images: rows that the attack verified against the message, and labels."""
    rows = []
    if bool(result.proved.any()) and played.seen.domain.low >= 0:  # encodings that were proved are no private images
        for i in range(max(len(result.images), played.seen.examples or 0)):
            there = i < len(result.images)
            pixels = result.images[i].float().cpu().contiguous().numpy().tobytes() if there else b""
            digest = hashlib.sha256(pixels).hexdigest() if there else ""
            rows.append(
                ImageScore(id=f"image {i + 1}", sha256=digest, psnr=None, ssim=None,
                           proved=there and bool(result.proved[i]), target="recovered")
            )  # fmt: skip
    order = torch.arange(len(result.images))
    return Scored(rows, [], _labels(result, played, None), None, order, order, played.seen.domain)


def _unit_range(batch: Batch) -> Tensor:
    return ((batch.images.double() - batch.domain.low) / (batch.domain.high - batch.domain.low)).cpu()


def _values(
    found: Tensor, goal: Tensor, order: Tensor, metrics: Sequence[str], context: MetricContext | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """([n] for each metric, NaN where nothing was matched or the metric is n/a; notes by metric)."""
    hit = (order >= 0).nonzero().flatten()
    values: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for name in dict.fromkeys([*ALWAYS_SCORED, *metrics]):
        metric = METRICS[name].make()
        column = torch.full((len(goal),), math.nan, dtype=torch.float64)
        if metric.about is not None and context is not None:
            notes[name] = metric.about(context)
        try:
            if len(hit):
                column[hit] = metric.values(found[order[hit]].clamp(0, 1), goal[hit], context)
        except NotAvailable as why:
            notes[name] = f"n/a: {why}"
        values[name] = column
    return values, notes


def _rows(
    values: Mapping[str, Tensor], order: Tensor, result: Reconstruction, batch: Batch, target: str
) -> list[ImageScore]:
    rows = []
    for i, name in enumerate(batch.ids):
        got = {m: (None if math.isnan(float(v[i])) else round(float(v[i]), 6)) for m, v in values.items()}
        proved = bool(order[i] >= 0 and result.proved[order[i]])
        digest = hashlib.sha256(batch.images[i].cpu().contiguous().numpy().tobytes()).hexdigest()
        psnr, ssim = got.pop("psnr"), got.pop("ssim")
        rows.append(ImageScore(id=name, sha256=digest, psnr=psnr, ssim=ssim, proved=proved, target=target, extra=got))
    return rows


def _ranked(
    rows: Sequence[ImageScore],
    values: Mapping[str, Tensor],
    found: Tensor,
    order: Tensor,
    batch: Batch,
    others: NonMembers,
    outside: Sequence[int],
) -> list[ImageScore]:
    """The rows with their ranks among non-members."""
    ranked = []
    for i, row in enumerate(rows):
        if order[i] >= 0:
            held = {m: float(v[i]) for m, v in values.items()}
            label = int(batch.targets[i].argmax())
            rank = null_rank(found[order[i]].clamp(0, 1), held, label, others, outside)
            row = row.model_copy(update={"null": rank})
        ranked.append(row)
    return ranked


def unfit(report: ReportPlan, images: Tensor, model: nn.Module) -> list[str]:
    """What is wrong with the metrics of a plan for these images and this network, a sentence each."""
    side, found = min(images.shape[-2:]), []
    for name in report.metrics:
        least = METRICS[name].make().least_side
        if side < least:
            found.append(
                f"report.metrics: {name!r} needs images of at least {least} pixels a side, and these have {side}; "
                "raise data.size, or leave it out."
            )
    chosen = METRICS[report.threshold.metric].make()
    if not found:
        probe = images[:1].double()
        try:
            best = chosen.values(probe, probe, MetricContext(probe, torch.zeros(1, dtype=torch.long), model))
            if bool(best.isnan()):
                found.append(
                    f"report.threshold.metric: {chosen.name!r} has no value for images of {side} pixels a side, so "
                    "that nothing could reach it; choose another."
                )
        except NotAvailable as why:
            found.append(f"report.threshold.metric: {chosen.name!r} is not available ({why}); choose another.")
    return found


def _labels(result: Reconstruction, played: Round, truth: Truth | None) -> Labels:
    if truth is None or not (truth.exact and truth.labelled) or truth.encoded:
        return _unchecked_labels(result, played)
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


def _unchecked_labels(result: Reconstruction, played: Round) -> Labels:
    """Labels of a message whose own are not known."""
    found = result.label_counts
    if found is None:
        granted = played.seen.labels is not None and result.targets is not None
        return Labels(source="granted" if granted else "unused")
    whole = bool((found == found.round()).all())
    named = torch.repeat_interleave(torch.arange(len(found)), found.cpu().round().long()).tolist() if whole else None
    return Labels(source="restored", restored=named)


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
        extra_means=_extra_means(rows),
        **_identified(rows),
    )


def _identified(rows: Sequence[ImageScore]) -> dict[str, int]:
    """Counts of an identification game; nothing if there was none."""
    asked = [r for r in rows if r.identified is not None and r.candidates is not None]
    if not asked:
        return {}
    least = min(r.candidates for r in asked if r.candidates is not None)
    return {"asked": len(asked), "identified": sum(bool(r.identified) for r in asked), "candidates": least}


def _extra_means(rows: Sequence[ImageScore]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row.extra)
    held = {name: [v for row in rows if (v := row.extra.get(name)) is not None] for name in names}
    return {name: _rounded(statistics.fmean(values)) for name, values in held.items() if values}


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
