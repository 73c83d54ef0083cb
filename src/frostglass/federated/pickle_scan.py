"""The opcodes of a pickle, read and never run: names, texts, bytes, sizes of byte storages, runs of whole numbers."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from frostglass.core.errors import BadInput

_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING")
_WORDS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_MEMO = ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_GOES_ON = (*_MEMO, "MARK", "APPENDS")  # a long list is written a thousand entries at a time
_SHORTEST, _LONGEST = 520, 1 << 20
_MAX_OPCODES = 50_000_000


@dataclass
class PickleScan:
    """What the opcodes mention.

    Args:
        names: "module.attribute" of everything that unpickling would import.
        texts: all short strings.
        byte_storages: elements of torch's storages of bytes.
        runs_of_words: whole numbers in a row, 520 or more, as in a tuple of a generator's words.
        blobs: bytes objects of 2 KiB to 8 MiB, as in an array of numpy.
    """

    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    byte_storages: list[int] = field(default_factory=list)
    runs_of_words: list[NDArray[np.uint64]] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)


def scan_pickles(path: Path) -> PickleScan:
    """Reads all pickles in a file: those of a zip archive (torch since 1.6), or one after the other.

    Raises:
        BadInput: nothing in the file is a pickle.
    """
    scan = PickleScan()
    try:
        for held in _pickles(path):
            _scan(held, scan)
    except (OSError, zipfile.BadZipFile) as wrong:
        raise BadInput(f"check-checkpoint: {path} cannot be read ({wrong}).") from None
    except Exception as wrong:  # whatever damaged bytes drive zipfile and pickletools into
        raise BadInput(f"check-checkpoint: {path} is no checkpoint of torch, and no pickle ({wrong}).") from None
    return scan


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".pkl")]
            if not names:
                raise ValueError("a zip archive without a pickle")
            for name in names:
                yield io.BytesIO(archive.read(name))
        return
    with path.open("rb") as held:
        first = True
        while first or held.peek(1)[:1] == b"\x80":  # protocol 2 and later begin with this byte
            yield held
            first = False


def _scan(held: IO[bytes], scan: PickleScan) -> None:
    """One pickle, up to its STOP."""
    run: list[int] = []
    storage = False
    recent: list[str] = []
    for number, (code, value, _) in enumerate(pickletools.genops(held)):
        if number > _MAX_OPCODES:
            raise ValueError("more opcodes than a checkpoint has")
        if code.name in _WORDS:
            if len(run) < _LONGEST:
                run.append(int(value or 0))
            if storage:  # of a persistent id ('storage', ByteStorage, key, location, elements)
                scan.byte_storages.append(int(value or 0))
        elif code.name not in _GOES_ON:
            _end_of(run, scan)
        if code.name in _BYTES:
            _keep(bytes(value or b""), scan)
        if code.name in _TEXTS:
            text = str(value)
            recent = [*recent[-1:], text]
            if len(text) < 200:
                scan.texts.append(text)
            else:  # protocol 2 writes bytes as latin-1 text
                _keep(text.encode("latin-1", "ignore"), scan)
        elif code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            name = str(value).replace(" ", ".") if value else ".".join(recent)
            scan.names.append(name)
            storage = name in ("torch.ByteStorage", "torch.storage.ByteStorage")
        elif code.name in ("BINPERSID", "PERSID"):
            storage = False


def _end_of(run: list[int], scan: PickleScan) -> None:
    if len(run) >= _SHORTEST:
        scan.runs_of_words.append(np.array([min(max(n, 0), 2**64 - 1) for n in run], np.uint64))
    run.clear()


def _keep(blob: bytes, scan: PickleScan) -> None:
    if 4 * _SHORTEST <= len(blob) <= 8 * _LONGEST:
        scan.blobs.append(blob)
