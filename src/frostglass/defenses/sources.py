"""Where an encoder takes images from: the private set and the public pool, checked once, never copied needlessly."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.numerics.compiled import fastest
from frostglass.numerics.key_loops import within
from frostglass.numerics.keystream import Keystream

Images: TypeAlias = "Tensor | NDArray[np.uint8] | NDArray[np.float32]"
"""[N, c, h, w], uint8 or float32 in [0, 1]; a `numpy.memmap` is read row by row.

What is not contiguous in memory (as after `permute`) is copied once; of a memory map only the rows drawn are.
"""

Augmentation: TypeAlias = Callable[[Tensor], Tensor]
"""[n, c, h, w] -> the same shape and dtype, each image changed at random."""


def check_images(images: Images, what: str) -> None:
    """Raises BadInput unless `images` is [N, c, h, w] of uint8, or of float32 in [0, 1] (memory maps: when read)."""
    if len(images.shape) != 4 or 0 in images.shape:
        raise BadInput(
            f"{what}: shape {tuple(images.shape)} must be [images, channels, height, width], none of them 0."
        )
    if images.dtype not in (torch.uint8, torch.float32, np.dtype(np.uint8), np.dtype(np.float32)):
        raise BadInput(f"{what}: dtype {images.dtype} is not taken; give uint8 in 0 .. 255 or float32 in [0, 1].")
    if not isinstance(images, np.memmap):
        check_range(images, what)


def check_range(images: Images, what: str) -> None:
    """Raises BadInput if float pixels are not within [0, 1]; NaN is not."""
    if images.dtype in (torch.uint8, np.dtype(np.uint8)) or 0 in images.shape:
        return
    low, high = float(images.min()), float(images.max())
    if not (low >= 0.0 and high <= 1.0):
        raise BadInput(
            f"{what}: float pixels run from {low:.4g} to {high:.4g} and must lie in [0, 1]; do not normalise by mean "
            "and std before encoding (one normalisation for private and public images is part of the encoding)."
        )


def as_rows(images: Images) -> Images:
    """[N, c, h, w] -> [N, d], contiguous; a view wherever the memory allows it."""
    if isinstance(images, Tensor):
        return images.detach().reshape(len(images), -1).contiguous()
    flat: Any = np.ascontiguousarray(images).reshape(len(images), -1)
    return cast(Images, flat)


def in_place(images: Images) -> bool:
    """Whether rows can be mixed from where the images are: not in a memory map that is checked or turned as read."""
    on_disk = isinstance(images, np.memmap)
    return not on_disk or (images.dtype == np.uint8 and bool(images.flags.c_contiguous))


def images_and_labels(train_set: Any) -> tuple[Images, Any]:
    """(images [N, c, h, w], labels) of a pair, a TensorDataset or any map-style data set of (image, label).

    A map-style data set is read once and kept: random transforms in it are drawn that one time and then stand still
    for all epochs. Leave them out and give them to the encoder as `augmentation`.

    Raises:
        BadInput: its items are no (image tensor, label) pairs of one shape.
    """
    pair = getattr(train_set, "tensors", train_set)
    if isinstance(pair, tuple | list) and len(pair) == 2 and len(getattr(pair[0], "shape", ())) == 4:
        return pair[0], pair[1]
    try:
        items = [train_set[i] for i in range(len(train_set))]
        return torch.stack([torch.as_tensor(image) for image, _ in items]), [
            operator.index(label) for _, label in items
        ]
    except (TypeError, ValueError, RuntimeError) as problem:
        raise BadInput(f"train_set: give (images, labels) or a data set of (image tensor, label); {problem}.") from None


def rows_of(rows: Sequence[int] | NDArray[np.int64] | Tensor, size: int) -> NDArray[np.int64]:
    """Row numbers of a set of `size` images as an array.

    Raises:
        BadInput: a row is not in the set.
    """
    index = np.asarray(rows.cpu().numpy() if isinstance(rows, Tensor) else rows)
    if index.ndim != 1 or (len(index) and index.dtype.kind not in "iu"):
        raise BadInput("rows: give a list of row numbers of the private set.")
    checked = index.astype(np.int64)
    if not fastest(within)(checked, size):
        raise BadInput(f"rows: {int(index.min())} to {int(index.max())} are not all in the set of {size} images.")
    return checked


class PrivateSet:
    """Images of one owner with their labels.

    Args:
        images: as in `Images`; must not change while it is encoded.
        targets: [N] class indices, or [N, classes] one-hot rows.
        classes: number of classes; may be left out for one-hot rows.

    Raises:
        BadInput: wrong shape, dtype, range, labels out of range, or targets that are soft already.
    """

    def __init__(
        self, images: Images, targets: Tensor | NDArray[np.int64] | Sequence[int], classes: int | None
    ) -> None:
        check_images(images, "images")
        self.images = images
        self.labels, self.classes = _class_indices(targets, classes)
        if len(self.labels) != len(images):
            raise BadInput(f"targets: {len(self.labels)} labels for {len(images)} images.")
        self.table: Images | None = as_rows(images) if in_place(images) else None  # None: gather what is drawn
        self.shape = tuple(images.shape[1:])
        self._augmented: tuple[int, Images] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device if isinstance(self.images, Tensor) else torch.device("cpu")

    def rows(self, rows: Sequence[int] | NDArray[np.int64] | Tensor) -> NDArray[np.int64]:
        """Row numbers as an array.

        Raises:
            BadInput: a row is not in the set.
        """
        return rows_of(rows, len(self))

    def gathered(self, index: NDArray[np.int64]) -> Tensor:
        """[n, c, h, w]: copies of the images `index`."""
        if isinstance(self.images, Tensor):
            return self.images[torch.from_numpy(index).to(self.images.device)]
        taken = torch.from_numpy(np.ascontiguousarray(self.images[index]))
        check_range(taken, "images")
        return taken

    def augmented(self, epoch: int, augmentation: Augmentation) -> Images:
        """[N, d]: one augmented copy of each image for the whole of `epoch`, as the paper does it."""
        if self._augmented is None or self._augmented[0] != epoch:
            self._augmented = None  # frees the old copy first
            changed = augment(self.gathered(np.arange(len(self))), augmentation)
            self._augmented = epoch, as_rows(changed)
        return self._augmented[1]


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """The augmented images.

    Raises:
        BadInput: the augmentation changes the shape, the dtype or leaves [0, 1].
    """
    changed = augmentation(images)
    if changed.shape != images.shape or changed.dtype != images.dtype:
        raise BadInput(
            f"augmentation: made {tuple(changed.shape)} {changed.dtype} of {tuple(images.shape)} {images.dtype}; "
            "it must keep shape and dtype."
        )
    check_range(changed, "augmentation")
    return changed


def _class_indices(
    targets: Tensor | NDArray[np.int64] | Sequence[int], classes: int | None
) -> tuple[NDArray[np.int64], int]:
    if isinstance(targets, Tensor):
        plain = targets.detach().cpu()
        targets = (plain.double() if plain.is_floating_point() else plain).numpy()
    values = np.array(targets)  # a copy: what was checked here must stay so, the compiled code trusts it
    if values.ndim == 2 and values.shape[1] == 1 and classes not in (None, 1):
        raise BadInput(f"targets: shape {values.shape}; give class indices as [N] (targets.squeeze(1)).")
    if values.ndim == 2:
        hard = ((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all()
        if not hard:
            raise BadInput(
                "targets: these rows are soft already; encode images with plain labels (mixing them twice would make "
                "the exposure ledger and the label mass false)."
            )
        if classes not in (None, values.shape[1]):
            raise BadInput(f"num_classes: {classes} does not fit targets with {values.shape[1]} columns.")
        return values.argmax(1).astype(np.int64), values.shape[1]
    if values.ndim != 1 or (len(values) and values.dtype.kind not in "iu"):
        raise BadInput(
            f"targets: shape {values.shape}, {values.dtype}; give class indices [N] or one-hot rows [N, classes]."
        )
    if classes is not None and (not isinstance(classes, int | np.integer) or isinstance(classes, bool)):
        raise BadInput(f"num_classes: {classes!r} is no whole number.")
    if classes is None:
        raise BadInput("num_classes: missing; class indices alone do not say how many classes there are.")
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < classes):
        raise BadInput(
            f"labels: values {int(values.min())} to {int(values.max())} do not fit {classes} classes; "
            "give labels from 0 or more classes."
        )
    return values.astype(np.int64), classes


class PublicPool:
    """Public images that fill the remaining slots; any number of them, drawn without bias from the whole pool.

    Args:
        images: as in `Images`; a `numpy.memmap` stays on disk, rows are read as they are drawn.
        crop: draw a fresh random crop of the private images' size at each use; without it the sizes must agree.
    """

    def __init__(self, images: Images, crop: bool = False) -> None:
        check_images(images, "public")
        if isinstance(images, Tensor):
            images = images.detach().contiguous()  # once, and not at every batch
        elif not isinstance(images, np.memmap):
            images = cast(Images, np.ascontiguousarray(images))
        self.images, self.crop = images, crop

    def __len__(self) -> int:
        return len(self.images)

    def check(self, shape: tuple[int, ...], dtype: object, slots: int) -> None:
        """Raises BadInput if the pool does not go with private images of this shape [c, h, w] and dtype."""
        mine = tuple(self.images.shape[1:])
        found = []
        if len(self) < slots:
            found.append(f"public: {len(self)} images are too few for {slots} distinct public partners; add images.")
        if mine[0] != shape[0]:
            found.append(f"public: {mine[0]} channels against {shape[0]} of the private images.")
        elif self.crop and (mine[1] < shape[1] or mine[2] < shape[2]):
            found.append(f"public: {mine[1:]} images are too small to crop {shape[1:]} from.")
        elif not self.crop and mine != shape:
            found.append(
                f"public: images of shape {mine} against {shape} of the private ones; make both alike: encode "
                "at the pool's size, or make a pool of this one (in Python, PublicPool(images, crop=True) crops)."
            )
        if _name(self.images.dtype) != _name(dtype):
            found.append(f"public: {_name(self.images.dtype)} against {_name(dtype)} private images; store both alike.")
        if found:
            raise BadInput(found)

    def rows_for(
        self, index: NDArray[np.int64], shape: tuple[int, ...], stream: Keystream
    ) -> tuple[Images, NDArray[np.int64]]:
        """(table [M, d], indices into it) for the drawn images `index` [b, slots]."""
        if not self.crop and in_place(self.images):
            return as_rows(self.images), index
        flat = index.reshape(-1)
        place = np.arange(len(flat)).reshape(index.shape)
        if not self.crop:
            made = torch.from_numpy(np.ascontiguousarray(self.images[flat]))
            check_range(made, "public")
            return as_rows(made), place
        (_, h, w), (_, full_h, full_w) = shape, self.images.shape[1:]
        top, left = stream.integers(full_h - h + 1, len(flat)), stream.integers(full_w - w + 1, len(flat))
        made = crops(self.images, flat, top, left, h, w)
        check_range(made, "public")
        return as_rows(made), place


def crops(
    images: Images, rows: NDArray[np.int64], top: NDArray[np.int64], left: NDArray[np.int64], h: int, w: int
) -> Tensor:
    """[n, c, h, w]: of image rows[i] what lies h down and w right of (top[i], left[i]), read from where it is.

    All positions of the window are a view of the images, without memory of its own; n of them are then copied at once.

    Raises:
        IndexError: a row or a corner is outside.
    """
    if isinstance(images, Tensor) and images.device.type != "cpu":
        seen = images.unfold(2, h, 1).unfold(3, w, 1)
        at = [torch.from_numpy(values).to(images.device) for values in (rows, top, left)]
        return seen[at[0], :, at[1], at[2]]
    plain = images.numpy() if isinstance(images, Tensor) else images.view(np.ndarray)
    return torch.from_numpy(sliding_window_view(plain, (h, w), (2, 3))[rows, :, top, left])


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
