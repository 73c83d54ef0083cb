"""One run on a SuperLink: handed over, followed and ended in time."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from frostglass.federated.flower.deployment_control import Control, RunStatus
from frostglass.federated.flower.deployment_processes import DeploymentFailed, WaitClock

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class FinishedRun:
    """A run that completed.

    Args:
        run_id: of the SuperLink.
        seconds: from hand-over to its end.
        log: what the server app printed.
        inbound, outbound: bytes at the SuperLink.
    """

    run_id: int
    seconds: float
    log: str
    inbound: int
    outbound: int


def carried_out(
    control: Control,
    app: bytes,
    plan: str,
    limit: float,
    on_log: Callable[[str], None] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> FinishedRun:
    """Starts a run and waits for its end.

    Args:
        control: of the SuperLink.
        app: a Flower app bundle whose configuration has the key "plan".
        plan: value of that key.
        limit: seconds; a run that takes longer is stopped.
        on_log: gets what the server app prints, as it comes.
        watch: called twice a second; may raise.

    Raises:
        DeploymentFailed: the run failed, was stopped or took too long, or the connection broke.
    """
    clock = WaitClock(limit, 0.5)
    run_id = control.start(app, {"plan": plan})
    log = _Log(control, run_id, on_log)
    status = RunStatus("pending", "", "", 0, 0)
    try:
        while clock.tick():
            watch()
            status = control.run(run_id)
            if status.status == "finished":
                break
        else:
            control.stop(run_id)
            raise DeploymentFailed(f"run {run_id} was stopped after {limit:.0f} s, its limit; {log.end()}")
    except (KeyboardInterrupt, SystemExit):  # nobody waits for it any more
        control.stop(run_id)
        raise
    seconds = clock.passed
    told = log.end()
    if status.outcome != "completed":
        raise DeploymentFailed(f"run {run_id} ended as {status.outcome or 'unknown'}: {status.details or told}")
    return FinishedRun(run_id, seconds, log.text, status.inbound, status.outbound)


class _Log:
    """Reads the server app's output in a thread of its own, as it comes."""

    def __init__(self, control: Control, run_id: int, on_log: Callable[[str], None] | None) -> None:
        self._parts: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(control, run_id, on_log), daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """All so far."""
        return "".join(self._parts)

    def end(self) -> str:
        """Waits for the rest; what it says last, for a sentence."""
        self._thread.join(10)
        lines = [line.strip() for line in self.text.splitlines() if any(c.isalnum() for c in line)]
        return f"its log ends with: {lines[-1]}" if lines else "it has printed nothing"

    def _read(self, control: Control, run_id: int, on_log: Callable[[str], None] | None) -> None:
        try:
            for part in control.log(run_id):
                plain = _COLOURS.sub("", part)
                self._parts.append(plain)
                if on_log is not None:
                    on_log(plain)
        except Exception as wrong:  # the run itself is followed elsewhere; a broken log must not end it
            self._parts.append(f"(the log broke off: {wrong})\n")
