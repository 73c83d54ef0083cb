"""Peeling a plain convolutional network from its head down: algebra for the last layers, a fit for the pixels."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from frostglass.attacks.analytic import peel_problem
from frostglass.attacks.analytic.fallback import alone, matching_objective
from frostglass.attacks.analytic.peel_problem import Problem
from frostglass.attacks.analytic.peel_state import PeelState, agreement, contrasted, info
from frostglass.attacks.analytic.proof import prove
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import Rule, StepInfo, adam, chain, scale
from frostglass.attacks.inversion.schedules import cosine, falling
from frostglass.attacks.inversion.target import refuse_broken_values
from frostglass.attacks.recipes.thaw import thaw
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics import conv_fit, head
from frostglass.numerics.conv_peel import CERTIFIED, THRESHOLDS
from frostglass.numerics.conv_peel import peel as peel_off
from frostglass.numerics.image import total_variation

SEARCH = 24
"""Steps for the classifier's inputs, at the most."""

STARTS = 8
"""Starts of that solve in one step."""

SETTLED = 5e-4
"""A hundredth of the residual below which a minimum that was found twice counts as the least one."""

USABLE = 1e-3
"""Residual of the peeled activations up to which pixels are fitted to them."""

GROUP_PRIOR = 10.0
"""How much stronger the first prior is where a norm leaves the activations' scale open."""

REFRESH = 10
"""Iterations between two updates of what the last ReLU hides."""

WARMUP = 20
"""Iterations over which the learning rate rises, and after which a free contrast is fitted."""


