"""Functions by their path, for engines and plans that carry text alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from frostglass.core.errors import BadInput


def named(path: str, what: str) -> Callable[..., Any]:
    """The function at "package.module:name".

    Raises:
        BadInput: there is none.
    """
    module, colon, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, ValueError) as wrong:
        raise BadInput(f"{what}: {path!r} cannot be imported ({wrong}).") from None
    if not callable(found):
        raise BadInput(f"{what}: {path!r} is no function; write 'package.module:function'.")
    return found
