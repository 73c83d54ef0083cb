"""Where an inversion gets its targets: granted, or restored from the classifier's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.threat import Observation
from frostglass.numerics.labels import classifier_layer, counts_to_targets, label_counts, row_minimum

Restore: TypeAlias = Callable[[Observation], Tensor]
"""Observation -> counts per class [k]."""


def _classifier_gradients(seen: Observation) -> tuple[Tensor, Tensor | None]:
    layer = classifier_layer(seen.model, seen.classes)
    prefix = f"{layer}." if layer else ""
    if layer is None or f"{prefix}weight" not in seen.gradients:
        raise BadInput(
            "attack: labels can be restored only from the gradient of a final Linear layer, which this update does not "
            "hold; grant 'labels'."
        )
    return seen.gradients[f"{prefix}weight"], seen.gradients.get(f"{prefix}bias")


def by_counts() -> Restore:
    """Counts from the bias gradient (n = K (p - g), uniform p); by row minimum where there is no bias."""

    def restore(seen: Observation) -> Tensor:
        _, bias = _classifier_gradients(seen)
        if bias is None:
            return by_row_minimum()(seen)
        return label_counts(bias, _examples(seen))

    return restore


def by_row_minimum() -> Restore:
    """Distinct labels by the row minimum (Yin et al. 2021, Eq. 8)."""

    def restore(seen: Observation) -> Tensor:
        weight, _ = _classifier_gradients(seen)
        if _examples(seen) > len(weight):
            raise BadInput(
                f"attack: the row-minimum rule names distinct classes, and {_examples(seen)} images exceed "
                f"{len(weight)} classes; restore counts instead, or grant 'labels'."
            )
        counts = weight.new_zeros(len(weight))
        counts[row_minimum(weight, _examples(seen))] = 1
        return counts

    return restore


def _examples(seen: Observation) -> int:
    if seen.examples is None:
        raise BadInput("attack: restoring labels needs the number of images; grant 'examples'.")
    return seen.examples


def targets_of(seen: Observation, restore: Restore) -> tuple[Tensor, Tensor | None]:
    """(targets [b, k], restored counts or None if the labels were granted)."""
    if seen.labels is not None:
        return seen.labels, None
    counts = restore(seen)
    return counts_to_targets(counts), counts
