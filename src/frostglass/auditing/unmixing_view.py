"""What an attacker on an encoded set gets to see: the grants of a plan, turned into an observation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from frostglass.auditing.unmixing_inputs import EncodedSet
from frostglass.auditing.unmixing_plan import KnownPlan, UnmixPlan
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.threat import EncodingMessage, Observation
from frostglass.defenses.encoder import encoded_domain
from frostglass.defenses.public_pool import open_pool
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.similarity_network_fit import coefficient_rows
from frostglass.vision import datasets

MOST_POOL = 4 * 2**30
"""Bytes of a pool that are held as float32."""


@dataclass(frozen=True)
class View:
    """The observation with what was granted in it.

    Args:
        seen: all that an attack gets.
        grants: strings of the grants enum.
        words: (what, in words) for the report.
        images: private images, None if nobody said.
        law: of the coefficients, None if k is not known.
        notes: sentences on what was assumed.
    """

    seen: Observation
    grants: tuple[str, ...]
    words: tuple[tuple[str, str], ...]
    images: int | None
    law: MixLaw | None
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan names beside the set: public pool, auxiliary images, groups."""
        defence = self.seen.defence
        held = [None if defence is None else defence.settings.get("public"), self.seen.auxiliary]
        held += [m.rows for m in self.seen.messages if isinstance(m, EncodingMessage)]
        found = hashlib.sha256()
        for tensor in held:
            found.update(repr(None if tensor is None else tuple(tensor.shape)).encode())
            if tensor is not None:
                found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


def view_of(plan: UnmixPlan, encoded: EncodedSet) -> View:
    """The attacker's view under `plan`.

    Raises:
        BadInput: grants that contradict the set or each other.
    """
    manifest, known = encoded.manifest, plan.known
    assumed = None if known.labels == "none" else private_named(encoded.targets, known.k)
    settings, law = settings_of(known, manifest, assumed)
    if plan.pool is not None:
        settings["public"] = _pool(Path(plan.pool), encoded.shape)
        settings["public_images"] = len(settings["public"])
    images = known.images or (int(manifest["images"]) if manifest.get("images") else None)
    if images is None and known.per_class is not None:
        images = sum(known.per_class)
    if images is not None and len(encoded.images) < images:
        raise BadInput(
            f"unmix: {len(encoded.images)} encodings are fewer than the {images} private images, so no image is "
            "determined; give all rounds, or correct known.images."
        )
    if known.labels != "none" and encoded.targets is None and known.per_class is not None:
        raise BadInput("known.per_class: the set has no labels, so counts by class say nothing; leave them out.")
    targets, notes = _targets(known, encoded, law)
    if law is not None and known.private is None and "private" not in manifest:
        notes.append(f"known.private is not given: {law.private} private images in one encoding are assumed.")
    per_class = _per_class(known, targets, images)
    auxiliary = None
    if plan.auxiliary is not None:
        source, channels = _source(plan.auxiliary), encoded.shape[0]
        auxiliary = datasets.load(source, size=encoded.shape[1:], channels=channels, limit=20_000).images
    seen = Observation(
        model=nn.Identity(),  # no model was sent: the encodings were
        messages=_messages(plan, encoded.images, targets),
        domain=encoded_domain(encoded.shape[0]),
        mode="eval",
        image_shape=encoded.shape,
        classes=1 if targets is None else targets.shape[1],
        examples=images,
        labels=per_class,
        auxiliary=auxiliary,
        defence=Defense("instahide", settings=settings, encodes=True) if law is not None else None,
    )
    granted = {"examples": images, "labels": per_class, "auxiliary": auxiliary, "defence": law}
    grants = ("domain", "messages", *(name for name, value in granted.items() if value is not None))
    return View(seen, tuple(sorted(grants)), _words(plan, encoded, settings, images, law), images, law, tuple(notes))


def settings_of(
    known: KnownPlan, manifest: Mapping[str, Any], assumed: int | None = None
) -> tuple[dict[str, Any], MixLaw | None]:
    """The encoder's settings: as the plan says, else as the manifest publishes them; no law without k.

    Args:
        known: the plan's; its k beside the manifest's own says nothing new.
        manifest: of the set.
        assumed: private images in one encoding if neither says how many; None for all.

    Raises:
        BadInput: settings that are not possible, or say nothing without k.
    """
    if known.k not in (None, manifest.get("k")):
        manifest = {key: value for key, value in manifest.items() if key not in ("k", "private", "c1", "c2")}
    k = known.k or manifest.get("k")
    private = known.private or manifest.get("private") or assumed or k
    default = MixLaw()
    settings: dict[str, Any] = {
        "k": k, "private": private,
        "c1": manifest.get("c1", default.c1) if known.c1 is None else known.c1,
        "c2": manifest.get("c2", default.c2) if known.c2 is None else known.c2,
        "law": known.law or manifest.get("law") or "folded_normal",
        "mask": known.mask or manifest.get("mask") or "sign",
        "labels": manifest.get("labels"),
        "public_images": known.public or manifest.get("public_images") or 0,
        "shards": [s["rows"] for s in manifest.get("shards", [])],
        "challenge_rounds": manifest.get("challenge_rounds") or 0,
    }  # fmt: skip
    if k is None:
        unused = [
            f"known.{name}: {value!r} says nothing without k, which the set does not tell; give known.k too."
            for name in ("c1", "c2", "law", "mask")
            if (value := getattr(known, name)) is not None
        ]
        if unused:
            raise BadInput(unused)
        return settings, None
    try:
        law = MixLaw(int(k), int(private or k), float(settings["c1"]), float(settings["c2"]), settings["law"])
        law.check()
    except (BadInput, TypeError, ValueError) as wrong:
        raise BadInput(f"unmix: k, private, c1, c2 or law of the set are not possible ({wrong}).") from None
    return settings, law


