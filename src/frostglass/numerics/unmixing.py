"""Unmixing: private images from their InstaHide encodings and labels, without a network and without other images.

    similarity of encodings -> groups within each class -> first assignment -> rounds of
        images from assignment (`phase_retrieval.fold_em`), assignment from images (`best_slots`)

until hardly anything changes. `unmix` runs it through; `unmix_start`, `unmix_round` and `unmix_read` are the same in
steps, with a state of plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.phase_retrieval import FoldEM, fold_em, mean_log_likelihood
from frostglass.numerics.unmixing_assignment import OPEN_MASS, Slots, best_slots, first_slots, groups_of, match
from frostglass.numerics.unmixing_clusters import classes_of_images, cluster_within_labels, images_per_class
from frostglass.numerics.unmixing_similarity import similarity as similarity_of
from frostglass.numerics.unmixing_weights import LabelKind, fit_shares, same_contrast

_RESTLESS = 0.1  # share of slots that changed
_SETTLED = 0.005
_CONTINUED = FoldEM(steps=6, prior=1.0, decay=0.6, align=(0,), restarts=2)


@dataclass(frozen=True)
class Unmixed:
    """What unmixing found.

    Args:
        images: [P, C, H, W] in [-1, 1], up to one sign for the whole set; numbered class by class.
        pairs: [E, slots] image in each private slot of each encoding, -1 for none.
        weights: [E, P] private coefficients.
        log_likelihood: of all encodings, mean per pixel; ranks starts.
        history: per round what happened, as plain numbers.
    """

    images: Float[Tensor, "p c h w"]
    pairs: Int64[Tensor, "e s"]
    weights: Float[Tensor, "e p"]
    log_likelihood: float
    history: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class UnmixState:
    """All that the next round needs, as plain tensors and numbers; may be saved and loaded.

    Args:
        pairs, shares: [E, S] image and coefficient of each private slot.
        images: [P, C, H, W] current images (zeros before the first round).
        noise: [E] variance of each encoding's public part.
        log_likelihood: mean per pixel of the last round; -inf before the first.
        round: rounds done.
        settled: whether the last round changed hardly any assignment (at most 1 in 200).
        history: per round.
    """

    pairs: Int64[Tensor, "e s"]
    shares: Float[Tensor, "e s"]
    images: Float[Tensor, "p c h w"]
    noise: Float[Tensor, " e"]
    log_likelihood: float = -float("inf")
    round: int = 0
    settled: bool = False
    history: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class UnmixProblem:
    """The attacker's view, checked: absolute values, label mass, images of a class, slots a row, kind of label, c1."""

    y: Float[Tensor, "e c h w"]
    mass: Float[Tensor, "e k"]
    per_class: Int64[Tensor, " k"]
    private: int
    kind: LabelKind = "exact"
    most: float = 0.65

    @property
    def class_of(self) -> Int64[Tensor, " p"]:
        """[P] class of each image."""
        return classes_of_images(self.per_class)

    @property
    def open(self) -> bool:
        """Whether the label leaves slots of which it says nothing."""
        return self.kind in ("one_hot", "none")


def problem(
    encodings: Tensor,
    mass: Tensor | None,
    per_class: Tensor | None,
    *,
    private: int,
    images: int,
    kind: LabelKind = "exact",
    most: float = 0.65,
) -> UnmixProblem:
    """The attacker's view.

    Args:
        encodings: [E, C, H, W], sign-masked or absolute values.
        mass: [E, K] label rows; None for none, which makes all images one class.
        per_class: [K] private images of each class; None to estimate them from the label mass.
        private: private images in one encoding.
        images: private images in all.
        kind: what label rows tell.
        most: no coefficient exceeds it (c1 of the encoder).

    Raises:
        BadInput: shapes that do not fit, values that are not finite, fewer encodings than images, or labels of no mass.
    """
    if encodings.ndim != 4 or not len(encodings):
        raise BadInput(f"encodings: shape {tuple(encodings.shape)} must be [encodings, channels, height, width].")
    if not bool(encodings.isfinite().all()):
        raise BadInput("encodings: some values are not finite; give pixels in [-1, 1].")
    if not bool(encodings.any()):
        raise BadInput("encodings: every value is 0; there is nothing in them.")
    if images < 1 or private < 1 or private > images:
        raise BadInput(f"private, images: {private} private images a row of {images} is not possible.")
    if len(encodings) < images:
        raise BadInput(f"encodings: {len(encodings)} are fewer than the {images} images; give more rounds.")
    if mass is None:
        mass, per_class, kind = encodings.new_ones(len(encodings), 1), None, "none"
    if mass.ndim != 2 or len(mass) != len(encodings):
        raise BadInput(f"mass: shape {tuple(mass.shape)} must be [{len(encodings)}, classes].")
    if not bool((mass >= 0).all()) or not bool((mass.sum(1) > 0).all()):
        raise BadInput("mass: every label row must be non-negative with a sum above 0.")
    if per_class is None:
        named = int((mass > 0).any(0).sum())
        if named > images:
            raise BadInput(f"images: labels name {named} classes, more than the {images} private images; correct it.")
        per_class = images_per_class(mass, images)
    if len(per_class) != mass.shape[1] or int(per_class.sum()) != images:
        raise BadInput(f"per_class: {per_class.tolist()} must hold {mass.shape[1]} counts with sum {images}.")
    if bool(((mass > 0).any(0) & (per_class == 0)).any()):
        raise BadInput("per_class: a class with 0 images occurs in the labels; correct the counts or leave them out.")
    mass, per_class = mass.to(encodings.device).float(), per_class.to(encodings.device).long()
    if kind in ("one_hot", "none"):  # of the coefficient they tell nothing
        mass = (mass == mass.max(1, keepdim=True).values).float() * OPEN_MASS
    return UnmixProblem(encodings.float().abs(), mass, per_class, private, kind, most)


