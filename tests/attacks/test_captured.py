"""Recorded iterations: the same as eager ones, or eager ones. CUDA is stood in for where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from frostglass.attacks.inversion import captured
from frostglass.attacks.inversion.captured import Recorder, Replay
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.together import Evaluations, evaluate_all
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Observation
from victims import observe

RUN = Runtime(Rng.from_seed(0, "captured"), dtype=torch.float64)
Step = Callable[[], Evaluations]


class Tape:
    """What a CUDA graph is to its memory: results lie in one place, and are overwritten by each replay."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, function: Step) -> Replay:
        self.recordings += 1
        held = function()

        def replay() -> Evaluations:
            self.replays += 1
            found = function()
            for place, value in zip(tensors_of(held), tensors_of(found), strict=True):
                place.copy_(value)
            return held

        return replay


def tensors_of(found: Evaluations) -> list[Tensor]:
    return [found.own, found.total, found.gradient, *found.values.values()]


def stale(function: Step) -> Replay:
    """A recording that misses what is new."""
    found = function()
    return lambda: found


def frozen_weights(function: Step) -> Replay:
    """A recording that is wrong by the weight of a term."""

    def replay() -> Evaluations:
        found = function()
        return replace(found, total=found.total * 1.01)

    return replay


def cannot(function: Step) -> Replay:
    raise RuntimeError("operation not permitted when stream is capturing")


def scene(**options: Any) -> Observation:
    return observe("small_bn_cnn", width=4, dtype=torch.float64, **options)[0]


def attack(**changes: Any) -> Inversion:
    """Every part that changes from step to step: weights on schedules, an anchor that comes and moves."""
    made = ATTACKS["grad_inversion"].make(
        steps=14, every=7, seeds=2, consensus="lazy", consensus_start=4, consensus_every=4, matching="cosine"
    )
    falling = ATTACKS["thaw"].make(steps=14)
    assert isinstance(made, Inversion)
    assert isinstance(falling, Inversion)
    return replace(made, graph=True, terms=falling.terms, **changes)


def on(monkeypatch: pytest.MonkeyPatch, record: Recorder) -> None:
    monkeypatch.setattr(captured, "recorder_for", lambda device: record)


def same(one: Reconstruction, other: Reconstruction) -> None:
    assert torch.equal(one.images, other.images)
    assert one.objective == other.objective


def test_a_run_of_replays_is_the_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scene()
    eager = drive(replace(attack(), graph=False), seen, RUN)
    tape = Tape()
    on(monkeypatch, tape)
    found = drive(attack(), seen, RUN)
    same(found, eager)
    assert found.info["cuda_graph"] is True
    assert tape.recordings == 2  # the anchor comes once, and moves in place
    assert tape.replays == 14 + 2 * 2  # every step, and two points to compare at each time


def test_an_eliminated_seed_makes_a_new_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tape = scene(), Tape()
    made = ATTACKS["thaw"].make(steps=20, seeds=4, eliminate=True, every=10)
    assert isinstance(made, Inversion)
    eager = drive(made, seen, RUN)
    on(monkeypatch, tape)
    same(drive(replace(made, graph=True), seen, RUN), eager)
    assert tape.recordings == 3  # four seeds, two, one


@pytest.mark.parametrize("record", [stale, frozen_weights, cannot])
def test_a_recording_that_does_not_repeat_the_eager_path_is_not_used(
    record: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = scene()
    eager = drive(replace(attack(), graph=False), seen, RUN)
    on(monkeypatch, record)
    found = drive(attack(), seen, RUN)
    same(found, eager)
    assert found.info["cuda_graph"] is False


def test_shifts_and_frozen_differences_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tape = scene(), Tape()
    on(monkeypatch, tape)
    shifting = ATTACKS["deep_inversion"].make(steps=3)
    assert isinstance(shifting, Inversion)
    drive(replace(shifting, graph=True), seen, RUN)
    drive(attack(engine="frozen_fd"), scene(mode="eval"), RUN)
    assert tape.recordings == 0


def test_a_cpu_records_nothing() -> None:
    found = drive(attack(), scene(), RUN)
    assert found.info["cuda_graph"] is False


def test_the_schedules_on_the_device_are_those_of_the_terms() -> None:
    seen, made = scene(), attack()
    state = made.init(seen, RUN)
    target, terms = made._prepared(seen, RUN)
    for t in (0, 5, 13):
        problem = made._objective(target, terms, state, t)
        table = problem.all_scales(state.z)
        own = [problem.scale(i) for i in (*range(len(terms)), -1)]
        assert table[t].tolist() == pytest.approx(own, rel=1e-12)
        scaled = replace(problem, scales=table[t])
        plain, by_table = (evaluate_all(state.z, [p] * 2, 2) for p in (problem, scaled))
        torch.testing.assert_close(plain.total, by_table.total, rtol=1e-12, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["small_bn_cnn", "resnet20"])
def test_on_cuda_a_graph_repeats_the_eager_run(name: str) -> None:
    run = replace(RUN, device=torch.device("cuda"), dtype=torch.float32)
    seen, _ = observe(name, size=32)
    made = replace(attack(), steps=8)
    graph, eager = drive(made, seen, run), drive(replace(made, graph=False), seen, run)
    assert graph.info["cuda_graph"] is True
    assert graph.objective == pytest.approx(eager.objective, rel=1e-2)
