"""What a client holds: a private batch of images, and what values its pixels may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.core.errors import BadInput

T = TypeVar("T")


@dataclass(frozen=True)
class Domain:
    """What a pixel may be, and the normalisation that the model applies inside.

    Args:
        low, high: bounds of a pixel value; photographs live in [0, 1], instance encodings in [-1, 1].
        mean, std: per-channel constants by which the model normalises; attacks optimise in that space.
    """

    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise BadInput(f"domain: low = {self.low} must be below high = {self.high}.")
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise BadInput(f"domain: std = {self.std} must be positive and as long as mean = {self.mean}.")

    def clamp(self, images: Tensor) -> Tensor:
        """Images limited to [low, high]."""
        return images.clamp(self.low, self.high)

    def channel_constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) shaped [c or 1, 1, 1], in the dtype and on the device of `like`."""
        make = [torch.tensor(v, dtype=like.dtype, device=like.device).view(-1, 1, 1) for v in (self.mean, self.std)]
        return make[0], make[1]

    def normalise(self, images: Tensor) -> Tensor:
        """(images - mean) / std."""
        mean, std = self.channel_constants(images)
        return (images - mean) / std

    def denormalise(self, z: Tensor) -> Tensor:
        """z * std + mean."""
        mean, std = self.channel_constants(z)
        return z * std + mean


@dataclass(frozen=True)
class Batch:
    """Images of one client with their targets.

    Args:
        images: [b, c, h, w], in the bounds of `domain`, never mean/std-normalised (models normalise inside).
        targets: [b, k], non-negative rows of mass m <= 1 (one-hot for plain labels; cross-dataset encodings lose mass).
        domain: what a pixel may be.
        ids: one name per image, for reports; never seen by an attack.
    """

    images: Float[Tensor, "b c h w"]
    targets: Float[Tensor, "b k"]
    domain: Domain
    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise BadInput(f"images: shape {tuple(self.images.shape)} must be [batch, channels, height, width].")
        if self.targets.ndim != 2 or len(self.targets) != len(self.images):
            raise BadInput(
                f"targets: shape {tuple(self.targets.shape)} must be [batch, classes] with batch = {len(self.images)}."
            )
        if len(self.ids) != len(self.images):
            raise BadInput(f"ids: {len(self.ids)} names for {len(self.images)} images.")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The same batch elsewhere."""
        return replace(self, images=self.images.to(device, dtype), targets=self.targets.to(device, dtype))

    def take(self, index: Sequence[int]) -> Batch:
        """The rows `index`, in that order."""
        rows = list(index)
        return replace(self, images=self.images[rows], targets=self.targets[rows], ids=tuple(self.ids[i] for i in rows))


def one_hot(labels: Sequence[int] | Tensor, classes: int) -> Tensor:
    """Class indices -> [b, classes] float targets.

    Raises:
        BadInput: labels that are no list of whole numbers, or one outside 0 .. classes - 1.
    """
    given = torch.as_tensor(labels)
    if given.ndim != 1 or given.is_complex() or not bool((given == given.long()).all()):
        raise BadInput(f"labels: shape {tuple(given.shape)}, {given.dtype} must be whole numbers, one an image.")
    index = given.long()
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= classes):
        raise BadInput(
            f"labels: values {int(index.min())} to {int(index.max())} do not fit a model with {classes} outputs; "
            "give labels from 0 or a model with more classes."
        )
    return torch.nn.functional.one_hot(index, classes).float()


class Sealed(Generic[T]):
    """Ground truth on its way past the attack: only `auditing.score` may open it (a test holds this).

    Printing, pickling and attribute access show nothing.
    """

    __slots__ = ("__value",)

    def __init__(self, value: T) -> None:
        self.__value = value

    def open_for_scoring(self) -> T:
        """The truth. One caller: frostglass.auditing.score."""
        return self.__value

    def __repr__(self) -> str:
        return "Sealed(...)"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("sealed ground truth is never pickled")
