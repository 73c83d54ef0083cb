"""From a TOML file and `--set` to the values of a plan, and from what pydantic finds to sentences."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from frostglass.core.errors import BadInput, close_match
from frostglass.core.files import placed, source_placed

SHOWN = 60
"""Letters of a wrong value that a sentence repeats."""


def read_values(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a plan file after `overrides`, with its relative paths anchored at its folder.

    Raises:
        BadInput: the file is missing, unreadable or no TOML, or an override does not parse.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadInput(f"plan: {path} does not exist; `frostglass init` writes one for `frostglass audit`.") from None
    except OSError as wrong:
        raise BadInput(f"plan: {path} cannot be read ({wrong.strerror}); give a TOML file that you may read.") from None
    except UnicodeDecodeError as wrong:
        raise BadInput(f"plan: {path} cannot be read as UTF-8 ({wrong.reason}); save it in UTF-8.") from None
    except (ValueError, RecursionError) as wrong:  # TOMLDecodeError, and numbers of more digits than Python parses
        raise BadInput(f"plan: {path} is not valid TOML ({wrong}).") from None
    for override in overrides:
        override_value(values, override)
    _anchor_paths(values, path.parent)
    return values


def _anchor_paths(values: Mapping[str, Any], folder: Path) -> None:
    """Makes paths of sources, weights and generators relative to the plan, so that a plan works from anywhere."""

    def generator(text: str, folder: Path) -> str:
        return placed(text, folder) if text.endswith(".safetensors") else text

    scenarios = values.get("scenario")
    tables = [s for s in scenarios if isinstance(s, dict)] if isinstance(scenarios, list) else []
    for table, key, anchored in [
        *((s.get("data"), "source", source_placed) for s in tables),
        *((s.get("model"), "weights", placed) for s in tables),
        *((a, "generator", generator) for s in tables for a in _listed(s.get("attack"))),
        *((s.get("threat"), "auxiliary", source_placed) for s in [values, *tables]),
    ]:
        if isinstance(table, dict) and isinstance(table.get(key), str) and table[key]:
            table[key] = anchored(table[key], folder)


def _listed(tables: Any) -> list[Any]:
    return tables if isinstance(tables, list) else []


def override_value(values: dict[str, Any], text: str) -> None:
    """Sets what `text` (`key.of.a.table=value`) says in `values`.

    Raises:
        BadInput: it does not read so, or goes nowhere.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"--set: {text!r} must read key=value, as in scenario.client.batch=8.")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except (ValueError, RecursionError):
        value = raw
    _assign(values, key.strip().split("."), value, text)


def _assign(node: Any, path: list[str], value: Any, text: str) -> None:
    head, rest = path[0], path[1:]
    if isinstance(node, list) and head.isdecimal():
        if int(head) >= len(node):
            raise BadInput(f"--set: {text!r} names entry {head} of {len(node)}; count from 0.")
        if rest:
            _assign(node[int(head)], rest, value, text)
        else:
            node[int(head)] = value
    elif isinstance(node, list):
        if not node:
            raise BadInput(f"--set: {text!r} goes into an empty list.")
        for entry in node:
            _assign(entry, path, value, text)
    elif not isinstance(node, dict):
        raise BadInput(f"--set: {text!r} goes into a value that is no table.")
    elif rest:
        _assign(node.setdefault(head, {}), rest, value, text)
    else:
        node[head] = value


def sentences(wrong: ValidationError, root: type[BaseModel]) -> list[str]:
    """One for each problem that pydantic found in a `root`."""
    found = []
    for e in wrong.errors():
        loc, kind, message = e["loc"], e["type"], e["msg"]
        if loc and loc[-1] in ("int", "float"):  # of a number of either kind pydantic tells twice; neither is a key
            loc, kind, message = loc[:-1], "number", "Input should be a finite number"
        found.append(_sentence(loc, kind, message, e.get("input"), root))
    return list(dict.fromkeys(found))


def _sentence(loc: tuple[int | str, ...], kind: str, message: str, value: Any, root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in loc) or "plan"
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {close_match(str(loc[-1]), _siblings(loc, root))}."
    if kind == "missing":
        return f"{where}: missing; give it a value."
    if kind == "too_short" and value == []:
        return f"{where}: empty; give at least one."
    if kind == "list_type" and isinstance(value, dict):
        return f"{where}: one table; write [[{where}]], in double brackets, as there may be several."
    words = message.removeprefix("Value error, ")
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
    if kind == "model_type":  # pydantic's own words name a class of Python
        return f"{where}: {shown} is not valid: a table is wanted, as {{ key = value }}."
    return f"{where}: {shown} is not valid: {words[0].lower()}{words[1:]}."


def _siblings(loc: tuple[int | str, ...], root: type[BaseModel]) -> Iterator[str]:
    model = root
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    yield from model.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def without_errors(values: Mapping[str, Any], wrong: ValidationError) -> dict[str, Any] | None:
    """A copy of `values` without what pydantic refused, so that the rest can be checked too; None where that fails."""
    kept = copy.deepcopy(dict(values))
    for error in wrong.errors():
        node: Any = kept
        loc = error["loc"]
        if error["type"] == "missing" or not loc or isinstance(loc[-1], int):
            return None
        for part in loc[:-1]:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                return None
        if isinstance(node, dict):
            node.pop(loc[-1], None)
    return kept
