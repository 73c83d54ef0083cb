"""Opacus, without what its import does to a program's logging."""

from __future__ import annotations

import importlib
import logging
import sys


def import_opacus() -> None:
    """To be called before `from opacus... import`: the first import puts a handler on the root logger.

    A program's own `logging.basicConfig` would then do nothing, and say nothing. A handler that was there stays.
    """
    if "opacus" in sys.modules:
        return
    root = logging.getLogger()
    held = logging.NullHandler()  # with a handler on the root, Opacus's basicConfig adds none
    root.addHandler(held)
    try:
        importlib.import_module("opacus")
    finally:
        root.removeHandler(held)
