"""How much a candidate's own update resembles the one that was observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.attacks.identification.encodings import unmixed
from frostglass.core.defense import Defense, Mechanism, Simulate, as_they_are
from frostglass.core.randomness import Rng, global_draws
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Gallery, GradientMessage, Observation
from frostglass.core.update import LocalPlan
from frostglass.numerics.called import copied
from frostglass.numerics.compress import clipped
from frostglass.numerics.local_update import local_update, trainable
from frostglass.numerics.per_sample import agrees, products, streamable

Gradients = Mapping[str, Tensor]


@runtime_checkable
class Evidence(Protocol):
    """A statistic of candidates, the greater the likelier."""

    @property
    def name(self) -> str:
        """For the report."""

    def scores(self, rows: slice, chunk: int) -> Float[Tensor, " n"]:
        """Of the candidates `rows`, in float64."""


@dataclass(frozen=True, eq=False)
class Setting:
    """The observation on the attack's device.

    Args:
        model: a copy.
        observed: gradients of the message.
        gallery: candidates and the rest of the message.
        plan: of the client.
        mechanism: the Gaussian mechanism, if the defence is granted and has one.
        simulate: what the defence does to own gradients, if it is granted.
        streams: whether inner products of single gradients can be had without the gradients.
        draws: address of what the network draws (Dropout): of each candidate its own, whatever was computed before.
    """

    model: nn.Module
    observed: Gradients
    gallery: Gallery
    plan: LocalPlan
    mechanism: Mechanism | None
    simulate: Simulate
    streams: bool
    draws: Rng

    @property
    def count(self) -> int:
        """Images in the message."""
        return 1 + len(self.gallery.other_images)

    def computed(self, images: Tensor, targets: Tensor, *place: str | int) -> Gradients:
        """What a client without a defence sends for these images, its network's draws following from `place`."""
        with global_draws(self.draws.at(*place), images.device):
            return local_update(self.model, images, targets, self.plan).gradients

    def update_of(self, images: Tensor, targets: Tensor, *place: str | int) -> dict[str, Tensor]:
        """What a client without noise sends for these images: of the parameters that were observed."""
        made = self.computed(images, targets, *place)
        return dict(self.simulate({n: made[n] for n in self.observed}, self.observed))

    def products(self, rows: slice, along: Sequence[Gradients]) -> tuple[Tensor, Tensor]:
        """(<g_i, v> for each v, ||g_i||^2) of candidates, each by itself."""
        images, targets = self.gallery.images[rows], self.gallery.targets[rows]
        if self.streams:
            with global_draws(self.draws.at("candidates", rows.start), images.device):
                return products(self.model, images, targets, along, self.plan.mode, alone=self.count == 1)
        dots = images.new_zeros(len(images), len(along), dtype=torch.float64)
        squares = dots.new_zeros(len(images))
        for i in range(len(images)):
            own = self.computed(images[i : i + 1], targets[i : i + 1], "candidate", rows.start + i)
            squares[i] = torch.stack([g.double().square().sum() for g in own.values()]).sum()
            for d, v in enumerate(along):
                dots[i, d] = torch.stack([(own[n].double() * v[n].double()).sum() for n in v]).sum()
        return dots, squares

    def likelihood(self, square: Tensor, dot: Tensor) -> Tensor:
        """Log-likelihood ratio against pure noise, up to a factor, from ||u||^2 and <u, observed>; or the cosine."""
        if self.mechanism is not None and self.mechanism.std > 0:
            return dot - square / 2
        return dot / square.clamp_min(1e-300).sqrt()

    @property
    def name(self) -> str:
        """Of the statistic."""
        noisy = self.mechanism is not None and self.mechanism.std > 0
        return "log-likelihood ratio" if noisy else "cosine"


def evidence_of(seen: Observation, run: Runtime) -> Evidence:
    """The statistic that suits what was granted."""
    assert seen.gallery is not None
    g = seen.gallery
    place, dtype = run.device, run.dtype
    model = copied(seen.model).to(place, dtype)
    weights = trainable(model)
    observed = {n: v.to(place, dtype) for n, v in seen.gradients.items() if n in weights}
    parts = {name: getattr(g, name).to(place, dtype) for name in ("images", "targets", "other_images", "other_targets")}
    moved = replace(g, **parts)
    kind = next(m.kind for m in seen.messages if isinstance(m, GradientMessage))
    plan = seen.local_plan or LocalPlan(kind="gradient" if kind == "gradient" else "delta")
    plan = replace(plan, mode="train" if seen.mode == "train" else "eval")
    known = seen.defence.mechanisms if seen.defence is not None else ()
    mechanism = known[-1] if known else None
    simulate = as_they_are if seen.defence is None else seen.defence.simulate
    per_image = mechanism is not None and mechanism.unit == "image"
    if kind != "gradient" and per_image:  # clipped at every local step: only the direction is used
        mechanism, simulate = None, as_they_are
    alone = not len(g.other_images)
    streams = set(weights) == set(observed) and streamable(model, plan.mode, alone=alone)
    draws = run.rng.at("model")
    with global_draws(draws.at("form"), place):
        streams = streams and agrees(model, moved.images[:2], moved.targets[:2], plan.mode, alone=alone)
    setting = Setting(model, observed, moved, plan, mechanism, simulate, streams, draws)
    if seen.defence is not None and seen.defence.encodes:
        found = unmixed(seen, moved, run)
        if found is not None:
            return found
    if kind == "gradient" and _inner_products_suffice(seen.defence):
        if per_image:
            return Images(setting)
        if streams:
            return Updates(setting)
    return Rehearsed(setting)


