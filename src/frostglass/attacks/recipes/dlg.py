"""Deep Leakage from Gradients, with the constants of the paper."""

from __future__ import annotations

from frostglass.attacks.inversion.lbfgs import lbfgs
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.seeds import Restart
from frostglass.attacks.inversion.spaces import pixels, with_labels
from frostglass.attacks.inversion.terms import match_squared
from frostglass.attacks.registry import ATTACKS
from frostglass.core.threat import Knows


@ATTACKS.register(paper="Zhu et al. 2019, NeurIPS (DLG)", family="inversion")
def dlg(
    *,
    steps: int = 300,
    lr: float = 1.0,
    inner: int = 20,
    history: int = 100,
    squared: float = 1.0,
    restart_every: int = 15,
    restart_factor: float = 0.5,
    seeds: int = 1,
    every: int = 10,
) -> Inversion:
    """Squared matching by L-BFGS, with images and soft labels found together.

    Eq. 4: min over (x, y') of sum_l ||grad L(x, softmax y') - g_l||^2 from normal starts. It needs a network that is
    twice smooth (sigmoid, strides instead of pooling), and diverges easily: a seed whose objective has not fallen below
    `restart_factor` of its start, or is not finite, begins anew.

    Args:
        steps: L-BFGS calls (300 in the paper).
        lr: length of a quasi-Newton step.
        inner: gradient evaluations in a call.
        history: pairs of the quasi-Newton approximation.
        squared: weight of the matching.
        restart_every: steps between two checks for divergence; 0 for never.
        restart_factor: as above.
        seeds: independent starts; the lowest objective is returned.
        every: steps between two reports.
    """
    return Inversion(
        "dlg",
        terms=lambda seen: (match_squared(squared),),
        update=lbfgs(lr=lr, iterations=inner, history=history),
        steps=steps,
        seeds=seeds,
        space=with_labels(pixels(box=False)),
        restart=Restart(restart_every, restart_factor) if restart_every else None,
        every=every,
        needs=frozenset({Knows.EXAMPLES}),
    )
