"""Secret keystreams: the only source of encoding keys.

One 256-bit secret from the operating system; below it one AES-256 key for each purpose (HKDF-SHA256); of each key the
counter-mode keystream, read once from its start and never rewound. Every draw below takes fresh words of such a
stream, so that no torch, numpy or `random` generator ever sees key material (their states can be rewound from a
checkpoint or searched from published coefficients).
"""

from __future__ import annotations

import math
import os
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from frostglass.core.errors import BadInput
from frostglass.core.randomness import OsKey, Randomness

_BLOCK = memoryview(bytes(1 << 16))  # zeros to be encrypted; small enough to stay in cache
_WORD = 1 << 32


def _refuse_pickle(what: object) -> NoReturn:
    raise TypeError(f"{type(what).__name__} holds key material and is never pickled, copied or saved")


class Secret:
    """256 bits in memory alone. Printing shows nothing, pickling and copying raise, `wipe` overwrites.

    Python may keep short-lived copies of bytes objects that no program can reach; the buffer held here and the cipher
    contexts made from it are what `wipe` and OpenSSL overwrite.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes | bytearray) -> None:
        if len(key) != 32:
            raise ValueError(f"a secret has 32 bytes, not {len(key)}")
        self._key = bytearray(key)

    @classmethod
    def draw(cls, randomness: Randomness | None = None) -> Secret:
        """A new secret: from the operating system, or from `Insecure(seed)` (then it is the same at every call)."""
        if randomness is None or isinstance(randomness, OsKey):
            return cls(os.urandom(32))
        return cls(randomness.rng().key)

    def at(self, *path: str | int) -> Secret:
        """The secret at `path` below this one, one way (HKDF-Expand, RFC 5869)."""
        return Secret(self._expand(path))

    def stream(self, purpose: str) -> Keystream:
        """The keystream of one purpose; streams of two purposes are independent."""
        return Keystream(self._expand(("stream", purpose)))

    def _expand(self, path: tuple[str | int, ...]) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

        if not any(self._key):
            raise RuntimeError("this secret has been wiped")
        parts = [f"{type(p).__name__}:{p}".encode() for p in path]
        # Length-prefixed, so that ("ab", "c") and ("a", "bc") differ.
        info = b"frostglass" + b"".join(len(p).to_bytes(8, "big") + p for p in parts)
        return HKDFExpand(SHA256(), 32, info).derive(bytes(self._key))

    def wipe(self) -> None:
        """Overwrites the key; further use raises."""
        self._key[:] = bytes(32)

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> NoReturn:
        _refuse_pickle(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_pickle(self)


def normals_from(radius: NDArray[np.uint32], angle: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard normal numbers [..., 2 n] from random words [..., n] and [..., n] (Box and Muller 1958).

    In float32, which is several times faster than float64: none is beyond 6.6, and those nearest to 0 are 3e-4 apart.
    """
    size = np.log(_uniform32(radius))
    size *= np.float32(-2)
    np.sqrt(size, out=size)
    turn = _uniform32(angle)
    turn *= np.float32(2 * math.pi)
    return np.concatenate([size * np.cos(turn), size * np.sin(turn)], -1)


def _uniform32(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Numbers in (0, 1], 31 bits of each word as far as float32 holds them."""
    made = (words >> np.uint32(1)).view(np.int32).astype(np.float32)  # signed ones are converted far faster
    made += np.float32(0.5)
    made *= np.float32(2.0**-31)
    return made


class Keystream:
    """AES-256-CTR keystream of one key, read forwards only.

    The nonce is zero because no key is ever used for a second stream.
    """

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._cipher: Any = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def fill(self, out: NDArray[np.uint8]) -> None:
        """Overwrites a contiguous uint8 array of any shape with keystream bytes."""
        if self._cipher is None:
            raise RuntimeError("this keystream has been wiped")
        view = memoryview(out.reshape(-1))  # type: ignore[arg-type]
        for start in range(0, len(view), len(_BLOCK)):
            part = view[start : start + len(_BLOCK)]
            self._cipher.update_into(_BLOCK[: len(part)], part)

    def bytes(self, count: int) -> NDArray[np.uint8]:
        """The next `count` bytes."""
        out = np.empty(count, np.uint8)
        self.fill(out)
        return out

    def words32(self, count: int) -> NDArray[np.uint64]:
        """The next `count` 32-bit words, each in a uint64 (little-endian on every machine)."""
        return self.bytes(4 * count).view("<u4").astype(np.uint64)

    def integers(self, high: int, count: int) -> NDArray[np.int64]:
        """`count` independent integers, uniform in [0, high) without bias.

        Multiply-and-reject (Lemire 2019, arXiv 1805.10941, algorithm 5): the product of a 32-bit word with `high`
        has the draw in its upper half and is thrown away where the lower half falls in the short interval.

        Raises:
            BadInput: high is not in 1 .. 2^32 - 1.
        """
        if not 1 <= high < _WORD:
            raise BadInput(f"keystream: a draw below {high} is not possible; give 1 to 2^32 - 1.")
        short = np.uint64((_WORD - high) % high)
        kept: list[NDArray[np.int64]] = []
        missing = count
        while missing > 0:
            product = self.words32(missing) * np.uint64(high)
            if short:
                product = product[(product & np.uint64(_WORD - 1)) >= short]
            kept.append((product >> np.uint64(32)).astype(np.int64))
            missing -= len(product)
        return kept[0] if len(kept) == 1 else np.concatenate(kept or [np.empty(0, np.int64)])

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """`count` uniform draws in the open interval (0, 1), 53 bits each."""
        words = self.bytes(8 * count).view("<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normals(self, count: int) -> NDArray[np.float32]:
        """`count` independent standard normal draws, of 32 bits each (see `normals_from`)."""
        words = self.bytes(8 * ((count + 1) // 2)).view("<u4")
        return normals_from(words[: len(words) // 2], words[len(words) // 2 :])[:count]

    def exponentials(self, count: int) -> NDArray[np.float64]:
        """`count` independent exponential draws of mean 1."""
        return -np.log(self.uniforms(count))

    def permutation(self, n: int) -> NDArray[np.int64]:
        """A uniform permutation of 0 .. n - 1: the order of n random 64-bit words, drawn anew if two are equal."""
        while True:
            words = self.bytes(8 * n).view("<u8")
            order = np.argsort(words, kind="stable")
            ranked = words[order]
            if not np.any(ranked[1:] == ranked[:-1]):
                return order.astype(np.int64)

    def wipe(self) -> None:
        """Forgets the cipher context (OpenSSL overwrites its key schedule); further use raises."""
        self._cipher = None

    def __repr__(self) -> str:
        return "Keystream(...)"

    def __reduce__(self) -> NoReturn:
        _refuse_pickle(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_pickle(self)
