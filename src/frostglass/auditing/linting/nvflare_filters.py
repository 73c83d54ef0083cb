"""NVFlare's filter configurations: config_fed_client.json, and the scopes of a site's privacy.json.

The filters' names, parameters and behaviour are those of nvflare.app_common.filters. Executors take patterns of tasks
(a name with "*", matched by fnmatch); filters are looked up by a task's exact name, so a pattern there applies to none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from frostglass.auditing.linting.facts import Facts, as_number
from frostglass.auditing.linting.lines import line_of, lines_of_keys

HEURISTIC = {
    "SVTPrivacy": "SVTPrivacy (sparse vector)",
    "PercentilePrivacy": "PercentilePrivacy (largest values)",
    "ExcludeVars": "ExcludeVars (leaves variables out)",
}
"""None of them adds noise that is calibrated to a sensitivity of the whole update."""

RESULTS = "task_result_filters"

MODEL_TASKS = ("train", "submit_model")
"""Tasks whose results hold something of the model."""


def nvflare_facts(path: Path, text: str, values: Any) -> list[Facts] | None:
    """Every filter on what leaves a client; None if the file has no place for filters."""
    del path
    lists = list(_filter_lists(values, ""))
    if not lists:
        return None
    # NVFlare refuses two chains for one task, so each chain may well leave the tasks of another one out.
    covered = {t for _, tasks, filters in lists if any(_is_mechanism(_named(f)) for f in filters) for t in tasks}
    found: list[Facts] = []
    line = 0
    for scope, tasks, filters in lists:
        met = {*tasks, *covered}
        bare = [f"results of the task {t!r}{how}" for t, how in _tasks_sent(values) if tasks and not _met(t, met)]
        bare += [f"results of the task {t!r} (NVFlare applies filters by exact name)" for t in tasks if "*" in t]
        for entry in filters:
            named = _named(entry)
            if not named:
                continue
            line = line_of(text, re.escape(named), line + 1) or line or 1
            args = entry.get("args")
            found.append(_facts(named, args if isinstance(args, Mapping) else {}, scope, bare, text, line))
    return found


def _named(entry: Any) -> str:
    return str(entry.get("path") or entry.get("name") or "") if isinstance(entry, Mapping) else ""


def _is_mechanism(named: str) -> bool:
    kind = named.rpartition(".")[2]
    return kind in HEURISTIC or "gauss" in kind.lower()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _filter_lists(node: Any, scope: str) -> Iterator[tuple[str, tuple[str, ...], list[Any]]]:
    """(scope, tasks they apply to, filters) of all result filters; no task: all of them."""
    if isinstance(node, list):
        for entry in node:
            yield from _filter_lists(entry, scope)
    if not isinstance(node, Mapping):
        return
    here = str(node.get("name", scope)) if RESULTS in node else scope
    for key, value in node.items():
        if key == RESULTS and isinstance(value, list):
            grouped = [g for g in value if isinstance(g, Mapping) and isinstance(g.get("filters"), list)]
            for group in grouped:
                yield here, tuple(map(str, _listed(group.get("tasks")))), group["filters"]
            if not grouped:
                yield here, (), value
        elif key != RESULTS:
            yield from _filter_lists(value, here)


def _tasks_sent(values: Any) -> list[tuple[str, str]]:
    """(a task that the executors take and that returns something of the model, by what they do if not by its name).

    A pattern that stands for none of the known tasks stands for itself.
    """
    if not isinstance(values, Mapping):
        return []
    executors = [e for e in _listed(values.get("executors")) if isinstance(e, Mapping)]
    taken = [t for e in executors for t in _listed(e.get("tasks")) if isinstance(t, str)]
    patterns = [p for p in taken if "*" in p]
    found = []
    for task in MODEL_TASKS:
        pattern = next((p for p in patterns if fnmatch(task, p)), None)
        if task in taken or pattern is not None:
            found.append((task, "" if task in taken else f" (which an executor of {pattern!r} takes)"))
    own = [p for p in patterns if p.startswith(MODEL_TASKS) and not any(fnmatch(t, p) for t in MODEL_TASKS)]
    return found + [(p, "") for p in own]


def _met(task: str, names: Iterable[str]) -> bool:
    """Whether a filter on these tasks is on this one, or on some of those that this pattern stands for."""
    return any(n == task or fnmatch(n, task) for n in names if "*" not in n)


def _facts(named: str, args: Mapping[str, Any], scope: str, bare: list[str], text: str, line: int) -> Facts:
    kind = named.rpartition(".")[2]
    number = {k: v for k, v in ((k, as_number(v)) for k, v in args.items()) if v is not None}
    unnoised = list(bare)
    if kind == "PercentilePrivacy" and not (number.get("gamma", 0.01) > 0 and 0 <= number.get("percentile", 10) <= 100):
        unnoised.append("all values (with gamma <= 0 or a percentile outside 0 to 100 this filter passes everything)")
    if kind in ("SVTPrivacy", "PercentilePrivacy"):
        unnoised.append("scalar tensors (this filter passes them as they are)")
    known = kind in HEURISTIC
    gaussian = "gauss" in kind.lower()
    return Facts(
        framework="NVFlare",
        name=HEURISTIC.get(kind, kind),
        called_dp=known or gaussian,
        calibrated=gaussian,
        where=f"{kind}{f' in scope {scope}' if scope else ''}",
        lines={"name": line, **lines_of_keys(text, args, line)},
        epsilon=number.get("epsilon") if kind == "SVTPrivacy" or gaussian else None,
        delta=number.get("delta"),
        epsilon_is="release" if "epsilon" in number else None,
        noise_std=number.get("sigma") if gaussian else None,
        accounted=False,
        clip_unit="client",
        unnoised=tuple(unnoised),
        secure_generator=False if kind == "SVTPrivacy" else None,
    )
