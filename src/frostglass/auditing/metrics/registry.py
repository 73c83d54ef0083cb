"""All metrics by name; a module below `frostglass.auditing.metrics` that registers one is found by existing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from frostglass.core.errors import BadInput, FrostglassError, first_line
from frostglass.core.memory import is_memory
from frostglass.core.registry import Registry


class NotAvailable(Exception):
    """A metric cannot be computed here; its text says why, and the score is n/a."""


@dataclass(frozen=True)
class MetricContext:
    """What a few metrics look at beyond the pair; only scoring builds it.

    Args:
        pool: [n, c, h, w] in [0, 1], original images of the evaluation source, those of the batch among them.
        index: [b] row of `pool` that holds the original of each pair.
        model: the audited network; takes images in [0, 1].
    """

    pool: Tensor
    index: Tensor
    model: nn.Module


@dataclass(frozen=True)
class Metric:
    """A score of one reconstruction against one private image.

    Args:
        name: in plans and scorecards.
        score: ([b, c, h, w], [b, c, h, w]) in [0, 1] -> [b], matched pairs in order; with `needs_context` it takes a
            `MetricContext` as its third argument. NaN for a pair without a score; `NotAvailable` if there is none here.
        higher_is_closer: direction.
        needs_context: it compares with a pool, so that it has a chance level of its own and takes no null.
        least_side: smallest height and width that it is defined for; a plan for smaller images is refused.
        about: one sentence that belongs beside the numbers, given the context.
    """

    name: str
    score: Callable[..., Tensor]
    higher_is_closer: bool = True
    needs_context: bool = False
    least_side: int = 1
    about: Callable[[MetricContext], str] | None = None

    def values(self, found: Tensor, truth: Tensor, context: MetricContext | None = None) -> Tensor:
        """`score`, with the context where it is needed: [b] in float64.

        Raises:
            NotAvailable: it cannot be computed here, or lacks its context, or the images are smaller than `least_side`.
            BadInput: `score` raised, or returned something else than a number, or NaN, for each pair.
        """
        if len(found) and min(found.shape[-2:]) < self.least_side:
            raise NotAvailable(
                f"{self.name} needs images of {self.least_side} pixels a side, not {min(found.shape[-2:])}"
            )
        if self.needs_context and context is None:
            raise NotAvailable("it compares with a pool of private images, and there is none here")
        try:
            values = self.score(found, truth, context) if self.needs_context else self.score(found, truth)
        except Exception as wrong:
            if isinstance(wrong, NotAvailable | FrostglassError) or is_memory(wrong):
                raise
            raise BadInput(
                f"metric {self.name!r}: raised {first_line(wrong)}; return a number for each pair, or raise "
                "NotAvailable with the reason."
            ) from wrong
        return self._checked(values, len(found))

    def _checked(self, values: object, pairs: int) -> Tensor:
        """One value would be spread over all pairs in silence, and a scorecard holds no infinity."""
        if not isinstance(values, Tensor) or values.shape != (pairs,) or values.is_complex():
            got = type(values).__name__
            if isinstance(values, Tensor):
                got = f"{values.dtype} of shape {tuple(values.shape)}"
            raise BadInput(f"metric {self.name!r}: returned {got} for {pairs} pairs; return real numbers [{pairs}].")
        if bool(values.isinf().any()):
            raise BadInput(f"metric {self.name!r}: gave an infinite score; limit it, or give NaN for no score.")
        return values.detach().double()


METRICS: Registry[Metric] = Registry("metric", "frostglass.auditing.metrics", makes=Metric)
ALWAYS_SCORED = ("psnr", "ssim")
"""Computed whatever `report.metrics` names, so that a threshold may be on them."""