def _inner_products_suffice(defence: Defense | None) -> bool:
    """Whether nothing is done to updates but clipping and noise, once."""
    parts = () if defence is None else (defence.parts or (defence,))
    return len(parts) <= 1 and all(p.simulate is as_they_are or p.mechanism is not None for p in parts)


@dataclass(frozen=True, eq=False)
class Images:
    """Per-image clipping: the sum minus the others' clipped gradients against each candidate's clipped gradient.

    Up to the noise's variance, the log-likelihood ratio of N(u, s^2) against N(0, s^2) is <u, r> - ||u||^2 / 2.
    """

    setting: Setting

    @property
    def name(self) -> str:
        """Of the statistic."""
        return self.setting.name

    @cached_property
    def rest(self) -> Gradients:
        """The sum of clipped gradients that was observed, without those of the others."""
        s, mechanism = self.setting, self.setting.mechanism
        assert mechanism is not None
        assert mechanism.clip is not None
        # A secure sum arrives as the mean of its clients' messages.
        total = s.count if mechanism.divisor is None else mechanism.divisor * s.gallery.clients
        rest = {n: total * v for n, v in s.observed.items()}
        for i, (x, y) in enumerate(zip(s.gallery.other_images, s.gallery.other_targets, strict=True)):
            own = clipped(s.computed(x[None], y[None], "other", i), mechanism.clip)
            rest = {n: v - own[n] for n, v in rest.items()}
        return rest

    def scores(self, rows: slice, chunk: int) -> Float[Tensor, " n"]:
        """One forward and backward pass a chunk."""
        s, mechanism, rest = self.setting, self.setting.mechanism, self.rest
        assert mechanism is not None
        assert mechanism.clip is not None
        found = []
        for part in range(rows.start, rows.stop, chunk):
            r = slice(part, min(part + chunk, rows.stop))
            dots, squares = s.products(r, [rest])
            factor = (mechanism.clip / squares.sqrt().clamp_min(1e-300)).clamp(max=1.0)
            found.append(s.likelihood(factor.square() * squares, factor * dots[:, 0]))
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Updates:
    """The whole update of each candidate with the others, clipped or not: m + g / b from inner products alone."""

    setting: Setting

    @property
    def name(self) -> str:
        """Of the statistic."""
        return self.setting.name

    @cached_property
    def rest(self) -> Gradients:
        """What the others contribute to the mean."""
        s, b = self.setting, self.setting.count
        if b == 1:
            return {n: torch.zeros_like(v) for n, v in s.observed.items()}
        made = s.computed(s.gallery.other_images, s.gallery.other_targets, "others")
        return {n: made[n] * ((b - 1) / b) for n in s.observed}

    def scores(self, rows: slice, chunk: int) -> Float[Tensor, " n"]:
        """One forward and backward pass a chunk."""
        s, b, rest = self.setting, self.setting.count, self.rest
        inside = sum(float(v.double().square().sum()) for v in rest.values())
        outside = sum(float((v.double() * s.observed[n].double()).sum()) for n, v in rest.items())
        found = []
        for part in range(rows.start, rows.stop, chunk):
            r = slice(part, min(part + chunk, rows.stop))
            dots, squares = s.products(r, [s.observed, rest])
            square = inside + 2 * dots[:, 1] / b + squares / b**2
            dot = outside + dots[:, 0] / b
            if s.mechanism is not None and s.mechanism.clip is not None:
                factor = (s.mechanism.clip / square.sqrt().clamp_min(1e-300)).clamp(max=1.0)
                square, dot = factor.square() * square, factor * dot
            found.append(s.likelihood(square, dot))
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Rehearsed:
    """One simulated client a candidate, through its defence: for whatever the two above cannot do."""

    setting: Setting

    @property
    def name(self) -> str:
        """Of the statistic."""
        return self.setting.name

    def scores(self, rows: slice, chunk: int) -> Float[Tensor, " n"]:
        """One client step a candidate."""
        s = self.setting
        found = []
        for i in range(rows.start, rows.stop):
            images = torch.cat([s.gallery.images[i : i + 1], s.gallery.other_images])
            targets = torch.cat([s.gallery.targets[i : i + 1], s.gallery.other_targets])
            own = s.update_of(images, targets, "candidate", i)
            square = torch.stack([v.double().square().sum() for v in own.values()]).sum()
            dot = torch.stack([(v.double() * s.observed[n].double()).sum() for n, v in own.items()]).sum()
            found.append(s.likelihood(square, dot))
        return torch.stack(found)
