"""Exceptions that no program is at fault for: a full disk, a locked folder, a name that cannot be written."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frostglass.core.errors import BadInput
from frostglass.core.printable import plain

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_NAMELESS = (errno.EFBIG, errno.EIO, errno.ESTALE)
"""What a write into an open file fails with, which says no name."""


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Refuses what cannot be written inside: by --out where it lies there, else by its own name.

    Raises:
        BadInput: a file or folder cannot be read or written.
    """
    try:
        yield
    except OSError as wrong:
        named = isinstance(wrong.filename, str | os.PathLike)
        if no_room(wrong) or (not named and wrong.errno not in _NAMELESS):
            raise
        if not named or _lies_in(wrong.filename, out):
            raise BadInput(f"--out: {out} cannot be written ({wrong.strerror}).") from None
        if cause_outside(wrong) is not None:
            raise
        place = _asked_for(os.fspath(wrong.filename))
        raise BadInput(f"{place} cannot be read or written ({wrong.strerror}); see to it, or name another.") from None


def _lies_in(place: str | os.PathLike[str], out: Path) -> bool:
    """Whether a file is of the run folder, or a folder above that it is made in."""
    own, folder = (Path(os.path.realpath(p)) for p in (place, out))
    return folder in (own, *own.parents) or own in folder.parents


def no_room(wrong: Exception) -> bool:
    """Whether a disk, or the user's part of it, is full; numpy and safetensors say so in words of their own."""
    short = isinstance(wrong, OSError) and re.search(r"\d+ requested and \d+ written", str(wrong)) is not None
    return short or _number(wrong) in _FULL


def _number(wrong: Exception) -> int | None:
    """The operating system's, which safetensors hands on in its text alone; None of what is no error of its."""
    if isinstance(wrong, OSError):
        return wrong.errno
    found = re.search(r"\(os error (\d+)\)", str(wrong)) if type(wrong).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def cause_outside(wrong: Exception) -> str | None:
    """One sentence with the fix where permissions, a limit or the letters of a name are the cause, else None."""
    if isinstance(wrong, OSError) and wrong.errno in _CLOSED and isinstance(wrong.filename, str):
        place = _asked_for(wrong.filename)
        return f"{place} cannot be read or written ({wrong.strerror}); change its permissions, or name another place."
    number = _number(wrong)
    if number == errno.EFBIG:
        return f"a file cannot be written ({os.strerror(number)}); raise the limit (ulimit -f), or name another place."
    if isinstance(wrong, UnicodeEncodeError):
        return _unkept(wrong)
    return None


def _asked_for(path: str) -> str:
    """The file that `core.files.written_beside` would have replaced, where it made its temporary one; in one line."""
    return plain(re.sub(r"\.([^/]+)\.[^./]+\.part$", r"\1", path))


def _unkept(wrong: UnicodeEncodeError) -> str | None:
    """About the name in the text that could not be encoded, which may be a whole plan."""
    before, after = wrong.object[: wrong.start], wrong.object[wrong.start :]
    name = re.split(r"[/\"'\n]", before)[-1] + re.split(r"[/\"'\n]", after)[0]
    if "surrogate" in wrong.reason:  # Python's stand-in for a byte of a file's name, or of an argument
        return f"{name!r} is no name in UTF-8, which results are written in; rename it."
    if wrong.encoding == sys.getfilesystemencoding():
        return f"{name!a} cannot be a file's name in this locale ({wrong.encoding}); set LC_ALL=C.UTF-8, or rename it."
    return None
