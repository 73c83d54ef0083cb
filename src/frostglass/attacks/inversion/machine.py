"""The inversion machine: terms + update rule + space + label restoration = one attack, stepped by the one loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.inversion.restore import Restore, by_counts, targets_of
from frostglass.attacks.inversion.rules import Rule, StepInfo
from frostglass.attacks.inversion.schedules import as_schedule
from frostglass.attacks.inversion.target import Target, lay_out, update_problems
from frostglass.attacks.inversion.terms import Candidate, Term, require
from frostglass.core.drive import Scalars
from frostglass.core.errors import BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics.local_update import local_update


@dataclass(frozen=True)
class InversionState:
    """Of all seeds together.

    Args:
        z: [s, b, c, h, w] the variables.
        rule: state of the update rule.
        targets: [b, k].
        counts: restored counts per class, None if labels were granted.
        best: the variables at their lowest total objective, [s, b, c, h, w].
        best_loss: [s] that objective, priors included.
    """

    z: Tensor
    rule: Any
    targets: Float[Tensor, "b k"]
    counts: Float[Tensor, " k"] | None
    best: Tensor
    best_loss: Float[Tensor, " s"]


@dataclass(frozen=True)
class Inversion:
    """A gradient inversion attack, as an `Attack`.

    Args:
        name: as registered.
        terms: given the observation (so that a recipe can use what was granted), the terms of the objective.
        update: gradient -> change of the variable.
        steps: iterations.
        restore: label restoration, used unless labels are granted.
        seeds: independent starts; the one with the lowest objective is returned.
        start: standard deviation of the normal start in the victim's normalised space.
        box: clamp to the domain's bounds after every step.
        every: iterations between two reports.
        needs: grants without which it does not run.
    """

    name: str
    terms: Callable[[Observation], tuple[Term, ...]]
    update: Rule
    steps: int
    restore: Restore = field(default_factory=by_counts)
    seeds: int = 1
    start: float = 1.0
    box: bool = True
    every: int = 50
    needs: frozenset[Knows] = frozenset({Knows.EXAMPLES})

    _laid_out: weakref.WeakKeyDictionary[Observation, tuple[Target, tuple[Term, ...]]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        problems = update_problems(seen)
        try:
            require(self.terms(seen), seen)
            if not problems:
                targets_of(seen, self.restore)
        except BadInput as wrong:
            problems += wrong.problems
        return problems

    def init(self, seen: Observation, run: Runtime) -> InversionState:
        """Normal starts, targets granted or restored."""
        targets, counts = targets_of(seen, self.restore)
        shape = (self.seeds, len(targets), *seen.image_shape)
        like = torch.zeros((), dtype=run.dtype, device=run.device)
        starts = [self.start * run.rng.at("start", s).normal(shape[1:], like=like) for s in range(self.seeds)]
        z = self._boxed(torch.stack(starts), seen)
        return InversionState(
            z=z,
            rule=self.update.init(z),
            targets=targets.to(like),
            counts=counts,
            best=z.clone(),
            best_loss=torch.full((self.seeds,), float("inf"), dtype=run.dtype, device=run.device),
        )

    def step(self, seen: Observation, state: InversionState, run: Runtime, t: int) -> tuple[InversionState, Scalars]:
        """One iteration of every seed: simulate the client once a seed, sum the terms, follow the rule."""
        target, terms = self._prepared(seen, run)
        grads, losses, parts = [], [], []
        for s in range(len(state.z)):
            z = state.z[s].detach().requires_grad_(True)
            loss, values = self._objective(z, state.targets, target, terms, t)
            grads.append(torch.autograd.grad(loss, z)[0])
            losses.append(loss.detach())
            parts.append(values)
        loss_now = torch.stack(losses)
        better = loss_now < state.best_loss
        info = StepInfo(t, self.steps, run.rng.at("step", t))
        change, rule = self.update.apply(torch.stack(grads), state.rule, info)
        new = replace(
            state,
            z=self._boxed(state.z + change, seen),
            rule=rule,
            best=torch.where(better[:, None, None, None, None], state.z, state.best),
            best_loss=torch.where(better, loss_now, state.best_loss),
        )
        scalars: dict[str, Tensor | float] = {"objective": loss_now.min(), "best": new.best_loss.min()}
        scalars |= {name: torch.stack([p[name] for p in parts]).mean() for name in parts[0]}
        return new, scalars

    def done(self, state: InversionState) -> bool:
        """Never early: the schedule ends the run."""
        return False

    def read(self, seen: Observation, state: InversionState) -> Reconstruction:
        """Of the seed with the lowest objective; the truth has no part in the choice."""
        pick = int(state.best_loss.argmin())
        images = seen.domain.clamp(seen.domain.denormalise(state.best[pick]))
        finite = bool(torch.isfinite(state.best_loss[pick]))
        return Reconstruction(
            images=images.float().cpu(),
            proved=torch.zeros(len(images), dtype=torch.bool),
            objective=float(state.best_loss[pick]) if finite else float("nan"),
            targets=state.targets.float().cpu(),
            label_counts=None if state.counts is None else state.counts.float().cpu(),
            info={"seed": pick, "seeds": len(state.z)},
        )

    def objective_of(self, seen: Observation, images: Tensor, targets: Tensor, run: Runtime) -> float:
        """The final total objective at given images: how scoring shows that an optimiser fell short.

        Args:
            seen: the observation.
            images: [b, c, h, w] in the bounds of the domain.
            targets: [b, k].
            run: device and dtype.
        """
        target, terms = self._prepared(seen, run)
        z = seen.domain.normalise(images.to(run.device, run.dtype)).requires_grad_(True)
        loss, _ = self._objective(z, targets.to(run.device, run.dtype), target, terms, self.steps - 1)
        return float(loss.detach())

    def _prepared(self, seen: Observation, run: Runtime) -> tuple[Target, tuple[Term, ...]]:
        if seen not in self._laid_out:
            terms = self.terms(seen)
            require(terms, seen)
            self._laid_out[seen] = (lay_out(seen, run), terms)
        return self._laid_out[seen]

    def _objective(
        self, z: Tensor, targets: Tensor, target: Target, terms: tuple[Term, ...], t: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = target.seen.domain.denormalise(z)
        trace = local_update(target.model, images, targets, target.plan, differentiable=True)
        candidate = Candidate(z, images, targets, trace, target)
        values = {term.name: term.value(candidate) for term in terms}
        weighted = [as_schedule(term.weight)(t, self.steps) * values[term.name] for term in terms]
        return torch.stack(weighted).sum(), {n: v.detach() for n, v in values.items()}

    def _boxed(self, z: Tensor, seen: Observation) -> Tensor:
        if not self.box:
            return z
        low, high = (seen.domain.normalise(torch.full_like(z[:1, :1], v)) for v in (seen.domain.low, seen.domain.high))
        return torch.minimum(torch.maximum(z, low), high)
