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
            tensors[path] = node.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if node is None or isinstance(node, bool | int | str):
            return {"value": node}
        if isinstance(node, float):
            return {"float": node.hex()}  # exact, and carries inf and nan
        if dataclasses.is_dataclass(node) and not isinstance(node, type):
            names = [f.name for f in dataclasses.fields(node)]
            return {"fields": {n: walk(getattr(node, n), f"{path}.{n}") for n in names}}
        if isinstance(node, Mapping):
            return {"map": {str(k): walk(v, f"{path}.{k}") for k, v in node.items()}}
        if isinstance(node, list | tuple):
            return {"items": [walk(v, f"{path}.{i}") for i, v in enumerate(node)]}
        raise TypeError(f"state{path}: {type(node).__name__} cannot be checkpointed")

    return tensors, walk(state, "")


def unpack(template: S, tensors: Mapping[str, Tensor], skeleton: Any, device: torch.device | None = None) -> S:
    """The inverse of `pack`; container types come from `template`, leaves from the checkpoint.

    Raises:
        ValueError: the checkpoint does not have the shape of the template's state.
    """

    def build(like: Any, node: Any, path: str) -> Any:
        if "tensor" in node:
            kept = tensors[node["tensor"]]
            return kept.to(device) if device is not None else kept
        if "value" in node:
            return node["value"]
        if "float" in node:
            return float.fromhex(node["float"])
        if "fields" in node:
            if not dataclasses.is_dataclass(like):
                raise ValueError(f"checkpoint{path}: holds {sorted(node['fields'])}, not {type(like).__name__}")
            made = {n: build(getattr(like, n), v, f"{path}.{n}") for n, v in node["fields"].items()}
            return dataclasses.replace(like, **made)  # type: ignore[type-var]
        if "map" in node:
            return {k: build(_child(like, k), v, f"{path}.{k}") for k, v in node["map"].items()}
        built = [build(_child(like, i), v, f"{path}.{i}") for i, v in enumerate(node["items"])]
        return tuple(built) if isinstance(like, tuple) else built

    restored: S = build(template, skeleton, "")
    return restored


def _child(like: Any, key: str | int) -> Any:
    if isinstance(like, Mapping):
        return like.get(str(key))
    if isinstance(like, list | tuple) and like:
        return like[min(int(key), len(like) - 1)]
    return None
