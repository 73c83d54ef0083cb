"""stdout and stderr that may close before a command ends, as in `frostglass audit ... 2>&1 | head -1`."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


class _Lasting(io.FileIO):
    """A stream whose reader may leave: what is written from then on goes nowhere, and the command goes on.

    Results are files, and progress that nobody reads is no reason to end the run that they are for.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        # a terminal that is gone fails so; of a file the same is a broken disk, and told
        self.left = (errno.EPIPE, errno.EIO) if self.isatty() else (errno.EPIPE,)

    def write(self, data: Any, /) -> int:
        """As a file's; to nowhere once nobody reads."""
        try:
            return super().write(data)
        except OSError as wrong:
            if wrong.errno not in self.left:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # for what libraries and child processes write too
        os.close(nowhere)
        return memoryview(data).nbytes


def make_lasting() -> None:
    """Puts streams that outlast their readers, and write every letter, in the place of sys.stdout and sys.stderr."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start, as by `2>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without a letter is no reason to fail
            if type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO:  # not what a test or notebook put there
                setattr(sys, name, _lasting(stream))


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = _Lasting(stream.fileno())
    return io.TextIOWrapper(
        io.BufferedWriter(raw) if hasattr(stream.buffer, "raw") else raw,  # `python -u` has none
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
