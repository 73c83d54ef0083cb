"""A public challenge in the format of InstaHide's own: arrays to publish, an opening that its maker keeps, a scorer.

The one-time key of an encoding is (indices, coefficients, mask). An encoder throws it away; a challenge must be
scored, so its maker keeps all of them, with the private images, in a file of the owner's own, and publishes a
commitment: the SHA-256 of a random nonce and of that whole. Whoever opens it later shows that nothing was changed.
Make challenges of images that you give up.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frostglass._version import __version__
from frostglass.core.errors import BadInput
from frostglass.core.files import check_writable, write_json, written_beside
from frostglass.core.randomness import Insecure
from frostglass.defenses.honesty import WARNING
from frostglass.defenses.key_ring import KeyRing
from frostglass.defenses.sets.owner import owner_only
from frostglass.defenses.sources import PublicPool
from frostglass.numerics.key_rows import KeyRows, MixLaw, mask_width
from frostglass.numerics.keystream import Secret
from frostglass.numerics.mixing import Labels, coarse_targets, mix, mix_targets
from frostglass.numerics.prng_search_released import released_keys

FORMAT = "frostglass challenge"
ABOUT, ENCODINGS, LABELS, DECRYPTION = "challenge.json", "encryption.npy", "label.npy", "decryption.npy"
L2 = "mean squared difference of pixels in [-1, 1]"


@dataclass(frozen=True)
class Settings:
    """What a challenge is made of; defaults are those of the public one of 2020.

    Args:
        images, rounds: private images and encodings with each of them first.
        law: k = 6, two of them private.
        labels: "exact" publishes the coefficients, as the public challenge did.
        seed: keys from a number that anybody can search; None: keys of the operating system.
        generator: "frostglass", or "released" for the generator that the public challenge fell by (needs `seed`).
    """

    images: int = 100
    rounds: int = 50
    law: MixLaw = field(default_factory=lambda: MixLaw(6, 2))
    labels: Labels = "exact"
    seed: int | None = None
    generator: str = "frostglass"

    def check(self) -> None:
        """Raises BadInput for settings that cannot be met."""
        self.law.check()
        if self.images < max(2, self.law.private) or self.rounds < 1:
            raise BadInput(
                f"challenge: {self.images} images and {self.rounds} rounds are too few; give at least "
                f"{max(2, self.law.private)} images (--private-images) and 1 round."
            )
        if self.generator not in ("frostglass", "released"):
            raise BadInput(f"challenge: generator {self.generator!r} is not known; use 'frostglass' or 'released'.")
        if self.generator == "released" and self.seed is None:
            raise BadInput("challenge: the released generator starts from a number; give --insecure-seed.")


@dataclass(frozen=True)
class Opening:
    """What the maker keeps: enough to score, and to prove that the challenge was this one.

    Args:
        images: uint8 [N, h, w, c]; labels: [N].
        indices: [E, k]; coefficients: [E, k] float32; flips: uint8 [E, ceil(d / 8)], bit 1: the pixel was negated.
        nonce: 32 random bytes.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    flips: NDArray[np.uint8]
    private: int
    nonce: bytes

    def commitment(self) -> str:
        """SHA-256 of the nonce and of everything else, each with its shape."""
        digest = hashlib.sha256(b"frostglass challenge 1" + self.nonce + self.private.to_bytes(8, "big"))
        for part in (self.images, self.labels, self.indices, self.coefficients, self.flips):
            plain = np.ascontiguousarray(part, part.dtype.newbyteorder("<"))
            digest.update(repr((plain.shape, plain.dtype.str)).encode() + plain.tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """For the owner alone, whole or not at all."""
        from safetensors.numpy import save_file

        tensors = {"images": self.images, "labels": self.labels, "indices": self.indices,
                   "coefficients": self.coefficients, "flips": self.flips}  # fmt: skip
        note = {"format": FORMAT, "nonce": self.nonce.hex(), "private": str(self.private)}
        with owner_only(path) as beside:
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, beside, metadata=note)


