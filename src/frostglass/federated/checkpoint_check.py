"""Finds generator states in checkpoints, without running anything that is in them.

Keys of an encoder that draws from torch's, numpy's or Python's generators (as the released InstaHide does) can be
recomputed from such a state: the Mersenne Twister can be run backwards. Frostglass draws keys from the operating system
and stores no state; other trainers save these states by default.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.federated.pickle_scan import scan_pickles
from frostglass.federated.twister import TORCH_BYTES, twister_in

ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".npz", ".safetensors")

_NAMES = re.compile(
    r"(^|[._/ ])(\w*(rng|random|generator)_?states?(?!_?dict)\w*|mt19937|philox\w*)($|[._/ ])", re.IGNORECASE
)
# Parts of networks have such names too (a GAN's generator): there numbers and bytes are suspect, weights are not.
_DOUBTFUL = re.compile(r"(^|[._/ ])(\w*rng\w*|generators?)($|[._/ ])", re.IGNORECASE)
_BARE = re.compile(r"\w*_?rng", re.IGNORECASE)
_SEEDS = re.compile(r"(^|[._/ ])(manual_|initial_|random_|global_)?seed($|[._/ ])", re.IGNORECASE)
_CUDA_STATE = 16  # seed and offset
_STACKED = 64  # states in one tensor, as of all ranks
_TWISTER = (624, 625)  # words of a Mersenne Twister, Python adds its position


@dataclass(frozen=True)
class Finding:
    """Something in a checkpoint that keys may follow from.

    Args:
        where: path inside the checkpoint.
        what: what it is.
        state: True for a generator state, False for a mere seed.
    """

    where: str
    what: str
    state: bool = True


def check_checkpoint(path: Path, unread: list[str] | None = None) -> list[Finding]:
    """All generator states and seeds in a file, or in all checkpoint files of a folder.

    Args:
        path: .pt, .pth, .ckpt, .bin, .pkl, .npz or .safetensors; or a folder with such files.
        unread: takes why files of a folder cannot be read; None: the first of them is raised.

    Raises:
        BadInput: missing, or no checkpoint.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in ENDINGS)
        if not files:
            raise BadInput(f"check-checkpoint: {path} holds no file ending in {', '.join(ENDINGS)}.")
        found = []
        for file in files:
            try:
                inside = check_checkpoint(file)
            except BadInput as wrong:
                if unread is None:
                    raise
                unread += wrong.problems
                continue
            found += [Finding(f"{file.relative_to(path)}: {x.where}", x.what, x.state) for x in inside]
        return found
    if not path.is_file():
        raise BadInput(f"check-checkpoint: {path} does not exist; give a checkpoint file or a folder of them.")
    ending = path.suffix.lower()
    if ending == ".safetensors":
        return list(_unique(_safetensors(path)))
    if ending == ".npz":
        return list(_unique(_npz(path)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on protocols of pickles, which the scan reads all the same
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as wrong:
        raise BadInput(f"check-checkpoint: {path} cannot be read ({wrong.strerror or wrong}).") from None
    except Exception:  # objects beside tensors, or another format: read its opcodes, run none
        return list(_unique(_of_opcodes(path)))
    return list(_unique(_walk(content, "")))


def _unique(found: Iterable[Finding]) -> Iterator[Finding]:
    yield from dict.fromkeys(found)


def _walk(node: Any, where: str) -> Iterator[Finding]:
    """States in what torch.load gave: tensors, numbers, texts and containers of those."""
    kind = _state_of(node, where)
    if kind is not None:
        yield Finding(where or "the file", kind)
        return
    if isinstance(node, Mapping):
        for key, value in node.items():
            below = f"{where}.{key}" if where else str(key)
            if _SEEDS.search(str(key)) and isinstance(value, int) and not isinstance(value, bool):
                yield Finding(below, f"a seed ({value})", state=False)
            inner = list(_walk(value, below))
            if not inner and _named(str(key), value):
                inner = [Finding(below, "a generator state, by its name")]
            yield from inner
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _walk(value, f"{where}[{i}]")


def _named(key: str, value: Any) -> bool:
    """Whether an entry passes for a generator's state by its name."""
    if value is None or isinstance(value, bool | str):
        return False
    if _NAMES.search(key):
        return True
    whole = isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(v, int) for v in value)
    return bool(_DOUBTFUL.search(key)) and (whole or isinstance(value, int | bytes | bytearray))


def _state_of(node: Any, where: str) -> str | None:
    if isinstance(node, Tensor):
        found = _tensor_state(node.dtype == torch.uint8, tuple(node.shape), where)
        return found or (None if node.is_floating_point() or node.is_complex() else _in_tensor(node))
    if isinstance(node, bytes | bytearray):
        return twister_in(bytes(node))
    if isinstance(node, list | tuple) and node:
        if node[0] == "MT19937":
            return "numpy's generator state"
        words = node[1] if len(node) == 3 and isinstance(node[1], list | tuple) else node
        if len(words) >= min(_TWISTER) and all(isinstance(w, int) and 0 <= w < 1 << 64 for w in words):
            return twister_in(np.array(words, np.uint64))
    if isinstance(node, Mapping) and "bit_generator" in node and "state" in node:
        return f"numpy's generator state ({node['bit_generator']})"
    return None


def _in_tensor(node: Tensor) -> str | None:
    try:
        return twister_in(node.detach().cpu().numpy())
    except (TypeError, RuntimeError):  # quantised, sparse, meta: not how a state is kept
        return None


def _tensor_state(is_bytes: bool, shape: tuple[int, ...], where: str) -> str | None:
    if len(shape) != 1:
        return None
    if is_bytes and shape[0] in TORCH_BYTES:
        return f"torch's CPU generator state ({shape[0]} bytes)"
    if is_bytes and shape[0] == _CUDA_STATE and re.search(r"rng|random|seed|cuda|generator", where, re.IGNORECASE):
        return "a CUDA generator state (16 bytes: seed and offset)"
    if not is_bytes and shape[0] in _TWISTER and _NAMES.search(where):
        return "a Mersenne Twister state (624 words)"
    return None


def _safetensors(path: Path) -> Iterator[Finding]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as held:
            for key in held.keys():  # noqa: SIM118 - not a dict
                part = held.get_slice(key)
                kind = _tensor_state(part.get_dtype() == "U8", tuple(part.get_shape()), key)
                if kind is None and part.get_dtype()[0] in "UI":
                    kind = _in_tensor(held.get_tensor(key))
                if kind is None and _NAMES.search(key):
                    kind = "a generator state, by its name"
                if kind is not None:
                    yield Finding(key, kind)
            for key, text in (held.metadata() or {}).items():
                if _NAMES.search(key) or "MT19937" in text:
                    yield Finding(f"metadata {key}", "a generator state, by its name")
                elif _SEEDS.search(key):
                    yield Finding(f"metadata {key}", f"a seed ({text[:20]})", state=False)
    except (SafetensorError, OSError) as wrong:
        raise BadInput(f"check-checkpoint: {path} cannot be read as safetensors ({wrong}).") from None


def _npz(path: Path) -> Iterator[Finding]:
    try:
        with np.load(path, allow_pickle=False) as held:
            for key in held.files:
                try:
                    kind = twister_in(held[key])
                except ValueError:  # an array of objects: it would have to be unpickled
                    kind = "an array of objects, which is not read"
                if kind is None and _NAMES.search(key):
                    kind = "a generator state, by its name"
                if kind is not None:
                    yield Finding(key, kind)
    except Exception as wrong:  # whatever damaged bytes drive zipfile and numpy into
        raise BadInput(f"check-checkpoint: {path} cannot be read as npz ({wrong}).") from None


def _of_opcodes(path: Path) -> Iterator[Finding]:
    seen = scan_pickles(path)
    for name in seen.names:
        if re.match(r"(torch\._C\.Generator|torch\.Generator|random\.Random|numpy\.random\.)", name):
            yield Finding("pickle", f"a generator object ({name})")
    for text in seen.texts:
        if text in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"):
            yield Finding("pickle", f"numpy's generator state ({text})")
        elif len(text) < 80 and (_NAMES.search(text) or _BARE.fullmatch(text)):
            yield Finding("pickle", f"an entry called {text!r}, which names a generator state")
    for size in seen.byte_storages:
        held = [s for s in TORCH_BYTES if size and size % s == 0 and size // s <= _STACKED]
        if held:
            yield Finding("pickle", f"torch's CPU generator state ({held[0]} bytes)")
    for kind in [*map(twister_in, seen.blobs), *map(twister_in, seen.runs_of_words)]:
        if kind is not None:
            yield Finding("pickle", kind)