def private_named(targets: Tensor | None, k: int | None) -> int | None:
    """Private images in one encoding, as many as a label names; None where labels cannot tell.

    They cannot where labels name all classes there are, unless part of the mass is missing: that is public.
    """
    if targets is None or k is None:
        return None
    held = targets > 0
    most, classes = int(held.sum(1).max()), int(held.any(0).sum())
    told = 0 < most < classes or (most > 1 and float(targets.sum(1).median()) < 0.999)
    return min(most, k) if told else None


def _pool(folder: Path, shape: tuple[int, int, int]) -> Tensor:
    pool = open_pool(folder)
    if tuple(pool.images.shape[1:]) != shape:
        raise BadInput(
            f"--public: patches of {folder} are {tuple(pool.images.shape[1:])} and encodings {shape}; an attacker "
            "compares with the very patches that were mixed in, so give the pool of that size."
        )
    if 4 * int(np.prod(pool.images.shape)) > MOST_POOL:
        raise BadInput(f"--public: {len(pool)} patches take more than {MOST_POOL // 2**30} GiB; give fewer of them.")
    return torch.from_numpy(np.array(pool.images)).float() / 127.5 - 1


def _targets(known: KnownPlan, encoded: EncodedSet, law: MixLaw | None) -> tuple[Tensor | None, list[str]]:
    notes = list(encoded.notes)
    if encoded.targets is None or known.labels == "none":
        return None, notes
    if law is None and float(encoded.targets.max()) > 0:
        most = int((encoded.targets > 0).sum(1).max())
        notes.append(f"k is not known: {most} private images in one encoding are assumed, as many as a label names.")
    if known.labels == "published":
        return encoded.targets, notes
    support = (encoded.targets > 0).float()
    mass = 1.0 if law is None or law.private == law.k else _mean_private_mass(law)
    return support * mass / support.sum(1, keepdim=True).clamp_min(1), notes


def _mean_private_mass(law: MixLaw) -> float:
    rows = coefficient_rows(law, 8192, Rng.from_seed(0, "mean private mass"))
    return float(rows[:, : law.private].sum(1).mean())


def _per_class(known: KnownPlan, targets: Tensor | None, images: int | None) -> Tensor | None:
    """[N, classes] one-hot rows, in the order of the classes."""
    if known.per_class is None:
        return None
    if targets is None:
        return None
    counts = list(known.per_class)
    if min(counts, default=0) < 0:
        raise BadInput(f"known.per_class: {min(counts)} is no number of images; give counts from 0.")
    if len(counts) != targets.shape[1]:
        raise BadInput(f"known.per_class: {len(counts)} counts for {targets.shape[1]} classes; give one for each.")
    if images is not None and sum(counts) != images:
        raise BadInput(f"known.per_class: the counts sum to {sum(counts)} and there are {images} private images.")
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return torch.nn.functional.one_hot(index, len(counts)).float()


def _messages(plan: UnmixPlan, images: Tensor, targets: Tensor | None) -> tuple[EncodingMessage, ...]:
    """One message with everything, or one for each group that is known to be of one image."""
    if plan.groups is None:
        return (EncodingMessage(images, targets),)
    path = Path(plan.groups)
    try:
        held = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as wrong:
        raise BadInput(f"--groups: {path} cannot be read ({wrong}); save whole numbers with np.save.") from None
    if not isinstance(held, np.ndarray):
        raise BadInput(f"--groups: {path} is an archive; save one array of whole numbers with np.save.")
    if held.shape != (len(images),) or held.dtype.kind not in "iu":
        raise BadInput(f"--groups: {held.shape} {held.dtype} must be {len(images)} whole numbers, one an encoding.")
    rows = [torch.from_numpy(np.flatnonzero(held == g)) for g in np.unique(held)]
    return tuple(EncodingMessage(images[r], None if targets is None else targets[r], r) for r in rows)


def _source(text: str) -> str:
    return f"folder:{text}" if Path(text).is_dir() else text


def _words(
    plan: UnmixPlan, encoded: EncodedSet, settings: Mapping[str, Any], images: int | None, law: MixLaw | None
) -> tuple[tuple[str, str], ...]:
    """The grants as a person reads them: (name, what was given), nothing left unsaid."""
    labels = "none were published" if encoded.targets is None else {
        "published": f"as published ({settings['labels'] or 'as they are'})",
        "classes": "their classes, without coefficients",
        "none": "published, and withheld from the attacker",
    }[plan.known.labels]  # fmt: skip
    encoder = "not known" if law is None else (
        f"k = {law.k}, {law.private} private, {law.law.replace('_', ' ')} coefficients, mask {settings['mask']}"
    )  # fmt: skip
    unlabelled = encoded.targets is None or plan.known.labels == "none"
    given = "given" if plan.known.per_class else "not given; estimated from the labels"
    classes = "not used, as there are no labels" if unlabelled else given
    pool = "not given" if plan.pool is None else f"{settings['public_images']} images, those that were mixed in"
    return (
        ("encodings", f"{len(encoded.images)} of {encoded.shape[1]} × {encoded.shape[2]} pixels"),
        ("labels", labels),
        ("number of private images", "not known" if images is None else str(images)),
        ("images of each class", classes),
        ("encoder", encoder),
        ("public pool", pool),
        ("which encodings share an image", "not given" if plan.groups is None else "given, by --groups"),
        ("other images of the kind", "not given" if plan.auxiliary is None else "given"),
    )
