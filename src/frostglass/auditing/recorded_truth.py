"""The owner's private images beside recorded updates: sealed, for scoring alone; and images that no client holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.errors import BadInput
from frostglass.vision import datasets
from frostglass.vision.datasets import ImageSet

MOST_IMAGES = 20_000
UNIT = Domain(0.0, 1.0)

Given = Mapping[str, tuple[Tensor, Tensor | None]]
"""From Python: (images [n, c, h, w] in [0, 1], labels [n] or None) by client; the key "" is one pool for all."""


@dataclass(frozen=True)
class Truth:
    """Private images by client.

    Args:
        pools: by client; "" is one pool for all clients.
        labelled: whether their labels mean something.
        others: images of the same source that no pool holds, for nulls and candidates; None if there are none.
        clients: how many clients share the pool "".
    """

    pools: Mapping[str, ImageSet]
    labelled: bool
    others: ImageSet | None = None
    clients: int = 1

    def exactly(self, client: str, examples: int | None) -> bool:
        """Whether a message of `examples` images holds those of its client's pool, all of them and no others.

        A pool that several clients share tells of none of them which images it holds, however many there are.
        """
        pool = self.of(client)
        return pool is not None and len(pool) == examples and (client in self.pools or self.clients == 1)

    def of(self, client: str) -> ImageSet | None:
        """Of one client, or the pool of all."""
        return self.pools.get(client, self.pools.get(""))

    def outside(self, client: str, further: ImageSet | None) -> ImageSet | None:
        """Images that this client does not hold: of other clients and of `further`, without doubles.

        Pixels are compared in 8 bits: the same image may come from a file here and from a tensor there.
        """
        own = self.of(client)
        parts = [p for name, p in self.pools.items() if name not in (client, "") and p is not own]
        parts += [p for p in (further, self.others) if p is not None]
        inside = set() if own is None else {_in_bytes(x) for x in own.images}
        if not parts:
            return None
        images = torch.cat([p.images for p in parts])
        keep, seen = [], set(inside)
        for i, image in enumerate(images):
            key = _in_bytes(image)
            if key not in seen:
                seen.add(key)
                keep.append(i)
        if not keep:
            return None
        labels = torch.cat([p.labels for p in parts])
        names = [n for p in parts for n in p.names]
        return ImageSet(images[keep], labels[keep], tuple(names[i] for i in keep), parts[0].classes, (), "recorded")

    def never_private(self, images: Tensor) -> Tensor:
        """Those of `images` that no client holds: what an attacker may be given as other images of the kind."""
        held = {_in_bytes(image) for pool in self.pools.values() for image in pool.images}
        return images[[i for i, image in enumerate(images) if _in_bytes(image) not in held]]


def content(image: Tensor) -> bytes:
    """Pixels as bytes: equal images have equal ones."""
    return image.detach().float().cpu().contiguous().numpy().tobytes()


def _in_bytes(image: Tensor) -> bytes:
    return (image.detach().float().cpu() * 255).round().byte().contiguous().numpy().tobytes()


def read_truth(where: str | None, clients: list[str], shape: tuple[int, int, int], given: Given | None) -> Truth | None:
    """The private images; None if there are none.

    Args:
        where: a folder (with subfolders by client, if there are such), "digits", or "parquet:FILE".
        clients: whose updates are recorded.
        shape: (channels, height, width) of the network.
        given: from Python, instead.

    Raises:
        BadInput: they cannot be read, or do not fit the network.
    """
    found = _read(where, clients, shape, given)
    return None if found is None else replace(found, clients=max(1, len(set(clients))))


def _read(where: str | None, clients: list[str], shape: tuple[int, int, int], given: Given | None) -> Truth | None:
    if given is not None:
        return Truth({c: _of_tensors(c, x, y, shape) for c, (x, y) in given.items()},
                     all(y is not None for _, y in given.values()))  # fmt: skip
    if where is None:
        return None
    root = Path(where).expanduser()
    own = [c for c in dict.fromkeys(clients) if _is_inside(root, c)] if root.is_dir() else []
    if not own:
        held = read_images(where, shape, whole=True)
        return _classed({"": held}) if root.is_dir() else Truth({"": held}, "arbitrary" not in " ".join(held.notes))
    return _classed({c: read_images(f"folder:{root / c}", shape, whole=True) for c in own})


def _classed(pools: Mapping[str, ImageSet]) -> Truth:
    """Classes by the names of their folders, alike in all pools: a number is the class itself."""
    names = sorted({n.split("/")[0] for p in pools.values() for n in p.names if "/" in n})
    if any("/" not in n for p in pools.values() for n in p.names):
        return Truth(pools, labelled=False)
    index = {n: int(n) if all(x.isdecimal() for x in names) else i for i, n in enumerate(names)}
    classes = max(index.values()) + 1
    classed = {
        c: replace(
            p, labels=torch.tensor([index[n.split("/")[0]] for n in p.names]), classes=classes,
            names=tuple(f"{c}/{n}" if c else n for n in p.names),
        )
        for c, p in pools.items()
    }  # fmt: skip
    return Truth(classed, labelled=True)


def _is_inside(root: Path, client: str) -> bool:
    """A client's name is what the other side sent: it must not lead out of the folder."""
    return Path(client).name == client and client not in ("", ".", "..") and (root / client).is_dir()


def read_images(where: str, shape: tuple[int, int, int], *, whole: bool) -> ImageSet:
    """Images of a source in the network's shape, the first MOST_IMAGES of them.

    Args:
        where: the source, or a folder.
        shape: [c, h, w].
        whole: refuse a source of more images instead, as those left out might be the private ones.

    Raises:
        BadInput: no such source, or more images than are compared.
    """
    channels, height, width = shape
    source = f"folder:{where}" if Path(where).expanduser().is_dir() else where
    if whole and datasets.count(source) > MOST_IMAGES:
        raise BadInput(
            f"--truth: {datasets.count(source)} images in {where} are more than the {MOST_IMAGES} that recovered ones "
            "are compared with; give the private ones alone."
        )
    return datasets.load(source, size=(height, width), channels=channels, limit=MOST_IMAGES)


def _of_tensors(client: str, images: Tensor, labels: Tensor | None, shape: tuple[int, int, int]) -> ImageSet:
    x = images.detach().float().cpu()
    fits = x.ndim == 4 and tuple(x.shape[1:]) == shape and len(x) > 0
    if not fits or not (float(x.min()) >= 0 and float(x.max()) <= 1):  # false for nan, too
        raise BadInput(f"truth: shape {tuple(x.shape)} must be [n, {', '.join(map(str, shape))}] in [0, 1].")
    y = torch.zeros(len(x), dtype=torch.long) if labels is None else torch.as_tensor(labels).long().cpu()
    if y.shape != (len(x),) or int(y.min()) < 0:
        raise BadInput(f"truth: {len(x)} images and labels of shape {tuple(y.shape)}; give one class an image.")
    start = f"{client}: " if client else ""
    names = tuple(f"{start}image {i}" for i in range(len(x)))
    return ImageSet(x, y, names, int(y.max()) + 1, (), "python")


def batch_of(held: ImageSet, classes: int, *, labelled: bool) -> Batch:
    """A pool as a batch.

    Raises:
        BadInput: labels that the network does not have.
    """
    labels = held.labels if labelled else held.labels % classes
    return Batch(held.images, one_hot(labels, classes), UNIT, held.names)
