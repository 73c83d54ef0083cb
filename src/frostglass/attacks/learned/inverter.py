"""Learning to invert: a network from update to images, trained through the very defence that it shall undo."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.inversion.target import refuse_broken_values, update_problems
from frostglass.attacks.learned.rehearsal import Rehearsal, problems_of, rehearsal_of
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics.assign import assign

PIECE = 50
"""Rehearsals in one step."""
BATCH = 32
"""Rehearsals in one gradient step of the inverter."""


@dataclass(frozen=True)
class InverterState:
    """What has been rehearsed and learned.

    Args:
        features: [r, d]; rows of rehearsals to come are 0.
        images: [r, b, c, h, w] in [0, 1], likewise.
        weights: of the inverter, by name.
        first, second: Adam's moments, by name.
        loss: of the last step: mean squared error of a pixel.
    """

    features: Tensor
    images: Tensor
    weights: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    loss: float


@dataclass(frozen=True)
class LearnedInverter:
    """See `learned_inverter`."""

    name: str
    rehearsals: int
    training: int
    hidden: int
    lr: float
    every: int
    needs: frozenset[Knows] = frozenset({Knows.EXAMPLES, Knows.AUXILIARY})

    _held: weakref.WeakKeyDictionary[Observation, tuple[torch.device, Rehearsal]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False, compare=False
    )

    @property
    def rehearsing(self) -> int:
        """Steps before the training."""
        return -(-self.rehearsals // PIECE)

    @property
    def steps(self) -> int:
        """Rehearsing and training."""
        return self.rehearsing + self.training

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        return [*update_problems(seen), *problems_of(seen)]

    def init(self, seen: Observation, run: Runtime) -> InverterState:
        """An inverter that knows nothing."""
        refuse_broken_values(seen)
        stage = self._rehearsal(seen, run)
        shape = (self.rehearsals, stage.examples, *seen.image_shape)
        widths = [stage.width, self.hidden, self.hidden, math.prod(shape[1:])]
        weights: dict[str, Tensor] = {}
        like = torch.zeros((), dtype=run.dtype, device=run.device)
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            spread = math.sqrt((2 if i < 2 else 0.1) / inputs)
            weights[f"weight{i}"] = spread * run.rng.at("inverter", i).normal((outputs, inputs), like=like)
            weights[f"bias{i}"] = like.new_zeros(outputs)
        nothing = {n: torch.zeros_like(w) for n, w in weights.items()}
        return InverterState(
            features=like.new_zeros(self.rehearsals, stage.width),
            images=like.new_zeros(shape),
            weights=weights,
            first=nothing,
            second={n: w.clone() for n, w in nothing.items()},
            loss=float("inf"),
        )

    def step(self, seen: Observation, state: InverterState, run: Runtime, t: int) -> tuple[InverterState, Scalars]:
        """A piece of the rehearsals, or one step of Adam on a batch of them."""
        if t < self.rehearsing:
            return self._rehearsed(seen, state, run, t), {"rehearsals": min(self.rehearsals, (t + 1) * PIECE)}
        new = self._trained(state, run.rng.at("batch", t), t - self.rehearsing)
        return new, {"mse": new.loss}

    def done(self, state: InverterState) -> bool:
        """The schedule ends it."""
        return False

    def read(self, seen: Observation, state: InverterState) -> Reconstruction:
        """What the inverter makes of the observed update."""
        _, stage = self._held[seen]
        weights = {n: w.cpu() for n, w in state.weights.items()}
        observed = {n: g.to(state.features.device, state.features.dtype) for n, g in seen.gradients.items()}
        with torch.no_grad():
            out = inverted(weights, _standardised(stage.features(observed)[None], state.features).cpu())
        low, high = seen.domain.low, seen.domain.high
        images = low + (high - low) * out.view(stage.examples, *seen.image_shape)
        return Reconstruction(
            images=seen.domain.clamp(images).float(),
            proved=torch.zeros(len(images), dtype=torch.bool),
            objective=state.loss if math.isfinite(state.loss) else float("nan"),
            targets=None if stage.targets is None else stage.targets.float().cpu(),
            info={"rehearsals": self.rehearsals, "through": stage.defence.name},
        )

    def _rehearsal(self, seen: Observation, run: Runtime) -> Rehearsal:
        held = self._held.get(seen)
        if held is None or held[0] != run.device:
            held = (run.device, rehearsal_of(seen, run))
            self._held[seen] = held
        return held[1]

    def _rehearsed(self, seen: Observation, state: InverterState, run: Runtime, t: int) -> InverterState:
        stage = self._rehearsal(seen, run)
        features, images = state.features.clone(), state.images.clone()
        for j in range(t * PIECE, min(self.rehearsals, (t + 1) * PIECE)):
            features[j], images[j] = stage.pair(run.rng.at("rehearsal", j))
        return replace(state, features=features, images=images)

    def _trained(self, state: InverterState, rng: Rng, k: int) -> InverterState:
        rows = rng.integers(len(state.features), (BATCH,)).to(state.features.device)
        weights = {n: w.detach().requires_grad_(True) for n, w in state.weights.items()}
        with torch.enable_grad():
            out = inverted(weights, _standardised(state.features[rows], state.features))
            loss = (out - in_order(out.detach(), state.images[rows])).square().mean()
        slopes = torch.autograd.grad(loss, list(weights.values()))
        rate = self.lr * 0.5 * (1 + math.cos(math.pi * k / self.training))
        first, second, moved = {}, {}, {}
        for (n, w), g in zip(state.weights.items(), slopes, strict=True):
            first[n] = 0.9 * state.first[n] + 0.1 * g
            second[n] = 0.999 * state.second[n] + 0.001 * g.square()
            step = (first[n] / (1 - 0.9 ** (k + 1))) / ((second[n] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
            moved[n] = w - rate * step
        return replace(state, weights=moved, first=first, second=second, loss=float(loss.detach()))


def _standardised(features: Float[Tensor, "n d"], rehearsed: Float[Tensor, "r d"]) -> Float[Tensor, "n d"]:
    """By mean and spread over the rehearsals: entries of different layers differ by orders of magnitude.

    Rehearsals that are all alike (a single one, say) have no spread, and nothing to scale by.
    """
    spread, mean = torch.std_mean(rehearsed, dim=0, correction=0)
    scale = spread + 0.01 * spread.mean()
    return (features - mean) / torch.where(scale > 0, scale, 1)


def inverted(weights: Mapping[str, Tensor], features: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
    """All pixels of all images of each message, in (0, 1)."""
    x = features
    for i in range(3):
        x = x @ weights[f"weight{i}"].T + weights[f"bias{i}"]
        x = torch.relu(x) if i < 2 else torch.sigmoid(x)
    return x


def in_order(found: Float[Tensor, "n p"], truth: Float[Tensor, "n b c h w"]) -> Float[Tensor, "n p"]:
    """True images in the order that suits what was found best: an update does not say which image came first."""
    if truth.shape[1] == 1:
        return truth.flatten(1)
    drawn = found.view_as(truth)
    rows = [t[assign(t.cpu(), f.cpu()).to(t.device)] for f, t in zip(drawn, truth, strict=True)]
    return torch.stack(rows).flatten(1)


@ATTACKS.register(paper="Wu et al. 2023, UAI (Learning to Invert)", family="learned")
def learned_inverter(
    *, rehearsals: int = 1000, training: int = 600, hidden: int = 512, lr: float = 1e-3, every: int = 50
) -> LearnedInverter:
    """A small network from update to images, trained on auxiliary images sent through the user's own defence.

    The adaptive attack for whatever has no better one: it needs no derivative of the defence. Where the defence is not
    granted it rehearses without one.

    Args:
        rehearsals: updates that the attacker computes on images of its own.
        training: steps of Adam on batches of 32 of them.
        hidden: width of the two hidden layers.
        lr: peak learning rate.
        every: steps between two reports.
    """
    wrong = [n for n, v in (("rehearsals", rehearsals), ("training", training), ("hidden", hidden)) if v < 1]
    if wrong or lr <= 0:
        raise BadInput(
            [f"attack.{n}: must be a whole number from 1." for n in wrong] or ["attack.lr: must be above 0."]
        )
    return LearnedInverter("learned_inverter", rehearsals, training, hidden, lr, every)
