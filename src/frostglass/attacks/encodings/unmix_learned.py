"""Unmixing with a similarity that a network has learned from encodings of other images (Carlini et al. 2021).

Theirs compares every ordered pair with a network of 12 layers: E^2 passes. Here one embedding is computed for each
encoding, E passes, and pairs are compared by inner products. The network is fitted by `frostglass fit-similarity`; no
weights are shipped.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from frostglass.attacks.encodings.unmixing_steps import Unmix
from frostglass.attacks.registry import ATTACKS
from frostglass.core.errors import BadInput
from frostglass.numerics.similarity_network import embed, load_network, misfit
from frostglass.numerics.unmixing_similarity import similarity


@ATTACKS.register(
    paper="Carlini et al. 2021, IEEE S&P (arXiv 2011.05315); one embedding per encoding is ours",
    family="encodings",
    reads="encodings",
)
def unmix_learned(
    *, network: str, statistical: float = 0.5, starts: int = 1, rounds: int = 8, limit: int = 8192
) -> Unmix:
    """As `unmix_statistical`, with the similarity of a siamese network fitted on encodings of other images.

    Args:
        network: a .safetensors file from `frostglass fit-similarity`.
        statistical: weight of the untrained similarity beside the learned one, from 0 to 1.
        starts, rounds, limit: as in `unmix_statistical`.
    """
    if not 0 <= statistical <= 1:
        raise BadInput(f"unmix_learned: statistical = {statistical} must be from 0 to 1.")
    held = load_network(Path(network))

    def likeness(encodings: Tensor) -> Tensor:
        z = embed(held.to(encodings.device), encodings).to(encodings.device)
        learned = z @ z.T
        return (1 - statistical) * _standard(learned) + statistical * _standard(similarity(encodings))

    return Unmix("unmix_learned", starts, rounds, limit, likeness, partial(misfit, held.shape))


def _standard(table: Tensor) -> Tensor:
    """Mean 0 and spread 1 off the diagonal."""
    n = len(table)
    if n <= 4096:
        off = table[~torch.eye(n, dtype=torch.bool, device=table.device)]
    else:
        off = table[n // 2 :, : n // 2].contiguous()
    return (table - off.mean()) / off.std().clamp_min(1e-9)
