"""Named things found by their existing: a module that registers an attack is all it takes to add one.

Modules of other packages are found where these name them as entry points of the group `PLUGINS`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
import threading
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Generic, TypeVar

from frostglass.core.errors import BadInput, close_match

T = TypeVar("T")

PLUGINS = "frostglass.plugins"
"""Entry points whose modules register attacks, defences, metrics, networks and data of other packages."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered maker.

    Args:
        name: as in a plan.
        make: called with keyword parameters only, which it checks as `problems` does.
        summary: the first line of its docstring.
        paper: its source, if it has one.
        about: further facts (what it needs, what it claims).
    """

    name: str
    make: Callable[..., T]
    summary: str
    paper: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Keyword parameters of the maker, by name."""
        return dict(inspect.signature(self.make).parameters)

    def problems(self, settings: Mapping[str, Any], where: str) -> list[str]:
        """What is wrong with `settings` as parameters of this entry, a sentence each."""
        found = []
        known = self.parameters
        hints = typing.get_type_hints(self.make)
        for key, value in settings.items():
            if key not in known:
                found.append(f"{where}.{key}: unknown parameter of {self.name!r}; {close_match(key, known)}.")
            elif not _fits(value, hints.get(key, Any)):
                want = _spell(hints[key])
                found.append(f"{where}.{key}: {value!r} is not {want}, which {self.name!r} takes there.")
        for key, parameter in known.items():
            if parameter.default is inspect.Parameter.empty and key not in settings:
                found.append(f"{where}.{key}: missing; {self.name!r} needs it.")
        return found


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in typing.get_args(hint))
    if origin is typing.Literal:
        return any(type(value) is type(a) and value == a for a in typing.get_args(hint))  # True is not 1
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        args = [a for a in typing.get_args(hint) if a is not Ellipsis]
        return isinstance(value, list | tuple) and all(any(_fits(v, a) for a in args) for v in value)
    if hint is float:  # a plan may spell nan and inf; no parameter means them, and scorecard.json cannot hold them
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    return isinstance(value, hint) if isinstance(hint, type) else True


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    origin, args = typing.get_origin(hint), [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_spell, args)))
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, typing.Sequence)):
        many = {float: "numbers", int: "whole numbers", str: "texts"}
        return "a list" + "".join(f" of {many[a]}" for a in args[:1] if a in many)
    return words.get(hint, str(hint).replace("typing.", ""))


def _no(made: object, wanted: type) -> str:
    """What a maker did instead of returning what is wanted: of a protocol, the first member that is not there."""
    said = f"returned {type(made).__name__}; it must return"
    lacking = [m for m in vars(wanted) if not m.startswith("_") and not hasattr(made, m)]
    if made is None or not getattr(wanted, "_is_protocol", False) or not lacking:
        return f"{said} {wanted.__name__}"
    return f"{said} {wanted.__name__}, and that has no {lacking[0]!r}"


_SCANNING = threading.RLock()
"""Held by the thread that scans any registry, which may ask all of them, and gets what is there so far.

One for all: a plug-in that asks while it is imported would wait for a thread that waits for its import.
"""


class _Plugins:
    """Of others, imported once; an error is told each time."""

    def __init__(self) -> None:
        self.whole = self._inside = False

    def bring(self) -> bool:
        """Imports them; whether all are there, which they are not yet for one that asks while it is imported."""
        if not self.whole and not self._inside:
            self._inside = True
            try:
                for point in metadata.entry_points(group=PLUGINS):
                    _import_plugin(point)
                self.whole = True
            finally:
                self._inside = False
        return self.whole


_PLUGINS = _Plugins()


def _import_plugin(point: metadata.EntryPoint) -> None:
    whose = f"plug-in {point.name!r}" + (f" of {point.dist.name}" if point.dist is not None else "")
    parts = point.pattern.match(point.value)  # `point.module` takes for granted that it is one
    if parts is None:
        raise BadInput(f'{whose}: {point.value!r} names no module; write it as "package.module" there.')
    try:
        importlib.import_module(parts["module"])
    except (Exception, SystemExit) as wrong:  # a module that is a script would end the command without a word
        raise BadInput(
            f"{whose}: {parts['module']} cannot be imported ({type(wrong).__name__}: {wrong}); "
            "repair that package, or uninstall it."
        ) from wrong


class Registry(Generic[T]):
    """Makers by name; the packages in `homes` are imported on first use, so that a new file is found by existing.

    Args:
        noun: what is made, in sentences.
        homes: packages.
        makes: type, or protocol, of what makers return; None for any.
    """

    def __init__(self, noun: str, *homes: str, makes: type | None = None) -> None:
        self.noun = noun
        self._makes = makes
        self._homes = homes
        self._entries: dict[str, Entry[T]] = {}
        self._scanned = False
        self._inside = False

    def register(self, name: str | None = None, *, paper: str = "", **about: Any) -> Callable[..., Any]:
        """Decorator for a maker; the name defaults to the function's own."""

        def keep(make: Callable[..., T]) -> Callable[..., T]:
            key = name or make.__name__
            if key in self._entries and self._entries[key].make.__module__ != make.__module__:
                raise ValueError(f"two {self.noun}s are called {key!r}")

            @functools.wraps(make)
            def checked(**settings: Any) -> T:
                wrong = entry.problems(settings, f"{self.noun} {key!r}")
                if wrong:
                    raise BadInput(wrong)
                made = make(**settings)
                if self._makes is not None and not isinstance(made, self._makes):
                    raise BadInput(f"{self.noun} {key!r}: its function {_no(made, self._makes)}.")
                return made

            doc = inspect.getdoc(make) or ""
            entry = Entry(key, checked, doc.split("\n", 1)[0].rstrip("."), paper, about)
            self._entries[key] = entry
            return make

        return keep

    def _scan(self) -> None:
        if self._scanned:
            return
        with _SCANNING:  # a second thread waits: half a registry would refuse names that exist
            if self._scanned or self._inside:
                return
            self._inside = True
            try:
                for home in self._homes:
                    package = importlib.import_module(home)
                    for module in pkgutil.walk_packages(package.__path__, home + "."):
                        importlib.import_module(module.name)
                self._scanned = _PLUGINS.bring()  # only now: a file that cannot be imported is an error each time
            finally:
                self._inside = False

    def __iter__(self) -> Iterator[Entry[T]]:
        self._scan()
        return iter(sorted(self._entries.values(), key=lambda e: e.name))

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._entries

    def __getitem__(self, name: str) -> Entry[T]:
        self._scan()
        if name not in self._entries:
            raise BadInput(f"{self.noun}: {name!r} is not known; {close_match(name, self._entries)}.")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return [entry.name for entry in self]
