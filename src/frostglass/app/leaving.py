"""The end of the process, also where a thread of ours still computes."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

_OURS = "frostglass-"
"""Names of our threads begin so."""


def leave(code: int) -> NoReturn:
    """Ends the process with `code`, after what is due at exit.

    A check of a gate that was given up runs on in a daemon thread. Python would end that thread inside of PyTorch,
    whose C++ then aborts the process: exit status 134 and a core dump, after a run that succeeded or was interrupted.
    """
    if any(thread.daemon and thread.name.startswith(_OURS) for thread in threading.enumerate()):
        atexit._run_exitfuncs()  # records are closed, Ray is shut down
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads any more
                stream.flush()
        os._exit(code)
    sys.exit(code)
