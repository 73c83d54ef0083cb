"""The one loop: it alone steps attacks, emits their events, writes their checkpoints and stops them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from torch import Tensor

from frostglass.core.errors import AttackFailed, BadInput, FrostglassError, first_line
from frostglass.core.events import Emit, Event, silent
from frostglass.core.memory import freed_memory_kept, is_memory
from frostglass.core.reconstruction import Reconstruction, faults
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation

S = TypeVar("S")
Scalars: TypeAlias = Mapping[str, "Tensor | float"]
"""What a step measured. Tensors stay on their device until the loop reports them: no host synchronisation a step."""


@runtime_checkable
class Attack(Protocol[S]):
    """Something that reads an observation. A pair of pure functions plus `read`; holds no loop, prints nothing.

    Attributes:
        name: as registered.
        needs: grants without which it cannot work; a plan that withholds one is refused before any compute.
        steps: how often `step` is called at the most.
        every: steps between two reports (and finite checks).
    """

    @property
    def name(self) -> str:
        """As registered."""

    @property
    def needs(self) -> frozenset[Knows]:
        """Grants it cannot do without."""

    @property
    def steps(self) -> int:
        """Upper limit of steps."""

    @property
    def every(self) -> int:
        """Steps between two reports."""

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked (missing layer, ...); empty if it can."""

    def init(self, seen: Observation, run: Runtime) -> S:
        """The state before the first step."""

    def step(self, seen: Observation, state: S, run: Runtime, t: int) -> tuple[S, Scalars]:
        """Step t (from 0); `run.rng` is the same at every step, so draws are addressed by t."""

    def done(self, state: S) -> bool:
        """True if further steps cannot help; asked at every report."""

    def read(self, seen: Observation, state: S) -> Reconstruction:
        """What has been found so far."""


@runtime_checkable
class Store(Protocol):
    """Where checkpoints go."""

    def save(self, step: int, state: object) -> None:
        """Keeps `state` as of after `step` steps, replacing the one before."""

    def load(self, template: S) -> tuple[int, S] | None:
        """(steps done, state), or None if there is nothing to resume from."""


def problems_of(attack: Attack[Any], seen: Observation) -> list[str]:
    """What `attack.check` says about an observation, of an attack that somebody else may have written.

    Raises:
        BadInput: it raised, or returned no list of sentences.
    """
    return _sentences(attack, "check", seen)


def warnings_of(attack: Attack[Any], seen: Observation) -> list[str]:
    """What `attack.warnings` says where there is such a method; raises as `problems_of` does."""
    return _sentences(attack, "warnings", seen) if hasattr(attack, "warnings") else []


def _sentences(attack: Attack[Any], method: str, seen: Observation) -> list[str]:
    try:
        found: object = getattr(attack, method)(seen)
    except Exception as wrong:
        if isinstance(wrong, FrostglassError) or is_memory(wrong):
            raise
        raise BadInput(
            f"attack {attack.name!r}: {method} raised {first_line(wrong)}; it must return a list of sentences, an "
            "empty one if there is nothing to say."
        ) from wrong
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        others = [text for text in found if not isinstance(text, str)] if isinstance(found, list | tuple) else []
        got = f"a list with {type(others[0]).__name__}" if others else type(found).__name__
        raise BadInput(
            f"attack {attack.name!r}: {method} returned {got}; it must return a list of sentences, an empty one if "
            "there is nothing to say."
        )
    return list(found)


def film_steps(steps: int, frames: int = 10) -> frozenset[int]:
    """Steps at which the filmstrip takes a picture: the start, then ever longer gaps, then the end."""
    if steps < frames:
        return frozenset(range(steps + 1))
    return frozenset({0, steps} | {round(steps * (i / (frames - 1)) ** 2) for i in range(1, frames - 1)})


def drive(
    attack: Attack[S],
    seen: Observation,
    run: Runtime,
    *,
    emit: Emit = silent,
    store: Store | None = None,
    save_every: int = 200,
    film: Collection[int] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Reconstruction:
    """Runs `attack` on `seen` to its end and returns what it read.

    Args:
        attack: what to run.
        seen: all that it may look at.
        run: its randomness, device and ranks.
        emit: told of progress at every `attack.every` steps.
        store: where checkpoints are written every `save_every` steps; if it holds one, the run goes on from there
            and ends as the uninterrupted run would (draws are addressed by step, never by generator state).
        film: steps after which a `candidate` event carries the current images.
        stop: asked at every report; True ends the run early with what there is.

    Raises:
        AttackFailed: a reported value or a pixel of the result is not finite, or the result is none of this
            observation's (shape, range, `proved`, ...): such a run has no result.
    """
    with freed_memory_kept():
        state = attack.init(seen, run)
        start = 0
        kept = store.load(state) if store else None
        if kept is not None:
            start, state = kept
        emit(Event("attack_started", attack.name, start, attack.steps))
        if start == 0 and 0 in film:
            _show(attack, seen, state, 0, emit)
        t = start
        ended = attack.done(state)
        while t < attack.steps and not ended:
            state, scalars = attack.step(seen, state, run, t)
            t += 1
            if t % attack.every == 0 or t == attack.steps:
                values = {name: float(value) for name, value in scalars.items()}
                emit(Event("progress", attack.name, t, attack.steps, values))
                _check_finite(attack.name, t, values)
                ended = attack.done(state) or stop()
            if t in film or (film and (ended or t == attack.steps)):
                _show(attack, seen, state, t, emit)  # before the checkpoint, or a kill between the two would lose it
            if store and (t % save_every == 0) and t < attack.steps:
                store.save(t, state)
                emit(Event("checkpoint", attack.name, t, attack.steps))
    result = attack.read(seen, state)
    wrong = faults(result, seen.image_shape, seen.classes, seen.domain)
    if wrong:
        raise AttackFailed(f"{attack.name}: {'; '.join(wrong)}.")
    emit(Event("attack_finished", attack.name, t, attack.steps, {"objective": result.objective}))
    return result


def _show(attack: Attack[S], seen: Observation, state: S, t: int, emit: Emit) -> None:
    found: object = attack.read(seen, state)
    if isinstance(found, Reconstruction):  # else the end of the run says so
        emit(Event("candidate", attack.name, t, attack.steps, tensors={"images": found.images}))


def _check_finite(name: str, t: int, values: Mapping[str, float]) -> None:
    wrong = [k for k, v in values.items() if not math.isfinite(v)]
    if wrong:
        raise AttackFailed(f"{name}: {', '.join(wrong)} became non-finite at step {t}; lower lr or the term's weight.")
