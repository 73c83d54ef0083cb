"""Image identifiability precision: is the original the nearest of a pool of originals? (Yin et al. 2021)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from frostglass.auditing.metrics.registry import MetricContext

CHUNK = 64


def identified(
    found: Float[Tensor, "b d"], pool: Float[Tensor, "n d"], index: Tensor, same: Bool[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """1 where the cosine to the own original is above that to every other image of the pool, 0 elsewhere.

    Args:
        found: features of the reconstructions.
        pool: features of the originals.
        index: [b] rows of `pool` with the own originals.
        same: pool images that equal the own original pixel by pixel: not rivals. A tie with any other is no success,
            so that a reconstruction without content (cosine 0 to all) identifies nobody.
    """
    rows = normalize(found.double(), dim=1)
    cosine = torch.cat([rows @ normalize(part.double(), dim=1).T for part in pool.split(CHUNK)], 1)
    own = cosine.gather(1, index[:, None]).squeeze(1)
    rival = cosine.masked_fill(same, -torch.inf).amax(1)
    return (own > rival).double()


def copies(context: MetricContext) -> Bool[Tensor, "b n"]:
    """Images of the pool that equal each original, itself among them."""
    flat = context.pool.flatten(1)
    return torch.stack([(flat == flat[i]).all(1) for i in context.index.tolist()])


def pool_words(context: MetricContext) -> str:
    """Pool size and chance level, which belong beside every such score."""
    n = len(context.pool)
    return f"nearest by cosine among a pool of {n} originals; chance level {100 / n:.2g} %"
