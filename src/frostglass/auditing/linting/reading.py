"""From a file to facts: tries every reader, and says which were tried."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frostglass.auditing.linting.facts import Facts
from frostglass.auditing.linting.nvflare_filters import nvflare_facts
from frostglass.auditing.linting.plan_defenses import plan_facts
from frostglass.auditing.linting.python_source import flower_project_facts, python_facts
from frostglass.core.errors import BadInput


@dataclass(frozen=True)
class Source:
    """A file that was read.

    Args:
        path: where it is.
        text: what is in it.
        kind: which reader knew it.
        facts: one entry for each mechanism in it.
    """

    path: Path
    text: str
    kind: str
    facts: tuple[Facts, ...]


Reader = Callable[[Path, str, Any], "list[Facts] | None"]
"""None: not a file of this kind. An empty list: of this kind, without a privacy mechanism."""

READERS: tuple[tuple[str, str, Reader], ...] = (
    ("Frostglass plan", ".toml", plan_facts),
    ("Flower project (pyproject.toml with [tool.flwr])", ".toml", flower_project_facts),
    ("NVFlare filter configuration", ".json", nvflare_facts),
    ("Python source with Opacus or Flower", ".py", python_facts),
)


def read_source(path: Path) -> Source:
    """Reads a configuration of any known kind.

    Raises:
        BadInput: the file cannot be read, or is of no known kind; says which were tried.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"check: {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as wrong:
        raise BadInput(f"check: {path} cannot be read as text ({wrong}).") from None
    values, broken = _parsed(path, text)
    tried = [name for name, suffix, _ in READERS]
    if broken is None:
        for name, suffix, read in READERS:
            try:
                found = read(path, text, values) if path.suffix == suffix else None
            except (RecursionError, MemoryError):  # of Python's own parser, too
                raise BadInput(f"check: {path.name} is nested too deeply to be read; split it up.") from None
            if found is not None:
                return Source(path, text, name, tuple(found))
    why = f" ({broken})" if broken else ""
    raise BadInput(f"check: {path.name} is none of the known kinds{why}; tried: {'; '.join(tried)}; or give numbers.")


def _parsed(path: Path, text: str) -> tuple[Any, str | None]:
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text), None
        if path.suffix == ".json":
            return json.loads(text), None
    except (ValueError, RecursionError) as wrong:
        return None, f"not valid {path.suffix[1:].upper()}: {wrong}"
    return None, None
