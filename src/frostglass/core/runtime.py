"""Where and with what randomness something runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng


@dataclass(frozen=True)
class World:
    """This process among those that share a run."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Runtime:
    """What an attack may use besides its observation.

    Args:
        rng: randomness of this attack alone, derived one way from the plan's root.
        device, dtype: of the computation.
        world: ranks among which seeds are sharded.
    """

    rng: Rng = field(default_factory=lambda: Rng.from_seed(0))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    world: World = World()

    def at(self, *path: str | int) -> Runtime:
        """The same runtime with the randomness at `path`."""
        return replace(self, rng=self.rng.at(*path))


def pick_device(name: Any) -> torch.device:
    """ "auto" (or None), "cpu", "cuda", "cuda:N" or a `torch.device` -> a device that exists.

    Raises:
        BadInput: CUDA is asked for and absent, or it is nothing of these.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(name, str | torch.device):
        raise BadInput(f"device: {name!r} is not a device; use auto, cpu or cuda.")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"device: {name!r} is not a device; use auto, cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device: {name!r} is not supported; use auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device: {name!r} was asked for and torch sees no CUDA device; use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"device: {name!r} does not exist; this machine has {torch.cuda.device_count()}, from cuda:0.")
    return device
