"""GradInversion, whole: per-layer matching, fidelity priors, pixel noise, and group consistency over seeds."""

from __future__ import annotations

from typing import Literal

from frostglass.attacks.inversion.consensus import Consensus
from frostglass.attacks.inversion.engine import Engine
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.restore import restore_by
from frostglass.attacks.inversion.rules import adam, chain, pixel_noise, scale
from frostglass.attacks.inversion.schedules import cosine
from frostglass.attacks.inversion.spaces import pixels
from frostglass.attacks.inversion.terms import (
    Term,
    available_bn,
    bn_statistics,
    l2_norm,
    match_cosine,
    match_layer_norms,
    variation_norm,
)
from frostglass.attacks.registry import ATTACKS
from frostglass.core.errors import BadInput
from frostglass.core.threat import Knows, Observation
from frostglass.numerics import registration

Agreement = Literal["registered", "lazy", "none"]
Statistics = Literal["auto", "batch", "running", "none"]
Matching = Literal["l2", "cosine"]

_SOURCE = {"batch": Knows.BN_BATCH, "running": Knows.BN_RUNNING}


@ATTACKS.register(paper="Yin et al. 2021, CVPR (GradInversion)", family="inversion")
def grad_inversion(
    *,
    steps: int = 20_000,
    lr: float = 0.1,
    warmup: int = 50,
    matching: Matching = "l2",
    gradient: float = 1e-3,
    cosine_gradient: float = 1.0,
    tv: float = 1e-4,
    l2: float = 1e-6,
    bn: Statistics = "auto",
    bn_weight: float = 0.1,
    bn_relative: bool = False,
    noise: float = 0.2,
    consensus: Agreement = "registered",
    group: float = 0.01,
    consensus_start: int | None = None,
    consensus_every: int = 100,
    register: str = "ecc_euclidean",
    box: bool = True,
    restore: str = "row_minimum",
    engine: Engine = "double_backward",
    graph: bool = False,
    seeds: int = 8,
    every: int = 50,
) -> Inversion:
    """Matching, TV, L2 and BatchNorm priors, eight seeds drawn to their registered mean, noise on the pixels.

    Eq. 1 to 12. Every term goes with one key: a weight of 0 leaves it out. Labels that are not granted are restored by
    the row minimum, which names distinct classes. The paper registers with RANSAC-flow, whose weights nobody may ship;
    `register` takes a method of `numerics.registration`, or "package.module:function".

    Args:
        steps: iterations.
        lr: peak of the learning rate, which falls to 0 along a cosine.
        warmup: iterations of its linear rise.
        matching: "l2" as in Eq. 3, or "cosine" (the paper's appendix).
        gradient: a_G, weight of the L2 matching.
        cosine_gradient: weight of the cosine matching.
        tv, l2: a_tv and a_l2 of Eq. 9.
        bn: BatchNorm statistics: of the target "batch" (BN_exact), "running" (BN_approx), "none", or "auto" for the
            best that is granted.
        bn_weight: a_BN.
        bn_relative: divide each layer's distance by the size of its target (not in the paper).
        noise: a_n, in units of the learning rate.
        consensus: "registered" (Eq. 12), "lazy" for the pixel mean, or "none".
        group: a_group of Eq. 11.
        consensus_start: first refresh; a quarter of the steps if left out (5,000 of 20,000, as in the paper).
        consensus_every: iterations between refreshes; the anchor is held fixed in between.
        register: method of the registered mean. On small images it gained no more than a random shift by a fraction of
            a pixel, which smooths as a warp does (bench/registration.py); agreement itself gains.
        box: limit pixels to their range after every step (the paper does not say).
        restore: how labels that are not granted are restored: "row_minimum" as in the paper, "counts" where classes
            repeat, "least_squares", "sum" or "idlg".
        engine: "double_backward", or "frozen_fd", which is faster on networks of ReLU and max-pooling, and serves
            those that cannot be differentiated twice.
        graph: on CUDA, replay iterations as one graph where that repeats the eager path. Off until it is measured.
        seeds: |G|; the lowest objective is returned.
        every: iterations between two reports.
    """
    if consensus_every < 1 or (consensus_start is not None and consensus_start < 0):
        raise BadInput("attack.consensus_every: must be from 1, and consensus_start from 0.")

    def terms(seen: Observation) -> tuple[Term, ...]:
        match = match_layer_norms(gradient) if matching == "l2" else match_cosine(cosine_gradient)
        source = available_bn(seen) if bn == "auto" else _SOURCE.get(bn)
        found = (match, variation_norm(tv), l2_norm(l2))
        return (*found, bn_statistics(bn_weight, source, relative=bn_relative)) if source and bn_weight else found

    method = registration.method(register) if consensus == "registered" else registration.none
    start = steps // 4 if consensus_start is None else consensus_start
    return Inversion(
        "grad_inversion",
        terms=terms,
        update=chain(adam(), pixel_noise(noise), scale(cosine(lr, warmup=warmup))),
        steps=steps,
        restore=restore_by(restore),
        seeds=seeds,
        space=pixels(box=box),
        consensus=Consensus(group, start, consensus_every, method) if consensus != "none" and group else None,
        engine=engine,
        graph=graph,
        every=every,
        needs=frozenset({Knows.EXAMPLES} | ({_SOURCE[bn]} if bn in _SOURCE and bn_weight else set())),
    )
