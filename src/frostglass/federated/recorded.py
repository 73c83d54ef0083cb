"""Reads a folder of recorded updates: whatever is whole, and in words what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.federated.record_header import BUFFER, HEADERS, INFO, UPDATE, Header, RecordInfo, digest

LINE_BYTES = 2**20
"""Longer lines of headers are not read."""


@dataclass(frozen=True)
class Recorded:
    """One update of a record; its tensors are read when asked for.

    Args:
        folder: of the record.
        header: about it.
    """

    folder: Path
    header: Header

    @property
    def title(self) -> str:
        """For people."""
        h = self.header
        return f"round {h.round}, client {h.client}"

    def sent(self) -> dict[str, Tensor]:
        """What the client had been sent, by name of parameter or buffer.

        Raises:
            BadInput: it was not kept, or its file is missing, no safetensors or another one.
        """
        if self.header.sent is None:
            raise BadInput(f"{self.title}: the weights that were sent were not kept.")
        return _tensors(self.folder, self.header.sent, self.header.sent_sha256, self.title)

    def payload(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(update by parameter name, buffers as returned).

        Raises:
            BadInput: nothing was kept, or its file is missing, no safetensors or another one.
        """
        if self.header.file is None:
            raise BadInput(f"{self.title}: {self.header.reason or 'its tensors were not kept'}.")
        held = _tensors(self.folder, self.header.file, self.header.sha256, self.title)
        update = {n.removeprefix(UPDATE): t for n, t in held.items() if n.startswith(UPDATE)}
        buffers = {n.removeprefix(BUFFER): t for n, t in held.items() if n.startswith(BUFFER)}
        return update, buffers


@dataclass(frozen=True)
class Record:
    """A whole folder.

    Args:
        folder: where it lies.
        info: about it.
        updates: in order of arrival, also those without tensors.
        problems: what could not be read, a sentence each.
    """

    folder: Path
    info: RecordInfo
    updates: tuple[Recorded, ...]
    problems: tuple[str, ...]


def read_record(folder: str | Path) -> Record:
    """The readable part of a record; tensors stay on disk.

    Raises:
        BadInput: this is no record at all.
    """
    root = Path(folder)
    try:
        info = RecordInfo.model_validate_json((root / INFO).read_text(encoding="utf-8"))
        lines = (root / HEADERS).read_bytes().split(b"\n")
    except (OSError, UnicodeDecodeError, ValidationError, ValueError) as wrong:
        text = str(getattr(wrong, "strerror", None) or wrong).splitlines()[0]
        ranks = sorted(p.parent.name for p in root.glob(f"rank-*/{INFO}"))
        if ranks:
            raise BadInput(
                f"{root}: it holds a record for each process; give one of them, as {root / ranks[0]}."
            ) from None
        raise BadInput(
            f"{root}: no record of updates ({text}); give the folder that `frostglass federate` or a Recorder wrote."
        ) from None
    found, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        header = _header(line)
        if isinstance(header, Header):
            found.append(Recorded(root, header))
        else:
            problems.append(f"{HEADERS}, line {number}: {header}; passed over.")
    found.sort(key=lambda one: one.header.number)  # what was dropped at once is written before what had to wait
    return Record(root, info, tuple(found), tuple(problems))


def _header(line: bytes) -> Header | str:
    if len(line) > LINE_BYTES:
        return f"{len(line)} bytes are no header"
    try:
        return Header.model_validate(json.loads(line))
    except (ValueError, RecursionError) as wrong:  # pydantic's, JSON's and Unicode's errors are ValueErrors
        return f"cut short or no header ({str(wrong).splitlines()[0]})"


def _tensors(folder: Path, name: str, sha256: str | None, title: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BadInput(f"{title}: {name} lies outside the record.")
    try:
        held: Mapping[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError, MemoryError) as wrong:
        raise BadInput(f"{title}: {name} cannot be read ({str(wrong).splitlines()[0]}).") from None
    if sha256 is not None and digest(held) != sha256:
        raise BadInput(f"{title}: {name} is not what was recorded (its SHA-256 is another).")
    return dict(held)