@dataclass(frozen=True)
class Peel:
    """See `peel`."""

    name: str
    pixel_steps: int
    update: Rule
    tv: float
    tv_start: float
    fallback: Inversion
    every: int
    needs: frozenset[Knows] = frozenset({Knows.EXAMPLES})
    _problems: weakref.WeakKeyDictionary[Observation, tuple[torch.device, torch.dtype, Problem]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    @property
    def steps(self) -> int:
        """Of all stages together; the first ones rarely take more than two."""
        return SEARCH + len(THRESHOLDS) + self.pixel_steps

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        return peel_problem.problems_of(seen)

    def init(self, seen: Observation, run: Runtime) -> PeelState:
        """Nothing solved; grey pixels."""
        problem = self._prepared(seen, run)
        targets = problem.targets[0]
        b, like = len(targets), torch.zeros((), dtype=run.dtype, device=run.device)
        z = 0.01 * run.rng.at("pixels").normal((b, *seen.image_shape), like=like)
        nothing = torch.zeros(0, dtype=run.dtype, device=run.device)
        return PeelState(
            stage="heads",
            tried=0,
            mixing=torch.eye(b, dtype=torch.float64),
            heads_residual=math.inf,
            targets=targets.to(like),
            activations=nothing,
            peel_residual=math.inf,
            above=nothing,
            hidden=nothing,
            z=z,
            rule=self.update.init(z),
            iteration=0,
            best=z.clone(),
            best_loss=torch.full_like(like, math.inf),
            fell_back=False,
            matching=self.fallback.init(seen, alone(run)),
        )

    def step(self, seen: Observation, state: PeelState, run: Runtime, t: int) -> tuple[PeelState, Scalars]:
        """A few starts, one threshold, or one iteration, by stage."""
        if state.stage == "heads":
            return self._heads(self._prepared(seen, run), state, run)
        if state.stage == "activations":
            return self._activations(self._prepared(seen, run), state, run)
        if state.stage == "pixels":
            return self._pixels(self._prepared(seen, run), state, run)
        if state.stage == "matching":
            matched, scalars = self.fallback.step(seen, state.matching, alone(run), state.iteration)
            return self._counted(replace(state, matching=matched)), scalars
        return state, {}

    def done(self, state: PeelState) -> bool:
        """All iterations were made."""
        return state.stage == "over"

    def read(self, seen: Observation, state: PeelState) -> Reconstruction:
        """The best pixels, with the residual of every stage; none of it uses the private images."""
        run = Runtime(device=state.z.device, dtype=state.z.dtype)
        problem = self._prepared(seen, run)
        told = info(problem, state)
        if state.fell_back:
            found = self.fallback.read(seen, state.matching)
            assert found.targets is not None
            objective = self.objective_of(seen, found.images, found.targets, run)
            return replace(found, objective=objective, info={**found.info, **told})
        images = seen.domain.clamp(seen.domain.denormalise(contrasted(problem, state.best)))
        holds = False
        if told["certificate"]:
            proof, agreeing = prove(seen, images), agreement(problem, state, images)
            told["activations_agreeing"] = agreeing
            if proof is not None:
                told.update(proof.told)
                holds = proof.holds and agreeing == 1.0
        return Reconstruction(
            images=images.float().cpu(),
            proved=torch.full((len(images),), holds, dtype=torch.bool),
            objective=self.objective_of(seen, images, state.targets, run),
            targets=state.targets.float().cpu(),
            label_counts=None if problem.granted else state.targets.sum(0).float().cpu(),
            info=told,
        )

    def objective_of(self, seen: Observation, images: Tensor, targets: Tensor, run: Runtime) -> float:
        """See `matching_objective`."""
        return matching_objective(seen, images, targets, run)

    def _prepared(self, seen: Observation, run: Runtime) -> Problem:
        held = self._problems.get(seen)
        if held is None or held[:2] != (run.device, run.dtype):
            refuse_broken_values(seen)
            held = (run.device, run.dtype, peel_problem.lay_out(seen, run))
            self._problems[seen] = held
        return held[2]

    def _heads(self, problem: Problem, state: PeelState, run: Runtime) -> tuple[PeelState, Scalars]:
        """A few starts for one of the possible labels."""
        choice, turn = state.tried % len(problem.targets), state.tried // len(problem.targets)
        rng = run.rng.at("heads", choice)
        mixing, residual = head.solve(problem.heads(choice), rng, starts=STARTS, first=turn * STARTS)
        new = replace(state, tried=state.tried + 1)
        if residual < state.heads_residual:
            targets = problem.targets[choice].to(state.targets)
            new = replace(new, mixing=mixing, heads_residual=residual, targets=targets)
        # the least residual, found twice in many starts and too large: the equations have no solution
        alone = len(problem.targets) == 1 and state.tried >= 3
        settled = alone and abs(residual - state.heads_residual) < 0.01 * residual < SETTLED
        if new.heads_residual < head.ACCEPTED:
            new = replace(new, stage="activations", tried=0)
        elif settled or new.tried == SEARCH:
            new = replace(new, stage="matching", fell_back=True)
        return new, {"heads_residual": new.heads_residual}

    def _activations(self, problem: Problem, state: PeelState, run: Runtime) -> tuple[PeelState, Scalars]:
        """The input of the last convolution, by one threshold."""
        equations = problem.last_convolution(state.targets, state.mixing, run.rng.at("deviation"))
        peeled = peel_off(equations, THRESHOLDS[state.tried])
        new = replace(state, tried=state.tried + 1)
        if peeled.residual < state.peel_residual:
            above = equations.layer.gradient_of_input(peeled.dz, peeled.inputs)
            # contiguous, as a checkpoint keeps them: another layout would round differently after a resume
            inputs, above = (v.to(state.z).contiguous() for v in (peeled.inputs, above))
            new = replace(new, activations=inputs, above=above, peel_residual=peeled.residual)
        if new.peel_residual < CERTIFIED or new.tried == len(THRESHOLDS):
            new = self._after_peeling(problem, new)
        return new, {"peel_residual": new.peel_residual} if math.isfinite(new.peel_residual) else {}

    def _after_peeling(self, problem: Problem, state: PeelState) -> PeelState:
        if state.peel_residual >= USABLE:
            return replace(state, stage="matching", fell_back=True)
        if len(problem.exact) > 1:
            return replace(state, stage="pixels")
        images = problem.to_images(state.activations)  # the first convolution is the last one: nothing is left to fit
        loss = torch.zeros_like(state.best_loss)
        return replace(state, stage="over", best=problem.domain.normalise(images), best_loss=loss)

    def _pixels(self, problem: Problem, state: PeelState, run: Runtime) -> tuple[PeelState, Scalars]:
        """One iteration of Adam on the pixels."""
        domain, t = problem.domain, state.iteration
        fit = problem.fit(state.activations, state.above)
        z = state.z.detach().requires_grad_(True)
        with torch.enable_grad():
            candidate = conv_fit.forward(fit, problem.to_input(domain.denormalise(z)))
            factor = conv_fit.scale_of(fit, candidate.y, known=t >= WARMUP)
            hidden = state.hidden
            if t % REFRESH == 0:
                hidden = conv_fit.gradient_below(fit, candidate, factor, known=t > 0)
            loss, hinge, linear = conv_fit.mismatch(fit, candidate, hidden, factor)
            prior = total_variation(z)
            start = self.tv_start * (GROUP_PRIOR if fit.free_scale else 1.0)
            weight = falling(start, self.tv)(t, self.pixel_steps) if self.tv else 0.0
            slope = torch.autograd.grad(loss + weight * prior, z)[0]
        change, rule = self.update.apply(slope, state.rule, StepInfo(t, self.pixel_steps, run.rng.at("step", t)))
        low, high = (domain.normalise(torch.full_like(z[:1, :1], v)) for v in (domain.low, domain.high))
        reached = hinge + linear
        better = reached < state.best_loss
        new = replace(
            state,
            hidden=hidden.detach(),
            z=torch.minimum(torch.maximum(z.detach() + change, low), high),
            rule=rule,
            best=torch.where(better, z.detach(), state.best),
            best_loss=torch.where(better, reached, state.best_loss),
        )
        scalars = {"pixel_loss": reached, "activations": hinge, "weight_gradient": linear, "tv": prior.detach()}
        return self._counted(new), scalars

    def _counted(self, state: PeelState) -> PeelState:
        done = state.iteration + 1
        return replace(state, iteration=done, stage="over" if done == self.pixel_steps else state.stage)


@ATTACKS.register(
    paper="Frostglass; related: Zhu & Blaschko 2021 (R-GAP), Kariyappa et al. 2023 (Cocktail Party)", family="analytic"
)
def peel(*, steps: int = 500, lr: float = 1.0, tv: float = 1e-5, tv_start: float = 1.0, every: int = 50) -> Peel:
    """Peels a plain conv-norm-ReLU network from its linear head down: exact activations, then pixels that fit them.

    Three stages. The inputs of the classifier are solved for exactly, image by image; the input of the last
    convolution follows by linear least squares; pixels are fitted to it by Adam, without second derivatives. Every
    stage has a residual, and the three together are a certificate that does not use the private images. Where the
    algebra fails (noise, rounding to half precision, wrong labels) gradient matching (`thaw`) takes over, uncertified.
    Labels and statistics of BatchNorm layers are used where granted and solved for where not; without the latter, as
    under GroupNorm, the contrast of the images is not in the gradient, and that of a typical photograph is shown.

    Args:
        steps: iterations on the pixels.
        lr: peak learning rate, reached after 20 iterations, 0 at the end.
        tv, tv_start: weight of the total variation at the end and at the start; set tv to 0 on encodings, whose
            neighbouring pixels are unrelated.
        every: iterations between two reports.
    """
    matching = thaw(steps=steps, every=every) if tv else thaw(steps=steps, tv=0.0, every=every)
    return Peel(
        "peel",
        pixel_steps=steps,
        update=chain(adam(), scale(cosine(lr, warmup=WARMUP))),
        tv=tv,
        tv_start=max(tv_start, tv),
        fallback=replace(matching, restore=peel_problem.COUNTS),
        every=every,
    )
