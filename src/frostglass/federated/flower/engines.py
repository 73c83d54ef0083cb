"""The three ways to run a plan's apps: in this process, in Flower's simulation on Ray, or on a running SuperLink."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from frostglass.core.errors import FrostglassError
from frostglass.federated.federation import federation_of
from frostglass.federated.flower.availability import require_ray
from frostglass.federated.flower.client_apps import plan_client_app
from frostglass.federated.flower.gate_mod import close_gates, drop_gates
from frostglass.federated.flower.going_on import start_from
from frostglass.federated.flower.local_grid import run_local
from frostglass.federated.flower.server_app import plan_server_app
from frostglass.federated.flower.unfinished import Unfinished

Tell = Callable[[str], object]

_STORE = 200 * 2**20
"""Bytes of Ray's object store: room for the messages in flight; it spills to disk beyond."""


def on_local(text: str, out: Path, tell: Tell, *, verbose: bool = False, resume: bool = False) -> None:
    """One client after the other, in this process.

    Args:
        text: of the plan (TOML).
        out: the run folder.
        tell: told of each round in a line.
        verbose: whether Flower's own messages are shown.
        resume: goes on behind the last whole round of the run that the folder holds.

    Raises:
        BadInput: a plan that cannot be run, or a run that cannot be gone on with.
    """
    made = federation_of(text)
    server, client = _apps(text, out, "local", tell, resume)
    try:
        with flower_quiet(verbose):
            run_local(server, client, len(made.rows))
    except BaseException:
        drop_gates()
        raise
    close_gates()


def on_ray(text: str, out: Path, tell: Tell, *, verbose: bool = False, resume: bool = False) -> None:
    """Flower's simulation: as many actors as cores, each with one core; clients are their tasks.

    `flwr.simulation.run_simulation` is deprecated and takes no run configuration; the apps carry the plan themselves.

    Args:
        text: of the plan (TOML).
        out: the run folder.
        tell: told of each round in a line.
        verbose: whether Flower's own messages are shown.
        resume: goes on behind the last whole round of the run that the folder holds.

    Raises:
        BadInput: Ray is not installed, a plan that cannot be run, or a run that cannot be gone on with.
        FrostglassError: the simulation broke.
    """
    require_ray()
    from flwr.simulation import run_simulation

    made = federation_of(text)
    stop, failed = threading.Event(), list[BaseException]()
    quiet = {"logging_level": logging.INFO if verbose else logging.ERROR, "log_to_driver": verbose}
    cores = min(os.cpu_count() or 1, len(made.rows))
    config: Any = {
        "init_args": {"num_cpus": cores, "object_store_memory": _STORE, "include_dashboard": False, **quiet},
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
    }
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns that it will not hide the GPU
    server, client = _apps(text, out, "ray", tell, resume)
    serving = _guarded(server, stop, failed)
    try:
        with flower_quiet(verbose), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(serving, client, len(made.rows), backend_config=config)
    except Exception as wrong:
        if not failed:
            raise FrostglassError(f"engine ray: the simulation broke ({type(wrong).__name__}: {wrong}).") from wrong
    finally:
        stop.set()
    if failed:
        raise failed[0]


def on_deployment(text: str, superlink: str, root_certificates: Path, tell: Tell, *, limit: float) -> None:
    """Hands the plan to a running SuperLink and waits for its end; the server writes to `server.folder`.

    Args:
        text: of the plan (TOML).
        superlink: its address, "host:port".
        root_certificates: PEM file of the authority that certified it.
        tell: told of what the server says, line by line.
        limit: seconds until the run is stopped.

    Raises:
        BadInput: nothing answers there, or a certificate does not fit.
        FrostglassError: the run failed.
    """
    from frostglass.federated.flower.deployment import submit

    submit(text, address=superlink, root_certificates=root_certificates, limit=limit, on_log=_lines(tell))


def _apps(text: str, out: Path, engine: str, tell: Tell, resume: bool) -> tuple[ServerApp, ClientApp]:
    """Both of a plan, at its beginning or where an interrupted run stands; clients write down what they remember."""
    made = federation_of(text)
    before = start_from(made, out, engine) if resume else None
    if before is not None:
        tell(f"goes on after round {before.round}/{made.plan.server.rounds}")
    remembered = Unfinished(out).mod(0 if before is None else before.round)
    return plan_server_app(text, out, engine, tell, before), plan_client_app(text, mods=[remembered])


def _guarded(app: ServerApp, stop: threading.Event, failed: list[BaseException]) -> ServerApp:
    """The simulation runs the server in a thread: its exception is caught here, and it can be told to stop."""
    made = ServerApp()

    @made.main()
    def main(grid: Grid, context: Context) -> None:
        pull = grid.pull_messages

        def checked(message_ids: Any) -> Any:
            if stop.is_set():
                raise FrostglassError("engine ray: stopped.")
            return pull(message_ids)

        grid.pull_messages = checked  # type: ignore[method-assign]
        try:
            app(grid, context)
        except Exception as wrong:
            failed.append(wrong)

    return made


@contextmanager
def flower_quiet(verbose: bool) -> Iterator[None]:
    """Flower logs every round and every deprecation of its own; what matters is told by us."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.INFO if verbose else logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _lines(tell: Tell) -> Callable[[str], None]:
    held = ""

    def take(text: str) -> None:
        nonlocal held
        *whole, held = (held + text).split("\n")
        for one in whole:
            tell(one)

    return take
