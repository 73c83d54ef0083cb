"""Peeling a residual network: exact activations of each image from the top down, then pixels that fit them."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.analytic.activation_fit import goals_of, mismatch
from frostglass.attacks.analytic.fallback import alone, matching_objective
from frostglass.attacks.analytic.proof import prove
from frostglass.attacks.analytic.residual_peel import Peeled, peel_down
from frostglass.attacks.analytic.residual_problem import Prepared, prepare, problems_of
from frostglass.attacks.inversion.machine import Inversion, InversionState
from frostglass.attacks.inversion.rules import Rule, StepInfo, adam, chain, scale
from frostglass.attacks.inversion.schedules import cosine, falling
from frostglass.attacks.inversion.target import refuse_broken_values
from frostglass.attacks.recipes.thaw import thaw
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics.image import total_variation

CERTIFIED = 1e-4
"""Largest distance between the recovered top activations' mean and what the head read, which no solve has used."""

COARSEST, EACH = 4, 2
"""Activations at most this many times coarser than the image along an axis, and with this many numbers a place of the
image, determine its pixels; coarser ones leave some of them to a prior."""

FEWEST = 1 / 8
"""Numbers a place of the image below which activations say too little for a picture."""


@dataclass(frozen=True)
class ResidualState:
    """What is kept between steps.

    Args:
        stage: "algebra", "pixels", "matching" (where the algebra did not reach far enough) or "over".
        told: what the algebra found, for the report.
        goals: activations that pixels are fitted to, by node.
        targets: [b, k] in the order of the images that the algebra found.
        z: [b, c, h, w] pixels in the domain's normalised space; rule: state of Adam; iteration: of either fit.
        best, best_loss: [b, c, h, w] and [b], each image's pixels at their lowest loss.
        matching: state of the gradient matching.
    """

    stage: str
    told: dict[str, float | int | str | bool]
    goals: dict[int, Tensor]
    targets: Float[Tensor, "b k"]
    z: Float[Tensor, "b c h w"]
    rule: Any
    iteration: int
    best: Float[Tensor, "b c h w"]
    best_loss: Float[Tensor, " b"]
    matching: InversionState


