"""SPEAR as an attack: exact recovery of a whole batch from the gradient of a first Linear-ReLU layer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch

from frostglass.attacks.analytic.first_layer import FirstLinear, find_first_linear
from frostglass.attacks.analytic.proof import prove
from frostglass.attacks.inversion.target import refuse_broken_values, update_problems
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics import spear as numerics
from frostglass.numerics.spear_proof import empty_state


@dataclass(frozen=True)
class SpearAttackState:
    """The search so far, and how many rows of its best set are proved."""

    search: numerics.SpearState
    found: int
    wanted: int
    agreement: float


@dataclass(frozen=True)
class Spear:
    """See `spear`."""

    name: str
    steps: int
    samples: int | None
    every: int = 1
    needs: frozenset[Knows] = frozenset()
    _problems: weakref.WeakKeyDictionary[Observation, tuple[FirstLinear, numerics.SpearProblem]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        problems = update_problems(seen)
        layer, missing = find_first_linear(seen)
        if layer is None:
            problems.append(missing)
        elif layer.grad_bias is None:
            problems.append(f"{layer.name!r} has no bias gradient, and without it the scale of an image is lost.")
        elif not layer.relu:
            problems.append(f"{layer.name!r} is not followed by a ReLU, whose zeros this attack reads.")
        return problems

    def init(self, seen: Observation, run: Runtime) -> SpearAttackState:
        """Factors the gradient; nothing is searched yet."""
        problem = self._prepared(seen)[1]
        return SpearAttackState(empty_state(problem), 0, problem.size, 0.0)

    def step(
        self, seen: Observation, state: SpearAttackState, run: Runtime, t: int
    ) -> tuple[SpearAttackState, Scalars]:
        """One bounded chunk of the search."""
        problem = self._prepared(seen)[1]
        generator = run.rng.at("search", t).generator()
        searched = numerics.search(problem, state.search, generator, self.samples or problem.samples)
        result = numerics.assemble(problem, searched)
        agreement = float(result.agreement.mean()) if len(result.agreement) else 0.0
        new = SpearAttackState(searched, result.found, problem.size, agreement)
        return new, {"proved": result.found, "agreement": agreement, "unexplained": 1 - agreement}

    def done(self, state: SpearAttackState) -> bool:
        """All rows are proved."""
        return state.wanted > 0 and state.found >= state.wanted

    def read(self, seen: Observation, state: SpearAttackState) -> Reconstruction:
        """The proved rows; rows that are not proved are not presented."""
        layer, problem = self._prepared(seen)
        result = numerics.assemble(problem, state.search)
        images = layer.to_images(result.inputs, seen.image_shape)
        keep = result.proved
        proof = prove(seen, images) if result.found == problem.size == problem.batch else None
        proved = keep.clone() if proof is None or proof.holds else torch.zeros_like(keep)
        shown = seen.domain.clamp(images)[keep].float().cpu()
        batch = problem.batch
        info: dict[str, float | int | str | bool] = {
            "rank": problem.rank,
            "wanted": batch,
            "proved": int(proved.sum()),
            "merged_or_below_noise": result.missing,
            "gradient_noise": problem.noise,
            "expected_pixel_error": _largest(result.deviation[keep]),
            "layer": layer.name,
        }
        if proof is not None:
            info.update(proof.told)
        return Reconstruction(
            images=shown,
            proved=proved[keep].cpu(),
            objective=proof.error if proof is not None else result.residual,
            targets=None if proof is None else proof.targets[keep],
            label_counts=None if proof is None or not proof.holds else proof.targets.sum(0),
            info=info,
        )

    def rows(self, seen: Observation) -> int:
        """Distinct images to be looked for: the number that was told, or the rank of the gradient."""
        return self._prepared(seen)[1].size

    def _prepared(self, seen: Observation) -> tuple[FirstLinear, numerics.SpearProblem]:
        if seen not in self._problems:
            problems = self.check(seen)
            if problems:
                raise BadInput(problems)
            refuse_broken_values(seen)
            layer, _ = find_first_linear(seen)
            assert layer is not None
            assert layer.bias is not None
            try:
                problem = numerics.prepare(
                    layer.weight.cpu(), layer.bias.cpu(), layer.grad_weight.cpu(),
                    None if layer.grad_bias is None else layer.grad_bias.cpu(), seen.examples,
                )  # fmt: skip
            except ValueError as wrong:
                raise AttackFailed(f"spear: {wrong}") from wrong
            self._problems[seen] = (layer, problem)
        return self._problems[seen]


def _largest(values: torch.Tensor) -> float:
    """In the layer's input space; 0 if there is no row."""
    return float(values.max()) if len(values) else 0.0


@ATTACKS.register(paper="Dimitrov et al. 2024, NeurIPS (SPEAR); search by sparse directions", family="analytic")
def spear(*, steps: int = 20, samples: int | None = None) -> Spear:
    """Exact recovery of a whole batch from a first Linear-ReLU layer: low rank and ReLU sparsity; proves what it shows.

    Args:
        steps: bounded chunks of search, at the most; ends as soon as every image is proved.
        samples: starts in one chunk; chosen by size if left out.
    """
    return Spear("spear", steps, samples)
