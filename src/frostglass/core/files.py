"""Files that are whole or absent: written beside, then renamed. And where the paths of a plan lead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frostglass.core.errors import BadInput


@contextmanager
def alone_in(folder: Path, option: str = "--out") -> Iterator[None]:
    """Holds a folder that exists, so that no second process resumes or clears up what the first still writes.

    The system frees it with the process, however that ends, and nothing is left in a folder that will be shared: a
    lock on the folder itself is no file.

    Args:
        folder: to hold.
        option: by which the user named it.

    Raises:
        BadInput: it is held.
    """
    handle = os.open(folder, os.O_RDONLY)
    _HELD.add(handle)
    try:
        _lock(handle, folder, option)
        yield
    finally:
        if handle in _HELD:  # a child that was forked has let go already, and the number may be another file's there
            _HELD.remove(handle)
            os.close(handle)


_HELD: set[int] = set()
"""Handles of the folders that this process holds."""


def _let_go() -> None:
    """In a child that was forked: the workers of a DataLoader outlive a killed run by seconds, and its lock with them.

    Closing frees nothing for the parent, which holds the same lock by a handle of its own.
    """
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)


def _lock(handle: int, folder: Path, option: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as wrong:
        if wrong.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BadInput(
                f"{option}: another process is at work in {folder}; wait until it has ended, or choose another folder."
            ) from None
        # some network file systems lock no folders; a run there is not to fail for it


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that replaces `path` when the block ends, and vanishes if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # mkstemp made it private; a report is as readable as any file of its owner
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def left_over(path: Path, name: str = "") -> bool:
    """Whether this is what a kill in the middle of `written_beside` leaves: of the file `name`, or of any."""
    return path.name.startswith(f".{name}") and path.name.endswith(".part")


def clear_left_over(folder: Path) -> None:
    """Removes what kills have left in a folder that this process holds."""
    for stray in filter(left_over, list(folder.rglob(".*.part"))):
        stray.unlink(missing_ok=True)


def is_free(folder: Path, name: str) -> bool:
    """Whether a run may begin there: nothing lies there but what a kill left of `name`, its first file."""
    if not folder.is_dir():
        return not folder.exists()
    return all(left_over(held, f"{name}.") for held in folder.iterdir())


def check_writable(path: Path, command: str, option: str = "--out") -> None:
    """Refuses a file that cannot be written, before the minutes of work that it is for; leaves nothing behind.

    Args:
        path: of the file.
        command: that writes it.
        option: by which the user named it.

    Raises:
        BadInput: it is a folder, or no file can be made where it would lie.
    """
    try:
        if path.is_dir():
            raise BadInput(f"{command}: {path} is a folder; name a file.")
        with tempfile.TemporaryFile(dir=next(p for p in path.absolute().parents if p.exists())):
            pass
    except OSError as wrong:
        raise BadInput(f"{command}: {path} cannot be written ({wrong.strerror or wrong}); change {option}.") from None


def check_name(path: Path, option: str = "--out") -> None:
    """Refuses a folder whose name is not in UTF-8: plans, which name it, and safetensors could not be written or read.

    Raises:
        BadInput: it holds bytes that are not; `option` is how the user named it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{option}: {str(path)!r} is no name in UTF-8; choose another folder.") from None


def placed(text: str, folder: Path) -> str:
    """A path that a plan names, absolute: from the plan's `folder`, with ~ and $NAME from the environment.

    Raises:
        BadInput: a variable that is not set.
    """
    full = os.path.expandvars(text)
    unset = re.search(r"\$(\w+|\{\w+\})", full)
    if unset and not (folder / full).exists():
        raise BadInput(f"plan: {text!r} names {unset[0]}, which is not set; set it, or write the path.")
    return (folder / Path(full).expanduser()).resolve().as_posix()


def source_placed(text: str, folder: Path) -> str:
    """A source of images with its path `placed`, as in folder:PATH and parquet:FILE; any other name as it is."""
    kind, _, rest = text.partition(":")
    return f"{kind}:{placed(rest, folder)}" if rest and kind in ("folder", "parquet") else text


def write_text(path: Path, text: str) -> None:
    """Text in UTF-8, whole or not at all."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def claimed(folder: Path, name: str, text: str) -> Iterator[None]:
    """Writes the file `name` into `folder`, and takes it back if the block is refused before anything else lies there.

    So a run that ends in `BadInput` before it began leaves its folder as it was, and the corrected command may use it.
    A file that was there already (a run that is resumed) stays. The folder is held meanwhile.

    Raises:
        BadInput: its name is not in UTF-8, or another process holds it (`alone_in`).
    """
    check_name(folder)
    own = folder / name
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder), _taken_back(own, made):
        for stray in folder.glob(f".{name}.*.part"):  # of a kill before this file was whole
            stray.unlink(missing_ok=True)
        write_text(own, text)
        yield


@contextmanager
def _taken_back(own: Path, made: list[Path]) -> Iterator[None]:
    folder = own.parent
    before = set(folder.rglob("*"))
    try:
        yield
    except BadInput:
        new = sorted(set(folder.rglob("*")) - before, reverse=True)  # what is deeper comes first
        if own in new and all(place == own or place.is_dir() for place in new):
            own.unlink()
            for place in (*(p for p in new if p != own), *made):
                place.rmdir()
        raise


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all; refuses NaN, which is no JSON.

    Raises:
        ValueError: a NaN or infinity in `value`.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
