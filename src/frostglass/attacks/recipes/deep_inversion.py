"""DeepInversion: what priors and the network's own knowledge give without any gradient matching. A negative control."""

from __future__ import annotations

from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.restore import restore_by
from frostglass.attacks.inversion.rules import adam, chain, coarse_to_fine, scale
from frostglass.attacks.inversion.schedules import cosine
from frostglass.attacks.inversion.spaces import pixels, random_shift
from frostglass.attacks.inversion.terms import Term, bn_statistics, cross_entropy, l2_norm, variation_norm
from frostglass.attacks.registry import ATTACKS
from frostglass.core.threat import Knows, Observation


@ATTACKS.register(paper="Yin et al. 2020, CVPR (DeepInversion)", family="inversion")
def deep_inversion(
    *,
    steps: int = 2000,
    lr: float = 0.1,
    ce: float = 1.0,
    tv: float = 1e-4,
    l2: float = 1e-6,
    bn: float = 0.1,
    shift: int = 2,
    flip: bool = True,
    coarse: int = 2,
    coarse_until: float = 0.25,
    restore: str = "counts",
    seeds: int = 1,
    every: int = 50,
) -> Inversion:
    """Images that the network recognises as their labels and whose statistics are those it was trained on.

    Eq. 1 to 4: cross-entropy, TV, L2 and distance to the running BatchNorm statistics, the network being shown each
    candidate shifted and mirrored at random. No term reads the observed gradient: it serves to restore the labels, if
    they are not granted. What this recipe recovers is no leak of the gradient. The weights of the priors are those of
    GradInversion, so that the two differ by the matching alone.

    Args:
        steps: iterations.
        lr: start of the learning rate, which falls to 0 along a cosine.
        ce: weight of the cross-entropy.
        tv: weight of ||dx||_2 + ||dy||_2.
        l2: weight of ||x||_2.
        bn: weight of the running BatchNorm statistics; 0 for networks without BatchNorm.
        shift: greatest shift in pixels, 0 for none.
        flip: mirror every other time.
        coarse: the run starts with blocks of so many pixels (multi-resolution start); 1 for none.
        coarse_until: share of the run that works in blocks.
        restore: how labels that are not granted are restored: "counts", "least_squares", "row_minimum", "sum", "idlg".
        seeds: independent starts; the lowest objective is returned.
        every: iterations between two reports.
    """

    def terms(_: Observation) -> tuple[Term, ...]:
        found = (cross_entropy(ce), variation_norm(tv), l2_norm(l2))
        return (*found, bn_statistics(bn, Knows.BN_RUNNING)) if bn else found

    return Inversion(
        "deep_inversion",
        terms=terms,
        update=chain(coarse_to_fine(coarse, coarse_until), adam(), scale(cosine(lr))),
        steps=steps,
        restore=restore_by(restore),
        seeds=seeds,
        space=pixels(coarse=coarse),
        jitter=random_shift(shift, flip=flip) if shift or flip else None,
        every=every,
        needs=frozenset({Knows.EXAMPLES} | ({Knows.BN_RUNNING} if bn else set())),
    )
