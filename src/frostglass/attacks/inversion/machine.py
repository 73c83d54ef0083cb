"""The inversion machine: terms + update rule + space + label restoration = one attack, stepped by the one loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from frostglass.attacks.inversion import ranks, seeds
from frostglass.attacks.inversion.captured import Recordings
from frostglass.attacks.inversion.choice import AgreeingMean, choose, combined, ends_told
from frostglass.attacks.inversion.consensus import Consensus, find_anchor, in_one_order
from frostglass.attacks.inversion.elimination import Elimination, eliminated
from frostglass.attacks.inversion.engine import Engine, Objective, evaluate, refuse_unheld_kinks
from frostglass.attacks.inversion.restore import Restore, by_counts, restored_of, targets_of
from frostglass.attacks.inversion.rules import Rule, StepInfo
from frostglass.attacks.inversion.spaces import Jitter, Space, pixels
from frostglass.attacks.inversion.state import InversionState, per_seed
from frostglass.attacks.inversion.target import Target, lay_out, update_problems
from frostglass.attacks.inversion.terms import Term, epoch_agreement, live, require
from frostglass.attacks.inversion.together import Evaluations, can_be_together, evaluate_all, seeds_at_once
from frostglass.attacks.inversion.validate import warnings_of
from frostglass.core.drive import Scalars
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage, Knows, Observation
from frostglass.numerics.fedavg import merge_epochs

__all__ = ["Inversion", "InversionState"]


@dataclass
class _Laid:
    """What is worked out once for an observation.

    Args:
        where: it lies.
        target, terms: the observation, and the live terms of its objective.
        at_once: seeds in one pass; None before it is known.
        recordings: of iterations, on CUDA.
    """

    where: tuple[torch.device, torch.dtype]
    target: Target
    terms: tuple[Term, ...]
    at_once: int | None = None
    recordings: Recordings = field(default_factory=Recordings)


@dataclass(frozen=True)
class Inversion:
    """A gradient inversion attack, as an `Attack`.

    Args:
        name: as registered.
        terms: given the observation (so that a recipe can use what was granted), the terms of the objective; those of
            weight 0 are left out.
        update: gradient -> change of the variable.
        steps: iterations.
        restore: label restoration, used unless labels are granted or the space holds them.
        seeds: independent starts; the one with the lowest objective is returned.
        space: what is searched.
        consensus: what draws the seeds together, None if nothing does.
        restart: when a seed starts anew, None for never.
        eliminate: when the worse part of the seeds is dropped, None for never.
        combine: how agreeing seeds are averaged into the result, None for the best seed alone; pixel spaces only.
        jitter: what happens to the images before the network sees them.
        engine: how the gradient is taken (see `engine`).
        every: iterations between two reports.
        needs: grants without which it does not run.
        graph: on CUDA, replay iterations as a graph where that repeats the eager path (see `captured`).
        at_once: seeds in one pass; None for as many as are worth it (`together.seeds_at_once`), 1 for one by one.
    """

    name: str
    terms: Callable[[Observation], tuple[Term, ...]]
    update: Rule
    steps: int
    restore: Restore = field(default_factory=by_counts)
    seeds: int = 1
    space: Space = field(default_factory=pixels)
    consensus: Consensus | None = None
    restart: seeds.Restart | None = None
    eliminate: Elimination | None = None
    combine: AgreeingMean | None = None
    jitter: Jitter | None = None
    engine: Engine = "double_backward"
    every: int = 50
    needs: frozenset[Knows] = frozenset({Knows.EXAMPLES})
    graph: bool = False
    at_once: int | None = None

    _laid_out: weakref.WeakKeyDictionary[Observation, _Laid] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "seeds": self.seeds, "every": self.every}
        counts |= {} if self.at_once is None else {"at_once": self.at_once}
        wrong = [w for w, n in counts.items() if n < 1]
        if wrong:
            raise BadInput([f"attack.{w}: must be a whole number from 1." for w in wrong])
        if self.combine is not None and not self.space.per_row:
            raise BadInput("attack.combine: seeds can be averaged in pixel spaces only; return the best seed instead.")

    @property
    def shares_seeds(self) -> bool:
        """True: `step` knows `run.world`, so that every rank of a run takes part in it."""
        return True

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        problems = update_problems(seen)
        try:
            require(live(self.terms(seen)), seen)
            if not problems:
                self._targets(seen)
        except BadInput as wrong:
            problems += wrong.problems
        sent = {message.kind for message in seen.messages if isinstance(message, GradientMessage)}
        if self.engine == "frozen_fd" and sent != {"gradient"}:
            problems.append("attack: engine 'frozen_fd' reads gradients, not weight differences; use double_backward.")
        return problems

    def warnings(self, seen: Observation) -> list[str]:
        """Sentences on what about this observation may make the result mislead."""
        return warnings_of(seen)

    def init(self, seen: Observation, run: Runtime) -> InversionState:
        """Starts of this rank's seeds, targets granted or restored.

        Raises:
            AttackFailed: "frozen_fd" does not fit the network (see `engine.refuse_unheld_kinks`).
        """
        target, terms = self._prepared(seen, run)
        targets, counts = self._targets(seen)
        numbers = ranks.seeds_of(run.world, self.seeds)
        z = seeds.start_of(self.space, target, len(targets), numbers, run)
        inf = torch.full((len(z),), float("inf"), dtype=run.dtype, device=run.device)
        none = torch.zeros((), dtype=torch.long, device=run.device)
        state = InversionState(
            z=z,
            rule=self.update.init(z),
            targets=targets.to(run.device, run.dtype),
            counts=counts,
            best=z.clone(),
            best_loss=inf,
            seeds=numbers,
            alive=torch.ones(len(z), dtype=torch.bool, device=run.device),
            first_loss=inf.clone(),
            last_loss=inf.clone(),
            lost=none,
            anchor=None,
            restarts=none.clone(),
            unregistered=torch.zeros((), dtype=run.dtype, device=run.device),
        )
        problem = self._objective(target, terms, state, 0)
        if self.engine == "frozen_fd" and numbers and any(term.gradient for term in terms):
            refuse_unheld_kinks(z[0], replace(problem, draws=run.rng.at("check")))
        self._at_once(seen, state, problem, run)
        return state

    def step(self, seen: Observation, state: InversionState, run: Runtime, t: int) -> tuple[InversionState, Scalars]:
        """One iteration of every seed: simulate the client, sum the terms, follow the rule.

        Nothing in it waits for the device, except where seeds are dropped and where the consensus is refreshed (images
        of one class are put in one order there, and registration works on the CPU).
        """
        target, terms = self._prepared(seen, run)
        state = self._arranged(state, target, run, t)
        problem = self._objective(target, terms, state, t)
        rng, at_once = run.rng.at("step", t), self._at_once(seen, state, problem, run)
        problems = self._problems(problem, state.seeds, rng)
        evaluated = self._laid_out[seen].recordings.evaluate if self.graph else evaluate_all

        def at(z: Tensor) -> Evaluations:
            return evaluated(z, problems, at_once)

        found = at(state.z)
        alive = seeds.living(state.alive, found.own, found.gradient)
        best, best_loss = seeds.keep_best(state, found.own, alive)
        info = StepInfo(t, self.steps, rng, state.seeds, state.z, lambda z: at(z).gradient)
        change, rule = self.update.apply(found.gradient, state.rule, info)
        z = self.space.box(torch.where(per_seed(alive, change), state.z + change, state.z), target)
        new = replace(
            state,
            z=z,
            rule=rule,
            best=best,
            best_loss=best_loss,
            alive=alive,
            first_loss=torch.where(state.first_loss.isinf(), found.own, state.first_loss),
            last_loss=found.own,
            lost=state.lost + (state.alive & ~alive).sum(),
        )
        scalars = self._scalars(found, new, run, t)
        return (self._settled(new, target, terms, run, t) if t == self.steps - 1 else new), scalars

    def done(self, state: InversionState) -> bool:
        """Never early: the schedule ends the run."""
        return False

    def read(self, seen: Observation, state: InversionState) -> Reconstruction:
        """Of the seed with the lowest own objective; the truth has no part in the choice.

        Before the last step the choice is among the seeds of this rank.
        """
        target = self._laid_out[seen].target
        if not state.seeds:  # a rank without seeds, before the end
            none = torch.zeros(0, *seen.image_shape)
            return Reconstruction(images=none, proved=torch.zeros(0, dtype=torch.bool), objective=float("nan"))
        pick = int(state.best_loss.argmin())
        best = state.best[pick]
        images = seen.domain.clamp(target.denormalise(self.space.images(best, target)).detach())
        labels = self.space.labels(best, target)
        targets = state.targets if labels is None else labels.detach()
        if target.order(len(images)) is not None:
            images = merge_epochs(images, target.epochs, targets.argmax(1).tolist())
        counts = state.counts if labels is None else _counts(targets)
        info: dict[str, float | int | str | bool] = {"seed": state.seeds[pick], "seeds": self.seeds}
        told = {"seeds_dropped": state.lost, "restarts": state.restarts, "unregistered": state.unregistered}
        info |= {name: int(value) for name, value in told.items() if int(value)}
        info |= ends_told(state)
        if self.graph:
            info["cuda_graph"] = self._laid_out[seen].recordings.used
        if labels is None and seen.labels is None:
            info |= restored_of(seen, self.restore).info
        objective = float(state.best_loss[pick])
        return Reconstruction(
            images=images.float().cpu(),
            proved=torch.zeros(len(images), dtype=torch.bool),
            objective=objective if abs(objective) < float("inf") else float("nan"),
            targets=targets.float().cpu(),
            label_counts=None if counts is None else counts.float().cpu(),
            info=info,
        )

    def objective_of(self, seen: Observation, images: Tensor, targets: Tensor, run: Runtime) -> float:
        """The own objective of the last step at given images: how scoring shows that an optimiser fell short.

        Args:
            seen: the observation.
            images: [b, c, h, w] in the bounds of the domain.
            targets: [b, k].
            run: device and dtype.
        """
        target, terms = self._prepared(seen, run)
        z = seen.domain.normalise(images.to(run.device, run.dtype))
        rows = targets.to(run.device, run.dtype)
        problem = Objective(target, terms, pixels(), self.engine, self.steps - 1, self.steps, rows)
        problem = replace(problem, draws=run.rng.at("objective"))
        return float(evaluate(z, problem, gradient=False).own)

    def _targets(self, seen: Observation) -> tuple[Tensor, Tensor | None]:
        if not self.space.holds_labels:
            return targets_of(seen, self.restore)
        if seen.examples is None:
            raise BadInput("attack: the number of images must be known; grant 'examples'.")
        return torch.zeros(seen.examples, seen.classes), None

    def _prepared(self, seen: Observation, run: Runtime) -> tuple[Target, tuple[Term, ...]]:
        where = (run.device, run.dtype)
        held = self._laid_out.get(seen)
        if held is None or held.where != where:
            terms = live(self.terms(seen))
            require(terms, seen)
            target = lay_out(seen, run)
            if target.epochs > 1 and self.space.per_row:
                terms = (*terms, epoch_agreement())
            held = _Laid(where, target, terms)
            self._laid_out[seen] = held
        return held.target, held.terms

    def _arranged(self, state: InversionState, target: Target, run: Runtime, t: int) -> InversionState:
        """Before a step: fewer seeds, restarts and a new anchor, where they are due."""
        if self.eliminate is not None and self.eliminate.due(t, self.steps):
            state = eliminated(state, self.eliminate, run.world)
        if self.restart is not None and self.restart.due(t, self.steps):
            state = seeds.restarted(state, self.restart, self.update, self.space, target, run, t)
        if self.consensus is not None and self.consensus.due(t):
            rows = [self.space.images(z, target) for z in state.z]
            count = len(state.targets) * (target.epochs if self.space.per_row else 1)
            shape = (0, count, *target.seen.image_shape)
            images = torch.stack(rows).detach() if rows else state.z.new_zeros(shape)
            if self.space.per_row:
                state, images = in_one_order(state, images, target.epochs, run.world)
            found = find_anchor(images, state.alive, self.consensus, target, run.world)
            state = replace(seeds.forget_best(state), anchor=found.z, unregistered=found.unregistered)
        return state

    def _settled(
        self, state: InversionState, target: Target, terms: tuple[Term, ...], run: Runtime, t: int
    ) -> InversionState:
        """After the last step: what is returned, by objective alone."""
        if self.combine is None:
            return choose(state, run.world)
        problem = replace(self._objective(target, terms, state, t), anchor=None, draws=run.rng.at("objective"))

        def objective(z: Tensor) -> Tensor:
            return evaluate(z, problem, gradient=False).own

        return combined(state, self.combine, objective, target.epochs, run.world)

    def _objective(self, target: Target, terms: tuple[Term, ...], state: InversionState, t: int) -> Objective:
        group = self.consensus.weight if self.consensus is not None else 0.0
        made = Objective(target, terms, self.space, self.engine, t, self.steps, state.targets)
        return replace(made, anchor=state.anchor, group=group)

    def _at_once(self, seen: Observation, state: InversionState, problem: Objective, run: Runtime) -> int:
        """Seeds in one pass, found out once, at two starts of its own: a run that resumes finds the same."""
        held = self._laid_out[seen]
        if held.at_once is None:
            most = min(self.at_once or seeds_at_once(held.target, len(state.targets)), self.seeds)
            if most > 1:
                own = run.at("together")
                z = seeds.start_of(self.space, held.target, len(state.targets), (0, 1), own)
                tried = self._problems(replace(problem, anchor=None, t=0), (0, 1), own.rng)
                most = most if can_be_together(z, tried) else 1
            held.at_once = most
        return held.at_once

    def _problems(self, problem: Objective, numbers: tuple[int, ...], rng: Rng) -> list[Objective]:
        """Of each seed: what is done to its images, and what its network draws."""
        shown = [None if self.jitter is None else self.jitter(rng.at("jitter", n)) for n in numbers]
        draws = [rng.at("model", n) for n in numbers]
        return [replace(problem, augment=a, draws=d) for a, d in zip(shown, draws, strict=True)]

    def _scalars(self, found: Evaluations, state: InversionState, run: Runtime, t: int) -> Scalars:
        """Lowest objectives over all seeds, means of the terms over this rank's living ones."""
        alive, count = state.alive, state.alive.sum().clamp_min(1)
        wall = found.total.new_full((1,), float("inf"))
        now = torch.cat([torch.where(alive, found.total, wall), wall]).min()
        least = torch.stack([now, torch.cat([state.best_loss, wall]).min()])
        if (t + 1) % self.every == 0 or t + 1 == self.steps:
            least = ranks.lowest(least, run.world, "a report")
        scalars: dict[str, Tensor | float] = {"objective": least[0], "best": least[1]}
        for name, value in found.values.items():
            scalars[name] = torch.where(alive, value, torch.zeros_like(value)).sum() / count
        if self.seeds > 1:
            scalars["seeds_dropped"] = state.lost
        return scalars


def _counts(targets: Tensor) -> Tensor:
    """[k] how many rows have their greatest entry in each class."""
    return torch.nn.functional.one_hot(targets.argmax(1), targets.shape[1]).sum(0).to(targets.dtype)
