"""Does a checkpoint hold the state of a random generator? Then keys drawn from that generator can be rewound from it.

Read statically: pickles are walked opcode by opcode and never executed, so a checkpoint from anywhere may be checked.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from frostglass.core.errors import BadInput

_NAMES = re.compile(
    r"(rng|random|generator)[_\-. ]?states?|^(rng|random_states?)$|[_\-.]rng$|^seed_state", re.IGNORECASE
)
_KINDS = re.compile(r"^(MT19937|PCG64(DXSM)?|Philox|SFC64|RandomState)$|^numpy\.random|^random$|^torch\._C Generator$")
_TORCH_CPU_STATE = 5056  # bytes of torch.get_rng_state(): an MT19937 state, which is invertible
_PYTHON_STATE = 625  # whole numbers of random.getstate()


def generator_states(path: str | Path) -> list[str]:
    """What in the file looks like the state of a random generator, a sentence each; empty if nothing does.

    Args:
        path: a checkpoint: torch.save (either format), a pickle, .npz or .safetensors.

    Raises:
        BadInput: the file does not exist or has none of these formats.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"checkpoint: {path} is no file.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            found = [f"member {n!r} is named like a generator state" for n in names if _NAMES.search(Path(n).stem)]
            for name in names:
                if name.endswith(".pkl"):
                    found += _in_pickle(archive.read(name), str(path))
        return list(dict.fromkeys(found))
    data = path.read_bytes()
    if len(data) > 9 and data[8:9] == b"{":
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except ValueError:
            raise BadInput(f"checkpoint: {path} begins like safetensors and is none; is it damaged?") from None
        return [f"tensor {n!r} is named like a generator state" for n in header if _NAMES.search(n)]
    return list(dict.fromkeys(_in_pickle(data, str(path))))


def _in_pickle(data: bytes, path: str) -> Iterator[str]:
    """Findings in one or more pickles, one after another (torch's old format begins with several)."""
    start = 0
    while start < len(data) and data[start : start + 1] in (b"\x80", b"(", b"]", b"}", b"c"):
        numbers, bytes_storage, end = 0, False, start
        try:
            for op, value, at in pickletools.genops(data[start:]):
                end = start + (at or 0) + 1
                if isinstance(value, str):
                    bytes_storage |= value.split(" ")[-1] in ("ByteStorage", "UntypedStorage")
                    if _NAMES.search(value):
                        yield f"an entry is named {value!r}"
                    elif _KINDS.search(value):
                        yield f"it holds a generator ({value})"
                if isinstance(value, int) and op.name not in ("PROTO", "FRAME") and "PUT" not in op.name:
                    numbers += 1
                    if value == _TORCH_CPU_STATE and bytes_storage:
                        yield f"it holds {_TORCH_CPU_STATE} bytes, the size of torch's CPU generator state"
                    if numbers == _PYTHON_STATE:
                        yield f"it holds {_PYTHON_STATE} whole numbers in a row, as Python's generator state does"
                elif op.name not in ("MEMOIZE", "MARK") and "PUT" not in op.name:
                    numbers = 0
        except (ValueError, IndexError, UnicodeDecodeError):
            if start == 0:
                raise BadInput(f"checkpoint: {path} is neither torch.save, pickle, .npz nor .safetensors.") from None
            return
        start = end
    if start == 0:
        raise BadInput(f"checkpoint: {path} is neither torch.save, pickle, .npz nor .safetensors.")
