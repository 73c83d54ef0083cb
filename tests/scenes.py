"""Small plans and attacks that tests of whole runs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from frostglass.auditing.scorecard import load_scorecard
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation


def small(attack: dict[str, Any] | list[dict[str, Any]] | None = None, **parts: Any) -> dict[str, Any]:
    """A plan whose cells take a fraction of a second."""
    attacks = attack or {"name": "thaw", "steps": 30, "every": 10}
    scenario: dict[str, Any] = {
        "name": "small",
        "data": {"size": 8},
        "model": {"name": "mlp", "options": {"hidden": [16]}},
        "client": {"batch": 2, "batches": 2},
        "attack": attacks if isinstance(attacks, list) else [attacks],
    }
    top = {k: parts.pop(k) for k in ("threat", "report", "verdict", "seed", "name") if k in parts}
    for key, value in parts.items():
        scenario[key] = scenario[key] | value if isinstance(value, dict) and key in scenario else value
    return {"scenario": [scenario], "threat": {"grants": ["examples", "labels"]}} | top


def outcome_of(folder: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(scorecard without seconds and date, reconstructions, pictures)."""
    card = load_scorecard(folder / "scorecard.json").model_dump()
    for cell in card["cells"]:
        cell["seconds"] = 0.0
    card["standards"]["evidence"]["date"] = ""
    pictures = folder / "pictures.safetensors"
    return card, load_file(folder / "reconstruction.safetensors"), load_file(pictures) if pictures.exists() else {}


def same_outcome(one: Path, other: Path) -> None:
    """Asserts that two run folders hold the same result, to the last bit."""
    a, b = outcome_of(one), outcome_of(other)
    assert a[0] == b[0]
    for left, right in zip(a[1:], b[1:], strict=True):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor.nan_to_num(9), right[name].nan_to_num(9)), name


@dataclass(frozen=True)
class Custom:
    """An attack of one step that calls what it is given, to see what a run makes of it."""

    call: Any
    found: Any = None
    name: str = "custom"
    steps: int = 1
    every: int = 1
    needs: frozenset[Knows] = frozenset()

    def check(self, seen: Observation) -> list[str]:
        return []

    def init(self, seen: Observation, run: Runtime) -> int:
        return 0

    def step(self, seen: Observation, state: int, run: Runtime, t: int) -> tuple[int, dict[str, float]]:
        self.call(seen, run)
        return state + 1, {"loss": 1.0}

    def done(self, state: int) -> bool:
        return False

    def read(self, seen: Observation, state: int) -> Reconstruction:
        if self.found is not None:
            return self.found(seen)  # type: ignore[no-any-return]
        return Reconstruction(torch.zeros(1, *seen.image_shape), torch.zeros(1, dtype=torch.bool), float("nan"))
