"""Unmixing of encodings: similarity, groups, phase retrieval, assignment, and the whole of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.mixing import coarse_targets
from frostglass.numerics.phase_restarts import neighbours, restart_pixels
from frostglass.numerics.phase_retrieval import (
    FoldEM,
    cosine_basis,
    fold_em,
    fold_log_likelihood,
    from_spectrum,
    least_squares,
    mean_log_likelihood,
    natural_spectrum,
    pixel_signs,
    to_spectrum,
)
from frostglass.numerics.unmixing import problem, unmix, unmix_read, unmix_round, unmix_start
from frostglass.numerics.unmixing_assignment import Slots, best_slots, first_slots, groups_of, match, spread_slots
from frostglass.numerics.unmixing_clusters import classes_of_images, cluster_within_labels, images_per_class
from frostglass.numerics.unmixing_similarity import blocks_of, differences, similarity
from frostglass.numerics.unmixing_weights import LabelKind, fit_shares, same_contrast
from frostglass.vision import datasets


def natural(count: int, rng: Rng, channels: int = 3, side: int = 16) -> Tensor:
    """Random images with the spectrum of natural ones, in [-1, 1]."""
    spectrum = natural_spectrum(channels, side, side)
    return from_spectrum(rng.normal((count, channels, side, side)) * spectrum.sqrt()).clamp(-1, 1)


def encoded(
    images: int = 6,
    rounds: int = 40,
    public: int = 1,
    classes: int = 3,
    seed: int = 0,
    photographs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Encodings of two private images each, and what they were made of."""
    rng = Rng.from_seed(seed, "unmixing test")
    x = natural(images, rng.at("private")) if photographs is None else photographs[:images]
    first = torch.arange(images).repeat(rounds)
    second = (first + 1 + rng.at("partner").integers(images - 1, (len(first),))) % images
    weight = rng.at("weights").normal((len(first), 2 + public)).abs() + 0.1
    weight = weight / weight.sum(1, keepdim=True)
    rows, e = torch.arange(len(first)), len(first)
    design = torch.zeros(e, images)
    design[rows, first], design[rows, second] = weight[:, 0], weight[:, 1]
    v = (design @ x.flatten(1)).view(e, *x.shape[1:])
    for j in range(public):
        pool = natural(e, rng.at("public", j)) if photographs is None else photographs[images:]
        v = v + weight[:, 2 + j, None, None, None] * pool[rng.at("drawn", j).integers(len(pool), (e,))]
    label = torch.arange(images) % classes
    mass = design @ torch.nn.functional.one_hot(label, classes).float()
    sign = rng.at("mask").integers(2, v.shape) * 2 - 1
    return {
        "y": v * sign,
        "x": x,
        "design": design,
        "mass": mass,
        "per_class": torch.bincount(label, minlength=classes),
        "label": label,
    }


def error(found: Tensor, truth: Tensor) -> float:
    """Mean squared error under the best matching and one sign for all."""
    cost = torch.stack([((s * found[:, None] - truth[None]) ** 2).flatten(2).mean(2) for s in (1, -1)])
    return min(float(c[linear_sum_assignment(c.numpy())].mean()) for c in cost)


# ---- similarity


def auc(s: Tensor, positive: Tensor) -> float:
    """Probability that a positive entry exceeds a negative one."""
    rank = s.argsort().argsort().double()
    n = int(positive.sum())
    return (float(rank[positive].sum()) - n * (n - 1) / 2) / (n * (len(positive) - n))


def test_similarity_does_not_see_the_mask_and_sees_shared_images() -> None:
    made = encoded(public=1)
    s = similarity(made["y"])
    assert torch.allclose(s, similarity(-made["y"].abs()))
    held = (made["design"] > 0).float()
    shared = (held @ held.T) > 0
    apart = ~torch.eye(len(s), dtype=torch.bool)
    assert auc(s[apart], shared[apart]) > 0.63


