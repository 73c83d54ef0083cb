"""Many seeds, one result: early elimination and the mean of agreeing seeds, by objective alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from frostglass.attacks.inversion import choice
from frostglass.attacks.inversion.choice import AgreeingMean
from frostglass.attacks.inversion.elimination import Elimination, eliminated
from frostglass.attacks.inversion.engine import evaluate
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import adam, chain, scale
from frostglass.attacks.inversion.schedules import cosine
from frostglass.attacks.inversion.spaces import pixels, with_labels
from frostglass.attacks.inversion.terms import bn_statistics, match_cosine, total_variation
from frostglass.auditing.store import CheckpointStore
from frostglass.core.batch import Batch
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime, World
from frostglass.core.threat import Knows
from frostglass.numerics.assign import assign
from victims import observe

RUN = Runtime(Rng.from_seed(0, "seed choice"))


def attack(seeds: int, steps: int = 20, **changed: Any) -> Inversion:
    return Inversion(
        "many",
        terms=lambda seen: (
            match_cosine(),
            total_variation(1e-2),
            bn_statistics(0.03, Knows.BN_BATCH, relative=True),
        ),
        update=chain(adam(), scale(cosine(0.3, warmup=5))),
        steps=steps,
        seeds=seeds,
        every=5,
        **changed,
    )


def psnr(found: Tensor, private: Batch) -> float:
    order = assign(found, private.images)
    errors = (found[order] - private.images).square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


def test_half_of_the_seeds_are_dropped_at_each_time() -> None:
    how = Elimination((0.25, 0.5))
    assert [how.survivors(n) for n in (1, 2, 5, 8)] == [1, 1, 3, 4]
    assert [t for t in range(20) if how.due(t, 20)] == [5, 10]
    assert not any(Elimination((0.01,)).due(t, 20) for t in range(20))  # round(0.2) = 0: nothing to choose by yet
    for wrong in ((), (0.0,), (1.0,), (0.5, 0.2), (0.3, 0.3)):
        with pytest.raises(BadInput, match=r"attack\.eliminate"):
            Elimination(wrong)
    with pytest.raises(BadInput, match=r"attack\.keep"):
        Elimination(keep=1.0)


def test_those_with_the_lowest_objective_go_on_and_broken_ones_go_first() -> None:
    seen, _ = observe("small_bn_cnn", width=4, size=8)
    many = attack(4)
    state, _ = many.step(seen, many.init(seen, RUN), RUN, 0)
    losses = torch.tensor([0.3, 0.1, 0.4, 0.2])
    state = replace(state, last_loss=losses, alive=torch.tensor([True, False, True, True]))
    left = eliminated(state, Elimination(), World())
    assert left.seeds == (0, 3)
    assert left.eliminated == 2
    assert torch.equal(left.z, state.z[[0, 3]])
    assert torch.equal(left.rule[0][1], state.rule[0][1][[0, 3]])
    assert torch.equal(left.last_loss, losses[[0, 3]])
    assert eliminated(left, Elimination(keep=0.01), World()).seeds == (3,)


def test_an_elimination_ends_with_a_seed_of_the_full_run_and_less_work() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    events: list[Event] = []
    how = Elimination((0.25, 0.5))
    full, less = attack(4), attack(4, eliminate=how)
    found = drive(less, seen, RUN, emit=events.append)
    assert found.info["seeds_eliminated"] == 3
    held = full.init(seen, RUN)
    for t in range(full.steps):
        held, _ = full.step(seen, held, RUN, t)
    mine = held.seeds.index(int(found.info["seed"]))
    # seeds do not depend on one another: the survivor is what it would have become among all
    assert found.objective == pytest.approx(float(held.best_loss[mine]), rel=1e-5)
    torch.testing.assert_close(found.images, full.read(seen, replace(held, best_loss=_only(held, mine))).images)


def _only(state: Any, index: int) -> Tensor:
    losses = torch.full_like(state.best_loss, float("inf"))
    losses[index] = state.best_loss[index]
    return losses


def test_a_resumed_elimination_ends_as_the_whole_run(tmp_path: Path) -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    many = attack(4, eliminate=Elimination((0.25, 0.5)), combine=AgreeingMean())
    whole = drive(many, seen, RUN)
    store = CheckpointStore(tmp_path / "c.safetensors", torch.device("cpu"))

    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if event.kind == "progress" and event.step == 15:
            raise Killed

    with pytest.raises(Killed):
        drive(many, seen, RUN, emit=kill, store=store, save_every=7)
    kept = store.load(many.init(seen, RUN))
    assert kept is not None
    assert kept[0] == 14
    assert len(kept[1].z) == 1
    again = drive(many, seen, RUN, store=store, save_every=7)
    assert torch.equal(again.images, whole.images)
    assert again.info == whole.info


def test_the_mean_of_agreeing_seeds_is_nearer_and_its_objective_is_its_own() -> None:
    seen, private = observe("small_bn_cnn", width=8, batch=2, size=16)
    alone, together = attack(4, 80), attack(4, 80, combine=AgreeingMean())
    state = alone.init(seen, RUN)
    for t in range(79):
        state, _ = alone.step(seen, state, RUN, t)
    together.init(seen, RUN)
    best, mean = (one.read(seen, one.step(seen, state, RUN, 79)[0]) for one in (alone, together))
    assert int(mean.info["seeds_averaged"]) >= 3
    assert mean.info["seed"] == best.info["seed"]
    assert psnr(mean.images, private) > psnr(best.images, private) + 0.3
    assert mean.targets is not None
    assert together.objective_of(seen, mean.images, mean.targets, RUN) == pytest.approx(mean.objective, rel=1e-3)
    assert mean.info["images_averaged"] == 2
    assert float(mean.info["objective_of_best_seed"]) == pytest.approx(best.objective, rel=1e-3)


def test_seeds_that_are_still_noise_are_not_averaged() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    best = drive(attack(4, 2), seen, RUN)
    refused = drive(attack(4, 2, combine=AgreeingMean(within=9)), seen, RUN)
    assert refused.info["seeds_averaged"] == refused.info["images_averaged"] == 0
    assert torch.equal(refused.images, best.images)
    assert refused.objective == best.objective
    grey = drive(attack(4, 2, combine=AgreeingMean(within=9, shared=0.0)), seen, RUN)
    assert grey.info["images_averaged"] == 2
    assert float(grey.images.std()) < 0.7 * float(best.images.std())


def test_what_seeds_share_is_judged_image_by_image() -> None:
    made = torch.Generator().manual_seed(0)
    picture = torch.randn(1, 3, 16, 16, generator=made)
    noise = torch.randn(4, 2, 3, 16, 16, generator=made)
    seeds = torch.stack([picture.expand(4, -1, -1, -1), torch.zeros(4, 3, 16, 16)], 1) + noise
    spread = seeds.var(0).flatten(1).mean(1)
    shared = choice.shared_part(seeds.mean(0), spread, 4)
    assert shared[0] == pytest.approx(0.8, abs=0.05)  # 1 of 1 + 1/4
    assert shared[1] < 0.1


def test_rows_are_matched_only_where_the_network_cannot_tell_them_apart() -> None:
    targets = torch.eye(3)[[0, 1, 0, 1]]
    groups = choice.interchangeable(targets, 8, 2)
    assert groups[0] == groups[2] != groups[1] == groups[3]
    assert len(groups.unique()) == 4  # the second epoch has rows of its own order
    reference = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    moved = reference[[2, 3, 0, 1]] + 0.1
    found = moved[choice.order_like(moved, reference, choice.interchangeable(targets, 4, 1))]
    torch.testing.assert_close(found, reference + 0.1)
    apart = moved[choice.order_like(moved, reference, torch.arange(4))]
    assert torch.equal(apart, moved)


def test_equal_seeds_average_to_exactly_themselves() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    one = attack(1)
    state = one.init(seen, RUN)
    state, _ = one.step(seen, state, RUN, 0)
    three = replace(
        state,
        best=state.best.repeat(3, 1, 1, 1, 1),
        best_loss=state.best_loss.repeat(3),
        first_loss=state.first_loss.repeat(3),
        last_loss=state.last_loss.repeat(3),
        seeds=(0, 1, 2),
        alive=torch.ones(3, dtype=torch.bool),
    )
    target, terms = one._prepared(seen, RUN)
    problem = one._objective(target, terms, state, 0)

    def objective(z: Tensor) -> Tensor:
        return evaluate(z, problem, gradient=False).own

    found = choice.combined(three, AgreeingMean(), objective, 1, World())
    assert torch.equal(found.best[0], state.best[0])
    assert found.averaged is not None
    assert found.averaged.images == 2
    assert float(found.best_loss) == found.averaged.best


def test_seeds_whose_images_are_not_the_variable_are_not_averaged() -> None:
    with pytest.raises(BadInput, match="pixel spaces only"):
        attack(2, space=with_labels(pixels()), combine=AgreeingMean())
    with pytest.raises(BadInput, match="within"):
        AgreeingMean(within=0.9)
    with pytest.raises(BadInput, match="shared"):
        AgreeingMean(shared=1.1)
