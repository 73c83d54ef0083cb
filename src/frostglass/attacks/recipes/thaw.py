"""Thaw: our own recipe, what works best on small machines. Published constants are for fidelity; this is for users."""

from __future__ import annotations

from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import adam, chain, scale
from frostglass.attacks.inversion.schedules import cosine
from frostglass.attacks.inversion.terms import Term, available_bn, bn_statistics, match_cosine, total_variation
from frostglass.attacks.registry import ATTACKS
from frostglass.core.threat import Knows, Observation


@ATTACKS.register(paper="Frostglass; after Geiping et al. 2020 and Yin et al. 2021", family="inversion")
def thaw(
    *,
    steps: int = 1200,
    lr: float = 0.1,
    tv: float = 3e-3,
    bn_batch: float = 1e-2,
    bn_running: float = 3e-3,
    seeds: int = 1,
    every: int = 50,
) -> Inversion:
    """Cosine matching, total variation and whatever BatchNorm statistics are granted; plain Adam, cosine decay.

    Args:
        steps: iterations.
        lr: peak learning rate, reached after 20 iterations, 0 at the end.
        tv: weight of the total variation; 0 on encodings, whose neighbouring pixels are unrelated.
        bn_batch: weight of the BatchNorm term with the statistics of the target batch.
        bn_running: the same with running statistics.
        seeds: independent starts; the lowest objective is returned.
        every: iterations between two reports.
    """

    def terms(seen: Observation) -> tuple[Term, ...]:
        source = available_bn(seen)
        found = [match_cosine()]
        if tv:
            found.append(total_variation(tv))
        if source is not None:
            found.append(bn_statistics(bn_batch if source is Knows.BN_BATCH else bn_running, source))
        return tuple(found)

    return Inversion(
        "thaw",
        terms=terms,
        update=chain(adam(), scale(cosine(lr, warmup=20))),
        steps=steps,
        seeds=seeds,
        every=every,
        needs=frozenset({Knows.EXAMPLES}),
    )
