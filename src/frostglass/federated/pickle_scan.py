"""The opcodes of a pickle, read and never run: names, texts, sizes of byte storages and runs of whole numbers."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from frostglass.core.errors import BadInput

_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING")
_WORDS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
_MEMO = ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT")
_MAX_OPCODES = 50_000_000


@dataclass
class PickleScan:
    """What the opcodes mention.

    Args:
        names: "module.attribute" of everything that unpickling would import.
        texts: all short strings.
        byte_storages: elements of torch's storages of bytes.
        longest_run_of_words: most whole numbers in a row, as in a tuple of a generator's words.
    """

    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    byte_storages: list[int] = field(default_factory=list)
    longest_run_of_words: int = 0


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
    except ValueError as wrong:
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
    run, storage = 0, False
    recent: list[str] = []
    for number, (code, value, _) in enumerate(pickletools.genops(held)):
        if number > _MAX_OPCODES:
            raise ValueError("more opcodes than a checkpoint has")
        if code.name in _WORDS:
            run += 1
            if storage:  # of a persistent id ('storage', ByteStorage, key, location, elements)
                scan.byte_storages.append(int(value or 0))
        elif code.name not in _MEMO:
            run = 0
        scan.longest_run_of_words = max(scan.longest_run_of_words, run)
        if code.name in _TEXTS:
            text = str(value)
            recent = [*recent[-1:], text]
            if len(text) < 200:
                scan.texts.append(text)
        elif code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            name = str(value).replace(" ", ".") if value else ".".join(recent)
            scan.names.append(name)
            storage = name in ("torch.ByteStorage", "torch.storage.ByteStorage")
        elif code.name in ("BINPERSID", "PERSID"):
            storage = False
