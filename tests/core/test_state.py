"""A checkpoint gives back exactly the state that went in, whatever its shape."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frostglass.auditing.store import CheckpointStore
from frostglass.core.errors import BadInput
from frostglass.core.state import pack, unpack


@dataclass(frozen=True)
class Node:
    inner: Any
    number: float = 0.0
    made: int = field(init=False, default=7)


class Pair(NamedTuple):
    left: Any
    right: Any


tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.arange(6).view(2, 3),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.tensor([True, False]),
        torch.rand(2, 3, dtype=torch.float64).T,
        torch.ones(2, dtype=torch.bfloat16),
    ]
)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors)
keys = st.one_of(st.text(max_size=4), st.integers(-3, 3), st.sampled_from(["a.b", "a", ".", "0"]))
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.builds(Node, inner, st.floats()),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    if isinstance(a, float):
        return a.hex() == b.hex() if not math.isnan(a) else math.isnan(b)
    if isinstance(a, Node):
        return same(a.inner, b.inner) and same(a.number, b.number)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(states)
def test_there_and_back(state: Any) -> None:
    held, skeleton = pack(state)
    assert same(unpack(state, held, json.loads(json.dumps(skeleton))), state)


def test_a_key_with_a_dot_does_not_meet_anothers_path() -> None:
    state = {"a.b": torch.zeros(2), "a": {"b": torch.ones(3)}}
    held, skeleton = pack(state)
    assert same(unpack(state, held, skeleton), state)


def test_what_grew_since_init_comes_back() -> None:
    """A template is the state of step 0: lists and Nones of then may be fuller now."""
    then = Node({"seen": [], "best": None, "pairs": [Pair(0, 0)]})
    now = Node({"seen": [(1, 2)], "best": (torch.ones(2), 3), "pairs": [Pair(1, 2), Pair(3, None)]})
    held, skeleton = pack(now)
    assert same(unpack(then, held, skeleton), now)


def test_checkpoints_share_no_memory_with_the_state() -> None:
    z = torch.zeros(3, requires_grad=True)
    held, _ = pack({"z": z})
    with torch.no_grad():
        z += 1
    assert float(next(iter(held.values())).sum()) == 0
    assert not next(iter(held.values())).requires_grad


def test_tensors_go_where_the_templates_are() -> None:
    held, skeleton = pack({"z": torch.ones(2), "new": torch.ones(1)})
    back = unpack({"z": torch.ones(2, device="meta")}, held, skeleton, torch.device("cpu"))
    assert (back["z"].device.type, back["new"].device.type) == ("meta", "cpu")


@pytest.mark.parametrize("state", [{1, 2}, lambda: 0, {(1, 2): 3}, {True: 1}, {"generator": torch.Generator()}])
def test_what_runs_or_has_no_form_is_refused(state: Any) -> None:
    with pytest.raises(TypeError, match="cannot be checkpointed"):
        pack({"deep": [state]})


def test_a_state_of_another_shape_is_refused() -> None:
    held, skeleton = pack({"a": Node(1.5)})
    with pytest.raises(ValueError, match="checkpoint"):
        unpack({"a": 3}, held, skeleton)
    with pytest.raises(ValueError, match="missing"):
        unpack({"a": torch.zeros(1)}, {}, pack({"a": torch.zeros(1)})[1])


def test_a_file_keeps_a_state_and_the_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c.safetensors", torch.device("cpu"))
    assert store.load(Node(None)) is None
    state = Node({"z": torch.rand(2, 2), 3: [math.inf]}, math.nan)
    store.save(41, Node(None))
    store.save(42, state)
    step, back = store.load(state)  # type: ignore[misc]
    assert step == 42
    assert same(back, state)
    with pytest.raises(BadInput, match="another version"):
        store.load({"other": 1})
    (tmp_path / "c.safetensors").write_bytes(b"cut off")
    with pytest.raises(BadInput, match="cannot be read"):
        store.load(state)