@pytest.mark.data
def test_on_photographs_similarity_beats_squared_pixels() -> None:
    root = os.environ.get("FROSTGLASS_DATA")
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("needs CIFAR-10 images: FROSTGLASS_DATA is not set to a folder that holds cifar10/")
    x = datasets.load(f"parquet:{root}/cifar10/test-00000-of-00001.parquet", size=32, limit=220).images * 2 - 1
    made = encoded(images=20, rounds=20, public=1, classes=4, photographs=x)
    held = (made["design"] > 0).float()
    shared, apart = (held @ held.T) > 0, ~torch.eye(400, dtype=torch.bool)
    square = torch.corrcoef((made["y"].square() - made["y"].square().mean(0)).flatten(1))
    ours = auc(similarity(made["y"])[apart], shared[apart])
    assert ours > 0.75
    assert ours > auc(square[apart], shared[apart]) + 0.1


def test_similarity_in_parts_is_the_whole_and_takes_any_size() -> None:
    y = Rng.from_seed(1).normal((13, 1, 10, 7))
    assert torch.allclose(similarity(y), similarity(y, rows=3), atol=1e-6)
    assert torch.allclose(similarity(y).diagonal(), torch.ones(13), atol=1e-5)
    assert torch.allclose(similarity(y), similarity(y).T, atol=1e-6)


def test_blocks_cut_an_image_without_remainder() -> None:
    x = Rng.from_seed(2).normal((2, 3, 10, 6))
    parts = blocks_of(x, 4)
    assert [p.shape[1] for p in parts] == [48, 24, 48, 24, 24, 12]
    assert torch.allclose(sum(p.square().sum() for p in parts), x.square().sum())


def test_differences_are_zero_at_the_far_edge() -> None:
    g = differences(torch.arange(6.0).view(1, 1, 2, 3))
    assert g[0, 0].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert g[0, 1].tolist() == [[3, 3, 3], [0, 0, 0]]


# ---- groups


def test_image_counts_are_read_off_the_label_mass() -> None:
    mass = torch.tensor([[0.5, 0.0, 0.0], [0.4, 0.1, 0.0], [0.9, 0.0, 0.0]])
    assert images_per_class(mass, 4).tolist() == [3, 1, 0]
    assert images_per_class(mass, 1).tolist() == [1, 0, 0]
    assert images_per_class(torch.ones(4, 2), 5).sum() == 5
    assert classes_of_images(torch.tensor([2, 0, 1])).tolist() == [0, 0, 2]


def test_clusters_find_the_images_of_a_class() -> None:
    made = encoded(images=6, rounds=40, classes=2)
    affinity = cluster_within_labels(similarity(made["y"]), made["mass"], made["per_class"], Rng.from_seed(0))
    slots = first_slots(affinity, made["mass"], classes_of_images(made["per_class"]), 2, False)
    count = torch.stack([(made["design"][(slots.image == p).any(1)] > 0).sum(0) for p in range(6)])
    _, columns = linear_sum_assignment(-count.numpy())
    named = torch.as_tensor(columns)[slots.image]
    assert float((made["design"].gather(1, named) > 0).float().mean()) > 0.85


# ---- phase retrieval


def test_the_cosine_basis_is_orthonormal_and_the_spectrum_has_unit_scale() -> None:
    basis = cosine_basis(8)
    assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-6)
    x = Rng.from_seed(3).normal((2, 3, 8, 6))
    assert torch.allclose(from_spectrum(to_spectrum(x)), x, atol=1e-5)
    assert to_spectrum(x).norm() == pytest.approx(float(x.norm()), rel=1e-5)
    spectrum = natural_spectrum(3, 8, 8)
    assert spectrum[0, 0, 0] > spectrum[0, 1, 1] > spectrum[0, 7, 7] > 0


def test_least_squares_is_the_solution_of_the_normal_equations() -> None:
    w, noise = Rng.from_seed(4).uniform((9, 2)), Rng.from_seed(5).uniform((9,)) + 0.1
    values = Rng.from_seed(6).normal((9, 1, 4, 4))
    plain = torch.linalg.solve(w.T @ (w / noise[:, None]), (w / noise[:, None]).T @ values.flatten(1))
    assert torch.allclose(least_squares(w, noise, values, 0.0).flatten(1), plain, atol=1e-4)
    assert least_squares(w, noise, values, 10.0).norm() < plain.norm()


