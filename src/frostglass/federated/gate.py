"""The last look at an update before it leaves the client: let out, warned about, or blocked, within a time budget.

The idea is NVIDIA's filter on relative data leakage values (Hatamizadeh et al. 2023, IEEE TMI: an update whose measured
leakage is above a tolerance does not leave), for any engine. What is measured is a function that the caller gives
(`frostglass.auditing.outgoing`).

A thread cannot be stopped from outside in Python, so the time budget rests on both sides: checks are told a deadline
and stop by themselves, and the gate waits no longer than the budget. A check that overruns is given up, its result is
thrown away, and while it still runs no further check is begun. Checks work on copies, so what training does to its
tensors meanwhile does not matter.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from frostglass.core.draws import draws_apart
from frostglass.core.errors import BadInput, close_match
from frostglass.core.journal import json_ready
from frostglass.core.randomness import Rng
from frostglass.federated.outgoing import Decide, Decision, Finding, NotRun, Outgoing

__all__ = ["Action", "Decide", "Decision", "Finding", "Gate", "NotRun", "OnFailure", "Outgoing", "Ruling"]

log = logging.getLogger(__name__)

Action: TypeAlias = Literal["block", "warn", "record"]
OnFailure: TypeAlias = Literal["open", "closed"]

SHARE = 0.9
"""Of the budget that checks are given; the rest is for the last one to notice that its time is over."""


_LET_OUT = {"warn": "Let out, as the gate only warns.", "record": "Let out, as the gate only records."}


@dataclass(frozen=True)
class Ruling:
    """What the client has to do.

    Args:
        passed: whether the update may leave.
        reason: why, one sentence.
        failed: whether a check that ought to have run did not.
        decision: what it rests on; None where there is none (yet).
    """

    passed: bool
    reason: str
    failed: bool = False
    decision: Decision | None = None


class Gate:
    """Called with an `Outgoing` at the client, after its defence and before its engine sends; one gate a client.

    Args:
        decide: the checks.
        action: on an exceeded tolerance: "block" the update; "warn" (log) and let it out; "record" lets everything out
            at once, checks later in a thread of its own, and only writes it down.
        on_failure: where checks broke or ran out of time: "open" lets the update out, "closed" blocks it (under
            "block" alone: the other actions never block).
        budget: seconds that an update waits for its checks at the most; under "record", what a check may take.
        journal: a file that gets one JSON line for every ruling, without pixels; None for none.
        waiting: updates that wait for their checks under "record"; further ones are let out unchecked, and named.

    Raises:
        BadInput: an unknown word, checks that cannot be called, or a budget that is not above 0.
    """

    def __init__(
        self,
        decide: Decide,
        *,
        action: Action = "block",
        on_failure: OnFailure = "open",
        budget: float = 30.0,
        journal: str | Path | None = None,
        waiting: int = 2,
    ) -> None:
        for word, value, known in (
            ("action", action, get_args(Action)),
            ("on_failure", on_failure, get_args(OnFailure)),
        ):
            if value not in known:
                raise BadInput(f"gate.{word}: {value!r} is not known; {close_match(str(value), known)}.")
        if not callable(decide):
            raise BadInput(f"gate.decide: {decide!r} cannot be called; give `outgoing_checks(...)` or a function.")
        numbers = isinstance(budget, int | float) and isinstance(waiting, int)
        if not numbers or not (budget > 0 and math.isfinite(budget)) or waiting < 1:
            raise BadInput(
                f"gate: budget = {budget!r} must be above 0 seconds and finite, and waiting = {waiting!r} a whole "
                "number from 1."
            )
        self.decide, self.action, self.on_failure, self.budget = decide, action, on_failure, budget
        self.journal = None if journal is None else Path(journal)
        self._running: _Check | None = None
        self._lock = threading.Lock()
        self._queue: queue.Queue[Outgoing | None] = queue.Queue(waiting)
        self._worker: threading.Thread | None = None

    def __call__(self, outgoing: Outgoing) -> Ruling:
        """Rules about one update; never raises, never takes much longer than the budget."""
        if self.action == "record":
            return self._put_aside(outgoing)
        with _torch_draws_as_before():
            decision, problem = self._decided(outgoing)
        ruling = self._rule(decision, problem)
        self._write(outgoing, ruling)
        if not ruling.passed or ruling.failed or (decision is not None and decision.exceeded):
            log.warning("frostglass gate, round %d, client %s: %s", outgoing.round, outgoing.client, ruling.reason)
        return ruling

    @property
    def patience(self) -> float:
        """Seconds that the checks that wait or run may take together."""
        return self.budget * (self._queue.maxsize + 2)

    def close(self, limit: float | None = None) -> bool:
        """Waits for what is still being checked.

        Args:
            limit: seconds at the most; None for as long as the checks that wait may take.

        Returns:
            whether nothing is running any more.
        """
        end = time.monotonic() + (self.patience if limit is None else limit)
        worker = self._worker
        if worker is not None:
            try:
                self._queue.put(None, timeout=max(0.0, end - time.monotonic()))
            except queue.Full:
                return False
            worker.join(max(0.0, end - time.monotonic()))
            if worker.is_alive():
                return False
            self._worker = None
        if self._running is not None:
            self._running.thread.join(max(0.0, end - time.monotonic()))
        return self._running is None or not self._running.thread.is_alive()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- while the update waits

    def _decided(self, outgoing: Outgoing) -> tuple[Decision | None, str]:
        """(what the checks came to, why there is nothing)."""
        end = time.monotonic() + self.budget
        if self._running is not None and self._running.thread.is_alive():
            return None, f"the check of {self._running.title} was given up and still runs"
        try:
            held = replace(outgoing.copied(), deadline=time.monotonic() + SHARE * self.budget)
        except Exception as wrong:
            return None, f"the update could not be copied for its checks ({_words(wrong)})"
        self._running = check = _Check(self.decide, held)
        check.thread.join(max(0.0, end - time.monotonic()))
        if check.thread.is_alive():
            return None, f"the checks were not done after {self.budget:g} seconds"
        self._running = None
        return check.decision, check.problem

    def _rule(self, decision: Decision | None, problem: str) -> Ruling:
        over = () if decision is None else decision.exceeded
        unrun = [] if decision is None else [n for n in decision.not_run if n.failed]
        why = problem or "; ".join(f"{n.check} did not run: {n.reason}" for n in unrun)
        if over:
            said = " ".join(f.text for f in over)
            if self.action == "block":
                return Ruling(False, said, bool(why), decision)
            return Ruling(True, f"{said} {_LET_OUT[self.action]}", bool(why), decision)
        if why:
            if self.action != "block":
                return Ruling(True, f"{why}. {_LET_OUT[self.action]}", True, decision)
            if self.on_failure == "open":
                return Ruling(True, f"{why}. Let out, as the gate fails open.", True, decision)
            return Ruling(False, f"{why}. Blocked, as the gate fails closed.", True, decision)
        assert decision is not None
        names = ", ".join(f.check for f in decision.findings) or "no check applied"
        return Ruling(True, f"Nothing exceeded its tolerance ({names}).", False, decision)

    # ---- off the training path

    def _put_aside(self, outgoing: Outgoing) -> Ruling:
        if self._queue.full():  # before the copy, which would be for nothing
            return self._unchecked(outgoing, "the checks are slower than the rounds")
        try:
            self._queue.put_nowait(outgoing.copied())
        except queue.Full:
            return self._unchecked(outgoing, "the checks are slower than the rounds")
        except Exception as wrong:
            return self._unchecked(outgoing, f"the update could not be copied for its checks ({_words(wrong)})")
        with self._lock:
            if self._worker is None:
                self._worker = threading.Thread(target=self._check_all, name="frostglass-gate", daemon=True)
                self._worker.start()
        return Ruling(True, "Let out; its checks run later and are only written down.")

    def _unchecked(self, outgoing: Outgoing, why: str) -> Ruling:
        ruling = Ruling(True, f"Let out unchecked: {why}.", True)
        self._write(outgoing, ruling)
        return ruling

    def _check_all(self) -> None:
        while (outgoing := self._queue.get()) is not None:
            held = replace(outgoing, deadline=time.monotonic() + self.budget)
            key = Rng.from_seed(0, "gate", outgoing.client, str(outgoing.round)).key
            with draws_apart(key):  # training goes on meanwhile, on torch's own generators
                decision, problem = _run(self.decide, held)
            found = self._rule(decision, problem)
            self._write(outgoing, replace(found, passed=True))
            del outgoing, held

    def _write(self, outgoing: Outgoing, ruling: Ruling) -> None:
        """One line; what breaks here breaks no round."""
        if self.journal is None:
            return
        row: dict[str, Any] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"), "round": outgoing.round, "client": outgoing.client,
            "defence": outgoing.defence.name, "action": self.action, "passed": ruling.passed, "failed": ruling.failed,
            "reason": ruling.reason,
        }  # fmt: skip
        if ruling.decision is not None:
            row |= asdict(ruling.decision)
        try:
            line = json.dumps(json_ready(row), ensure_ascii=False)
            with self._lock:
                self.journal.parent.mkdir(parents=True, exist_ok=True)
                with self.journal.open("a", encoding="utf-8") as out:
                    out.write(line + "\n")
        except Exception as wrong:
            log.warning("frostglass gate: %s cannot be written (%s)", self.journal, wrong)


@dataclass(eq=False)
class _Check:
    """One decision in a thread of its own."""

    decide: Decide
    outgoing: Outgoing
    decision: Decision | None = None
    problem: str = ""
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.title = f"round {self.outgoing.round}"
        self.thread = threading.Thread(target=self._work, name="frostglass-gate-check", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        self.decision, self.problem = _run(self.decide, self.outgoing)


def _run(decide: Decide, outgoing: Outgoing) -> tuple[Decision | None, str]:
    try:
        found: Any = decide(outgoing)
    except BaseException as wrong:  # whatever breaks in a check, sys.exit too, must not break the round or this thread
        return None, f"the checks broke ({_words(wrong)})"
    if not isinstance(found, Decision):
        return None, f"the checks returned {type(found).__name__} and no Decision"
    return found, ""


@contextlib.contextmanager
def _torch_draws_as_before() -> Iterator[None]:
    """What checks draw (dropout of a network in train mode, say) is not taken from training's random numbers."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _words(wrong: BaseException) -> str:
    text = next((line.strip() for line in str(wrong).splitlines() if line.strip()), "no detail")
    return f"{type(wrong).__name__}: {text}"
