"""Further commands, one file each: a module here that has a click command named `command` is found by existing."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import click


def found() -> Iterator[click.Command]:
    """All commands of this package, by file name."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        made = getattr(importlib.import_module(f"{__name__}.{module.name}"), "command", None)
        if isinstance(made, click.Command):
            yield made
