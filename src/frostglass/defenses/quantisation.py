"""Few bits an entry: even levels, or the sign alone."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.core.update import Update
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.compress import Rounding, quantised, signs, straight_through


@DEFENSES.register(paper="Alistarh et al. 2017, NeurIPS (QSGD)")
def quantisation(*, bits: int = 4, rounding: Rounding = "nearest") -> Defense:
    """Each tensor of the update rounded to 2^bits - 1 even levels; saves bandwidth, a heuristic as a defence.

    Args:
        bits: of an entry, 2 to 32; 32 leaves the update as it is.
        rounding: "nearest", or "stochastic", which keeps the mean.
    """
    if not 2 <= bits <= 32:
        raise BadInput(f"quantisation: bits = {bits} must be a whole number from 2 to 32; for one bit use 'sign'.")

    def protect(update: Update, randomness: Randomness) -> Update:
        if bits == 32:
            return update
        rng = randomness.rng().at("quantisation")
        return replace(
            update, gradients={n: quantised(g, bits, rounding, rng.at(n)) for n, g in update.gradients.items()}
        )

    def rounded(g: Tensor) -> Tensor:
        return straight_through(g, lambda x: quantised(x, bits))

    return Defense(
        "quantisation",
        protect=protect,
        settings={"bits": bits, "rounding": rounding},
        adaptive=("thaw", "gallery", "learned_inverter"),
        # what is rounded at random is g on average
        simulate=lambda own, _: {n: rounded(g) for n, g in own.items()} if rounding == "nearest" and bits < 32 else own,
    )


@DEFENSES.register(paper="Bernstein et al. 2018, ICML (signSGD)")
def sign(*, magnitude: bool = True) -> Defense:
    """One bit an entry: the sign of the update; a heuristic as a defence.

    Args:
        magnitude: send the mean of |g| of each tensor too, which scales its signs.
    """

    def protect(update: Update, _: Randomness) -> Update:
        sent = {n: signs(g, magnitude=magnitude) for n, g in update.gradients.items()}
        return replace(update, gradients=sent)

    return Defense(
        "sign",
        protect=protect,
        settings={"magnitude": magnitude},
        adaptive=("learned_inverter", "gallery", "thaw"),
        simulate=lambda own, _: {
            n: straight_through(g, lambda x: signs(x, magnitude=magnitude)) for n, g in own.items()
        },
    )
