"""The whole linter: read, look, recompute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from frostglass.auditing.linting.facts import LEVEL, Facts
from frostglass.auditing.linting.output import Checked
from frostglass.auditing.linting.reading import read_source
from frostglass.auditing.linting.recompute import recompute
from frostglass.auditing.linting.rules import findings


def check_file(path: Path) -> Checked:
    """Of a configuration file.

    Raises:
        BadInput: it cannot be read, or is of no known kind.
    """
    source = read_source(path)
    return check_facts(source.facts, path.as_posix(), source.kind)


def check_facts(facts: Sequence[Facts], name: str, kind: str) -> Checked:
    """Of mechanisms that are known already: numbers, or live objects."""
    found = [f for one in facts for f in findings(one)]
    found.sort(key=lambda f: (-LEVEL[f.severity], f.line or 0))
    numbers = [n for n in map(recompute, facts) if n is not None]
    return Checked(name, kind, len(facts), tuple(found), tuple(numbers))
