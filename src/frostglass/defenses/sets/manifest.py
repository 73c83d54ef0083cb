"""What a shared encoded set says about itself, and whether its shards are those that were written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from frostglass.core.errors import BadInput

FORMAT, VERSION, MANIFEST = "frostglass encoded set", 1, "manifest.json"

_NEEDED: dict[str, type] = {
    "encodings": int, "shape": list, "dtype": str, "classes": int, "labels": str, "shards": list, "warning": str,
}  # fmt: skip
_COUNTS = {"classes": 1, "encodings": 1, "images": 1, "public_images": 0, "k": 1, "private": 1, "rounds": 1}
_CHOICES = {
    "mask": ("sign", "abs", "none"), "labels": ("exact", "quantised", "renormalised", "none"),
    "dtype": ("float32", "bfloat16"),
}  # fmt: skip
_HISTOGRAMS = ("exposure_histogram", "exposure_histogram_with_earlier_sets")


def shard_name(number: int) -> str:
    """File name of a shard; nothing else is ever opened, whatever a manifest says."""
    return f"encodings-{number:05d}.safetensors"


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an encoded set.

    Raises:
        BadInput: no such folder, no manifest, or one that is damaged or of another format or version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BadInput(f"encoded set: {folder} is no folder; give one that `frostglass encode` has written.")
    if not path.is_file():
        raise BadInput(f"encoded set: {folder} holds no {MANIFEST}; it is no encoded set, or its encoding never ended.")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as wrong:
        raise BadInput(f"encoded set: {path} cannot be read ({wrong}); copy the set anew.") from None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise BadInput(f"encoded set: {path} is not the manifest of an encoded set.")
    if held.get("version") != VERSION:
        raise BadInput(f"encoded set: {path} is of version {held.get('version')!r}; this library reads {VERSION}.")
    wrong_keys = [key for key, kind in _NEEDED.items() if not isinstance(held.get(key), kind)]
    wrong_keys += [key for key, least in _COUNTS.items() if key in held and not _counts(held[key], least)]
    wrong_keys += [key for key, known in _CHOICES.items() if key in held and held[key] not in known]
    wrong_keys += [key for key in _HISTOGRAMS if key in held and not _histogram(held[key], held.get("images"))]
    if wrong_keys or not _whole(held):
        named = ", ".join(wrong_keys) or "shards"
        raise BadInput(f"encoded set: {path} is damaged (at {named}); copy the set anew.")
    return held


def _counts(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _histogram(value: Any, images: Any) -> bool:
    """Whether it says of how many images each is in so many encodings: {"3": 10}, all images together."""
    if not isinstance(value, dict) or not all(k.isascii() and k.isdigit() and _counts(n, 1) for k, n in value.items()):
        return False
    return images is None or sum(value.values()) == images


def _whole(held: dict[str, Any]) -> bool:
    """Whether the shards are named and counted as this library does it."""
    shards = held["shards"]
    fits = all(
        isinstance(s, dict) and s.get("file") == shard_name(i) and isinstance(s.get("rows"), int)
        and s["rows"] > 0 and isinstance(s.get("sha256"), str)
        for i, s in enumerate(shards)
    )  # fmt: skip
    return fits and sum(s["rows"] for s in shards) == held["encodings"] and len(held["shape"]) == 3


def problems_of(folder: Path, held: dict[str, Any]) -> list[str]:
    """A sentence for each file that is not as the manifest says: missing, changed, or not part of the set.

    Files whose name begins with a dot are not looked at: file managers leave them wherever they have been.

    The manifest itself is not signed: whoever can change a shard can change its hash there too. Send the manifest's
    own digest by another way if that matters.
    """
    found = []
    for shard in held["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.is_symlink():
            found.append(f"encoded set: shard {shard['file']} is missing; copy the set anew.")
        elif sha256_of(path) != shard["sha256"]:
            found.append(
                f"encoded set: shard {shard['file']} has been changed: its SHA-256 is not the one in {MANIFEST}; copy "
                "the set anew."
            )
    named = {MANIFEST, *(shard["file"] for shard in held["shards"])}
    strays = sorted(p.name for p in folder.iterdir() if p.name not in named and not p.name.startswith("."))
    found += [f"encoded set: {name} is no part of the set; remove it." for name in strays]
    return found
