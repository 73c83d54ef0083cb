"""Noise on the update without clipping: no sensitivity is bounded, so nothing is proved."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from frostglass.core.defense import Defense, Mechanism
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness, Rng
from frostglass.core.update import Update
from frostglass.defenses.registry import DEFENSES

Law = Literal["gaussian", "laplace"]


@DEFENSES.register(paper="Zhu et al. 2019, NeurIPS (DLG, sec. 5.1)")
def noise(*, std: float = 0.01, law: Law = "gaussian") -> Defense:
    """Independent noise on every entry of the update, which nobody clipped: a heuristic, no (epsilon, delta).

    Args:
        std: standard deviation, in units of the update's entries; 0 for none.
        law: "gaussian" or "laplace".
    """
    if not std >= 0:
        raise BadInput(f"noise: std = {std} must be at least 0.")

    def protect(update: Update, randomness: Randomness) -> Update:
        if std == 0:
            return update
        rng = randomness.rng().at("noise")
        return replace(update, gradients={n: g + std * drawn(rng.at(n), law, g) for n, g in update.gradients.items()})

    return Defense(
        "noise",
        protect=protect,
        settings={"std": std, "law": law},
        adaptive=("gallery", "learned_inverter"),
        mechanism=Mechanism("update", None, std) if law == "gaussian" else None,
    )


def drawn(rng: Rng, law: Law, like: Tensor) -> Tensor:
    """Noise of variance 1 in the shape of `like`."""
    if law == "gaussian":
        return rng.normal(like.shape, like=like)
    u = (rng.uniform(like.shape).double() - 0.5).clamp(-0.5 + 1e-9, 0.5 - 1e-9).to(like.device)
    return (-u.sign() * (1 - 2 * u.abs()).log() / 2**0.5).to(like.dtype)
