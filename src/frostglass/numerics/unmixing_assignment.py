"""Which private images an encoding holds, and how much of each: the best match that its label allows.

A row's label names classes and, in exact labels, the coefficient at each. Where a class names one slot the coefficient
is read off; where it names several (two images of one class) the split is searched on a grid. A choice m = sum w_s x_s
is scored like a pair of encodings in `unmixing_similarity`, by differences g and blocks B of one unknown sign:

    sum over B |<g(y), g(m)>_B| / ||g(m)||

The likelihood pixel by pixel does worse: it takes the smooth public part for independent noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from frostglass.numerics.unmixing_similarity import blocks_of, differences

OPEN_MASS = 0.2
"""Coefficient of a slot of which the label says nothing, until it is fitted."""

_SPLITS = (0.1, 0.25, 0.4)  # and their complements
_JOINT = 500  # combinations tried together; beyond it, class by class
_SWEEPS = 2
_BLOCK = 1 << 24  # elements of memory at a time


@dataclass(frozen=True)
class Slots:
    """Assignment of E encodings with S private slots: image (-1 none) and coefficient of each slot."""

    image: Int64[Tensor, "e s"]
    weight: Float[Tensor, "e s"]

    def design(self, images: int) -> Float[Tensor, "e p"]:
        """The matrix W."""
        made = self.weight.new_zeros(len(self.image), images)
        return made.scatter_add_(1, self.image.clamp_min(0), torch.where(self.image >= 0, self.weight, 0.0))


@dataclass(frozen=True)
class Part:
    """Choices for the slots that share one entry of the label.

    Args:
        images: [choices, slots].
        shares: [choices, slots] of the entry's mass.
        column: of the label row; -1 for a slot of which the label says nothing.
    """

    images: Int64[Tensor, "n s"]
    shares: Float[Tensor, "n s"]
    column: int

    def mass(self, label: Float[Tensor, "r k"]) -> Float[Tensor, " r"]:
        """What there is to share, row by row."""
        return label.new_full((len(label),), OPEN_MASS) if self.column < 0 else label[:, self.column]


@dataclass(frozen=True)
class Group:
    """One way in which encodings `rows`, whose labels name the same classes, may fill their slots."""

    rows: Int64[Tensor, " r"]
    parts: tuple[Part, ...]


def spread_slots(classes: int, slots: int) -> Iterator[tuple[int, ...]]:
    """All ways to give each of `classes` at least one of `slots`; one each if there are not enough."""
    spare = max(slots - classes, 0)
    for extra in itertools.combinations_with_replacement(range(classes), spare):
        yield tuple(1 + extra.count(i) for i in range(classes))


def _part(members: list[int], count: int, column: int, device: torch.device) -> Part:
    """`count` slots that hold images of one class."""
    picks = list(itertools.combinations(members, min(count, len(members))))
    shares = _shares(min(count, len(members)))
    images = torch.tensor([p for p in picks for _ in shares], device=device)
    return Part(images, torch.tensor([s for _ in picks for s in shares], device=device), column)


def _shares(count: int) -> list[tuple[float, ...]]:
    if count == 1:
        return [(1.0,)]
    if count == 2:
        return [(0.5, 0.5), *((a, 1 - a) for a in _SPLITS), *((1 - a, a) for a in _SPLITS)]
    rank = tuple(range(1, count + 1))  # several images of one class: equal, or falling in any order
    return [tuple([1 / count] * count)] + [tuple(r / sum(rank) for r in p) for p in itertools.permutations(rank)]


def groups_of(present: Bool[Tensor, "e k"], class_of: Int64[Tensor, " p"], slots: int, open_: bool) -> list[Group]:
    """Encodings by the classes that their label names, once for each way of filling their slots.

    Args:
        present: which classes a label names.
        class_of: class of each image.
        slots: private images in one encoding.
        open_: whether slots beyond one a class may hold any image; otherwise they repeat the classes named.
    """
    images = {c: (class_of == c).nonzero().flatten().tolist() for c in class_of.unique().tolist()}
    signatures, which = present.unique(dim=0, return_inverse=True)
    made = []
    for n, signature in enumerate(signatures):
        classes = [c for c in signature.nonzero().flatten().tolist() if c in images]
        rows = (which == n).nonzero().flatten()
        if open_:
            named = [_part(images[c], 1, c, class_of.device) for c in classes[:slots]]
            free = [_part(list(range(len(class_of))), 1, -1, class_of.device) for _ in range(slots - len(named))]
            made.append(Group(rows, (*named, *free)))
            continue
        for spread in spread_slots(len(classes), slots):
            parts = tuple(_part(images[c], k, c, class_of.device) for c, k in zip(classes, spread, strict=True))
            if parts and sum(p.images.shape[1] for p in parts) <= slots:
                made.append(Group(rows, parts))
    return made


def first_slots(
    affinity: Float[Tensor, "e p"], mass: Float[Tensor, "e k"], class_of: Int64[Tensor, " p"], slots: int, open_: bool
) -> Slots:
    """Every class of a label gets its most similar image; slots left over the next most similar ones (of the same
    classes unless `open_`)."""
    allowed = (mass > 0)[:, class_of]
    a = torch.where(allowed | open_, affinity, -torch.inf)
    best, rows = torch.zeros_like(allowed), torch.arange(len(a), device=a.device)
    for c in class_of.unique().tolist():
        members = (class_of == c).nonzero().flatten()
        best[rows, members[a[:, members].argmax(1)]] = mass[:, c] > 0
    order = torch.where(best, a + 1e6, a).topk(min(slots, a.shape[1]), dim=1)
    image = torch.where(order.values.isfinite(), order.indices, -1)
    return Slots(image, shares_of(image, mass, class_of))


def shares_of(image: Int64[Tensor, "e s"], mass: Float[Tensor, "e k"], class_of: Int64[Tensor, " p"]) -> Tensor:
    """[E, S] coefficients: each class's mass in equal parts to its slots."""
    kinds = torch.where(image >= 0, class_of[image.clamp_min(0)], -1)
    same = ((kinds[:, :, None] == kinds[:, None]) & (kinds[:, :, None] >= 0)).sum(-1).clamp_min(1)
    share = mass.gather(1, kinds.clamp_min(0)) / same
    return torch.where(image >= 0, torch.where(share > 0, share, OPEN_MASS), 0.0)


