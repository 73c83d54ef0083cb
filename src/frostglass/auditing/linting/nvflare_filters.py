"""NVFlare's filter configurations: config_fed_client.json, and the scopes of a site's privacy.json.

The filters' names, parameters and behaviour are those of nvflare.app_common.filters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frostglass.auditing.linting.facts import Facts
from frostglass.auditing.linting.lines import line_of, lines_of_keys

HEURISTIC = {
    "SVTPrivacy": "SVTPrivacy (sparse vector)",
    "PercentilePrivacy": "PercentilePrivacy (largest values)",
    "ExcludeVars": "ExcludeVars (leaves variables out)",
}
"""None of them adds noise that is calibrated to a sensitivity of the whole update."""

RESULTS = "task_result_filters"


def nvflare_facts(path: Path, text: str, values: Any) -> list[Facts] | None:
    """Every filter on what leaves a client; None if the file has no place for filters."""
    del path
    if not any(True for _ in _filter_lists(values, "")):
        return None
    found: list[Facts] = []
    line = 1
    for scope, tasks, filters in _filter_lists(values, ""):
        for entry in filters:
            named = str(entry.get("path") or entry.get("name") or "") if isinstance(entry, Mapping) else ""
            if not named:
                continue
            line = line_of(text, re.escape(named), line) or line
            found.append(_facts(named, entry.get("args") or {}, scope, tasks, _tasks_sent(values), text, line))
    return found


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
                yield here, tuple(map(str, group.get("tasks", ()))), group["filters"]
            if not grouped:
                yield here, (), value
        elif key != RESULTS:
            yield from _filter_lists(value, here)


def _tasks_sent(values: Any) -> tuple[str, ...]:
    """Tasks of the executors: those of them that return something of the model."""
    if isinstance(values, Mapping):
        tasks = [t for e in values.get("executors", []) if isinstance(e, Mapping) for t in e.get("tasks", [])]
        return tuple(str(t) for t in tasks if t in ("train", "submit_model"))
    return ()


def _facts(
    named: str, args: Mapping[str, Any], scope: str, tasks: tuple[str, ...], sent: tuple[str, ...], text: str, line: int
) -> Facts:
    kind = named.rpartition(".")[2]
    number = {k: float(v) for k, v in args.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    bare = [t for t in sent if tasks and t not in tasks]
    unnoised = [f"results of the task {t!r}" for t in bare]
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
