"""What docs/files.md says of a file against the file: every field there, none besides, of the type that it says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,), "whole number": (int,), "number": (int, float), "boolean": (bool,), "list": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip


@cache
def fields(section: str) -> dict[str, str]:
    """{field: value as documented} of one section of the page."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "files.md").read_text(encoding="utf-8")
    found = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]*\|$", found, re.M))


def misfits(section: str, value: Any) -> list[str]:
    """Where a file and its section differ; empty where they agree."""
    return _differ(fields(section), value, "")


def _differ(known: dict[str, str], value: Any, at: str) -> list[str]:
    if isinstance(value, list):
        return [text for item in value for text in _item(known, item, f"{at}[]")]
    if not isinstance(value, dict):
        return []
    prefix = f"{at}." if at else ""
    inside = [k.removeprefix(prefix) for k in known if k.startswith(prefix)]
    own = {k for k in inside if "." not in k and "[" not in k}
    found = []
    for key, held in value.items():
        name = key if key in own else "N" if "N" in own and key.isdigit() else "*" if "*" in own else None
        if name is None:
            found.append(f"{at}.{key} is not documented")
        elif name != "*":
            found += _item(known, held, prefix + name)
    needed = {k for k in own - {"N", "*"} if "absent" not in known[prefix + k]}
    return found + [f"{at}.{key} is not there" for key in sorted(needed - value.keys())]


def _item(known: dict[str, str], value: Any, at: str) -> list[str]:
    said = known.get(at)
    wrong = []
    if said is not None and "any" not in said.split(" or "):
        words = said.replace("true or false", "boolean").split(" or ")
        types = tuple(t for w in words for t in _TYPES.get(w, ()))
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        wrong = [] if fits else [f"{at} is {value!r}, not {said}"]
    return wrong + _differ(known, value, at)
