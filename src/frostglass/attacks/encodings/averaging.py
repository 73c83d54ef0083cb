"""Many encodings of one image: partners average out, the image stays.

For an encoding that holds image x with coefficient l, the partners together are about normal, so that each pixel of
|x~| is a folded normal around l x + (1 - l) m, with m the mean image. The pixel of greatest likelihood over all
encodings of the group is read from a grid. Our own derivation; the mean of y^2 alone is the first step of
Huang et al. 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.attacks.encodings.given import NO_ENCODINGS, messages_of, mixing_of
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import EncodingMessage, Knows, Observation

GRID = 81
"""Values of a pixel that are tried, from -1 to 1."""
LEAST = 2
"""Encodings in a group, at the least."""


@dataclass(frozen=True)
class Averages:
    """One image for each group done so far, [r, c, h, w], the groups' mean log-likelihood a pixel, and all groups."""

    images: Tensor
    likelihood: Tensor
    groups: int


@dataclass(frozen=True)
class Averaging:
    """See `averaging`."""

    name: str
    first: float
    steps: int
    every: int = 1
    needs: frozenset[Knows] = frozenset()
    sign_free: bool = True

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        groups = messages_of(seen)
        if not groups:
            return [NO_ENCODINGS]
        if len(groups) == 1 and groups[0].rows is None and seen.examples != 1 and len(groups[0].images) > 1:
            return [
                "it needs to know which encodings are of one image, as a server that predicts on them does; give "
                "--groups FILE.npy (a number for each encoding)."
            ]
        if max(len(g.images) for g in groups) < LEAST:
            return ["no image has more than one encoding, so there is nothing to average."]
        return []

    def init(self, seen: Observation, run: Runtime) -> Averages:
        """No group is done."""
        return Averages(torch.zeros(0, *seen.image_shape), torch.zeros(0), len(messages_of(seen)))

    def step(self, seen: Observation, state: Averages, run: Runtime, t: int) -> tuple[Averages, Scalars]:
        """Group t."""
        groups = messages_of(seen)
        if not bool(groups[t].images.isfinite().all()):
            raise AttackFailed("averaging: the encodings hold values that are not finite.")
        mean, spread = torch.zeros(seen.image_shape), 0.5
        if seen.auxiliary is not None and len(seen.auxiliary) > 1:  # one image has no spread, and is no mean
            others = 2 * seen.auxiliary.float() - 1
            mean, spread = others.mean(0), float(others.std(0).mean())
        image, likelihood = likeliest(groups[t].images.float(), self._shares(seen, groups[t]), mean, spread)
        likelihoods = torch.cat([state.likelihood, likelihood[None]])
        new = Averages(torch.cat([state.images, image[None]]), likelihoods, state.groups)
        return new, {"groups": t + 1, "log_likelihood": float(likelihood)}

    def _shares(self, seen: Observation, group: EncodingMessage) -> Tensor:
        """[n] coefficient of the common image: the label's at the class that all labels share, else its mean."""
        n = len(group.images)
        if group.targets is not None:
            common = (group.targets > 0).all(0)
            if int(common.sum()) == 1:
                return group.targets[:, common][:, 0].float()
        mixing = mixing_of(seen)
        return torch.full((n,), self.first if mixing is None else max(self.first, 1 / mixing.law.k))

    def done(self, state: Averages) -> bool:
        """All groups are done."""
        return len(state.images) >= state.groups

    def read(self, seen: Observation, state: Averages) -> Reconstruction:
        """An image for each group."""
        sizes = [len(g.images) for g in messages_of(seen)]
        mean = float(state.likelihood.mean()) if len(state.likelihood) else float("nan")
        return Reconstruction(
            state.images,
            torch.zeros(len(state.images), dtype=torch.bool),
            -mean,
            info={"groups": len(sizes), "encodings_in_a_group_least": min(sizes), "most": max(sizes)},
        )


def likeliest(
    y: Float[Tensor, "n c h w"], share: Float[Tensor, " n"], mean: Float[Tensor, "c h w"], spread: float
) -> tuple[Float[Tensor, "c h w"], Float[Tensor, ""]]:
    """(the image of greatest likelihood, mean log-likelihood a pixel).

    Args:
        y: encodings of one image, sign-masked or not.
        share: its coefficient in each.
        mean: of the partners, in [-1, 1].
        spread: standard deviation of a partner's pixel.
    """
    size, d = y.abs().flatten(1), mean.numel()
    # a partner's share is about half of what is left: two or three partners of unlike weight
    s = (spread * (1 - share) * 0.7).clamp_min(0.02)[:, None]
    rest = (1 - share)[:, None] * mean.flatten()[None]
    best = torch.full((d,), -torch.inf)
    pixel = torch.zeros(d)
    for value in torch.linspace(-1, 1, GRID).tolist():
        m = share[:, None] * value + rest
        v = size * m.abs() / s**2
        log = (-(size**2 + m**2) / (2 * s**2) + v + torch.log1p(torch.exp(-2 * v)) - s.log()).mean(0)
        better = log > best
        best, pixel = torch.where(better, log, best), torch.where(better, torch.full_like(pixel, value), pixel)
    return pixel.view_as(mean), best.mean()


@ATTACKS.register(paper="Huang et al. 2020, ICML (averaging); grid likelihood is ours", family="encodings",
                  reads="encodings")  # fmt: skip
def averaging(*, first: float = 0.35, groups: int = 10_000) -> Averaging:
    """Averages many encodings of one image: what a server that predicts on encodings, or a group of them, gives away.

    Args:
        first: coefficient of the common image where no label says it.
        groups: of encodings, at the most; one step each.
    """
    if not 0 < first < 1 or groups < 1:
        raise BadInput(f"averaging: first = {first} must be between 0 and 1, and groups = {groups} from 1.")
    return Averaging("averaging", first, groups)
