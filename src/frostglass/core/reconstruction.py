"""What an attack returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """Images read out of an observation, with the attack's own account of them.

    Args:
        images: [r, c, h, w] in the bounds of the observation's domain; r may be below the batch size, 0 if none.
        targets: [r, k] the attack's belief about the targets, or None.
        proved: [r] rows that the attack verified algebraically against the observation.
        objective: the attack's own final loss (lower is better), NaN if it has none.
        label_counts: [k] restored counts per class, None if labels were granted or not restored.
        info: further numbers and words for the report.
    """

    images: Float[Tensor, "r c h w"]
    proved: Bool[Tensor, " r"]
    objective: float
    targets: Float[Tensor, "r k"] | None = None
    label_counts: Float[Tensor, " k"] | None = None
    info: Mapping[str, float | int | str | bool] = field(default_factory=dict)
