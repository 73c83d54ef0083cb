"""Unmixing without a network and without other images; the attack that InstaHide's users can run on a laptop."""

from __future__ import annotations

from frostglass.attacks.encodings.unmixing_steps import Unmix
from frostglass.attacks.registry import ATTACKS
from frostglass.core.errors import BadInput


@ATTACKS.register(
    paper="own derivation; stages as in Carlini et al. 2021 (arXiv 2011.05315)", family="encodings", reads="encodings"
)
def unmix_statistical(*, starts: int = 1, rounds: int = 8, limit: int = 8192) -> Unmix:
    """Recovers the private images behind many encodings: similarity, clusters, assignment, phase retrieval, in turns.

    Args:
        starts: independent starts; the likeliest is kept.
        rounds: of assignment and reconstruction in each start, at the most.
        limit: encodings used at the most, drawn at random from more (memory grows with its square).
    """
    if starts < 1 or rounds < 1 or limit < 2:
        raise BadInput(
            f"unmix_statistical: starts {starts}, rounds {rounds} and limit {limit} must be from 1, 1 and 2."
        )
    return Unmix("unmix_statistical", starts, rounds, limit)
