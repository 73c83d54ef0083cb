"""Writes down what a server received: headers and hashes of all updates, tensors as far as there is room for them.

A recorder never raises into the training that it watches: tensors are written by a thread of its own, from a queue that
holds one update a client; when the disk is full the tensors are dropped and named. So they are when the queue is full,
unless the recorder was made to wait: then training goes at the pace of the disk.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.files import write_json, written_beside
from frostglass.core.update import LocalPlan
from frostglass.federated.record_files import Kept, apart, cut_behind, size_of
from frostglass.federated.record_header import (
    BUFFER,
    HEADERS,
    INFO,
    PAYLOADS,
    SENT,
    UPDATE,
    Header,
    RecordInfo,
    digest,
    plan_fields,
)

log = logging.getLogger(__name__)

DEFAULT_BYTES = 2 * 2**30

LETTERS, MOST = 500, 50
"""Of a text, and texts about one update: what another side sent must not make a header that cannot be read."""


@dataclass(frozen=True)
class Received:
    """One update as it arrived.

    Args:
        round: of the server.
        client: a name; the engine's node id is one.
        gradients: W_before - W_after, or the gradient, by parameter name; None where nothing came.
        buffers: as returned (BatchNorm statistics); empty if the client keeps them.
        kind: "delta" or "gradient".
        examples: images, as the client says; None if it does not.
        clients: summed in it.
        plan: what the server ordered; None if unknown.
        defence: as the job names it.
        reason: why nothing came.
        problems: what is wrong with it, a clause each.
        metrics: numbers that came with it.
    """

    round: int
    client: str
    gradients: Mapping[str, Tensor] | None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    kind: str = "delta"
    examples: int | None = None
    clients: int = 1
    plan: LocalPlan | None = None
    defence: str | None = None
    reason: str = ""
    problems: tuple[str, ...] = ()
    metrics: Mapping[str, float | str] = field(default_factory=dict)


class Recorder:
    """Takes down updates in a folder; see `frostglass.federated.record_header` for what lies in it.

    Args:
        folder: new or empty.
        engine: what the updates go through.
        model: name, options, classes, channels, size of the network, so that an audit can build it.
        image_shape: (channels, height, width).
        max_bytes: of all tensors together; later ones are dropped and named.
        in_flight: updates that wait for the disk at the most; one per client of a round.
        note: what is seen here.
        patience: seconds that a full queue may hold up whoever records; used up once, by a disk that hangs.
        goes_on_after: the last whole round of an interrupted run, whose record the folder holds; later ones go out of
            it. None for a new record.

    Raises:
        BadInput: the folder holds something else, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        engine: str,
        model: Mapping[str, Any] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        max_bytes: int = DEFAULT_BYTES,
        in_flight: int = 8,
        note: str = "",
        patience: float = 0.0,
        goes_on_after: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        if max_bytes < 1 or in_flight < 1:
            raise BadInput(f"record: max_bytes = {max_bytes} and in_flight = {in_flight} must be at least 1.")
        held = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        if held and goes_on_after is None:
            raise BadInput(f"record: {self.folder} holds something already; name a new folder.")
        info = RecordInfo(
            engine=engine, model=dict(model or {}), image_shape=image_shape, max_bytes=max_bytes, note=note
        )
        try:
            kept = Kept() if goes_on_after is None else cut_behind(self.folder, goes_on_after)
            for part in (SENT, PAYLOADS):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            write_json(self.folder / INFO, info.model_dump())
            (self.folder / HEADERS).touch()
        except OSError as wrong:
            raise BadInput(
                f"record: {self.folder} cannot be written ({wrong.strerror}); name another folder."
            ) from None
        self.max_bytes, self._patience = max_bytes, patience
        self.problems: list[str] = []
        self.lines, self._number, self._used, self._files = kept.lines, kept.number, kept.used, kept.sent
        self._sent: dict[int, tuple[str | None, str]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._queue: queue.Queue[tuple[Header | None, str, dict[str, Tensor]] | None] = queue.Queue(in_flight + 1)
        self._thread = threading.Thread(target=self._write_all, name="frostglass-recorder", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a training that broke off leaves what was received

    def sent(self, round: int, state: Mapping[str, Tensor]) -> None:
        """What the server sends out in this round; written once however many clients get it."""
        if self._closed:
            return
        try:
            kept = {n: t.detach().cpu().contiguous() for n, t in state.items()}
            found = digest(kept)
            if found not in self._files:
                reason = self._handed_over(None, name := f"{SENT}/{round:05d}.safetensors", kept, size_of(kept))
                if reason:
                    self._sent[round] = None, found
                    self._note(f"round {round}: the weights that were sent are not kept: {reason}")
                    return
                self._files[found] = name
            self._sent[round] = self._files[found], found
        except Exception as wrong:  # whatever breaks here must not break the round
            self._note(f"round {round}: the weights that were sent are not kept ({wrong})")

    def received(self, got: Received) -> None:
        """One update; returns at once, or when there is room in the queue."""
        if self._closed:
            return
        try:
            header, tensors = self._header(got)
            if tensors is None:
                self._append(header)
                return
            assert header.file is not None
            reason = self._handed_over(header, header.file, tensors, header.bytes)
            if not reason:
                return
            self._append(header.model_copy(update={"file": None, "sha256": digest(tensors), "reason": reason}))
        except Exception as wrong:
            self._note(f"round {got.round}, client {got.client}: not recorded ({wrong})")

    def flush(self, limit: float) -> bool:
        """Waits until what has been received so far is on disk, `limit` seconds at the most; whether it is."""
        with self._queue.all_tasks_done:
            done = self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, limit)
        try:
            with (self.folder / HEADERS).open("rb") as written:
                os.fsync(written.fileno())
        except OSError:  # the record is gone, which must not break the round
            return False
        return done

    def close(self) -> None:
        """Waits until everything is on disk. Updates that come later are not recorded."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._queue.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    def _header(self, got: Received) -> tuple[Header, dict[str, Tensor] | None]:
        with self._lock:
            self._number += 1
            number = self._number
        file, sent = self._sent.get(got.round, (None, None))
        tensors = None
        if got.gradients is not None:
            tensors = {f"{UPDATE}{n}": t.detach() for n, t in got.gradients.items()}
            tensors |= {f"{BUFFER}{n}": t.detach() for n, t in got.buffers.items()}
        finite = {
            shortened(n): shortened(v) if isinstance(v, str) else v
            for n, v in list(got.metrics.items())[:MOST]
            if isinstance(v, str) or (v == v and abs(v) != float("inf"))
        }
        header = Header(
            number=number, round=got.round, client=shortened(got.client),
            kind="gradient" if got.kind == "gradient" else "delta",
            examples=got.examples, clients=got.clients, plan=None if got.plan is None else plan_fields(got.plan),
            defence=got.defence, file=None if tensors is None else f"{PAYLOADS}/{number:06d}.safetensors",
            bytes=0 if tensors is None else size_of(tensors), sent=file, sent_sha256=sent,
            reason=shortened(got.reason), problems=_first(got.problems), metrics=finite,
        )  # fmt: skip
        return header, tensors

    def _handed_over(self, header: Header | None, name: str, tensors: dict[str, Tensor], size: int) -> str:
        """Why these tensors will not be written; nothing if they will."""
        if not self._room_for(size):
            return f"the record is full ({self.max_bytes} bytes)"
        # a copy: whoever sends may go on to change its weights in place
        own = {n: t.clone() if header is None else t for n, t in tensors.items()}
        patience = self._patience if self._thread.is_alive() else 0.0  # in a forked process nobody empties the queue
        try:
            self._queue.put((header, name, own), block=patience > 0, timeout=patience)
        except queue.Full:
            self._patience = 0.0  # a disk that hangs holds training up once, not at every step
            self._give_back(size)
            return "the disk is slower than the clients"
        return ""

    def _room_for(self, size: int) -> bool:
        with self._lock:
            if self._used + size > self.max_bytes:
                return False
            self._used += size
            return True

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._used -= size

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            self._write(*item)
            del item
            self._queue.task_done()

    def _write(self, header: Header | None, name: str, tensors: dict[str, Tensor]) -> None:
        problem, sha256 = "", None
        try:
            kept = {n: t.cpu().contiguous() for n, t in tensors.items()}
            sha256 = None if header is None else digest(kept)  # what was sent has been hashed already
            self._save(name, kept)
        except Exception as wrong:
            problem = f"the tensors could not be written ({wrong})"
        if header is None:
            if problem:
                self._note(f"{name}: {problem}")
            return
        found = {"sha256": sha256, "file": None if problem else name, "reason": problem or header.reason}
        try:
            self._append(header.model_copy(update=found))
        except Exception as wrong:
            self._note(f"update {header.number}: not recorded ({wrong})")

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with written_beside(self.folder / name) as beside:
            save_file(apart(tensors), beside)

    def _append(self, header: Header) -> None:
        line = header.model_dump_json()
        with self._lock, (self.folder / HEADERS).open("a", encoding="utf-8") as out:
            out.write(line + "\n")
            self.lines += 1

    def _note(self, text: str) -> None:
        self.problems.append(text)
        log.warning("frostglass recorder: %s", text)


def shortened(text: str) -> str:
    """What somebody else wrote, at most so long."""
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}..."


def _first(problems: tuple[str, ...]) -> list[str]:
    told = [shortened(p) for p in problems[:MOST]]
    return told if len(problems) <= MOST else [*told, f"{len(problems) - MOST} further problems"]
