"""Flower's long-running processes: started with their logs in one folder, watched, ended with all their children."""

from __future__ import annotations

import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from frostglass.core.errors import BadInput, FrostglassError
from frostglass.federated.flower.availability import QUIET

if TYPE_CHECKING:
    import psutil

MARK = "FROSTGLASS_DEPLOYMENT"
"""Environment variable that every process of a deployment inherits; by it they are found again."""

NOTHING_INSTALLED = {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
"""A SuperLink would otherwise install what an app asks for."""

_PARTS = {
    "superlink": ("flwr.superlink.cli.flower_superlink", "flower_superlink"),
    "supernode": ("flwr.supernode.cli.flower_supernode", "flower_supernode"),
}
# Flower's own watcher ends the process when this one is gone, so that not even SIGKILL leaves daemons behind.
_PROGRAM = (
    "import sys; from flwr.supercore.app_utils import start_parent_process_monitor as watch; "
    "sys.argv[0] = 'flower-{part}'; watch(int(sys.argv.pop(1))); from {module} import {function} as main; main()"
)


class DeploymentFailed(FrostglassError):
    """A deployment that was asked for correctly and broke: what happened, and the last line of the log that tells."""


class Processes:
    """All processes of one deployment.

    Args:
        folder: of their logs, `NAME.log`; also what they work in.
        home: FLWR_HOME, where Flower keeps what it unpacks.
    """

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        self._token = secrets.token_hex(16)
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, part: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        """Starts `flower-superlink` or `flower-supernode` in a process group of its own.

        Args:
            name: of its log.
            part: "superlink" or "supernode".
            arguments: of the command.
            environment: beyond what all of them get.
        """
        module, function = _PARTS[part]
        program = _PROGRAM.format(part=part, module=module, function=function)
        with self.log(name).open("ab") as out:
            self._started[name] = subprocess.Popen(
                [sys.executable, "-c", program, str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=self.folder,
                env=self.environment() | dict(environment or {}), start_new_session=True,
            )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Of every process."""
        own = dict(os.environ) | QUIET | NOTHING_INSTALLED | {"FLWR_HOME": str(self.home), MARK: self._token}
        own["PYTHONUNBUFFERED"] = "1"
        own.setdefault("OMP_NUM_THREADS", "1")  # every client is a process: they would fight for the cores
        own.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.5")  # seconds until a task is seen; else one
        # The parts start `flower-superexec` by name, and apps import this very package.
        own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)])
        package = str(Path(__file__).resolve().parents[3])
        own["PYTHONPATH"] = os.pathsep.join(p for p in (package, own.get("PYTHONPATH")) if p)
        for name in ("NO_PROXY", "no_proxy"):
            own[name] = ",".join(p for p in (own.get(name), "127.0.0.1,localhost") if p)
        return own

    def log(self, name: str) -> Path:
        """Of one process."""
        return self.folder / f"{name}.log"

    def ended(self, name: str) -> int | None:
        """Its exit status; None while it runs."""
        return self._started[name].poll()

    def pid(self, name: str) -> int:
        """Of the process itself, not of its children."""
        return self._started[name].pid

    def kill(self, name: str) -> None:
        """At once, with everything it started: what a crash of that machine is like."""
        import psutil

        own = psutil.Process(self.pid(name))
        family = [own, *own.children(recursive=True)]
        _each(family, "kill")
        self._started[name].wait(10)

    def require(self, name: str) -> None:
        """Nothing, while it runs.

        Raises:
            DeploymentFailed: it has ended.
        """
        status = self.ended(name)
        if status is not None:
            raise DeploymentFailed(f"{name} ended with status {status}: {last_line(self.log(name))}")

    def alive(self) -> list[psutil.Process]:
        """Every process that carries this deployment's mark, children and grandchildren, detached or not."""
        import psutil

        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self._token:
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # another user's, or just gone
        return found

    def stop(self, patience: float = 10.0) -> None:
        """Asks all to end, ends those that do not, and makes sure that none is left.

        Args:
            patience: seconds for an orderly end.

        Raises:
            DeploymentFailed: one could not be ended.
        """
        for action, limit in (("terminate", patience), ("kill", 5.0), ("kill", 5.0)):
            # What was just being started when the others were told is found by the next look.
            _each(self.alive(), action)
            if self._gone(limit):
                return
        named = ", ".join(f"{process.pid}" for process in self.alive())
        raise DeploymentFailed(f"processes {named} could not be ended; end them by hand.")

    def _gone(self, limit: float) -> bool:
        """Whether none is left, at the latest after so many seconds."""
        clock = WaitClock(limit, 0.1)
        while clock.tick():
            for process in self._started.values():
                process.poll()
            if not self.alive():
                return True
        return False


def free_port(host: str) -> int:
    """One that nobody listens on at this moment."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int, field: str) -> None:
    """Nothing, if one can listen there.

    Raises:
        BadInput: the port is taken or cannot be had.
    """
    if not 0 < port < 65536:
        raise BadInput(f"{field}: {port} is no port; name one from 1 to 65535, or none to take a free one.")
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind((host, port))
        except OSError as wrong:
            raise BadInput(
                f"{field}: port {port} on {host} cannot be had ({(wrong.strerror or str(wrong)).lower()}); "
                "name another one, or none to take a free one."
            ) from None


def last_line(log: Path) -> str:
    """What a log says last, as far as a person is concerned: without colours, rules and empty lines."""
    try:
        text = log.read_bytes()[-20_000:].decode(errors="replace")
    except OSError:
        return f"{log.name} has not been written"
    lines = [_plain(line) for line in text.splitlines()]
    told = [line for line in lines if any(c.isalnum() for c in line)]
    errors = [line for line in told if re.search(r"error|fail|invalid|refused|unauthori", line, re.IGNORECASE)]
    return (errors or told or [f"{log.name} is empty"])[-1]


def _plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _each(processes: list[psutil.Process], action: str) -> None:
    import psutil

    for process in processes:
        try:
            getattr(process, action)()
        except psutil.Error:
            continue


class WaitClock:
    """Ticks until its limit is over.

    Args:
        limit: seconds.
        every: seconds between two ticks.
    """

    def __init__(self, limit: float, every: float) -> None:
        self.limit, self.every = limit, every
        self._began = time.monotonic()
        self._first = True

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def tick(self) -> bool:
        """True as long as the limit is not over; sleeps between two calls."""
        if self._first:
            self._first = False
            return True
        if self.passed >= self.limit:
            return False
        time.sleep(self.every)
        return True
