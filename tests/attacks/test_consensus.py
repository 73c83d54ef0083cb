"""Group consistency: what published code gets wrong about it, each fault with the test that would have caught it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from frostglass.attacks.inversion.consensus import Consensus, find_anchor, in_one_order, seed_mean
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import adam, chain, scale
from frostglass.attacks.inversion.state import InversionState
from frostglass.attacks.inversion.target import lay_out
from frostglass.attacks.inversion.terms import Term, match_cosine
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import drive
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime, World
from frostglass.core.threat import Observation
from frostglass.numerics import registration
from frostglass.numerics.image import anchor_distance
from victims import observe

RUN = Runtime(Rng.from_seed(0, "consensus"))
ALONE = World()


def coupled(how: Consensus | None, *, seeds: int = 3, steps: int = 8, terms: Sequence[Term] = ()) -> Inversion:
    return Inversion(
        "coupled",
        terms=lambda seen: tuple(terms) or (match_cosine(),),
        update=chain(adam(), scale(0.1)),
        steps=steps,
        seeds=seeds,
        consensus=how,
        every=1,
    )


def play(attack: Inversion, seen: Observation, run: Runtime = RUN, steps: int | None = None) -> InversionState:
    state = attack.init(seen, run)
    for t in range(attack.steps if steps is None else steps):
        state, _ = attack.step(seen, state, run, t)
    return state


def spread(z: Tensor) -> float:
    return float((z - z.mean(0)).flatten(1).norm(dim=1).mean())


def test_seeds_that_found_images_of_one_class_in_another_order_agree() -> None:
    seen, private = observe("small_bn_cnn", width=4, batch=3, size=16)
    x = seen.domain.normalise(private.images)
    targets = private.targets[[0, 0, 1]]
    seen = replace(seen, labels=targets)
    attack = coupled(Consensus(1.0, 1, 100, registration.none), seeds=2)
    state = attack.init(seen, RUN)
    turned = x[[1, 0, 2]]
    moment = torch.stack([x, turned + 1])
    state = replace(state, z=torch.stack([x, turned]), best=torch.stack([x, turned]), rule=((moment, 2 * moment), ()))
    after, images = in_one_order(state, state.z, 1, ALONE)
    assert torch.equal(after.z, torch.stack([x, x]))
    assert torch.equal(after.best, after.z)
    assert torch.equal(images, after.z)
    first, second = after.rule[0]  # rows of the rule's state move with the images
    assert torch.equal(first, torch.stack([x, x + 1]))
    assert torch.equal(second, 2 * first)
    anchor = find_anchor(images, state.alive, Consensus(1.0, 0, 1, registration.none), lay_out(seen, RUN), ALONE)
    assert torch.equal(anchor.z, x)
    # images of two classes stay where they are
    apart = replace(state, targets=private.targets)
    assert torch.equal(in_one_order(apart, state.z, 1, ALONE)[0].z, state.z)


@pytest.mark.parametrize("method", registration.METHODS)
@pytest.mark.parametrize(("seeds", "images"), [(3, 2), (2, 3), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_seeds_cost_exactly_nothing(method: str, seeds: int, images: int, dtype: torch.dtype) -> None:
    """One implementation pulls every image to all images of the batch: 1.51 instead of 0."""
    seen, private = observe("mlp", hidden=(8,), batch=images, size=16)
    target = lay_out(seen, Runtime(dtype=dtype))
    z = torch.randn(private.images.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    same = target.seen.domain.normalise(seen.domain.clamp(seen.domain.denormalise(z))).expand(seeds, *z.shape)
    how = Consensus(1.0, 0, 1, registration.METHODS[method])
    anchor = find_anchor(same.clone(), torch.ones(seeds, dtype=torch.bool), how, target, ALONE)
    assert torch.equal(anchor.z, same[0])
    for x in same:
        x = x.clone().requires_grad_(True)
        cost = anchor_distance(x, anchor.z)
        assert float(cost.detach()) == 0
        assert not torch.autograd.grad(cost, x)[0].any()
    assert float(anchor.unregistered) == 0


def test_each_image_is_drawn_to_its_own_counterpart() -> None:
    """Two seeds whose images are in one order, three of them: no image is drawn to another one of the batch."""
    a, b = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    b[1] = 1.0
    anchor = seed_mean(torch.stack([a, b]), torch.ones(2, dtype=torch.bool), ALONE)
    x = a.clone().requires_grad_(True)
    cost = anchor_distance(x, anchor)
    assert float(cost.detach()) == pytest.approx((0 + 0.5 * 2 + 0) / 3)  # ||.5 x 4 pixels|| = 1, mean over three images
    gradient = torch.autograd.grad(cost, x)[0]
    assert bool(gradient[1].ne(0).all())
    assert not gradient[[0, 2]].any()


def test_dropped_seeds_have_no_say() -> None:
    z = torch.tensor([1.0, float("nan"), 4.0]).view(3, 1, 1, 1, 1)
    assert float(seed_mean(z, torch.tensor([True, False, True]), ALONE)) == pytest.approx(2.5)
    assert float(seed_mean(z, torch.tensor([False, False, True]), ALONE)) == 4.0
    assert float(seed_mean(z, torch.tensor([False, False, False]), ALONE)) == 0.0


def test_the_group_term_is_in_the_logged_objective_and_moves_the_seeds_together() -> None:
    """One implementation builds its closures without the group, so that the term is never evaluated."""
    seen, _ = observe("small_bn_cnn", width=4)
    events: list[Event] = []
    weight = 0.5
    attack = coupled(Consensus(weight, 2, 3, registration.none))
    state = attack.init(seen, RUN)
    for t in range(3):
        before = state
        state, scalars = attack.step(seen, state, RUN, t)
        assert ("group" in scalars) == (t >= 2)
    drive(attack, seen, RUN, emit=events.append)
    late = [e.values for e in events if e.kind == "progress"][2:]
    assert all(v["group"] > 0 for v in late)
    assert before.anchor is None
    assert state.anchor is not None
    problem_free = coupled(None)
    apart, together = play(problem_free, seen).z, play(attack, seen).z
    assert spread(together) < 0.95 * spread(apart)


def test_the_objective_of_one_step_is_own_plus_weighted_distance() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    attack = coupled(Consensus(0.25, 0, 100, registration.none), seeds=2)
    state = attack.init(seen, RUN)
    new, scalars = attack.step(seen, state, RUN, 0)
    assert new.anchor is not None
    distances = [float(anchor_distance(z, new.anchor)) for z in state.z]
    totals = [float(own) + 0.25 * d for own, d in zip(new.last_loss, distances, strict=True)]
    assert float(scalars["objective"]) == pytest.approx(min(totals))
    assert float(scalars["group"]) == pytest.approx(sum(distances) / 2)


def test_the_anchor_is_held_between_refreshes_and_made_anew_at_them() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    attack = coupled(Consensus(0.1, 2, 3, registration.ecc_euclidean))
    state, anchors = attack.init(seen, RUN), []
    for t in range(attack.steps):
        state, _ = attack.step(seen, state, RUN, t)
        anchors.append(state.anchor)
    assert anchors[:2] == [None, None]
    made = [a for a in anchors if a is not None]
    same = [torch.equal(a, b) for a, b in pairwise(made)]
    assert same == [True, True, False, True, True]  # refreshed before steps 2 and 5
    assert all(not a.requires_grad for a in made)


def test_the_registered_mean_averages_warps_and_counts_failures() -> None:
    seen, private = observe("small_bn_cnn", width=4, size=32, batch=2)
    target = lay_out(seen, RUN)
    z = seen.domain.normalise(private.images)
    views = torch.stack([z.roll(1, -1), z.roll(-1, -1), z])
    alive = torch.ones(3, dtype=torch.bool)
    lazy = find_anchor(views, alive, Consensus(1.0, 0, 1, registration.none), target, ALONE)
    registered = find_anchor(views, alive, Consensus(1.0, 0, 1, registration.ecc_euclidean), target, ALONE)

    def error(a: Tensor) -> float:
        return float((a - z)[..., 4:-4, 4:-4].square().mean())

    assert error(registered.z) < 0.7 * error(lazy.z)
    assert float(registered.unregistered) == 0

    def broken(moving: Tensor, fixed: Tensor) -> Tensor:
        return moving

    failed = find_anchor(views, alive, Consensus(1.0, 0, 1, broken), target, ALONE)
    assert float(failed.unregistered) == 6
    torch.testing.assert_close(failed.z, lazy.z, atol=1e-5, rtol=1e-5)


def test_a_refresh_forgets_the_best_so_far() -> None:
    """It was the best at another objective; otherwise the images from before the consensus would win."""
    seen, _ = observe("small_bn_cnn", width=4)
    attack = coupled(Consensus(50.0, 4, 100, registration.none), steps=6)
    state = play(attack, seen, steps=4)
    late, _ = attack.step(seen, state, RUN, 4)
    assert torch.equal(late.best, state.z)
    torch.testing.assert_close(late.best_loss, late.last_loss)


def test_a_registration_of_the_users_own_is_plugged_in_by_its_path(monkeypatch: Any) -> None:
    calls = []

    def mine(moving: Tensor, fixed: Tensor) -> Tensor:
        calls.append(moving.shape)
        return fixed

    monkeypatch.setattr(registration, "mine", mine, raising=False)
    name = "frostglass.numerics.registration:mine"
    attack = ATTACKS["grad_inversion"].make(steps=4, seeds=2, consensus_every=1, register=name)
    seen, _ = observe("small_bn_cnn", width=4)
    drive(attack, seen, RUN)
    assert calls == [(2, 3, 16, 16)] * 6  # two seeds, refreshes before steps 1, 2 and 3


def test_one_seed_agrees_with_itself() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    with_group = coupled(Consensus(1.0, 0, 1, registration.ecc_euclidean), seeds=1)
    assert torch.equal(play(with_group, seen).z, play(replace(with_group, consensus=None), seen).z)
