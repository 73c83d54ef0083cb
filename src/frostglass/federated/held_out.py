"""Images of a plan's data, and those that are kept for testing."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.federated.train_plan import DataPlan
from frostglass.vision.byte_images import ByteImages, load_bytes


def images_of(data: DataPlan, seed: int) -> tuple[ByteImages, ByteImages]:
    """(train, test); a fifth of the source is held out, by the seed, where the plan names no other source.

    Raises:
        BadInput: images that cannot be read, are too few, or differ in size.
    """
    held = load_bytes(data.source, size=data.size, channels=data.channels, limit=data.limit)
    if data.test is not None:
        size, channels = held.images.shape[-1], held.images.shape[1]
        test = load_bytes(data.test, size=data.size and size, channels=channels, limit=data.test_limit)
        if test.images.shape[1:] != held.images.shape[1:]:
            raise BadInput("data.test: its images differ in size from those of data.source; set data.size.")
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
