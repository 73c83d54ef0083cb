"""Calls of Opacus and of Flower's privacy mechanisms in Python source; nothing is run."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from frostglass.auditing.linting.facts import Facts
from frostglass.auditing.linting.flower_mechanisms import MECHANISMS, flower_facts
from frostglass.auditing.linting.lines import line_of, lines_of_keys
from frostglass.auditing.linting.opacus_calls import CALLS, opacus_facts
from frostglass.core.errors import BadInput

Values = Mapping[str, Any]

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: lambda a, b: float(a) ** b,  # of floats, so that no file makes it compute a number of any length
}  # fmt: skip


class Scope:
    """Constants of a module, and a run configuration, so that names in calls become numbers."""

    def __init__(self, tree: ast.Module, config: Values) -> None:
        self.config = config
        self.constants: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                names: list[ast.expr] = node.targets
            elif isinstance(node, ast.AnnAssign):
                names = [node.target]
            else:
                continue
            value = self.value(node.value)
            if value is not None and len(names) == 1 and isinstance(names[0], ast.Name):
                self.constants[names[0].id] = value

    def value(self, node: ast.expr | None) -> Any:
        """The constant that an expression stands for; None if it cannot be told without running it."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.constants.get(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self.value(node.operand)
            return -inner if isinstance(inner, int | float) else None
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = self.value(node.left), self.value(node.right)
            if all(isinstance(v, int | float) for v in (left, right)):
                try:
                    return _ARITHMETIC[type(node.op)](left, right)
                except ArithmeticError:  # division by 0, or too large
                    return None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("float", "int"):
            return self.value(node.args[0]) if node.args else None
        if isinstance(node, ast.Subscript):  # context.run_config["clipping-norm"]
            return self.config.get(_key(self.value(node.slice)))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            held = self.config.get(_key(self.value(node.args[0])))
            return held if held is not None or len(node.args) < 2 else self.value(node.args[1])
        return None


def _key(name: Any) -> str:
    return str(name).replace("-", "_")


def called(node: ast.Call) -> str:
    """Last part of what is called: `make_private` of `engine.make_private(...)`."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def arguments(node: ast.Call, names: tuple[str, ...], scope: Scope) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants by parameter, lines), positional arguments by `names`."""
    given = [*zip(names, node.args, strict=False), *((k.arg, k.value) for k in node.keywords if k.arg)]
    return {n: scope.value(v) for n, v in given}, {n: v.lineno for n, v in given}


def python_facts(path: Path, text: str, _: Any, config: Values | None = None) -> list[Facts] | None:
    """All mechanisms in one source file; None if it calls none that is known."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    scope = Scope(tree, config or {})
    found: list[Facts] = []
    for node in _calls(tree):
        name = called(node)
        if name in MECHANISMS:
            held, lines = arguments(node, MECHANISMS[name], scope)
            found.append(flower_facts(name, held, {"name": node.lineno, **lines}, config or {}))
        elif name in CALLS:
            held, lines = arguments(node, (), scope)
            found.append(opacus_facts(name, held, {"name": node.lineno, **lines}, tree, scope))
    known = bool(found) or bool(re.search(r"^\s*(from|import) (opacus|flwr)\b", text, re.M))
    return [_placed(f, path) for f in found] if known else None


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    yield from sorted(calls, key=lambda node: node.lineno)


def _placed(facts: Facts, path: Path) -> Facts:
    return replace(facts, where=f"{facts.name} ({path.name})")


def flower_project_facts(path: Path, text: str, values: Any) -> list[Facts] | None:
    """A Flower app: the mechanisms in its components, with the run configuration that they read.

    Raises:
        BadInput: a component cannot be read, so that nothing can be said of the app.
    """
    app = _table(_table(_table(values, "tool"), "flwr"), "app")
    if app is None:
        return None
    config = {_key(k): v for k, v in _flat(_table(app, "config") or {})}
    found: list[Facts] = []
    for component in (_table(app, "components") or {}).values():
        module = path.parent / (str(component).partition(":")[0].replace(".", "/") + ".py")
        if module.is_file():
            of_module = python_facts(module, _source_text(module), None, config) or []
            found += [replace(f, file=module.as_posix()) for f in of_module]
    return found or _by_names(text, config)


def _table(values: Any, key: str) -> Mapping[str, Any] | None:
    held = values.get(key) if isinstance(values, Mapping) else None
    return held if isinstance(held, Mapping) else None


def _source_text(module: Path) -> str:
    """Text of a component that parses; one that does not would hide its mechanisms."""
    try:
        text = module.read_text(encoding="utf-8-sig")
        ast.parse(text)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError) as wrong:
        why = wrong.msg if isinstance(wrong, SyntaxError) else wrong
        raise BadInput(f"check: the component {module.name} cannot be read as Python ({why}); mend it.") from None
    return text


def _flat(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value


def _by_names(text: str, config: Values) -> list[Facts]:
    """Without the source: parameters named as Flower's own."""
    start = line_of(text, r"tool\.flwr\.app\.config") or 1
    for name, parameters in MECHANISMS.items():
        needed = [p for p in parameters if p in ("clipping_norm", "noise_multiplier", "sensitivity", "epsilon")]
        if needed and all(p in config for p in needed):
            lines = {"name": start, **lines_of_keys(text, config, start)}
            return [flower_facts(name, {p: config.get(p) for p in parameters}, lines, config)]
    return []
