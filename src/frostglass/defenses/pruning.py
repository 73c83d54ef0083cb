"""Gradient pruning: only the largest entries leave."""

from __future__ import annotations

from dataclasses import replace

from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.core.update import Update
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.compress import Scope, kept, pruned_alike


@DEFENSES.register(paper="Lin et al. 2018, ICLR (deep gradient compression); Zhu et al. 2019, NeurIPS (as a defence)")
def pruning(*, fraction: float = 0.9, keep: int | None = None, scope: Scope = "global") -> Defense:
    """Top-k sparsification: the smallest entries of the update become 0; a heuristic that modern attacks bypass.

    Which entries were sent is plain to see, so an attack matches those alone.

    Args:
        fraction: share of the entries that become 0; 0 for none, below 1.
        keep: how many entries stay instead (top-k); `fraction` then has no effect.
        scope: "global" ranks all layers together, "layer" each by itself.
    """
    if not 0 <= fraction < 1 or (keep is not None and keep < 1):
        raise BadInput(f"pruning: fraction = {fraction} must be at least 0 and below 1, and keep = {keep} from 1.")

    share, least = (fraction, 1) if keep is None else (1.0, keep)

    def protect(update: Update, _: Randomness) -> Update:
        return replace(update, gradients=kept(update.gradients, share, scope, least)) if share else update

    return Defense(
        "pruning",
        protect=protect,
        settings={"fraction": fraction, "keep": keep, "scope": scope},
        adaptive=("thaw", "gallery", "learned_inverter"),
        simulate=lambda own, observed: pruned_alike(own, observed, share, scope, least),
    )
