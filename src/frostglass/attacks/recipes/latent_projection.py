"""Latent projection: the image is searched among those that a generator draws."""

from __future__ import annotations

from typing import Literal

from torch import nn

from frostglass.attacks.inversion.generated import latent, untrained
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.restore import restore_by
from frostglass.attacks.inversion.rules import adam, chain, scale
from frostglass.attacks.inversion.schedules import cosine
from frostglass.attacks.inversion.spaces import Space
from frostglass.attacks.inversion.terms import (
    Term,
    available_bn,
    bn_statistics,
    match_cosine,
    match_layer_norms,
    total_variation,
)
from frostglass.attacks.registry import ATTACKS
from frostglass.core.errors import BadInput
from frostglass.core.threat import Knows, Observation
from frostglass.vision.generators import from_factory, load_generator

UNTRAINED = "untrained"
_UNTRAINED_RATE, _LATENT_RATE = 0.03, 0.1
"""Peak learning rates for weights and for latents."""


@ATTACKS.register(
    paper="Yin et al. 2021, CVPR (latent projection); Ulyanov et al. 2018, CVPR (untrained)", family="inversion"
)
def latent_projection(
    *,
    generator: str = UNTRAINED,
    steps: int = 1000,
    lr: float | None = None,
    matching: Literal["cosine", "l2"] = "cosine",
    gradient: float = 1.0,
    tv: float = 1e-2,
    bn: float = 0.0,
    width: int = 32,
    restore: str = "counts",
    seeds: int = 1,
    every: int = 50,
) -> Inversion:
    """The matching loss over a generator's latents, or over the weights of an untrained network.

    The paper projects onto BigGAN. Its weights are no part of frostglass; a generator fitted to public images, or none
    at all, takes its place, so results are not those of the paper's table.

    Args:
        generator: "untrained" (deep image prior: the weights of a small network are searched, no file needed);
            "FILE.safetensors", as `frostglass fit-generator` writes it; or "package.module:factory", which returns a
            module with `latent_shape` that maps [b, *latent_shape] to images in [0, 1].
        steps: iterations.
        lr: peak learning rate, 0 at the end; 0.03 for weights and 0.1 for latents if left out.
        matching: "cosine", or "l2" as in the paper.
        gradient: weight of the matching.
        tv: weight of the total variation; it helps the untrained network by about 1 dB.
        bn: weight of the best BatchNorm statistics that are granted, relative to their size.
        width: channels of the untrained network.
        restore: how labels that are not granted are restored: "counts", "least_squares", "row_minimum", "sum", "idlg".
        seeds: independent starts; the lowest objective is returned.
        every: iterations between two reports.
    """

    def terms(seen: Observation) -> tuple[Term, ...]:
        found = [(match_cosine if matching == "cosine" else match_layer_norms)(gradient), total_variation(tv)]
        source = available_bn(seen) if bn else None
        return (*found, bn_statistics(bn, source, relative=True)) if source else tuple(found)

    rate = lr if lr is not None else _UNTRAINED_RATE if generator == UNTRAINED else _LATENT_RATE
    return Inversion(
        "latent_projection",
        terms=terms,
        update=chain(adam(), scale(cosine(rate, warmup=20))),
        steps=steps,
        restore=restore_by(restore),
        seeds=seeds,
        space=_space(generator, width),
        every=every,
        needs=frozenset({Knows.EXAMPLES}),
    )


def _space(generator: str, width: int) -> Space:
    if generator == UNTRAINED:
        return untrained(width)
    return latent(_loaded(generator))


def _loaded(generator: str) -> nn.Module:
    if generator.endswith(".safetensors"):
        return load_generator(generator)
    module, colon, factory = generator.partition(":")
    if not colon or not module or not factory:
        raise BadInput(
            f'attack.generator: {generator!r} must be "untrained", a .safetensors file, or package.module:factory.'
        )
    return from_factory(generator)
