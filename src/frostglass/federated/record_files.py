"""The files of a record: tensors that can be written, and the part that an interrupted run goes on behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.files import write_text
from frostglass.federated.record_header import HEADERS, PAYLOADS, SENT, Header


@dataclass(frozen=True)
class Kept:
    """What stays of a record when its run goes on.

    Args:
        lines: headers.
        number: of the last one.
        used: bytes of all tensors.
        sent: {digest of what was sent: its file}.
    """

    lines: int = 0
    number: int = 0
    used: int = 0
    sent: dict[str, str] = field(default_factory=dict)


def cut_behind(folder: Path, round: int) -> Kept:
    """Takes out of a record what came after `round`, and whatever a kill left half written.

    Args:
        folder: of the record.
        round: the last whole one; 0 for none.

    Raises:
        BadInput: the record is no longer there.
    """
    kept = whole_headers(folder, round)
    write_text(folder / HEADERS, "".join(f"{line}\n" for line, _ in kept))
    headers = [h for _, h in kept]
    files = {h.file for h in headers if h.file} | {h.sent for h in headers if h.sent}
    strays = [*folder.glob(".*.part"), *(p for place in (SENT, PAYLOADS) for p in (folder / place).glob("*"))]
    for stray in strays:
        if stray.relative_to(folder).as_posix() not in files:
            stray.unlink()
    sent = {h.sent_sha256: h.sent for h in headers if h.sent and h.sent_sha256}
    used = sum(h.bytes for h in headers if h.file) + sum(_tensor_bytes(folder / name) for name in sent.values())
    return Kept(len(headers), max((h.number for h in headers), default=0), used, sent)


def whole_headers(folder: Path, round: int) -> list[tuple[str, Header]]:
    """(line, header) of each update of a record up to `round`.

    Raises:
        BadInput: the record is no longer there.
    """
    path = folder / HEADERS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as wrong:
        raise BadInput(
            f"--resume: {path} cannot be read ({wrong.strerror}); bring it back, or start anew in an empty folder."
        ) from None
    return [(line, h) for line in lines if (h := _header(line)) is not None and h.round <= round]


def _header(line: str) -> Header | None:
    """None for a line that a kill cut short."""
    try:
        return Header.model_validate(json.loads(line))
    except (ValueError, ValidationError):
        return None


def _tensor_bytes(path: Path) -> int:
    """Of a safetensors file: behind eight bytes with the length of its table, and the table."""
    try:
        with path.open("rb") as held:
            return path.stat().st_size - 8 - int.from_bytes(held.read(8), "little")
    except OSError:
        return 0


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No two in the same memory, which safetensors refuses; copies as few as that takes."""
    own, seen = {}, set()
    for name, t in tensors.items():
        memory = t.untyped_storage()
        alone = memory.data_ptr() not in seen and memory.nbytes() == t.numel() * t.element_size()
        own[name] = t if alone or not t.numel() else t.clone()
        seen.add(memory.data_ptr())
    return own


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors.values())
