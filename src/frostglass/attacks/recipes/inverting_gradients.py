"""Inverting Gradients, with the constants of the paper and its released configuration."""

from __future__ import annotations

from frostglass.attacks.inversion.engine import Engine
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import adam, chain, scale, sign
from frostglass.attacks.inversion.schedules import step_decay
from frostglass.attacks.inversion.terms import match_cosine, total_variation
from frostglass.attacks.registry import ATTACKS
from frostglass.core.threat import Knows


@ATTACKS.register(paper="Geiping et al. 2020, NeurIPS (Inverting Gradients)", family="inversion")
def inverting_gradients(
    *,
    steps: int = 4800,
    lr: float = 0.1,
    gradient: float = 1.0,
    tv: float = 1e-1,
    seeds: int = 1,
    engine: Engine = "double_backward",
    graph: bool = False,
    every: int = 50,
) -> Inversion:
    """Cosine matching and total variation, Adam on the sign of the gradient, box projection.

    Eq. 4 and sec. 3: min over x in the box of 1 - cos(grad L(x, y), g) + tv TV(x); labels are assumed known, the
    learning rate falls by ten after 3/8, 5/8 and 7/8 of the steps.

    Args:
        steps: iterations (4,800 in the paper).
        lr: start of the learning rate.
        gradient: weight of the matching.
        tv: weight of the total variation (1e-1 to 1e-6 in the paper, by model).
        seeds: restarts.
        engine: "double_backward", or "frozen_fd", which is faster on networks of ReLU and max-pooling, and serves
            those that cannot be differentiated twice.
        graph: on CUDA, replay iterations as one graph where that repeats the eager path. Off until it is measured.
        every: iterations between two reports.
    """
    return Inversion(
        "inverting_gradients",
        terms=lambda seen: (match_cosine(gradient), total_variation(tv)),
        update=chain(sign(), adam(), scale(step_decay(lr, at=(3 / 8, 5 / 8, 7 / 8), factor=0.1))),
        steps=steps,
        seeds=seeds,
        engine=engine,
        graph=graph,
        every=every,
        needs=frozenset({Knows.EXAMPLES, Knows.LABELS}),
    )