@dataclass(frozen=True)
class Match:
    """Inner products from which every choice is scored.

    Args:
        cross: [E, B, P] of each encoding with each image, block by block.
        gram: [P, P] of the images.
    """

    cross: Float[Tensor, "e b p"]
    gram: Float[Tensor, "p p"]

    def score(self, rows: Tensor, design: Float[Tensor, "r n p"]) -> Float[Tensor, "r n"]:
        """Match of encodings `rows` with n choices of coefficients each."""
        held = (design @ self.cross[rows].transpose(1, 2)).abs().sum(-1)
        norm = ((design @ self.gram) * design).sum(-1).clamp_min(1e-12).sqrt()
        return held / norm


def match(y: Float[Tensor, "e c h w"], images: Float[Tensor, "p c h w"], block: int = 4) -> Match:
    """Inner products of encodings (absolute values) and images."""
    a, b = blocks_of(differences(y), block), blocks_of(differences(images), block)
    cross = torch.stack([p @ q.T for p, q in zip(a, b, strict=True)], 1)
    flat = differences(images).flatten(1)
    return Match(cross, flat @ flat.T)


def best_slots(
    found: Match, mass: Float[Tensor, "e k"], groups: list[Group], now: Slots
) -> tuple[Slots, Float[Tensor, " e"]]:
    """The assignment of best match for every encoding, and its score.

    Args:
        found: from `match`, at the current images.
        mass: label rows (coefficients by class).
        groups: from `groups_of`.
        now: current assignment, from where more than some hundred choices are searched part by part.
    """
    image, weight = now.image.clone(), now.weight.clone()
    value = torch.full((len(image),), -torch.inf, device=image.device)
    for way in groups:
        rows = way.rows
        picked, share, score = _search(found, mass[rows], way, now)
        better = score > value[rows]
        spare = (0, image.shape[1] - picked.shape[1])
        picked, share = torch.nn.functional.pad(picked, spare, value=-1), torch.nn.functional.pad(share, spare)
        chosen = rows[better]
        image[chosen], weight[chosen], value[chosen] = picked[better], share[better], score[better]
    return Slots(image, weight), value


def _search(found: Match, label: Tensor, way: Group, now: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """(images [rows, s], coefficients [rows, s], score [rows]) of the best choice of each row."""
    rows, parts = way.rows, way.parts
    mass = [p.mass(label) for p in parts]
    if math.prod(len(p.images) for p in parts) <= _JOINT:
        picks = torch.tensor(list(itertools.product(*(range(len(p.images)) for p in parts))), device=label.device)
        images = torch.cat([p.images[picks[:, i]] for i, p in enumerate(parts)], 1)
        shares = [m[:, None, None] * p.shares[picks[:, i]] for i, (p, m) in enumerate(zip(parts, mass, strict=True))]
        weight = torch.cat(shares, 2)
        best, score = _best(found, rows, images, weight, None)
        return images[best], weight[torch.arange(len(rows), device=label.device), best], score
    pick = [(p.images[None, :, :, None] == now.image[rows][:, None, None]).any(-1).sum(-1).argmax(1) for p in parts]
    score = label.new_zeros(len(rows))
    for _ in range(_SWEEPS):
        for i, part in enumerate(parts):
            base = label.new_zeros(len(rows), len(found.gram))
            for j, (p, m) in enumerate(zip(parts, mass, strict=True)):
                if j != i:
                    base.scatter_add_(1, p.images[pick[j]], m[:, None] * p.shares[pick[j]])
            pick[i], score = _best(found, rows, part.images, mass[i][:, None, None] * part.shares, base)
    images = torch.cat([p.images[q] for p, q in zip(parts, pick, strict=True)], 1)
    return images, torch.cat([m[:, None] * p.shares[q] for p, m, q in zip(parts, mass, pick, strict=True)], 1), score


def _best(found: Match, rows: Tensor, images: Tensor, weight: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """([rows] best choice, [rows] score); choices [n, s], weights [rows, n, s], base [rows, p] of the other slots."""
    n, p = len(images), len(found.gram)
    step = max(1, _BLOCK // (n * (p + found.cross.shape[1])))
    picks, scores = [], []
    for i in range(0, len(rows), step):
        w = weight[i : i + step]
        design = w.new_zeros(len(w), n, p).scatter_add_(2, images.expand(len(w), -1, -1), w)
        if base is not None:
            design = design + base[i : i + step, None]
        top = found.score(rows[i : i + step], design).max(1)
        picks.append(top.indices)
        scores.append(top.values)
    return torch.cat(picks), torch.cat(scores)
