"""Normalisation as a part of the network: images stay in [0, 1] everywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.batch import Domain
from frostglass.core.errors import BadInput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def usual_constants(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel: ImageNet's for colour, their averages otherwise."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.449,) * channels, (0.226,) * channels


class Normalise(nn.Module):
    """(images - mean) / std. The constants are no part of the state dict, so that published checkpoints load.

    Args:
        mean, std: one number per channel, or one for all; std positive.

    Raises:
        BadInput: lengths that differ, or a std that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or not all(s > 0 for s in std):
            raise BadInput(f"normalise: std = {tuple(std)} must be positive and as long as mean = {tuple(mean)}.")
        # the numbers as given, beside the buffers: a float32 buffer does not give 0.485 back
        self.constants = (tuple(map(float, mean)), tuple(map(float, std)))
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.get_default_dtype()).view(1, -1, 1, 1), persistent=False
            )

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalised images."""
        return (images - self.mean) / self.std

    def _apply(self, fn: object, recurse: bool = True) -> Normalise:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in zip(("mean", "std"), self.constants, strict=True):
            moved = getattr(self, name)  # exact again after a change of dtype: float64 must not keep float32's rounding
            setattr(self, name, moved.new_tensor(values).view(1, -1, 1, 1))
        return self

    def extra_repr(self) -> str:
        """The constants, for printing."""
        return "mean={}, std={}".format(*self.constants)


class Normalised(nn.Module):
    """A network for normalised images as one for images in [0, 1]: `Normalised(model, mean, std)`.

    Args:
        model: takes [b, c, h, w], already normalised.
        mean, std: per channel; std positive.

    Raises:
        BadInput: as `Normalise`.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalise = Normalise(mean, std)
        self.model = model

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of images in [0, 1]."""
        logits: Tensor = self.model(self.normalise(images))
        return logits


def domain_of(model: nn.Module) -> Domain:
    """Images in [0, 1] with the constants of the model's first `Normalise`; mean 0 and std 1 if it has none."""
    for module in model.modules():
        if isinstance(module, Normalise):
            mean, std = module.constants
            return Domain(0.0, 1.0, mean, std)
    return Domain(0.0, 1.0, (0.0,), (1.0,))
