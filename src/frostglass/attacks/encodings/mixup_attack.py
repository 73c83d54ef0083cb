"""Which public images an encoding holds, by inner products with the pool; what is left is private.

Without a mask the inner product of an encoding with a public image that it holds is about lambda d, and about sqrt(d)
otherwise (Huang et al. 2020, sec. 4). Natural images agree in their smooth parts, so spatial differences are compared,
greedily, and refitted together (orthogonal matching pursuit). Under a sign mask blocks of the difference image keep
their sign, and the sum over blocks of the absolute inner product takes its place: then the partners can be named, but
not subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from frostglass.attacks.encodings.given import NO_ENCODINGS, Mixing, encodings_of, messages_of, mixing_of, targets_of
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.numerics.unmixing_similarity import differences, similarity

BLOCK = 4096
"""Rows of encodings and of the pool that are compared at a time."""
LEAST = 32
"""Public images that chance is judged from, at the least."""
MARGIN = 1.5
"""Standard deviations above the greatest of that many chance matches at which one counts as found."""


@dataclass(frozen=True)
class Partners:
    """Public partners found so far.

    Args:
        rows: [e, slots] of the pool, -1 where none was found (yet).
        weights: [e, slots] their coefficients, 0 under a sign mask.
        score: [e, slots] standard deviations above chance.
    """

    rows: Tensor
    weights: Tensor
    score: Tensor


@dataclass(frozen=True)
class MixupAttack:
    """See `mixup_attack`."""

    name: str
    shown: int
    steps: int
    every: int = 1
    needs: frozenset[Knows] = frozenset({Knows.DEFENCE})

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        if not messages_of(seen):
            return [NO_ENCODINGS]
        mixing = mixing_of(seen)
        if mixing is None or mixing.public is None:
            return ["it compares with the public pool, and none was given; give --public POOL."]
        if mixing.law.private == mixing.law.k:
            return ["the encodings hold no public images (private = k)."]
        if tuple(mixing.public.shape[1:]) != seen.image_shape:
            pool = tuple(mixing.public.shape[1:])
            return [f"images of the pool are {pool}, encodings {seen.image_shape}; cut a pool of the same size."]
        if len(mixing.public) < LEAST:
            return [
                f"a pool of {len(mixing.public)} images is too small to tell a match from chance; it takes {LEAST}."
            ]
        if mixing.law.k - mixing.law.private > self.steps:
            return [
                f"{mixing.law.k - mixing.law.private} public images in one encoding are more than slots = {self.steps}."
            ]
        return []

    def init(self, seen: Observation, run: Runtime) -> Partners:
        """No partner is known."""
        size = (len(encodings_of(seen)), self._slots(seen))
        none = torch.zeros(size, device=run.device)
        return Partners(torch.full_like(none, -1, dtype=torch.long), none, none)

    def step(self, seen: Observation, state: Partners, run: Runtime, t: int) -> tuple[Partners, Scalars]:
        """The next partner of every encoding; all of them at once under a mask."""
        mixing = _pooled(seen)
        y = encodings_of(seen).to(run.device).float()
        if not bool(y.isfinite().all()):
            raise AttackFailed("mixup_attack: the encodings hold values that are not finite.")
        assert mixing.public is not None
        pool = mixing.public.to(run.device)
        new = _next(y, pool, state, t) if mixing.mask == "none" else _masked(y, pool, state)
        return new, {"partners_found": float((new.rows >= 0).sum())}

    def done(self, state: Partners) -> bool:
        """Every slot has been looked for."""
        return bool((state.score[:, -1] != 0).all())

    def warnings(self, seen: Observation) -> list[str]:
        """What makes the result mislead."""
        mixing = mixing_of(seen)
        if mixing is None or mixing.mask == "none":
            return []
        return ["A mask hides the signs: partners were looked for by blocks and cannot be subtracted, so no image is "
                "shown. `unmix_statistical` recovers the private ones without them."]  # fmt: skip

    def read(self, seen: Observation, state: Partners) -> Reconstruction:
        """Private remainders, those first in which one image outweighs the others."""
        mixing = _pooled(seen)
        found = state.rows >= 0
        complete = found.all(1)
        info: dict[str, float | int | str | bool] = {
            "public_partners": int(state.rows.numel()), "found": int(found.sum()), "complete": int(complete.sum()),
        }  # fmt: skip
        images = torch.zeros(0, *seen.image_shape)
        if mixing.mask == "none" and bool(complete.any()):
            assert mixing.public is not None
            here = Partners(state.rows.cpu(), state.weights.cpu(), state.score.cpu())
            y = encodings_of(seen).float()
            images = _remainders(y, mixing.public, here, complete.cpu(), targets_of(seen))
            images = images[: self.shown]
        return Reconstruction(
            seen.domain.clamp(images), torch.zeros(len(images), dtype=torch.bool), float("nan"), info=info
        )

    def _slots(self, seen: Observation) -> int:
        law = _pooled(seen).law
        return law.k - law.private


def _pooled(seen: Observation) -> Mixing:
    mixing = mixing_of(seen)
    if mixing is None or mixing.public is None:
        raise BadInput("mixup_attack: give the public pool.")
    return mixing


def _next(y: Tensor, pool: Tensor, state: Partners, slot: int) -> Partners:
    """The pool image whose edges agree best with what the partners found so far leave of each encoding."""
    edges = differences(y).flatten(1)
    rest = edges - _explained(differences(pool.float()).flatten(1), state)
    best, row = _best(rest, pool, state.rows)
    new = _with(state, slot, row, best)
    return _refitted(edges, differences(pool.float()).flatten(1), new)


def _best(rest: Tensor, pool: Tensor, taken: Int[Tensor, "e s"]) -> tuple[Tensor, Tensor]:
    """([e] score above chance of the best pool image, [e] its row, -1 if chance explains it)."""
    e = len(rest)
    top, where = rest.new_full((e,), -torch.inf), taken.new_full((e,), -1)
    middle, spread, blocks = rest.new_zeros(e), rest.new_zeros(e), 0
    unit = torch.nn.functional.normalize(rest, dim=1)
    for start, held in _parts(pool):
        part = torch.nn.functional.normalize(differences(held.float()).flatten(1), dim=1)
        c = unit @ part.T
        m, s = _chance(c)
        middle, spread, blocks = middle + m, spread + s, blocks + 1
        inside = (taken >= start) & (taken < start + len(part))
        rows, slots = inside.nonzero(as_tuple=True)
        c[rows, taken[rows, slots] - start] = -torch.inf
        value, at = c.max(1)
        better = value > top
        top, where = torch.where(better, value, top), torch.where(better, at + start, where)
    return _judged(top, where, middle / blocks, spread / blocks, len(pool))


def _parts(pool: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of parts of even size: chance is judged in each, and a few rows left over would not tell it."""
    start = 0
    for part in pool.tensor_split(-(-len(pool) // BLOCK)):
        yield start, part
        start += len(part)


def _chance(c: Float[Tensor, "e m"]) -> tuple[Tensor, Tensor]:
    """Middle and standard deviation of the matches of each row, robust to the few that are no chance (MAD)."""
    middle = c.median(1).values
    return middle, 1.4826 * (c - middle[:, None]).abs().median(1).values


def _judged(top: Tensor, where: Tensor, middle: Tensor, spread: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    score = (top - middle) / spread.clamp_min(1e-9)
    chance = math.sqrt(2 * math.log(max(2, pool * len(top)))) + MARGIN
    return score, torch.where(score > chance, where, torch.full_like(where, -1))


def _with(state: Partners, slot: int, row: Tensor, score: Tensor) -> Partners:
    rows, scores = state.rows.clone(), state.score.clone()
    rows[:, slot], scores[:, slot] = row, torch.where(score == 0, torch.full_like(score, 1e-9), score)
    return Partners(rows, state.weights, scores)


def _explained(edges: Float[Tensor, "m f"], state: Partners) -> Float[Tensor, "e f"]:
    made = edges.new_zeros(len(state.rows), edges.shape[1])
    for s in range(state.rows.shape[1]):
        made += state.weights[:, s, None] * edges[state.rows[:, s].clamp_min(0)]
    return made


def _refitted(y: Float[Tensor, "e f"], edges: Float[Tensor, "m f"], state: Partners) -> Partners:
    """Coefficients of all partners found so far, by least squares in the edges, at least 0."""
    chosen = (state.rows >= 0).float()
    weights = torch.zeros_like(state.weights)
    for start in range(0, len(y), BLOCK // 8):
        part = slice(start, start + BLOCK // 8)
        x = edges[state.rows[part].clamp_min(0)] * chosen[part, :, None]
        gram = x @ x.transpose(1, 2) + 1e-6 * torch.eye(x.shape[1], device=x.device)
        weights[part] = torch.linalg.solve(gram, (x @ y[part, :, None]))[..., 0] * chosen[part]
    return Partners(state.rows, weights.clamp_min(0), state.score)


def _masked(y: Tensor, pool: Tensor, state: Partners) -> Partners:
    """The best pool images of each encoding by blocks, those above chance."""
    slots = state.rows.shape[1]
    e = len(y)
    top, where = y.new_full((e, slots), -torch.inf), state.rows.new_full((e, slots), -1)
    middle, spread, blocks = y.new_zeros(e), y.new_zeros(e), 0
    for start, held in _parts(pool):
        c = similarity(y, (held.float() + 1) / 2)
        m, s = _chance(c)
        middle, spread, blocks = middle + m, spread + s, blocks + 1
        both = torch.cat([top, c], 1)
        at = torch.cat([where, torch.arange(start, start + c.shape[1], device=c.device).expand(e, -1)], 1)
        top, order = both.topk(slots, dim=1)
        where = at.gather(1, order)
    judged = [_judged(top[:, s], where[:, s], middle / blocks, spread / blocks, len(pool)) for s in range(slots)]
    scores = torch.stack([j[0] for j in judged], 1)
    return Partners(torch.stack([j[1] for j in judged], 1), state.weights, torch.where(scores == 0, 1e-9, scores))


def _remainders(y: Tensor, pool: Tensor, state: Partners, complete: Tensor, targets: Tensor | None) -> Tensor:
    """(y - sum of public parts) / private share of the encodings whose partners are all known, clearest first."""
    rows, weights = state.rows[complete], state.weights[complete]
    left = y[complete].clone()
    for s in range(rows.shape[1]):
        left -= weights[:, s, None, None, None] * pool[rows[:, s]].float()
    share = 1 - weights.sum(1)
    if targets is not None:
        mass = targets[complete].sum(1)
        share = torch.where((mass > 0) & (mass < 0.999), mass, share)
        order = (targets[complete].amax(1) / mass.clamp_min(1e-6)).argsort(descending=True, stable=True)
    else:
        order = share.argsort(descending=True, stable=True)
    return (left / share.clamp_min(0.05)[:, None, None, None])[order]


@ATTACKS.register(paper="Huang et al. 2020, ICML, sec. 4 (attack on Mixup)", family="encodings", reads="encodings")
def mixup_attack(*, shown: int = 1000, slots: int = 8) -> MixupAttack:
    """Finds the public images in each encoding by inner products with the pool, and subtracts them where no mask is.

    Args:
        shown: private remainders shown at the most.
        slots: public images in one encoding, at the most.
    """
    if shown < 1 or slots < 1:
        raise BadInput(f"mixup_attack: shown {shown} and slots {slots} must be from 1.")
    return MixupAttack("mixup_attack", shown, slots)