def load_opening(path: Path) -> Opening:
    """What `Opening.save` wrote.

    Raises:
        BadInput: it is not there or no opening.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as held:
            note = held.metadata() or {}
            if note.get("format") != FORMAT:
                raise BadInput(f"challenge: {path} is no opening of a challenge.")
            parts = {k: held.get_tensor(k) for k in ("images", "labels", "indices", "coefficients", "flips")}
            return Opening(**parts, private=int(note["private"]), nonce=bytes.fromhex(note["nonce"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as wrong:
        raise BadInput(
            f"challenge: the opening {path} cannot be read ({wrong}); name the file that its maker keeps."
        ) from None


def make_challenge(
    settings: Settings, images: Tensor, labels: Tensor, classes: int, pool: PublicPool | None, out: Path, opening: Path
) -> dict[str, Any]:
    """Writes the challenge to the new folder `out` and its opening to `opening`; returns what `challenge.json` says.

    Args:
        images: uint8 [n, c, h, w], of which the first `settings.images` are taken; labels: [n].
        classes: columns of the label array.
        pool: public images of the same size, None if all slots are private.

    Raises:
        BadInput: too few images, a pool that does not fit, or files that are in the way.
    """
    settings.check()
    n, law = settings.images, settings.law
    if len(images) < n:
        raise BadInput(f"challenge: {len(images)} images are fewer than the {n} asked for; lower --private-images.")
    if (law.private < law.k) != (pool is not None):
        raise BadInput(f"challenge: {law.k - law.private} of k = {law.k} slots are public; --public must match.")
    hidden = opening.resolve()  # both made absolute: a relative path has other parents
    if out.exists() or opening.exists() or out.resolve() in (hidden, *hidden.parents):
        raise BadInput(
            f"challenge: {out if out.exists() else opening} is in the way; name new paths, the opening outside."
        )
    check_writable(out / ENCODINGS, "challenge", "OUT")
    check_writable(opening, "challenge", "--opening")
    private, kept = images[:n], labels[:n].numpy().astype(np.int64)
    if pool is not None:
        pool.check(tuple(private.shape[1:]), private.dtype, law.k - law.private)
    encodings, targets, keys = _encoded(settings, private, kept, classes, pool)
    made = Opening(
        np.ascontiguousarray(private.permute(0, 2, 3, 1).numpy()), kept, keys.indices, keys.coefficients,
        np.zeros((len(encodings), 0), np.uint8) if keys.bits is None else keys.bits, law.private, os.urandom(32),
    )  # fmt: skip
    about = _about(settings, encodings, classes, pool, made)
    from safetensors import SafetensorError

    try:
        made.save(opening)
        with written_beside(out / ENCODINGS) as beside, beside.open("wb") as held:
            np.save(held, np.ascontiguousarray(encodings.permute(0, 2, 3, 1).numpy()), allow_pickle=False)
        with written_beside(out / LABELS) as beside, beside.open("wb") as held:
            np.save(held, targets.numpy(), allow_pickle=False)
        write_json(out / ABOUT, about)
    except BaseException as wrong:  # neither was there before: half a challenge helps nobody, and its keys are secret
        with suppress(OSError):
            opening.unlink()
        shutil.rmtree(out, ignore_errors=True)
        if isinstance(wrong, OSError | SafetensorError):
            why = getattr(wrong, "strerror", None) or wrong
            raise BadInput(f"challenge: {out} or {opening} cannot be written ({why}).") from None
        raise
    return about


def _encoded(
    settings: Settings, images: Tensor, labels: NDArray[np.int64], classes: int, pool: PublicPool | None
) -> tuple[Tensor, Tensor, KeyRows]:
    table, d, law = images.flatten(1), int(np.prod(images.shape[1:])), settings.law
    if settings.generator == "released":
        assert settings.seed is not None
        old = released_keys(settings.seed, len(images), 0 if pool is None else len(pool), settings.rounds, law, d)
        assert old.flips is not None
        keys = KeyRows(old.indices, old.coefficients, packed(old.flips))
        held = None if pool is None else pool.images
        table_of = held if held is None or isinstance(held, Tensor) else torch.from_numpy(np.array(held))
        public = None if table_of is None else table_of.flatten(1)
    else:
        keys, public = _fresh_keys(settings, len(images), d, pool, tuple(images.shape[1:]))
    out = torch.empty(len(keys.indices), d)
    mix(table, public, law.private, keys, "sign", out)
    soft = coarse_targets(mix_targets(labels, classes, law.private, keys), settings.labels)
    return out.view(-1, *images.shape[1:]), soft, keys


def _fresh_keys(
    settings: Settings, images: int, d: int, pool: PublicPool | None, shape: tuple[int, ...]
) -> tuple[KeyRows, Any]:
    """Keys of all rounds, each round with a secret of its own; rows then stand in one secret order."""
    law, parts, tables, placed = settings.law, [], [], 0
    for r in range(settings.rounds):
        secret = Secret.draw() if settings.seed is None else Secret.draw(Insecure(settings.seed)).at("challenge", r)
        ring = KeyRing(secret, law, "permutation", images, 0 if pool is None else len(pool), ahead=0)
        indices, weights = ring.draw(np.arange(images))
        if pool is not None:
            table, drawn = pool.rows_for(indices[:, law.private :], shape, ring.streams["crops"])
            used = np.asarray(table[drawn.reshape(-1)])
            indices[:, law.private :] = np.arange(placed, placed + len(used)).reshape(drawn.shape)
            tables.append(used)
            placed += len(used)
        parts.append((indices, weights, ring.mask(images, d)))
        ring.wipe()
    secret = Secret.draw() if settings.seed is None else Secret.draw(Insecure(settings.seed)).at("challenge order")
    order = secret.stream("order").permutation(images * settings.rounds)
    joined = [np.concatenate(column)[order] for column in zip(*parts, strict=True)]
    public = torch.from_numpy(np.concatenate(tables)) if tables else None
    return KeyRows(joined[0], joined[1], joined[2]), public


def packed(flips: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """[b, d] -> [b, m] with pixel i in bit i // m of byte i % m, as masks are kept."""
    b, d = flips.shape
    m = mask_width(d)
    wide = np.zeros((b, 8 * m), np.uint8)
    wide[:, :d] = flips
    made: NDArray[np.uint8] = (
        (wide.reshape(b, 8, m) << np.arange(8, dtype=np.uint8)[None, :, None]).sum(1).astype(np.uint8)
    )
    return made


