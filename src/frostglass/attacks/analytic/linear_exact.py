"""Bias-ratio recovery: a unit of a first linear layer that only one image excites hands that image over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frostglass.attacks.analytic.first_layer import FirstLinear, find_first_linear
from frostglass.attacks.analytic.proof import prove
from frostglass.attacks.inversion.target import refuse_broken_values, update_problems
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation

SAME = 1e-3
"""Largest difference, relative to the spread of the rows, at which two units speak of the same image."""


@dataclass(frozen=True)
class Rows:
    """Candidates [r, d] in the layer's input space, and how many units agree on each."""

    inputs: Tensor
    units: Tensor


@dataclass(frozen=True)
class LinearExact:
    """See `linear_exact`."""

    name: str
    min_units: int
    steps: int = 1
    every: int = 1
    needs: frozenset[Knows] = frozenset()

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        layer, missing = find_first_linear(seen)
        problems = update_problems(seen)
        if layer is None:
            return [*problems, missing]
        if layer.grad_bias is None:
            problems.append(f"{layer.name!r} has no bias gradient, which this attack divides by.")
        return problems

    def init(self, seen: Observation, run: Runtime) -> Rows:
        """No candidates yet."""
        refuse_broken_values(seen)
        size = seen.image_shape[0] * seen.image_shape[1] * seen.image_shape[2]
        return Rows(torch.zeros(0, size), torch.zeros(0, dtype=torch.long))

    def step(self, seen: Observation, state: Rows, run: Runtime, t: int) -> tuple[Rows, Scalars]:
        """All of it: ratios, then groups of units that agree."""
        layer, _ = find_first_linear(seen)
        assert layer is not None
        rows = bias_ratio_rows(layer, seen.examples, self.min_units)
        return rows, {"candidates": len(rows.inputs)}

    def done(self, state: Rows) -> bool:
        """One step is all."""
        return False

    def read(self, seen: Observation, state: Rows) -> Reconstruction:
        """Rows that several units agree on; proved if the re-computed gradient agrees too."""
        layer, _ = find_first_linear(seen)
        assert layer is not None
        images = layer.to_images(state.inputs, seen.image_shape).cpu()
        complete = len(images) > 0 and (seen.examples is None or len(images) == seen.examples)
        proof = prove(seen, images) if complete else None
        holds = proof is not None and proof.holds
        info: dict[str, float | int | str | bool] = {"layer": layer.name, "rows": len(images)}
        if proof is not None:
            info.update(proof.told)
        if len(state.units):
            info["units_agreeing_least"] = int(state.units.min())
        return Reconstruction(
            images=seen.domain.clamp(images).float(),
            proved=torch.full((len(images),), holds, dtype=torch.bool),
            objective=proof.error if proof is not None else float("nan"),
            targets=proof.targets if proof is not None and holds else None,
            label_counts=proof.targets.sum(0) if proof is not None and holds else None,
            info=info,
        )


def bias_ratio_rows(layer: FirstLinear, examples: int | None, min_units: int) -> Rows:
    """x = gW_j / gb_j for each unit j, kept where at least `min_units` units name the same row.

    Exact for a batch of one. In a larger batch a unit that several images excite gives a mixture; two units give the
    same mixture only by accident, so agreement marks the units that one image has for itself.
    """
    assert layer.grad_bias is not None
    g, b = layer.grad_weight.double().cpu(), layer.grad_bias.double().cpu()
    usable = b.abs() > 1e-6 * b.abs().max()
    rows, weight = g[usable] / b[usable, None], b[usable].abs()
    if not len(rows):
        return Rows(rows, torch.zeros(0, dtype=torch.long))
    if examples == 1:
        best = weight.argmax()
        return Rows(rows[best][None], torch.tensor([len(rows)]))
    order = weight.argsort(descending=True)[:2048]
    rows, weight = rows[order], weight[order]
    close = _same_rows(rows)
    found, counts = [], []
    free = torch.ones(len(rows), dtype=torch.bool)
    for i in close.sum(1).argsort(descending=True).tolist():
        group = close[i] & free
        if free[i] and int(group.sum()) >= min_units:
            share = weight[group] / weight[group].sum()
            found.append((share[:, None] * rows[group]).sum(0))  # larger gradients carry less rounding
            counts.append(int(group.sum()))
            free &= ~group
    best_first = sorted(range(len(found)), key=lambda k: -counts[k])[: examples or len(found)]
    inputs = torch.stack([found[k] for k in best_first]) if best_first else rows[:0]
    return Rows(inputs, torch.tensor([counts[k] for k in best_first], dtype=torch.long))


def _same_rows(rows: Tensor) -> Tensor:
    """[n, n] whether two rows differ by less than SAME of the rows' typical spread."""
    distance = torch.cdist(rows, rows)
    spread = (rows - rows.mean(0)).norm(dim=1).median().clamp_min(1e-12)
    return distance <= SAME * spread


@ATTACKS.register(paper="Phong et al. 2018 (bias ratio); Geiping et al. 2020, Prop. 3.1", family="analytic")
def linear_exact(*, min_units: int = 3) -> LinearExact:
    """Bias-ratio recovery in a first linear layer: exact for one image, and for images with units of their own.

    Args:
        min_units: units that must agree on a row before it is shown, in batches above one.
    """
    return LinearExact("linear_exact", min_units)
