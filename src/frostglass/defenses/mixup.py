"""Mixup: the mixing of InstaHide without a mask, by the same code."""

from __future__ import annotations

from frostglass.core.defense import Defense
from frostglass.defenses.batch_mixer import BatchMixer
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.key_rows import Law, MixLaw
from frostglass.numerics.mixing import Labels


@DEFENSES.register("mixup", paper="Zhang et al. 2018, ICLR (mixup); Huang et al. 2021, NeurIPS (as a defence)")
def mixup(*, k: int = 4, c1: float = 0.65, law: Law = "folded_normal", labels: Labels = "exact") -> Defense:
    """Weighted means of k private images, unmasked; a heuristic that published attacks undo, no (epsilon, delta).

    Args:
        k: images in one encoding.
        c1: no coefficient exceeds it; 1 for no bound.
        law: of the coefficients, see `MixLaw`.
        labels: "exact", "quantised" or "renormalised".

    Raises:
        BadInput: c1 is below 1 / k, or hardly any draw keeps it.
    """
    mixing = MixLaw(k=k, private=k, c1=c1, law=law)
    mixing.check()
    return Defense(
        "mixup",
        encode=BatchMixer(mixing, "none", labels),
        claim="heuristic",
        settings={"k": k, "c1": c1, "law": law, "labels": labels},
        encodes=True,
        adaptive=("spear", "gallery", "learned_inverter"),
    )
