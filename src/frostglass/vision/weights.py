"""Weights on disk: safetensors, or a torch file read without running anything that is in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.files import written_beside
from frostglass.vision.normalise import Normalised

WRAPPERS = {
    "module.": "DataParallel or DistributedDataParallel",
    "_module.": "Opacus",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""What wrappers put before the names of all parameters."""

_INSIDE = tuple(f".{part}" for part in WRAPPERS if part not in ("module.", "_module."))  # no name of anybody's own
_COUNTER = "num_batches_tracked"  # many published files leave it out; it changes nothing while momentum is set


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fills `model`, in place, with the weights in a file; on an error it is left as it was.

    Key prefixes of DataParallel, Opacus and torch.compile are dropped, and for a `Normalised` network (torchvision's)
    the file may be one for the network inside it.

    Args:
        model: any network.
        path: .safetensors, or .pt / .pth with a state dict (also below the key "state_dict"), read by
            `torch.load(weights_only=True)`.

    Returns:
        The same model.

    Raises:
        BadInput: a file that is missing, unreadable or of another kind; keys that are missing or too many; shapes
            that differ; values that are not finite. Of each, the first three are named.
    """
    path = Path(path)
    stored, _ = unwrapped(_read(path))
    target: nn.Module = model
    own = model.state_dict()
    if isinstance(model, Normalised) and not any(key.startswith("model.") for key in stored):
        target, own = model.model, model.model.state_dict()
    problems = _differences(own, stored, path)
    if problems:
        raise BadInput(problems)
    target.load_state_dict(own | dict(stored))
    return model


def save_weights(model: nn.Module, path: str | Path) -> Path:
    """Writes all weights and buffers to a .safetensors file, whole or not at all (folders are made).

    Constants of `Normalise` are no part of them.

    Raises:
        BadInput: another extension, or a place that cannot be written.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadInput(f"weights: {path} must end in .safetensors to be written; change the extension.")
    # copies: safetensors refuses tensors that share memory, which tied weights do
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    try:
        with written_beside(path) as beside:
            save_file(tensors, beside, metadata={"format": "pt"})
    except OSError as problem:
        raise BadInput(f"weights: {path} cannot be written ({problem.strerror}); choose another place.") from None
    return path


def read_weights(path: str | Path, field: str = "weights") -> Mapping[str, Tensor]:
    """Tensors by name in a .safetensors, .pt or .pth file, without prefixes of wrappers; nothing in it is run.

    Args:
        path: of the file.
        field: what the file was given as, for messages.

    Raises:
        BadInput: a file that is missing, unreadable or of another kind.
    """
    return unwrapped(_read(Path(path), field))[0]


def _read(path: Path, field: str = "weights") -> Mapping[str, Tensor]:
    try:
        there, whole = path.exists(), path.is_file()
    except OSError as problem:  # a folder above it may not be entered, or the name is too long
        raise BadInput(f"{field}: {path} cannot be read ({problem.strerror}); correct the path.") from None
    if not there:
        raise BadInput(f"{field}: file {path} does not exist; correct the path.")
    if not whole:
        raise BadInput(f"{field}: {path} is not a file; give a .safetensors, .pt or .pth file.")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise BadInput(f"{field}: {path} must be a .safetensors, .pt or .pth file; convert or rename it.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(
            f"{field}: {path} is damaged or holds Python objects beside tensors, which are never run; "
            "save a state dict, best as .safetensors."
        ) from None
    except OSError as problem:
        raise BadInput(f"{field}: {path} cannot be read ({problem.strerror or problem}); check the file.") from None
    except Exception as problem:  # SafetensorError, and whatever damaged bytes drive torch.load into
        line = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise BadInput(f"{field}: {path} is damaged or of another format ({line}); replace it.") from None
    return _state_dict(content, path, field)


def _state_dict(content: Any, path: Path, field: str) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise BadInput(f"{field}: {path} holds no state dict (tensors by name); save model.state_dict().")
    return content


def unwrapped(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the same by the names that the network itself gives them, the prefixes that were cut).

    Wrappers stand in any order (`torch.compile` of a DDP network, DDP of a compiled one), each once; those that wrap
    parts of a network leave their name in the middle.
    """
    held, cut, left = dict(stored), list[str](), dict(WRAPPERS)
    while prefix := next((p for p in left if held and all(key.startswith(p) for key in held)), ""):
        held = {key.removeprefix(prefix): value for key, value in held.items()}
        cut.append(prefix)
        del left[prefix]
    for part in _INSIDE:
        short = {key.replace(part, "."): value for key, value in held.items()}
        if len(short) == len(held) and short.keys() != held.keys():
            held = short
            cut.append(part.removeprefix("."))
    return held, list(dict.fromkeys(cut))


def _differences(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path) -> list[str]:
    """A sentence for each way in which the file does not fit the model."""
    both = [key for key in own if key in stored]
    shapes = [k for k in both if own[k].shape != stored[k].shape]
    kinds = [k for k in both if own[k].is_floating_point() != stored[k].is_floating_point()]
    broken = [k for k in both if stored[k].is_floating_point() and not bool(torch.isfinite(stored[k]).all())]
    found = {
        "lacks": [key for key in own if key not in stored and not key.endswith(_COUNTER)],
        "has, beyond the model's own,": [key for key in stored if key not in own],
        "has other shapes for": [f"{k} {tuple(stored[k].shape)}, not {tuple(own[k].shape)}" for k in shapes],
        "has values of another kind for": [f"{k} {stored[k].dtype}, not {own[k].dtype}" for k in kinds],
        "has values that are not finite in": broken,
    }
    return [
        f"weights: {path} {what} {_first(keys)}; give weights of this very model."
        for what, keys in found.items()
        if keys
    ]


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return "; ".join(keys[:3]) + more
