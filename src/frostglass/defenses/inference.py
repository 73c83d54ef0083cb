"""What comes out of encoding test images, and how its predictions are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from frostglass.core.errors import BadInput


@dataclass(frozen=True)
class TestEncodings:
    """Several encodings of each test image.

    Args:
        images: [b * n, c, h, w] in [-1, 1]; the n encodings of one image stand together.
        n: encodings per image.
        insecure: made with `insecure_seed`.
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    images: Float[Tensor, "bn c h w"]
    n: int
    insecure: bool


def average_predictions(
    outputs: Float[Tensor, "bn k"], n: int, outputs_are: Literal["logits", "probabilities"] = "logits"
) -> Float[Tensor, "b k"]:
    """Mean class probabilities over the n encodings of each image.

    Args:
        outputs: [b * n, classes], the n rows of one image together, as `encode_for_inference` gives them.
        n: encodings per image.
        outputs_are: "logits" (softmax is applied) or "probabilities".

    Raises:
        BadInput: the rows do not divide by n, or probabilities do not sum to 1.
    """
    if n < 1 or len(outputs) % n:
        raise BadInput(f"n: {len(outputs)} predictions do not divide into groups of {n}.")
    if outputs_are == "logits":
        outputs = outputs.softmax(1)
    elif not ((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() <= 1e-3).all()):  # NaN is none either
        raise BadInput('outputs: rows are no probabilities (they must be non-negative and sum to 1); say "logits".')
    return outputs.view(-1, n, outputs.shape[1]).mean(1)
