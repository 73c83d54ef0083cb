"""Images of the evaluation source that were not in a batch, and what a score is worth beside them.

A score is high because the private image was recovered, or because any picture of that class would score so. The null
of a score is the same reconstruction against non-members: p = (1 + #{null at least as close}) / (1 + n0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frostglass.auditing.metrics.registry import METRICS, Metric, MetricContext, NotAvailable
from frostglass.auditing.plan import ReportPlan
from frostglass.auditing.prepare import Prepared
from frostglass.auditing.scorecard import NullRank
from frostglass.core.batch import Batch
from frostglass.core.errors import BadInput
from frostglass.vision import datasets

LEAST_NULL = 99
"""Fewer cannot reach p = .01, so no p is given."""
MOST_NULL = 256
"""Non-members that one reconstruction is compared with, and those in an identification pool beside the batch."""
LARGE = 64 * 64
"""Images of more pixels are compared with `LEAST_NULL` non-members, as each comparison costs accordingly."""
MOST_BYTES = 2**29
"""What is read from a source beyond the audited images."""
CHUNK = 32


@dataclass(frozen=True)
class NonMembers:
    """Images of one source; which of them are non-members depends on the batch.

    Args:
        images: [n, c, h, w] in [0, 1], audited ones among them.
        labels: [n] classes; as arbitrary as those of the source.
        names: of the images in their source.
        digests: SHA-256 of each image's pixels.
        order: all rows in a random order, fixed by the plan's seed.
        common: rows that were drawn whatever their class.
        model: the audited network.
        note: one sentence if the source could not be read, else "".
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    digests: tuple[str, ...]
    order: tuple[int, ...]
    common: frozenset[int]
    model: nn.Module
    note: str = ""

    def outside(self, batch: Batch) -> list[int]:
        """Rows that are in `batch` neither by name nor by content, in `order`."""
        names, held = set(batch.ids), {_digest(image) for image in batch.images}
        return [i for i in self.order if self.names[i] not in names and self.digests[i] not in held]

    def context(self, private: Tensor, outside: Sequence[int], index: Tensor) -> MetricContext:
        """The pool of an identification: all images of the batch, and up to `MOST_NULL` non-members.

        Args:
            private: [k, c, h, w] in [0, 1], the batch.
            outside: rows of non-members.
            index: [b] which images of the batch are scored.
        """
        others = [i for i in outside if i in self.common][:MOST_NULL]
        return MetricContext(torch.cat([private.to(self.images), self.images[others]]), index, self.model)


def non_members(prepared: Prepared, report: ReportPlan) -> NonMembers | None:
    """What scoring sets a scenario's reconstructions beside; None if the plan asks for nothing of the kind."""
    known = [METRICS[name].make() for name in report.metrics]
    if not report.null and not any(m.needs_context for m in known):
        return None
    data, further, note = prepared.data, None, ""
    try:
        further = _further(prepared)
    except (BadInput, OSError) as wrong:  # an image that no attack needs must not end the audit
        note = f"only the audited images serve as non-members, as others cannot be read ({str(wrong).splitlines()[0]})"
    images, labels, names, common = data.images, data.labels, data.names, range(len(data.images))
    if further is not None:
        extra, drawn = further
        common = range(len(images) + drawn)
        images, labels = torch.cat([images, extra.images]), torch.cat([labels, extra.labels])
        names = (*names, *extra.names)
    order = prepared.rng.at("non-members", "order").permutation(len(images)).tolist()
    digests = tuple(_digest(image) for image in images)
    return NonMembers(images, labels, names, digests, tuple(order), frozenset(common), prepared.model, note)


def _further(prepared: Prepared) -> tuple[datasets.ImageSet, int] | None:
    """Images of a large source that the audit itself did not read: (images, how many were drawn whatever their class).

    Those of any class stand first, then more of the classes that the audited images have.
    """
    data, where = prepared.data, prepared.scenario.data
    if data.source != where.source:  # given from Python
        return None
    found = datasets.catalogue(where.source)
    held = set(data.names)
    order = prepared.rng.at("non-members", "rows").permutation(len(found.names)).tolist()
    free = [i for i in order if found.names[i] not in held]
    if not free:
        return None
    affordable = MOST_BYTES // (4 * data.images[0].numel())
    rows = free[: min(MOST_NULL, affordable)]
    drawn, classes = len(rows), data.labels.unique().tolist()
    each = min(most_null(data.images), (affordable - drawn) // len(classes))
    for k in classes:
        rows += [i for i in free[drawn:] if found.labels[i] == k][:each]
    channels = int(data.images.shape[1])
    further = datasets.load(where.source, size=where.size, channels=channels, rows=rows)
    if further.images.shape[1:] != data.images.shape[1:]:
        raise BadInput("they have another size; set data.size.")
    return further, drawn


def most_null(images: Tensor) -> int:
    """How many non-members each reconstruction is compared with, at the most."""
    return MOST_NULL if images.shape[-2] * images.shape[-1] <= LARGE else LEAST_NULL


def null_rank(
    found: Tensor, scores: Mapping[str, float], label: int, others: NonMembers, outside: Sequence[int]
) -> NullRank | None:
    """How many non-members are at least as close to one reconstruction as its own original.

    Args:
        found: [c, h, w] in [0, 1].
        scores: of `found` against its own original, by metric; NaN and metrics with a chance level are left out.
        label: class of the original.
        others, outside: the source and its rows outside the batch.

    Returns:
        Ranks among same-class images; among any where those are fewer than `LEAST_NULL`; None without non-members.
    """
    if not outside:
        return None
    most = most_null(others.images)
    same = [i for i in outside if int(others.labels[i]) == label][:most]
    common = [i for i in outside if i in others.common][:most]
    known = {name: METRICS[name].make() for name in scores}
    held = {name: (known[name], s) for name, s in scores.items() if not known[name].needs_context and s == s}
    if len(same) >= LEAST_NULL:
        return NullRank(n0=len(same), p=_ranks(found, held, others.images[same]))
    ranks = _ranks(found, held, others.images[common]) if common else {}
    return NullRank(n0=len(same), any_n0=len(common), any_p=ranks)


def _ranks(found: Tensor, held: Mapping[str, tuple[Metric, float]], null: Tensor) -> dict[str, float]:
    """p by metric."""
    ranks = {}
    for name, (metric, score) in held.items():
        try:
            parts = [metric.values(found.expand_as(part), part) for part in null.split(CHUNK)]
        except NotAvailable:
            continue
        values = torch.cat(parts)
        closer = values >= score if metric.higher_is_closer else values <= score
        ranks[name] = round((1 + int(closer.sum())) / (1 + len(null)), 6)
    return ranks


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