def test_pixel_signs_are_undone_up_to_one() -> None:
    x = natural(8, Rng.from_seed(7))
    flips = (Rng.from_seed(8).integers(2, x.shape[1:]) * 2 - 1).float()
    repaired = x * flips * pixel_signs(x * flips)
    share = float((torch.sign(repaired * x).mean(0) > 0).float().mean())
    assert max(share, 1 - share) > 0.99


def test_em_finds_the_images_when_the_assignment_is_known() -> None:
    made = encoded(public=1)
    found, noise = fold_em(made["y"].abs(), made["design"])
    assert error(found, made["x"]) < 0.01
    public = 1 - made["design"].sum(1)
    assert float(torch.corrcoef(torch.stack([noise, public.square()]))[0, 1]) > 0.5


def test_em_goes_on_from_where_it_is_told_to() -> None:
    made = encoded(public=1)
    short = FoldEM(steps=1, prior=0.1, align=())
    found, _ = fold_em(made["y"].abs(), made["design"], made["x"], torch.full((len(made["y"]),), 0.02), short)
    assert error(found, made["x"]) < 0.01


def test_the_folded_normal_integrates_to_one() -> None:
    y = torch.linspace(0, 6, 6001)
    density = fold_log_likelihood(y, torch.tensor(-0.7), torch.tensor(0.5)).exp()
    assert float(torch.trapezoid(density, y)) == pytest.approx(1, abs=1e-4)


def test_pixels_in_a_wrong_maximum_are_started_again_and_no_others_change() -> None:
    made = encoded(public=1)
    x, noise = fold_em(made["y"].abs(), made["design"])
    spoilt = x.clone()
    spoilt[:, 0, 3:5, 7] = Rng.from_seed(1).normal((6, 2))
    repaired = restart_pixels(made["y"].abs(), made["design"], noise, spoilt)
    assert (spoilt - x)[:, 0, 3:5, 7].abs().mean() > 0.3
    assert (repaired - x)[:, 0, 3:5, 7].abs().mean() < 0.05
    assert float((repaired == spoilt).all(0).float().mean()) >= 0.75


def test_restarts_never_lower_the_likelihood() -> None:
    made = encoded(public=2, rounds=25)
    y, design = made["y"].abs(), made["design"]
    values = [mean_log_likelihood(y, design, *fold_em(y, design, how=FoldEM(restarts=n, gain=0.0))) for n in (0, 1, 3)]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_neighbours_are_the_pixels_around() -> None:
    x = torch.arange(18.0).view(1, 2, 3, 3)
    near = neighbours(x)
    assert near[:, 0, 0, 1, 1].tolist() == [1, 7, 3, 5, 13]
    assert near[:, 0, 0, 0, 0].tolist() == [0, 3, 0, 1, 9]


# ---- coefficients


def test_coefficients_are_fitted_to_the_images() -> None:
    made = encoded(classes=6)
    slots = Slots(made["design"].topk(2).indices, torch.full((len(made["design"]), 2), 0.2))
    y, noise, label = made["y"].abs(), (1 - made["design"].sum(1)).square() * 0.2 + 1e-3, made["label"]
    for _ in range(4):
        slots = fit_shares(y, made["x"], noise, slots, made["mass"], label, "none")
    true = made["design"].gather(1, slots.image)
    assert float((slots.weight - true).abs().mean()) < 0.5 * float((true - 0.2).abs().mean())


def test_coefficients_are_held_to_the_bound_of_the_encoder() -> None:
    made = encoded(classes=6, public=0)  # two images alone: one of them mostly has more than .65
    slots = Slots(made["design"].topk(2).indices, made["design"].topk(2).values)
    true = made["design"].gather(1, slots.image)
    given = made["y"].abs(), made["x"], torch.full((len(true),), 1e-3), slots, made["mass"], made["label"], "none"
    assert float(true.max()) > 0.85
    assert float((fit_shares(*given, 1.0).weight - true).abs().max()) < 0.05
    assert float(fit_shares(*given, 0.65).weight.max()) <= 0.65


