"""Any attack state (dataclasses, tuples, dicts, tensors, numbers) <-> flat tensors and a JSON skeleton.

A checkpoint holds tensors and plain numbers and nothing that runs: reading one takes a template, the state that
`init` builds, for the types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """State -> (tensors by path, JSON-ready skeleton).

    Raises:
        TypeError: something that is no tensor, number, text, None, list, tuple, dict or dataclass.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            name = f"{len(tensors)}{path}"  # numbered: a key that holds a dot must not meet another's path
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {"tensor": name}
        if node is None or isinstance(node, bool | int | str):
            return {"value": node}
        if isinstance(node, float):
            return {"float": node.hex()}  # exact, and carries inf and nan
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            names = [f.name for f in dataclasses.fields(node) if f.init]
            return {"fields": {n: walk(getattr(node, n), f"{path}.{n}") for n in names}}
        if isinstance(node, Mapping):
            wrong = [k for k in node if isinstance(k, bool) or not isinstance(k, str | int)]
            if wrong:
                raise TypeError(
                    f"state{path}: key {wrong[0]!r} is no text or whole number, so it cannot be checkpointed"
                )
            return {"map": [[k, walk(v, f"{path}.{k}")] for k, v in node.items()]}
        if isinstance(node, list | tuple):
            kind = "list" if isinstance(node, list) else "tuple"
            return {kind: [walk(v, f"{path}.{i}") for i, v in enumerate(node)]}
        raise TypeError(f"state{path}: {type(node).__name__} cannot be checkpointed")

    return tensors, walk(state, "")


def unpack(template: S, tensors: Mapping[str, Tensor], skeleton: Any, device: torch.device | None = None) -> S:
    """The inverse of `pack`; dataclasses and named tuples come from `template`, all else from the checkpoint.

    Args:
        template: a state of the same shape.
        tensors, skeleton: as `pack` gave them.
        device: for tensors that the template does not have; the others go where the template's are.

    Raises:
        ValueError: the checkpoint does not have the shape of the template's state.
    """

    def build(like: Any, node: Any, path: str) -> Any:
        if "tensor" in node:
            place = like.device if isinstance(like, Tensor) else device
            return tensors[node["tensor"]].to(place)
        if "value" in node:
            return node["value"]
        if "float" in node:
            return float.fromhex(node["float"])
        if "fields" in node:
            known = {f.name for f in dataclasses.fields(like)} if dataclasses.is_dataclass(like) else set()
            if not known.issuperset(node["fields"]):
                raise ValueError(f"checkpoint{path}: holds {sorted(node['fields'])}, not {type(like).__name__}")
            made = {n: build(getattr(like, n), v, f"{path}.{n}") for n, v in node["fields"].items()}
            return dataclasses.replace(like, **made)
        if "map" in node:
            return {k: build(_child(like, k), v, f"{path}.{k}") for k, v in node["map"]}
        if "list" in node:
            return [build(_child(like, i), v, f"{path}.{i}") for i, v in enumerate(node["list"])]
        built = [build(_child(like, i), v, f"{path}.{i}") for i, v in enumerate(node["tuple"])]
        return type(like)(*built) if hasattr(like, "_fields") else tuple(built)

    try:
        restored: S = build(template, skeleton, "")
    except KeyError as missing:
        raise ValueError(f"checkpoint: {missing} is missing") from None
    return restored


def _child(like: Any, key: str | int) -> Any:
    """What the template has at `key`; its last entry stands for those of a list that has grown since."""
    if isinstance(like, Mapping):
        return like.get(key)
    if isinstance(like, list | tuple) and like:
        return like[min(int(key), len(like) - 1)]
    return None
