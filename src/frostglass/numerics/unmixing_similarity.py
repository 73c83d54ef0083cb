"""How much two encodings look as if they shared an image, from their absolute values alone.

    s(e, f) = sum over blocks B of |<g_e, g_f>_B|,   g = spatial differences of |x~|, normalised

The mask hides one sign a pixel. Within a small block the unmasked mix v = sum_j lambda_j x_j mostly keeps its sign, so
that differences of |v| are differences of v up to one sign a block, which the absolute value drops. Differences whiten:
two natural images correlate strongly by their smooth parts and hardly by their edges. Our own derivation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def differences(images: Float[Tensor, "e c h w"]) -> Float[Tensor, "e c2 h w"]:
    """Differences to the right and the lower neighbour as channels (0 at the far edge)."""
    right = torch.nn.functional.pad(images[..., 1:] - images[..., :-1], (0, 1))
    down = torch.nn.functional.pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1))
    return torch.cat([right, down], 1)


def blocks_of(images: Float[Tensor, "e c h w"], block: int) -> list[Tensor]:
    """The blocks of side `block`, row by row, each [e, its pixels] (smaller ones at the lower and right edge)."""
    return [q.flatten(1) for row in images.split(block, -2) for q in row.split(block, -1)]


def similarity(
    encodings: Float[Tensor, "e c h w"],
    others: Float[Tensor, "f c h w"] | None = None,
    *,
    block: int = 4,
    rows: int = 2048,
) -> Float[Tensor, "e f"]:
    """Similarity of every encoding to every other (or to `others`), at least 0; invariant to any sign mask.

    Args:
        encodings, others: in [-1, 1], sign-masked or absolute values.
        block: side in pixels of the blocks that are taken to have one sign.
        rows: encodings worked on at a time: memory is [rows, f] besides the result.
    """
    left = blocks_of(_unit(encodings), block)
    right = left if others is None else blocks_of(_unit(others), block)
    made = encodings.new_zeros(left[0].shape[0], right[0].shape[0], dtype=torch.float32)
    for a, b in zip(left, right, strict=True):
        for start in range(0, len(a), rows):
            made[start : start + rows] += (a[start : start + rows] @ b.T).abs_()
    return made


def _unit(encodings: Tensor) -> Tensor:
    g = differences(encodings.float().abs())
    g = g - g.mean(0)
    return g / torch.linalg.vector_norm(g.flatten(1), dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
