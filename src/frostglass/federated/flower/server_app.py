"""The ServerApp of a plan: audited FedAvg, a test after every round, and the run folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from frostglass.core.files import written_beside
from frostglass.core.randomness import Rng
from frostglass.federated.federation import Federation, federation_of
from frostglass.federated.flower.client_apps import plan_text
from frostglass.federated.flower.going_on import MODEL
from frostglass.federated.flower.strategy import Answer, AuditedFedAvg
from frostglass.federated.flower.unfinished import Unfinished, Whole
from frostglass.federated.flower.wire import ARRAYS, record_of, state_of
from frostglass.federated.global_accuracy import accuracy_of
from frostglass.federated.history import UNITS, History, line
from frostglass.federated.lone_images import caution_of
from frostglass.federated.recording import Recorder

_PATIENCE = 30.0
"""Seconds that a round's end waits for the disk to take the record."""

_NUMBERS = ("loss", "epsilon", "delta", "exposure-mean", "exposure-max", "insecure")

Tell = Callable[[str], object]


def plan_server_app(
    text: str | None = None,
    out: Path | None = None,
    engine: str = "",
    tell: Tell | None = None,
    before: Whole | None = None,
) -> ServerApp:
    """The ServerApp of a plan.

    Args:
        text: the plan (TOML); None to read it from the run's configuration, key "plan".
        out: an existing run folder; None to read it from the run's configuration, key "out".
        engine: for the history; empty to read it from the run's configuration, key "engine".
        tell: told of each round in a line; None for Flower's logger, which `flwr run --stream` shows.
        before: where an interrupted run stood, to go on from there.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        made = federation_of(text if text is not None else plan_text(context))
        folder = out or Path(str(config.get("out") or made.plan.server.folder or "federation"))
        folder.mkdir(parents=True, exist_ok=True)
        named = engine or str(config.get("engine", "deployment"))
        Serving(made, folder, named, tell or logging.getLogger("flwr").info, before)(grid)

    return app


class Serving:
    """One run of the server.

    Args:
        made: the federation.
        folder: where recorded updates, history and weights go.
        engine: "local", "ray" or "deployment".
        tell: told of each round.
        before: where an interrupted run stood, to go on from there.
    """

    def __init__(self, made: Federation, folder: Path, engine: str, tell: Tell, before: Whole | None = None) -> None:
        self.made, self.folder, self.engine, self.tell, self.before = made, folder, engine, tell, before
        self.done = 0 if before is None else before.round
        self.history = History(folder, made, engine, None if before is None else before.history)
        self.caution = caution_of(*made.steps)
        self.recorder = self._recorder()
        self.unfinished = None if engine == "deployment" else Unfinished(folder)  # its clients remember elsewhere
        self.data = "" if self.unfinished is None else made.digest()
        self.begun = time.perf_counter()

    def __call__(self, grid: Grid) -> None:
        """All rounds; whatever ends them, what was recorded is on disk."""
        try:
            plan = self.made.plan
            if self.caution:
                self.tell(self.caution)
                if self.before is None:
                    self.history.note(self.caution)
            self.strategy = self._strategy()
            first = self.made.model.state_dict() if self.before is None else self.before.state
            if self.done < plan.server.rounds:
                self.strategy.start(
                    grid=grid,
                    initial_arrays=record_of(first),
                    num_rounds=plan.server.rounds - self.done,
                    timeout=plan.server.timeout,
                    evaluate_fn=self._after_round,
                )
        finally:
            self._close()
        if self.unfinished is not None:
            self.unfinished.remove()

    # ---- inside

    def _recorder(self) -> Recorder | None:
        plan = self.made.plan
        if not plan.record.on:
            return None
        made = Recorder(
            self.folder / plan.record.folder, engine="flower", model=self.made.described(),
            image_shape=self.made.image_shape, max_bytes=plan.record.max_bytes,
            in_flight=plan.server.clients or plan.split.clients, note="each client's own update, seen by the server",
            goes_on_after=None if self.before is None else self.done,
        )  # fmt: skip
        if self.before is not None:
            made.problems = list(self.before.problems)
        return made

    def _strategy(self) -> AuditedFedAvg:
        plan = self.made.plan
        made = AuditedFedAvg(
            model=self.made.model, recorder=self.recorder, plan=plan.client.local_plan(), defence=plan.called,
            largest=plan.server.largest, clients=plan.split.clients, per_round=plan.server.clients,
            rng=Rng.from_seed(plan.seed, "federation").at("server"), wait=plan.server.wait,
            roll_call=self.engine != "deployment",  # there every question is a process that imports torch
            done=self.done,
        )  # fmt: skip
        made.notes = [] if self.before is None else list(self.before.notes)
        return made

    def _after_round(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if not number and self.before is not None:
            return None  # what it goes on from has been tested
        round = self.done + number
        seconds = time.perf_counter() - self.begun
        state = state_of(RecordDict({ARRAYS: arrays}), self.made.model)
        accuracy = accuracy_of(self.made, state)
        answers = self.strategy.answers.get(round, [])
        rows = [_row(a) for a in sorted(answers, key=lambda a: (len(a.client), a.client))]
        self.tell(
            line(self.history.add(round, accuracy, rows, seconds if round else 0.0), self.made.plan.server.rounds)
        )
        if round:
            self._save(state)
        self._keep(round, state)
        self.begun = time.perf_counter()
        return MetricRecord({"accuracy": accuracy.plain})

    def _save(self, state: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with written_beside(self.folder / MODEL) as beside:
            save_file({n: t.contiguous() for n, t in state.items()}, beside)

    def _keep(self, round: int, state: dict[str, Tensor]) -> None:
        """What `--resume` goes on from; an earlier round's stays where the disk does not take the record in time."""
        recorder = self.recorder
        if self.unfinished is None or not (recorder is None or recorder.flush(_PATIENCE)):
            return
        self.unfinished.save(
            Whole(
                round, self.history.value, self.unfinished.newest(), self.strategy.notes,
                [] if recorder is None else recorder.problems, 0 if recorder is None else recorder.lines,
                self.data, state,
            )
        )  # fmt: skip

    def _close(self) -> None:
        for text in getattr(getattr(self, "strategy", None), "notes", []):
            self.history.note(text)
        if self.recorder is not None:
            self.recorder.close()
            for text in self.recorder.problems:
                self.history.note(f"record: {text}")
        self.history.save()


def _row(answer: Answer) -> dict[str, Any]:
    """For the history; what a client says about itself may be anything, and is taken only if it is a number."""
    found: dict[str, Any] = {"client": answer.client, "examples": answer.examples}
    for key in _NUMBERS:
        value = answer.about.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            found[key] = value
    if answer.about.get("unit") in UNITS:
        found["unit"] = answer.about["unit"]
    if "delta" not in found or "unit" not in found:
        found.pop("epsilon", None)  # says nothing without them
    return found | ({"reason": answer.reason} if answer.reason else {})
