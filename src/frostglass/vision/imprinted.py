"""A network that a malicious server sends out: in front of an honest one, a layer that sorts images into bins."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.vision.networks import MODELS


class Imprint(nn.Module):
    """x + B relu(A x + c): every row of A measures the brightness, every bin has a threshold of its own.

    Unit i is active for images brighter than its threshold, and all units have the same error, as all columns of B are
    equal. So the gradient of row i minus that of row i + 1 is that of the images between the two thresholds.
    """

    def __init__(self, pixels: int, bins: int, mean: float, std: float) -> None:
        super().__init__()
        self.measure, self.back = nn.Linear(pixels, bins), nn.Linear(bins, pixels)
        shares = (torch.arange(bins) + 0.5) / bins
        thresholds = mean + std * torch.special.ndtri(shares.double())
        with torch.no_grad():
            self.measure.weight.fill_(1 / pixels)
            self.measure.bias.copy_(-thresholds)
            self.back.weight.fill_(1 / bins)
            self.back.bias.zero_()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The images, a little brighter."""
        return images + self.back(torch.relu(self.measure(images.flatten(1)))).view_as(images)


class _Imprinted(nn.Module):
    def __init__(self, imprint: Imprint, inner: nn.Module) -> None:
        super().__init__()
        self.imprint, self.inner = imprint, inner

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        logits: Tensor = self.inner(self.imprint(images))
        return logits


@MODELS.register(paper="Fowl et al. 2022, ICLR (Robbing the Fed)")
def imprinted(
    *,
    classes: int,
    channels: int,
    size: int,
    bins: int = 128,
    mean: float = 0.47,
    std: float = 0.12,
    inner: str = "small_bn_cnn",
    inner_options: dict[str, Any] | None = None,
) -> nn.Module:
    """What a malicious server sends: a layer of brightness bins before an honest network; for the attack `imprint`.

    Args:
        classes, channels, size: of the images.
        bins: units; the more of them, the more images are alone in theirs.
        mean, std: of the mean brightness of an image, as the server guesses it.
        inner: built-in network behind it.
        inner_options: its options.
    """
    if bins < 2 or std <= 0:
        raise BadInput(f"model.bins: {bins} must be from 2, and std = {std} above 0.")
    shape = {"classes": classes, "channels": channels, "size": size}
    entry, options = MODELS[inner], dict(inner_options or {})
    wrong = entry.problems({**shape, **options}, "model.inner_options")
    if wrong:
        raise BadInput(wrong)
    return _Imprinted(Imprint(channels * size * size, bins, mean, std), entry.make(**shape, **options))