@pytest.mark.parametrize("kind", ["exact", "quantised", "renormalised"])
def test_fitted_coefficients_keep_what_the_label_says(kind: LabelKind) -> None:
    made = encoded(classes=2, rounds=10)
    mass = made["mass"] if kind != "renormalised" else made["mass"] / made["mass"].sum(1, keepdim=True)
    mass = coarse_targets(mass, "quantised") if kind == "quantised" else mass
    slots = Slots(made["design"].topk(2).indices, torch.full((len(mass), 2), 0.2))
    noise = torch.full((len(mass),), 0.02)
    found = fit_shares(made["y"].abs(), made["x"], noise, slots, mass, made["label"], kind).design(6)
    total = found @ torch.nn.functional.one_hot(made["label"], 2).float()
    if kind == "exact":
        assert torch.allclose(total, mass, atol=1e-5)
    elif kind == "quantised":
        assert float((total - mass)[mass > 0].abs().max()) < 0.25 + 1e-5
    else:
        assert torch.allclose(total / total.sum(1, keepdim=True), mass, atol=1e-4)


def test_equal_contrast_leaves_the_encodings_alone() -> None:
    made = encoded(rounds=10)
    factor = torch.tensor([0.5, 1.0, 2.0, 1.0, 1.5, 0.7])
    slots = Slots(made["design"].topk(2).indices, made["design"].topk(2).values)
    skewed = Slots(slots.image, slots.weight / factor[slots.image])
    x, even = same_contrast(made["x"] * factor.view(-1, 1, 1, 1), skewed, "none")
    assert torch.allclose(even.design(6) @ x.flatten(1), made["design"] @ made["x"].flatten(1), atol=1e-4)
    design = even.design(6)
    mean = design.sum(0) / (design > 0).sum(0)
    assert torch.allclose(mean, mean.mean().expand(6), rtol=1e-4)
    assert same_contrast(made["x"], slots, "exact")[1] is slots


# ---- assignment


def test_slots_spread_over_the_classes_of_a_label() -> None:
    assert list(spread_slots(2, 2)) == [(1, 1)]
    assert list(spread_slots(1, 2)) == [(2,)]
    assert sorted(spread_slots(2, 3)) == [(1, 2), (2, 1)]


@pytest.mark.parametrize("classes", [1, 2, 6])
def test_true_images_give_the_true_assignment(classes: int) -> None:
    made = encoded(classes=classes, rounds=20)
    order = made["label"].argsort(stable=True)  # images are numbered class by class
    x, design = made["x"][order], made["design"][:, order]
    class_of = classes_of_images(made["per_class"])
    now = Slots(torch.zeros(len(design), 2, dtype=torch.long), torch.zeros(len(design), 2))
    groups = groups_of(made["mass"] > 0, class_of, 2, False)
    slots, score = best_slots(match(made["y"].abs(), x), made["mass"], groups, now)
    assert float((design.gather(1, slots.image) > 0).float().mean()) > 0.9
    assert bool(score.isfinite().all())
    assert torch.allclose(slots.design(6).sum(1), made["mass"].sum(1), atol=1e-5)
    if classes == 6:
        assert torch.allclose(slots.design(6), design, atol=1e-5)


def test_many_slots_are_searched_class_by_class() -> None:
    rng = Rng.from_seed(9)
    x = natural(24, rng.at("x"))
    picks = torch.stack([rng.at("pick", e).permutation(24)[:4] for e in range(60)])
    weight = torch.tensor([0.4, 0.3, 0.2, 0.1])
    design = torch.zeros(60, 24).scatter_(1, picks, weight.expand(60, -1))
    label = torch.arange(24) // 6
    mass = design @ torch.nn.functional.one_hot(label, 4).float()
    y = (design @ x.flatten(1)).view(60, 3, 16, 16).abs()
    blank = Slots(torch.full((60, 4), -1), torch.zeros(60, 4))
    slots, _ = best_slots(match(y, x), mass, groups_of(mass > 0, label, 4, False), blank)
    found = slots.design(24)
    assert torch.allclose(found.sum(1), torch.ones(60), atol=1e-5)
    assert float(torch.minimum(found, design).sum(1).mean()) > 0.7