def unmix_start(
    given: UnmixProblem, rng: Rng, *, similarity: Float[Tensor, "e e"] | None = None, restarts: int = 20
) -> UnmixState:
    """State before the first round: groups by similarity (computed unless given), first assignment."""
    s = similarity_of(given.y) if similarity is None else similarity.clone()
    affinity = cluster_within_labels(s, given.mass, given.per_class, rng, restarts)
    slots = first_slots(affinity, given.mass, given.class_of, given.private, given.open)
    blank = given.y.new_zeros(int(given.per_class.sum()), *given.y.shape[1:])
    noise = (given.y.square().mean() / 2).expand(len(given.y)).clone()
    return UnmixState(slots.image, slots.weight, blank, noise)


def unmix_round(given: UnmixProblem, state: UnmixState, how: FoldEM | None = None) -> UnmixState:
    """Images from the current assignment, then the likeliest assignment given the images."""
    count = int(given.per_class.sum())
    held = Slots(state.pairs, state.shares)
    design = held.design(count)
    restless = not state.history or state.history[-1]["changed"] > _RESTLESS
    if restless:  # a start from wrong images would keep their errors
        x, noise = fold_em(given.y, design, how=how)
    else:
        x, noise = fold_em(given.y, design, state.images, state.noise, how or _CONTINUED)
    value = mean_log_likelihood(given.y, design, x, noise)
    x = x.clamp(-1, 1)
    present = (given.mass > 0) if given.kind != "none" else torch.zeros_like(given.mass, dtype=torch.bool)
    groups = groups_of(present, given.class_of, given.private, given.open)
    slots, _ = best_slots(match(given.y, x), given.mass, groups, held)
    slots = fit_shares(given.y, x, noise, slots, given.mass, given.class_of, given.kind, given.most)
    x, slots = same_contrast(x, slots, given.kind)
    changed = float((slots.image.sort(1).values != state.pairs.sort(1).values).float().mean())
    told = {"round": float(state.round), "log_likelihood": value, "changed": changed}
    return UnmixState(
        slots.image,
        slots.weight,
        x,
        noise,
        told["log_likelihood"],
        state.round + 1,
        changed <= _SETTLED,
        (*state.history, told),
    )


def unmix_read(state: UnmixState) -> Unmixed:
    """What has been found so far."""
    weights = Slots(state.pairs, state.shares).design(len(state.images))
    return Unmixed(state.images, state.pairs, weights, state.log_likelihood, state.history)


def unmix(
    encodings: Tensor,
    mass: Tensor | None,
    per_class: Tensor | None,
    *,
    private: int,
    images: int,
    rng: Rng,
    starts: int = 1,
    rounds: int = 8,
    similarity: Tensor | None = None,
    kind: LabelKind = "exact",
    most: float = 0.65,
    on_round: Callable[[UnmixState], None] | None = None,
) -> Unmixed:
    """Private images from encodings: the likeliest result of `starts` starts of at most `rounds` rounds.

    Args:
        encodings: in [-1, 1], sign-masked or absolute values.
        mass: label rows: coefficients by class (None: no labels).
        per_class: private images of each class (None: estimated from the labels).
        private: private images in one encoding.
        images: private images in all.
        kind: what label rows tell: coefficients exactly, in quarters, their ratios, one class, or nothing.
        rng: of the k-means starts.
        similarity: [E, E], where a better one than `similarity` is at hand.
        most: no coefficient exceeds it (c1 of the encoder).
        on_round: called after each round.

    Raises:
        BadInput: as in `problem`.
    """
    given = problem(encodings, mass, per_class, private=private, images=images, kind=kind, most=most)
    best: UnmixState | None = None
    for start in range(max(starts, 1)):
        state = unmix_start(given, rng.at("start", start), similarity=similarity)
        while state.round < rounds and not state.settled:
            state = unmix_round(given, state)
            if on_round is not None:
                on_round(state)
        if best is None or state.log_likelihood > best.log_likelihood:
            best = state
    assert best is not None
    return unmix_read(replace(best, images=best.images.clamp(-1, 1)))
