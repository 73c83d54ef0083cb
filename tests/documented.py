"""What docs/files.md says of a file against the file: every field there, none besides, of the type that it says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,), "whole number": (int,), "number": (int, float), "true or false": (bool,), "list": (list,),
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
    inside = [k.removeprefix(f"{at}." if at else "") for k in known if k.startswith(f"{at}." if at else "")]
    own = {k for k in inside if "." not in k and "[" not in k}
    found = []
    for key, held in value.items():
        name = key if key in own else "N" if "N" in own and key.isdigit() else "*" if "*" in own else None
        if name is None:
            found.append(f"{at}.{key} is not documented")
        elif name != "*":
            found += _item(known, held, f"{at}.{name}" if at else name)
    needed = {k for k in own - {"N", "*"} if "absent" not in known[f"{at}.{k}" if at else k]}
    return found + [f"{at}.{key} is not there" for key in sorted(needed - value.keys())]


def _item(known: dict[str, str], value: Any, at: str) -> list[str]:
    said = known.get(at)
    wrong = []
    if said is not None and "any" not in said.split(" or "):
        words = said.replace("true or false", "bool").split(" or ")
        types = tuple(t for w in words for t in _TYPES.get("true or false" if w == "bool" else w, ()))
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        wrong = [] if fits else [f"{at} is {value!r}, not {said}"]
    return wrong + _differ(known, value, at)