def _about(
    settings: Settings, encodings: Tensor, classes: int, pool: PublicPool | None, made: Opening
) -> dict[str, Any]:
    law = settings.law
    return {
        "format": FORMAT,
        "version": 1,
        "private_images": settings.images,
        "rounds": settings.rounds,
        "encodings": len(encodings),
        "shape": list(encodings.shape[1:]),
        "classes": classes,
        "k": law.k,
        "private": law.private,
        "c1": law.c1,
        "c2": law.c2,
        "law": law.law,
        "mask": "sign",
        "labels": settings.labels,
        "public_images": 0 if pool is None else len(pool),
        "commitment": made.commitment(),
        "insecure": settings.seed is not None,
        "generator": settings.generator,
        "submission": f"{DECRYPTION}: float, [{len(encodings)}, height, width, channels], pixels in [-1, 1] or [0, 1]",
        "library": f"frostglass {__version__}",
        "warning": WARNING,
    }


def read_about(folder: Path) -> dict[str, Any]:
    """What `challenge.json` says.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    try:
        held = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as wrong:
        raise BadInput(
            f"challenge: {folder / ABOUT} cannot be read ({wrong}); name a folder of `challenge make`."
        ) from None
    if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("commitment"), str):
        raise BadInput(f"challenge: {folder / ABOUT} does not describe a challenge.")
    return held
