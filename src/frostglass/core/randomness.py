"""Randomness addressed by path, from keys of 256 bits; no generator state is ever stored.

torch's CPU generator keeps 32 bits of a seed, so it is not used for anything that an attack must not rebuild.
"""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from frostglass.core.draws import apart_draws, seed_of

_MT_OFFSET = 24  # bytes before the 624 state words in torch's CPU generator state: seed, left, seeded, next


def _digest(*parts: bytes) -> bytes:
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "big"))  # length-prefixed: ("ab", "c") differs from ("a", "bc")
        h.update(part)
    return h.digest()


def _spelled(part: str | int | bytes) -> bytes:
    """A step of a path with its kind, so that 1, "1" and b"1" lead to different keys, and numpy's 1 where 1 leads."""
    if isinstance(part, bytes):
        return b"bytes:" + part
    if isinstance(part, str):
        return b"str:" + str(part).encode("utf-8", "surrogatepass")
    return b"int:" + str(operator.index(part)).encode()


@dataclass(frozen=True)
class Rng:
    """A 256-bit key and the draws that follow from it. Same key and path: same draw; `at` is one-way.

    Every method draws from the *start* of this key's stream, so two calls of one method on one `Rng` give equal
    results: address each draw by its own path.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != 32:
            raise ValueError(f"an Rng key has 32 bytes, not {len(self.key)}")

    @classmethod
    def from_seed(cls, seed: int, *context: str) -> Rng:
        """A key for tests and audits, from a number that a plan names."""
        return cls(_digest(b"frostglass seed", str(seed).encode(), *(c.encode() for c in context)))

    def at(self, *path: str | int | bytes) -> Rng:
        """The key at `path` below this one."""
        return Rng(_digest(self.key, *(_spelled(part) for part in path)))

    def numpy(self) -> np.random.Generator:
        """A counter-based generator (Philox, keyed with 128 bits of this key)."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self.key[:16], "big")))

    def normal(self, shape: Sequence[int], *, like: Tensor | None = None) -> Tensor:
        """Standard normal draws, float32 (or in the dtype and on the device of `like`)."""
        drawn = torch.from_numpy(self.numpy().standard_normal(tuple(shape), dtype=np.float32))
        return drawn if like is None else drawn.to(like.device, like.dtype)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform draws in [0, 1), float32."""
        return torch.from_numpy(self.numpy().random(tuple(shape), dtype=np.float32))

    def permutation(self, n: int) -> Tensor:
        """A uniform permutation of 0 .. n - 1, int64."""
        return torch.from_numpy(self.numpy().permutation(n))

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Unbiased integers in [0, high), int64."""
        return torch.from_numpy(self.numpy().integers(0, high, tuple(shape)))

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A torch generator for code that wants one.

        On the CPU its whole Mersenne Twister state is drawn from this key, as `manual_seed` would keep 32 bits of it.
        Elsewhere it holds 63 bits. The state can be inverted from enough outputs: never for InstaHide keys.
        """
        made = torch.Generator(device=device)
        made.manual_seed(seed_of(self.key))
        if made.device.type == "cpu":
            state = made.get_state().numpy().copy()
            words = state[_MT_OFFSET : _MT_OFFSET + 8 * 624].view(np.uint64)  # 32-bit words kept in 64-bit slots
            words[:] = self.at("mt19937").numpy().integers(0, 2**32, 624, dtype=np.uint64)
            made.set_state(torch.from_numpy(state))
        return made


@contextmanager
def global_draws(rng: Rng, device: torch.device) -> Iterator[None]:
    """In the block torch's own generators (those that Dropout draws from) follow from `rng`; afterwards they are as
    they were."""
    apart = apart_draws()
    if apart is not None:
        with apart.following(rng.key):
            yield
        return
    cuda = [device] if device.type == "cuda" else []
    seed = seed_of(rng.key)
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@dataclass(frozen=True)
class OsKey:
    """Keys from the operating system: what encoders use outside audits. Never written anywhere."""

    insecure = False

    def rng(self) -> Rng:
        """A fresh key; two calls never agree."""
        return Rng(os.urandom(32))


@dataclass(frozen=True)
class Insecure:
    """Keys from a known number or key, for tests and audits that must repeat; every output made with it says so."""

    source: int | Rng
    insecure = True

    def rng(self) -> Rng:
        """The same key at each call."""
        return self.source if isinstance(self.source, Rng) else Rng.from_seed(self.source, "insecure")


Randomness = OsKey | Insecure
