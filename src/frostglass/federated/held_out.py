"""Images of a plan's data, and those that are kept for testing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.defenses.public_pool import open_pool
from frostglass.defenses.sets.owner import digest_of
from frostglass.defenses.sets.writing import sample_digest
from frostglass.federated.train_plan import DataPlan
from frostglass.vision.byte_images import ByteImages, load_bytes


def images_of(data: DataPlan, seed: int) -> tuple[ByteImages, ByteImages]:
    """(train, test); a fifth of the source is held out, by the seed, where the plan names no other source.

    Raises:
        BadInput: images that cannot be read, are too few, differ in size, or have no classes, or classes for testing
            that are not trained on.
    """
    held = load_bytes(data.source, size=data.size, channels=data.channels, limit=data.limit)
    if held.made_up and data.source.startswith("folder:"):
        raise BadInput(
            f"data.source: {data.source!r} is one folder without classes; sort its images into one subfolder for each."
        )
    if data.test is not None:
        size, channels = held.images.shape[-1], held.images.shape[1]
        test = load_bytes(data.test, size=data.size and size, channels=channels, limit=data.test_limit)
        if test.images.shape[1:] != held.images.shape[1:]:
            raise BadInput("data.test: its images differ in size from those of data.source; set data.size.")
        if held.words and test.words:
            return held, _numbered_as(held, test)
        classes = max(held.classes, test.classes)
        return replace(held, classes=classes), replace(test, classes=classes)
    order = Rng.from_seed(seed, "split").permutation(len(held))
    cut = max(1, len(held) // 5)
    if len(held) - cut < 1:
        raise BadInput(f"data: {len(held)} images cannot be split for training and testing; give more.")

    def part(rows: Tensor) -> ByteImages:
        names = tuple(held.names[i] for i in rows.tolist())
        return replace(held, images=held.images[rows], labels=held.labels[rows], names=names)

    return part(order[cut:]), part(order[:cut][: data.test_limit])


def digest_of_both(train: ByteImages, test: ByteImages, pools: Iterable[str | None] = ()) -> str:
    """SHA-256 of all images and labels, and of a sample of the public images that they are mixed with.

    Args:
        train, test: the two sets.
        pools: folders of public pools; None for no pool.
    """
    h = hashlib.sha256()
    for part in (train, test):
        h.update(digest_of(part.images, part.labels.numpy().astype(np.int64)).encode())
    for folder in pools:
        if folder is not None:
            h.update(sample_digest(open_pool(folder)).encode())
    return h.hexdigest()


def _numbered_as(held: ByteImages, test: ByteImages) -> ByteImages:
    """`test` with the class numbers of `held`: a subfolder means the same class in both, whatever others there are."""
    strange = [word for word in test.words if word not in held.words]
    if strange:
        raise BadInput(
            f"data.test: class {strange[0]!r} is none of those of data.source ({', '.join(held.words[:5])}"
            f"{', ...' if len(held.words) > 5 else ''}); name the subfolders alike."
        )
    numbers = torch.tensor([held.words.index(word) for word in test.words])
    return replace(test, labels=numbers[test.labels], classes=held.classes, words=held.words)
