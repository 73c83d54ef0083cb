"""What an interrupted federation goes on from: the server's state after each round, and what clients remember.

UNFINISHED/ in the run folder is its owner's alone to read, and goes when the run is done:
  server.safetensors            global weights; round, history and notes in its metadata
  client-2.000007.safetensors   what client 2 remembered after round 7 (`memory`): counts and encodings, never a key

A client writes before its update leaves. What is newer than the server's round belongs to a round that is done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.defenses.sets.owner import owner_only
from frostglass.federated.flower.memory import KEPT, LEDGER, SPENT
from frostglass.federated.flower.mods import RELEASES, Mod
from frostglass.federated.flower.wire import partition_of, round_of

UNFINISHED, SERVER = "unfinished", "server.safetensors"

_REMEMBERED = (SPENT, RELEASES, LEDGER, KEPT)
"""Records of a node's state that are kept; what else stands in it, a mod of the user's may have made of anything."""

_NEW = "start anew in an empty folder"


@dataclass(frozen=True)
class Whole:
    """Where a run stands after a round.

    Args:
        round: the last whole one; 0 before the first.
        history: as in history.json.
        clients: {client: round of its newest file}.
        notes: of the strategy.
        problems: of the recorder.
        recorded: headers of the record.
        data: digest of the images.
        state: the global weights.
    """

    round: int
    history: dict[str, Any]
    clients: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    recorded: int = 0
    data: str = ""
    state: dict[str, Tensor] = field(default_factory=dict)


class Unfinished:
    """The folder of one run.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / UNFINISHED

    # ---- the server

    @property
    def begun(self) -> bool:
        """Whether there is a round to go on from."""
        return (self.folder / SERVER).exists()

    def save(self, whole: Whole) -> None:
        """Whole or not at all; afterwards older files of clients go."""
        from safetensors.torch import save_file

        self._made()
        about = {f.name: getattr(whole, f.name) for f in fields(whole) if f.name != "state"}
        with owner_only(self.folder / SERVER) as beside:
            tensors = {n: t.contiguous() for n, t in whole.state.items()}
            save_file(tensors, beside, metadata={"about": json.dumps(about), "format": "pt"})
        for client, rounds in self._files().items():
            for round in rounds:
                if round < whole.clients.get(client, 0):
                    self._path(client, round).unlink()

    def load(self) -> Whole:
        """The last whole round.

        Raises:
            BadInput: a file is damaged or missing.
        """
        whole = self._read()
        held = self._files()
        for client, round in whole.clients.items():
            if round not in held.get(client, ()):
                raise BadInput(
                    f"--resume: {self._path(client, round)} is missing, which counts what client {client} has spent; "
                    f"bring it back, or {_NEW}."
                )
        return whole

    def clear_behind(self, round: int) -> None:
        """What belongs to later rounds goes, and what a kill left half written."""
        for client, rounds in self._files().items():
            for later in rounds:
                if later > round:
                    self._path(client, later).unlink()
        for stray in self.folder.glob(".*.part"):
            stray.unlink()

    def newest(self) -> dict[str, int]:
        """{client: round of its newest file}."""
        return {client: max(rounds) for client, rounds in self._files().items()}

    def remove(self) -> None:
        """The run is done, or nothing of it is kept."""
        (self.folder / SERVER).unlink(missing_ok=True)  # first: what follows may be cut short
        if self.folder.exists():
            shutil.rmtree(self.folder)

    # ---- the clients

    def mod(self, after: int) -> Mod:
        """Gives a node that begins in this run what its client remembered after round `after`, and writes down what
        it remembers then; outermost, so that what other mods count is in it.
        """

        def remembered(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
            if not message.metadata.message_type.startswith(MessageType.TRAIN):
                return call_next(message, context)
            client = str(partition_of(context))
            if not any(key in context.state for key in _REMEMBERED):
                self._recall(client, after, context)
            try:
                return call_next(message, context)
            finally:  # also of a round that failed: what was encoded may have been seen
                self._put_down(client, round_of(message), context)

        return remembered

    # ---- inside

    def _read(self) -> Whole:
        from safetensors import SafetensorError, safe_open

        path = self.folder / SERVER
        try:
            with safe_open(path, framework="pt") as held:
                about = json.loads((held.metadata() or {})["about"])
                return Whole(**about, state={n: held.get_tensor(n) for n in held.keys()})  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as wrong:
            raise BadInput(f"--resume: {path} cannot be used ({wrong}); {_NEW}.") from None

    def _made(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _path(self, client: str, round: int) -> Path:
        return self.folder / f"client-{client}.{round:06d}.safetensors"

    def _files(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for path in self.folder.glob("client-*.*.safetensors"):
            client, round, _ = path.name.removeprefix("client-").split(".")
            found.setdefault(client, []).append(int(round))
        return found

    def _recall(self, client: str, after: int, context: Context) -> None:
        from safetensors import SafetensorError, safe_open

        rounds = [r for r in self._files().get(client, ()) if r <= after]
        if not rounds:
            return
        path = self._path(client, max(rounds))
        try:
            with safe_open(path, framework="pt") as held:
                numbers = json.loads((held.metadata() or {})["numbers"])
                tensors = {n: held.get_tensor(n) for n in held.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, ValueError, KeyError):
            raise BadInput(f"{path.name} cannot be read, so what client {client} has spent is unknown.") from None
        for key, values in numbers.items():
            context.state[key] = ConfigRecord(values)
        for key in (LEDGER, KEPT):
            own = {n.removeprefix(f"{key}/"): t for n, t in tensors.items() if n.startswith(f"{key}/")}
            if own:
                context.state[key] = ArrayRecord(own)

    def _put_down(self, client: str, round: int, context: Context) -> None:
        from safetensors.torch import save_file

        held = {key: context.state[key] for key in _REMEMBERED if key in context.state}
        if not held:
            return
        numbers = {key: dict(record) for key, record in held.items() if isinstance(record, ConfigRecord)}
        tensors = {
            f"{key}/{name}": value.contiguous()
            for key, record in held.items() if isinstance(record, ArrayRecord)
            for name, value in record.to_torch_state_dict().items()
        }  # fmt: skip
        self._made()
        with owner_only(self._path(client, round)) as beside:
            save_file(tensors, beside, metadata={"numbers": json.dumps(numbers)})
