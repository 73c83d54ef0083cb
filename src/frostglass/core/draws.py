"""Random operators of one thread on generators of its own, while another thread trains on torch's.

torch's own generators are one a process and device. Whoever forks and restores them beside a training takes back what
the training drew meanwhile, so that a Dropout of either depends on which thread came first.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HERE = threading.local()
_WITH_GENERATOR = {"default": "generator", "low": "low_generator"}
"""Overloads of rand, randn, randint and randperm that take a generator."""


def seed_of(key: bytes) -> int:
    """63 bits of a key, for torch's own generators."""
    return int.from_bytes(key[:8], "big") & (2**63 - 1)


@functools.cache
def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


class Draws(TorchDispatchMode):
    """Operators of the block that would draw from torch's own generators draw from these.

    Those that can be given no generator (a fused attention with dropout on CUDA) still draw from torch's.
    """

    def __init__(self, key: bytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._key, self._made = key, dict[torch.device, torch.Generator]()

    @contextmanager
    def following(self, key: bytes) -> Iterator[None]:
        """Inside, draws follow from `key`, as torch's own would after `manual_seed`; afterwards they go on."""
        before = self._key, self._made
        self._key, self._made = key, {}
        try:
            yield
        finally:
            self._key, self._made = before

    def generator(self, device: torch.device) -> torch.Generator:
        """Of a device, begun at the first draw."""
        if device not in self._made:
            self._made[device] = torch.Generator(device).manual_seed(seed_of(self._key))
        return self._made[device]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operator, with a generator where it draws."""
        if not _random(func):
            return func(*args, **(kwargs or {}))
        given = dict(kwargs or {})
        first = next((a for a in args if isinstance(a, Tensor)), None)
        device = torch.device(given.get("device") or ("cpu" if first is None else first.device))
        if first is not None and func._schema.name == "aten::native_dropout":
            return self._dropout(first, *args[1:])
        if any(a.name == "generator" for a in func._schema.arguments):
            if given.get("generator") is None:
                given["generator"] = self.generator(device)
            return func(*args, **given)
        name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name or "default"
        if name.endswith("_like") and first is not None:
            return self._like(name, first, args[1:], given)
        other = getattr(func.overloadpacket, _WITH_GENERATOR.get(overload, ""), None)
        return func(*args, **given) if other is None else other(*args, **given, generator=self.generator(device))

    def _dropout(self, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
        """As torch's fused one: (what is kept, the mask)."""
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        mask = torch.empty_like(x).bernoulli_(1 - p, generator=self.generator(x.device))
        return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask.bool()

    def _like(self, name: str, x: Tensor, bounds: Sequence[Any], given: dict[str, Any]) -> Tensor:
        made = torch.empty_like(x, **given)
        drawn = self.generator(made.device)
        if name == "randn_like":
            return made.normal_(generator=drawn)
        if name == "randint_like":
            low, high = bounds if len(bounds) > 1 else (0, bounds[0])
            return made.random_(low, high, generator=drawn)
        return made.uniform_(generator=drawn)


def apart_draws() -> Draws | None:
    """Of this thread, inside `draws_apart`."""
    held: Draws | None = getattr(_HERE, "draws", None)
    return held


@contextmanager
def draws_apart(key: bytes) -> Iterator[None]:
    """In the block this thread leaves torch's own generators alone: not read, not written, not forked.

    Small operators take up to twice as long in it.
    """
    before = apart_draws()
    _HERE.draws = made = Draws(key)
    try:
        with made:
            yield
    finally:
        _HERE.draws = before


@contextmanager
def kept_draws() -> Iterator[None]:
    """Draws inside move on no generator of torch's: forked and restored, or left alone by a thread that draws apart."""
    apart = apart_draws()
    if apart is not None:
        yield
        return
    with torch.random.fork_rng():
        yield