@dataclass(frozen=True)
class PeelResidual:
    """See `peel_residual`."""

    name: str
    pixel_steps: int
    update: Rule
    tv: float
    tv_start: float
    tv_coarse: float
    fallback: Inversion
    every: int
    needs: frozenset[Knows] = frozenset({Knows.EXAMPLES})
    _held: weakref.WeakKeyDictionary[Observation, tuple[torch.device, torch.dtype, Prepared]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    @property
    def steps(self) -> int:
        """One for the algebra, the rest for pixels."""
        return 1 + self.pixel_steps

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        return problems_of(seen)

    def init(self, seen: Observation, run: Runtime) -> ResidualState:
        """Nothing solved; grey pixels."""
        self._prepared(seen, run)
        like = torch.zeros((), dtype=run.dtype, device=run.device)
        assert seen.examples
        z = 0.01 * run.rng.at("pixels").normal((seen.examples, *seen.image_shape), like=like)
        targets = torch.zeros(seen.examples, seen.classes)
        best_loss = like.new_full((seen.examples,), math.inf)
        matching = self.fallback.init(seen, alone(run))
        return ResidualState("algebra", {}, {}, targets, z, self.update.init(z), 0, z.clone(), best_loss, matching)

    def step(self, seen: Observation, state: ResidualState, run: Runtime, t: int) -> tuple[ResidualState, Scalars]:
        """The whole algebra, or one iteration of a fit."""
        if state.stage == "algebra":
            return self._algebra(seen, self._prepared(seen, run), state)
        if state.stage == "pixels":
            return self._pixels(seen, self._prepared(seen, run), state, run)
        if state.stage == "matching":
            matched, scalars = self.fallback.step(seen, state.matching, alone(run), state.iteration)
            return self._counted(replace(state, matching=matched)), scalars
        return state, {}

    def done(self, state: ResidualState) -> bool:
        """All iterations were made."""
        return state.stage == "over"

    def read(self, seen: Observation, state: ResidualState) -> Reconstruction:
        """The best pixels, and how far the algebra came; none of it uses the private image."""
        run = Runtime(device=state.z.device, dtype=state.z.dtype)
        if not state.goals:
            found = self.fallback.read(seen, state.matching)
            return replace(found, info={**found.info, **state.told})
        images = seen.domain.clamp(seen.domain.denormalise(state.best))
        told = {**state.told, "pixel_loss": float(state.best_loss.mean())}
        proof = prove(seen, images) if told["certificate"] else None
        if proof is not None:
            told.update(proof.told)
        return Reconstruction(
            images=images.float().cpu(),
            proved=torch.full((len(images),), proof is not None and proof.holds, dtype=torch.bool),
            objective=self.objective_of(seen, images, state.targets, run),
            targets=state.targets,
            label_counts=None if seen.labels is not None else state.targets.sum(0),
            info=told,
        )

    def objective_of(self, seen: Observation, images: Tensor, targets: Tensor, run: Runtime) -> float:
        """See `matching_objective`."""
        return matching_objective(seen, images, targets, run)

    def _prepared(self, seen: Observation, run: Runtime) -> Prepared:
        held = self._held.get(seen)
        if held is None or held[:2] != (run.device, run.dtype):
            refuse_broken_values(seen)
            held = (run.device, run.dtype, prepare(seen, run))
            self._held[seen] = held
        return held[2]

    def _algebra(self, seen: Observation, prepared: Prepared, state: ResidualState) -> tuple[ResidualState, Scalars]:
        found = peel_down(prepared.sent)
        told = _told(found)
        fine, some = _fine_enough(prepared, found, state.z.shape[2])
        fitted = told["certificate"] and (fine or (some and self.tv > 0))
        goals = goals_of(prepared.graph, found.values, state.z) if fitted else {}
        if goals and not fine:
            told["coarse"] = True
            told["warning"] = (
                "activations were recovered exactly, but too coarse ones to determine pixels: what they leave open is "
                "smoothed"
            )
        elif not goals and told["certificate"]:
            told["warning"] = (
                "activations near the head were recovered exactly, but too coarse ones to fit pixels to: shown is an "
                "image by gradient matching"
            )
        stage = "pixels" if goals else "matching"
        scalars = {"features_error": found.features_error} if math.isfinite(found.features_error) else {}
        targets = state.targets if found.errors is None else _targets(seen, found.errors)
        return replace(state, stage=stage, goals=goals, told=told, targets=targets), scalars

    def _pixels(
        self, seen: Observation, prepared: Prepared, state: ResidualState, run: Runtime
    ) -> tuple[ResidualState, Scalars]:
        """One iteration of Adam on the pixels: a forward and a backward pass, no second derivative."""
        domain, t = seen.domain, state.iteration
        z = state.z.detach().requires_grad_(True)
        with torch.enable_grad():
            reached = mismatch(prepared.graph, prepared.model, state.goals, domain.denormalise(z))
            prior = total_variation(z)
            weight = falling(self.tv_start, self.tv)(t, self.pixel_steps) if self.tv else 0.0
            weight = self.tv_coarse if state.told.get("coarse") else weight
            slope = torch.autograd.grad(reached.sum() + len(z) * weight * prior, z)[0]
        change, rule = self.update.apply(slope, state.rule, StepInfo(t, self.pixel_steps, run.rng.at("step", t)))
        low, high = (domain.normalise(torch.full_like(z[:1, :1], v)) for v in (domain.low, domain.high))
        better = reached.detach() < state.best_loss
        new = replace(
            state,
            z=torch.minimum(torch.maximum(z.detach() + change, low), high),
            rule=rule,
            best=torch.where(better.view(-1, 1, 1, 1), z.detach(), state.best),
            best_loss=torch.where(better, reached.detach(), state.best_loss),
        )
        return self._counted(new), {"pixel_loss": reached.detach().mean(), "tv": prior.detach()}

    def _counted(self, state: ResidualState) -> ResidualState:
        done = state.iteration + 1
        return replace(state, iteration=done, stage="over" if done == self.pixel_steps else state.stage)


def _targets(seen: Observation, errors: Tensor) -> Tensor:
    """[b, k]: the class whose logit has the least gradient (iDLG's rule, exact for each image); a lone granted row."""
    if seen.labels is not None and len(errors) == 1:
        return seen.labels.float().cpu()
    return torch.nn.functional.one_hot(errors.argmin(1), seen.classes).float()


def _told(found: Peeled) -> dict[str, float | int | str | bool]:
    told: dict[str, float | int | str | bool] = {
        "certificate": found.features_error < CERTIFIED,
        "convolutions_solved": len(found.residuals),
        "lowest_solved": next(reversed(found.residuals), "none"),
    }
    if found.residuals:
        told["largest_residual"] = max(found.residuals.values())
    if math.isfinite(found.features_error):
        told["features_error"] = found.features_error
    if found.problem:
        told["warning"] = f"{found.problem}: shown is an image by gradient matching"
    elif not told["certificate"]:
        told["warning"] = "the recovered activations are not what the head read: shown is an image by gradient matching"
    return told


def _fine_enough(prepared: Prepared, found: Peeled, size: int) -> tuple[bool, bool]:
    """Whether the recovered activations determine the pixels of an image, and whether they say enough for a picture."""
    shapes = [prepared.graph.nodes[i].shape for i in found.values if prepared.graph.nodes[i].unit is not None]
    fine = any(COARSEST * h >= size and c * h * w >= EACH * size * size for c, h, w in shapes)
    return fine, any(c * h * w >= FEWEST * size * size for c, h, w in shapes)


@ATTACKS.register(
    paper="Frostglass; related: Zhu & Blaschko 2021 (R-GAP), Dimitrov et al. 2024 (SPEAR)", family="analytic"
)
def peel_residual(
    *,
    steps: int = 2000,
    lr: float = 0.4,
    tv: float = 1e-5,
    tv_start: float = 0.07,
    tv_coarse: float = 0.5,
    every: int = 50,
) -> PeelResidual:
    """Images out of a residual network's gradient: exact activations by linear algebra, then pixels that fit them.

    The row space of the last convolution's gradient gives what it read: overlapping patches leave one factor an image,
    and the ReLU's zeros tell images apart. Every layer below is a linear least-squares problem for as long as its
    gradient has as many equations as unknowns. The batch may have as many images as their places there fit into the
    channels: 32 in a ResNet-18 for CIFAR (16 places, 512 channels), one in a ResNet-20. It works on trained networks
    and on images that the network is sure of, where gradient matching fails, and in train mode if the batch's BatchNorm
    statistics are granted. Where it does not reach activations fine enough, gradient matching (`thaw`) takes over and
    the report says so.

    Args:
        steps: iterations on the pixels.
        lr: peak learning rate, reached after 20 iterations, 0 at the end.
        tv, tv_start: weight of the total variation at the end and at the start; set tv to 0 on encodings, whose
            neighbouring pixels are unrelated.
        tv_coarse: its weight throughout where the activations found are too coarse to determine all pixels, as in a
            ResNet-18 at 224 pixels.
        every: iterations between two reports.
    """
    return PeelResidual(
        "peel_residual",
        pixel_steps=steps,
        update=chain(adam(), scale(cosine(lr, warmup=20))),
        tv=tv,
        tv_start=max(tv_start, tv),
        tv_coarse=tv_coarse,
        fallback=thaw(steps=steps, every=every) if tv else thaw(steps=steps, tv=0.0, every=every),
        every=every,
    )
