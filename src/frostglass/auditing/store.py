"""The run folder: checkpoints, results and pictures, each whole or absent, so that a killed run resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.files import (
    alone_in,
    check_name,
    clear_left_over,
    left_over,
    write_json,
    write_text,
    written_beside,
)
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.state import pack, unpack

S = TypeVar("S")

MARK = ".run.json"
"""Says to which plan a run folder belongs."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Tensors with a JSON note, as safetensors."""
    note = {"frostglass": json.dumps(dict(about or {}))}
    with written_beside(path) as beside:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside, metadata=note)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, note).

    Raises:
        BadInput: the file is cut off or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as held:
            note = json.loads((held.metadata() or {}).get("frostglass", "{}"))
            return {k: held.get_tensor(k) for k in held.keys()}, note  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as wrong:
        raise BadInput(f"{path.name}: cannot be read ({wrong}); delete it and run again.") from None


def other_data(folder: Path) -> BadInput:
    """The refusal to go on in `folder` with what its run did not begin with."""
    return BadInput(
        f"--resume: the images, labels or weights are not those that {folder} began with; choose an empty folder."
    )


def refuse_other_data(folder: Path, path: Path, value: Mapping[str, str]) -> None:
    """For runs that write down which data they began with.

    Args:
        folder: of the run.
        path: what it wrote.
        value: the same of the data that are there now.

    Raises:
        BadInput: they differ, or it cannot be read.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as wrong:
        raise BadInput(f"--resume: {path} cannot be used ({wrong}); choose an empty folder.") from None
    if held != value:
        raise other_data(folder)


class Stopwatch:
    """Seconds that an attack has taken, over all runs that went into its result."""

    def __init__(self) -> None:
        self._begun, self._before = time.perf_counter(), 0.0
        self.known: dict[int, float] = {}  # at the steps of the checkpoints that were read

    @property
    def seconds(self) -> float:
        """So far, those until the checkpoint that it went on from too."""
        return self._before + time.perf_counter() - self._begun

    def goes_on(self, step: int) -> None:
        """Told of the step that the attack begins behind; what was computed after that checkpoint is done again."""
        self._before = self.known.get(step, 0.0)


class CheckpointStore:
    """The `Store` of one attack run: one file, replaced at each save. Holds tensors and numbers, no generator state."""

    def __init__(self, path: Path, device: torch.device, watch: Stopwatch | None = None) -> None:
        self.path = path
        self.device = device
        self.watch = watch or Stopwatch()

    def save(self, step: int, state: object) -> None:
        """Keeps `state` as of after `step` steps."""
        tensors, skeleton = pack(state)
        save_tensors(self.path, tensors, {"step": step, "skeleton": skeleton, "seconds": self.watch.seconds})

    def load(self, template: S) -> tuple[int, S] | None:
        """The last whole checkpoint, None if there is none."""
        if not self.path.exists():
            return None
        tensors, note = load_tensors(self.path)
        try:
            step = int(note["step"])
            self.watch.known[step] = float(note.get("seconds", 0.0))
            return step, unpack(template, tensors, note["skeleton"], self.device)
        except (KeyError, ValueError, TypeError) as wrong:
            raise BadInput(f"{self.path.name}: is of another version ({wrong}); delete it and run again.") from None


class RunFolder:
    """Where a run lives; as a context, what `open` has taken is free again behind it.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = ExitStack()
        self._began: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def check(self, plan_sha256: str, *, resume: bool) -> None:
        """Before any compute, and without touching anything: may this plan be run here?

        Raises:
            BadInput: it belongs to another plan, holds something else, holds this run and `resume` is off, or its name
                is not in UTF-8.
        """
        check_name(self.path)
        try:
            held = self._mark()
            others = [p for p in self.path.iterdir() if not left_over(p)] if self.path.is_dir() else []
        except OSError as wrong:
            raise BadInput(f"--out: {self.path} cannot be read ({wrong.strerror or wrong}).") from None
        if held is None and (others or (self.path.exists() and not self.path.is_dir())):
            raise BadInput(f"--out: {self.path} exists and holds something else; choose an empty folder.")
        if held is not None and held.get("plan_sha256") != plan_sha256:
            raise BadInput(f"--out: {self.path} belongs to another plan; choose an empty folder.")
        if held is not None and not resume:
            raise BadInput(f"--out: {self.path} already holds this run; add --resume or choose another folder.")

    def open(
        self,
        plan_toml: str,
        plan_sha256: str,
        data_sha256: str,
        *,
        resume: bool,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Creates the folder, or goes on in it; no other process may until this context ends.

        Args:
            plan_toml: the resolved plan.
            plan_sha256: its digest.
            data_sha256: of all images, labels, weights and other files that it names.
            resume: the folder may hold this run.
            environment: what computes now, as a scorecard says it; that of the run's beginning is kept in the folder.

        Raises:
            BadInput: as `check`; its run began with other images, labels or weights; it cannot be written; another
                process is at work in it.
        """
        self.check(plan_sha256, resume=resume)
        held = self._mark()
        if held is not None and held.get("data_sha256") != data_sha256:
            raise other_data(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(alone_in(self.path))
            clear_left_over(self.path)
            began = (held or {}).get("environment", environment)
            self._began = dict(began) if isinstance(began, Mapping) else {}
            mark = {"plan_sha256": plan_sha256, "data_sha256": data_sha256, "environment": self._began}
            write_json(self.path / MARK, mark)
            write_text(self.path / "plan.toml", plan_toml)
        except OSError as wrong:
            raise BadInput(f"--out: {self.path} cannot be written ({wrong.strerror or wrong}).") from None

    def environment(self, now: Mapping[str, str]) -> dict[str, str]:
        """`now`, with what it was at the run's beginning where that was something else."""
        return {key: value if (old := self._began.get(key, value)) == value else f"{old}, then {value}"
                for key, value in now.items()}  # fmt: skip

    def moved(self, now: Mapping[str, str]) -> str:
        """A sentence where the run goes on in another environment than it began in; empty where it does not."""
        changed = [f"{key} {value}" for key, value in self.environment(now).items() if now[key] != value]
        if not changed:
            return ""
        return f"goes on elsewhere than it began ({'; '.join(changed)}): rounding differs, so results may"

    def _mark(self) -> dict[str, Any] | None:
        """What says whose folder this is, None if nothing does."""
        mark = self.path / MARK
        if not mark.is_file():
            return None
        try:
            held = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            held = None
        return held if isinstance(held, dict) else {}

    def checkpoint(self, cell: str, unit: int, device: torch.device, watch: Stopwatch | None = None) -> CheckpointStore:
        """Of one repetition of one cell, with the seconds that it has taken."""
        return CheckpointStore(self.path / "checkpoints" / f"{cell}-{unit}.safetensors", device, watch)

    def result_path(self, cell: str, unit: int) -> Path:
        """Of a finished repetition."""
        return self.path / "checkpoints" / f"{cell}-{unit}.done.safetensors"

    def save_result(self, cell: str, unit: int, result: Reconstruction, about: Mapping[str, Any]) -> None:
        """Keeps a finished repetition and drops its checkpoints, also those of a run on another number of ranks."""
        tensors, skeleton = pack(result)
        done = self.result_path(cell, unit)
        save_tensors(done, tensors, {"skeleton": skeleton, **about})
        of_ranks = done.parent.glob(f"{cell}-{unit}.rank*.safetensors")
        for path in (done.with_name(f"{cell}-{unit}.safetensors"), *of_ranks):
            path.unlink(missing_ok=True)

    def load_result(self, cell: str, unit: int) -> tuple[Reconstruction, dict[str, Any]] | None:
        """A finished repetition, None if it is not there."""
        path = self.result_path(cell, unit)
        if not path.exists():
            return None
        tensors, note = load_tensors(path)
        like = Reconstruction(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.bool), 0.0)
        return unpack(like, tensors, note["skeleton"]), note

    def save_frame(self, cell: str, step: int, images: Tensor) -> None:
        """One picture of the filmstrip (only ever called when the plan shows images)."""
        save_tensors(self.path / "checkpoints" / "film" / f"{cell}-{step:06d}.safetensors", {"images": images})

    def frames(self, cell: str) -> dict[int, Tensor]:
        """All pictures of a cell's filmstrip by step."""
        found = {}
        for path in (self.path / "checkpoints" / "film").glob(f"{cell}-*.safetensors"):
            found[int(path.stem.rpartition("-")[2])] = load_tensors(path)[0]["images"]
        return dict(sorted(found.items()))
