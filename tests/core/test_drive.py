"""The one loop: reports, pictures, stop, checkpoints, resume, and no result from broken numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from frostglass.core.batch import Domain
from frostglass.core.drive import Attack, Store, drive, film_steps, problems_of, warnings_of
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime, pick_device
from frostglass.core.state import pack, unpack
from frostglass.core.threat import Knows, Observation

SEEN = Observation(nn.Linear(1, 1), (), Domain(-100.0, 100.0), "train", (1, 2, 2), 2)
RUN = Runtime(Rng.from_seed(1))


@dataclass(frozen=True)
class Walk:
    """Adds noise that is addressed by step; ends early at `enough`."""

    steps: int = 10
    every: int = 3
    broken: int = -1
    enough: int = 10**9
    pixel: float = 0.0
    name: str = "walk"
    needs: frozenset[Knows] = frozenset()

    def check(self, seen: Observation) -> list[str]:
        return []

    def init(self, seen: Observation, run: Runtime) -> dict[str, Any]:
        return {"z": run.rng.at("start").normal((1, 1, 2, 2)), "t": 0}

    def step(self, seen: Observation, state: Any, run: Runtime, t: int) -> tuple[Any, dict[str, Tensor | float]]:
        z = state["z"] + run.rng.at("step", t).normal((1, 1, 2, 2))
        return {"z": z, "t": t + 1}, {"loss": torch.tensor(math.nan if t == self.broken else 1.0), "t": t}

    def done(self, state: Any) -> bool:
        return bool(state["t"] >= self.enough)

    def read(self, seen: Observation, state: Any) -> Reconstruction:
        return Reconstruction(state["z"] + self.pixel, torch.zeros(1, dtype=torch.bool), float(state["t"]))


class Memory:
    def __init__(self) -> None:
        self.kept: Any = None
        self.saves: list[int] = []

    def save(self, step: int, state: object) -> None:
        self.kept = (step, *pack(state))
        self.saves.append(step)

    def load(self, template: Any) -> Any:
        return None if self.kept is None else (self.kept[0], unpack(template, *self.kept[1:]))


def run(attack: Walk, **keywords: Any) -> tuple[Reconstruction, list[Event]]:
    heard: list[Event] = []
    return drive(attack, SEEN, RUN, emit=heard.append, **keywords), heard


def steps_of(heard: list[Event], kind: str) -> list[int]:
    return [e.step for e in heard if e.kind == kind]


def test_the_protocols_hold() -> None:
    assert isinstance(Walk(), Attack)
    assert isinstance(Memory(), Store)


def test_it_reports_at_every_and_at_the_end() -> None:
    result, heard = run(Walk())
    assert steps_of(heard, "progress") == [3, 6, 9, 10]
    assert heard[0].kind == "attack_started"
    assert heard[-1].kind == "attack_finished"
    assert heard[-1].values == {"objective": 10.0}
    assert all(isinstance(v, float) for e in heard for v in e.values.values())
    assert result.objective == 10


def test_it_stops_when_asked_and_when_done() -> None:
    result, heard = run(Walk(), stop=lambda: True)
    assert steps_of(heard, "progress") == [3]
    assert result.objective == 3
    assert run(Walk(enough=5))[0].objective == 6, "done is asked at reports"
    assert run(Walk(enough=0))[0].objective == 0, "nothing to do from the start"
    assert run(Walk(steps=0))[0].objective == 0


def test_values_that_are_not_finite_end_the_run_without_a_result() -> None:
    with pytest.raises(AttackFailed, match="loss became non-finite at step 6"):
        run(Walk(broken=5))
    with pytest.raises(AttackFailed, match="not finite"):
        run(Walk(pixel=math.inf))


SAID: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"images": torch.zeros(1, 1, 2, 3)}, r"images are torch.float32 of shape \(1, 1, 2, 3\); they"),
    "no rows": ({"images": torch.zeros(1, 2, 2)}, r"of shape \(rows, 1, 2, 2\)"),
    "bytes": ({"images": torch.zeros(1, 1, 2, 2, dtype=torch.uint8)}, "images are torch.uint8"),
    "a graph": ({"images": torch.zeros(1, 1, 2, 2, requires_grad=True)}, "part of a graph"),
    "another range": ({"images": torch.full((1, 1, 2, 2), 255.0)}, "from 255 to 255; pixels lie between -100 and 100"),
    "proved as numbers": ({"proved": torch.zeros(1)}, "proved is torch.float32"),
    "too few proved": ({"proved": torch.zeros(0, dtype=torch.bool)}, r"proved is torch.bool of shape \(0,\)"),
    "proved left out": ({"proved": None}, "proved is NoneType"),
    "no objective": ({"objective": None}, "objective is NoneType; it must be a number, NaN if there is none"),
    "an objective that is a tensor": ({"objective": torch.tensor(1.0)}, "objective is torch.float32"),
    "counts of other classes": ({"label_counts": torch.ones(3)}, "label_counts are .* must be 2 finite numbers from 0"),
    "counts below 0": ({"label_counts": -torch.ones(2)}, "label_counts are"),
    "targets that are no tensor": ({"targets": [[1.0, 0.0]]}, "targets are list; they must be None, or a tensor"),
    "targets of other rows": ({"targets": torch.ones(3, 2)}, "targets are torch.float32 of shape"),
    "no info": ({"info": None}, "info is NoneType; it must be a mapping"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_result_that_is_none_of_this_observations_is_said_and_never_scored(case: str) -> None:
    """Annotations are checked where results are made in tests alone: what is wrong is put in afterwards."""
    fields, sentence = SAID[case]

    class Wrong(Walk):
        def read(self, seen: Observation, state: Any) -> Reconstruction:
            found = super().read(seen, state)
            for name, value in fields.items():
                object.__setattr__(found, name, value)
            return found

    with pytest.raises(AttackFailed, match=f"walk: .*{sentence}"):
        run(Wrong())


@pytest.mark.parametrize(
    ("returned", "got"),
    [(None, "NoneType"), (True, "bool"), ("too small", "str"), ([1], "a list with int"), (iter([]), "list_iterator")],
)
def test_a_check_that_returns_no_sentences_is_told_by_its_attack(returned: Any, got: str) -> None:
    wrong: Any = Walk()
    for method, ask in (("check", problems_of), ("warnings", warnings_of)):
        object.__setattr__(wrong, method, lambda _: returned)
        with pytest.raises(BadInput, match=f"attack 'walk': {method} returned {got}; it must return a list of sentenc"):
            ask(wrong, SEEN)


def test_a_check_that_raises_is_told_by_its_attack() -> None:
    wrong: Any = Walk()
    object.__setattr__(wrong, "check", lambda _: 1 / 0)
    with pytest.raises(BadInput, match="attack 'walk': check raised ZeroDivisionError: division by zero; it must"):
        problems_of(wrong, SEEN)
    object.__setattr__(wrong, "check", lambda _: ("one.",))
    assert problems_of(wrong, SEEN) == ["one."]
    assert warnings_of(wrong, SEEN) == []


def test_an_attack_that_returns_nothing_is_told_what_it_must_return() -> None:
    class Silent(Walk):
        def read(self, seen: Observation, state: Any) -> Any:
            return None

    with pytest.raises(AttackFailed, match="walk: read returned NoneType; it must return a Reconstruction"):
        run(Silent(), film=(0, 10))


@pytest.mark.parametrize("killed_at", range(1, 10))
@pytest.mark.parametrize("save_every", [1, 2, 4])
def test_a_killed_run_goes_on_to_the_same_end(killed_at: int, save_every: int) -> None:
    whole, _ = run(Walk())
    store = Memory()

    class Kill(BaseException):
        pass

    def kill(event: Event) -> None:
        if event.step >= killed_at:
            raise Kill

    attack = Walk(every=1)
    with pytest.raises(Kill):
        drive(attack, SEEN, RUN, emit=kill, store=store, save_every=save_every)
    heard: list[Event] = []
    again = drive(attack, SEEN, RUN, emit=heard.append, store=store, save_every=save_every)
    assert torch.equal(again.images, whole.images)
    assert heard[0].step == (store.saves[0] if killed_at > save_every else 0) or heard[0].step <= killed_at


def test_it_saves_between_and_never_at_the_end() -> None:
    store = Memory()
    _, heard = run(Walk(), store=store, save_every=5)
    assert store.saves == [5]
    assert steps_of(heard, "checkpoint") == [5]


def test_pictures_are_taken_where_asked_and_at_the_end() -> None:
    _, heard = run(Walk(), film=film_steps(10, 4))
    assert steps_of(heard, "candidate") == sorted(film_steps(10, 4))
    _, heard = run(Walk(enough=4), film=(0, 2, 10))
    assert steps_of(heard, "candidate") == [0, 2, 6], "an early end is the last picture"
    assert not any(e.kind == "candidate" for e in run(Walk())[1])
    assert all(e.tensors["images"].shape == (1, 1, 2, 2) for e in heard if e.kind == "candidate")


@given(st.integers(0, 3000), st.integers(2, 20))
def test_film_steps_span_the_run(steps: int, frames: int) -> None:
    taken = sorted(film_steps(steps, frames))
    assert taken[0] == 0
    assert taken[-1] == steps
    assert len(taken) <= max(frames, steps + 1)
    assert len(taken) <= frames or steps < frames


def test_a_runtime_below_has_other_randomness_only() -> None:
    below = RUN.at("x", 1)
    assert below.rng == RUN.rng.at("x", 1)
    assert replace(below, rng=RUN.rng) == RUN


@pytest.mark.parametrize("name", ["gpu", "", "mps", "cuda:x", "cpu:1:2"])
def test_devices_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="device"):
        pick_device(name)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="sees no CUDA device"):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cuda"
    with pytest.raises(BadInput, match="this machine has 2"):
        pick_device("cuda:7")
