"""Numbers drawn as tiles lie (`numerics.panels`), and how to read them."""

from __future__ import annotations

import torch
from torch import Tensor

from frostglass.numerics.panels import matrices


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=made) for s in shapes]


def panels(points: int, rows: int, columns: int) -> Tensor:
    """Drawn numbers as tiles lie; what fills up a panel is 0."""
    made = matrices(torch.empty(0), points, rows, columns)
    (numbers,) = drawn((points, rows, made.shape[1] * 32))
    numbers[:, :, columns:] = 0
    return made.copy_(numbers.unflatten(2, (-1, 32)).transpose(1, 2))


def unpacked(matrices: Tensor, columns: int) -> Tensor:
    """[points, rows, columns]."""
    return matrices.transpose(1, 2).flatten(2)[:, :, :columns]
