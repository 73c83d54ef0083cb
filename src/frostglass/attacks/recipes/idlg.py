"""Improved Deep Leakage from Gradients: the label by its gradient's sign, then DLG on the image alone."""

from __future__ import annotations

from frostglass.attacks.inversion.lbfgs import lbfgs
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.restore import Restored, by_idlg, by_row_minimum
from frostglass.attacks.inversion.seeds import Restart
from frostglass.attacks.inversion.spaces import pixels
from frostglass.attacks.inversion.terms import match_squared
from frostglass.attacks.registry import ATTACKS
from frostglass.core.threat import Knows, Observation


@ATTACKS.register(paper="Zhao et al. 2020, arXiv:2001.02610 (iDLG)", family="inversion")
def idlg(
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
    """The label read off the classifier's gradient, then squared matching by L-BFGS; made for one image.

    Sec. 3: with non-negative features the label's row is the only one with negative entries. It is taken as the row
    with the least entry, since a saturated softmax gives exactly 0; for more than one image that is the row-minimum
    rule, which names distinct classes (not in the paper).

    Args:
        steps, lr, inner, history, squared, restart_every, restart_factor: as in `dlg`.
        seeds: independent starts; the lowest objective is returned.
        every: steps between two reports.
    """
    return Inversion(
        "idlg",
        terms=lambda seen: (match_squared(squared),),
        update=lbfgs(lr=lr, iterations=inner, history=history),
        steps=steps,
        restore=_label,
        seeds=seeds,
        space=pixels(box=False),
        restart=Restart(restart_every, restart_factor) if restart_every else None,
        every=every,
        needs=frozenset({Knows.EXAMPLES}),
    )


def _label(seen: Observation) -> Restored:
    return by_idlg()(seen) if seen.examples == 1 else by_row_minimum()(seen)