def test_open_slots_take_any_image() -> None:
    made = encoded(classes=6, rounds=20)
    one_hot = torch.nn.functional.one_hot(made["mass"].argmax(1), 6).bool()
    groups = groups_of(one_hot, made["label"], 2, True)
    now = Slots(torch.zeros(len(one_hot), 2, dtype=torch.long), torch.zeros(len(one_hot), 2))
    slots, _ = best_slots(match(made["y"].abs(), made["x"]), one_hot * 0.2, groups, now)
    held = slots.design(6) > 0
    assert bool(held[one_hot].all())
    assert float((held == (made["design"] > 0)).float().mean()) > 0.85


# ---- the whole


def test_unmixing_recovers_the_images() -> None:
    made = encoded(images=6, rounds=50, public=1, classes=3)
    found = unmix(made["y"], made["mass"], made["per_class"], private=2, images=6, rng=Rng.from_seed(0), rounds=4)
    assert found.images.shape == made["x"].shape
    assert float(found.images.abs().max()) <= 1
    assert error(found.images, made["x"]) < 0.01
    assert found.pairs.shape == (300, 2)
    assert torch.allclose(found.weights.sum(1), made["mass"].sum(1), atol=1e-5)
    assert [h["round"] for h in found.history] == list(range(len(found.history)))


@pytest.mark.parametrize("kind", ["one_hot", "none"])
def test_unmixing_does_without_coefficients(kind: LabelKind) -> None:
    made = encoded(images=6, rounds=60, public=0, classes=3)
    mass = torch.nn.functional.one_hot(made["mass"].argmax(1), 3).float() if kind == "one_hot" else None
    per_class = made["per_class"] if kind == "one_hot" else None
    found = unmix(made["y"], mass, per_class, private=2, images=6, rng=Rng.from_seed(0), rounds=6, kind=kind)
    cos = torch.corrcoef(torch.cat([found.images, made["x"]]).flatten(1))[:6, 6:].abs()
    rows, columns = linear_sum_assignment(-cos.numpy())
    assert float(cos[rows, columns].median()) > 0.85


def test_the_steps_are_the_whole_and_repeat() -> None:
    made = encoded(rounds=20)
    given = problem(made["y"], made["mass"], made["per_class"], private=2, images=6)
    state = unmix_start(given, Rng.from_seed(3).at("start", 0))
    for _ in range(2):
        state = unmix_round(given, state)
    whole = unmix(made["y"], made["mass"], made["per_class"], private=2, images=6, rng=Rng.from_seed(3), rounds=2)
    assert torch.equal(unmix_read(state).images, whole.images)
    assert unmix_read(state).log_likelihood == whole.log_likelihood


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encodings": torch.zeros(3, 4, 4)}, "encodings"),
        ({"encodings": torch.full((8, 1, 4, 4), float("nan"))}, "encodings"),
        ({"encodings": torch.zeros(8, 1, 4, 4)}, "encodings"),
        ({"images": 9}, "encodings"),
        ({"images": 1}, "private, images"),
        ({"mass": torch.ones(7, 2)}, "mass"),
        ({"mass": torch.zeros(8, 2)}, "mass"),
        ({"per_class": torch.tensor([1, 2])}, "per_class"),
        ({"per_class": torch.tensor([4, 0])}, "per_class"),
    ],
)
def test_bad_input_names_what_is_wrong(change: dict[str, object], named: str) -> None:
    given = {"encodings": torch.ones(8, 1, 4, 4), "mass": torch.ones(8, 2), "per_class": torch.tensor([2, 2])}
    given |= {"private": 2, "images": 4} | change
    encodings, mass, per_class = given.pop("encodings"), given.pop("mass"), given.pop("per_class")
    with pytest.raises(BadInput, match=f"^{named}:"):
        problem(encodings, mass, per_class, **given)
