"""Clipping and Gaussian noise on the finished update: local differential privacy, accounted."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from frostglass.core.defense import Defense, Mechanism
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.core.update import PrivacySpent, Update
from frostglass.defenses.accounting import Accountant, epsilon_of
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.compress import clipped

Adjacency = Literal["replace", "add_remove"]


@DEFENSES.register(paper="Geyer et al. 2017; McMahan et al. 2018, ICLR (clipping a client's whole update)")
def clip_and_noise(
    *,
    clipping_norm: float = 1.0,
    noise_multiplier: float = 1.0,
    delta: float = 1e-5,
    adjacency: Adjacency = "replace",
    accountant: Accountant = "rdp",
) -> Defense:
    """The whole update clipped to a norm, Gaussian noise on top: a proof for the update as one unit.

    The sensitivity is the clipping norm C where a client is added or removed, and 2 C where its data are replaced by
    any other (local differential privacy). One image of a batch is protected at least as well as the update that it
    is a part of. Accounted for one release; releases of several rounds add up. Batch statistics are held back, as
    nobody noised them.

    Args:
        clipping_norm: C, in units of the update's L2 norm over all layers; above 0.
        noise_multiplier: sigma: noise of standard deviation sigma C on every entry; 0 clips only and proves nothing.
        delta: of (epsilon, delta).
        adjacency: "replace" any data of the client by any other, or "add_remove" a client.
        accountant: Opacus' "rdp" or "prv".
    """
    if not clipping_norm > 0 or not noise_multiplier >= 0 or not 0 < delta < 1:
        raise BadInput(
            f"clip_and_noise: clipping_norm = {clipping_norm} must be above 0, noise_multiplier = {noise_multiplier} "
            f"at least 0 and delta = {delta} between 0 and 1."
        )
    std = noise_multiplier * clipping_norm
    spent = _accounted(noise_multiplier, clipping_norm, delta, adjacency, accountant)

    def protect(update: Update, randomness: Randomness) -> Update:
        rng = randomness.rng().at("clip_and_noise")
        short = clipped(update.gradients, clipping_norm)
        sent = {n: g + std * rng.at(n).normal(g.shape, like=g) for n, g in short.items()} if std else short
        return replace(update, gradients=sent, bn={}, spent=spent)

    return Defense(
        "clip_and_noise",
        protect=protect,
        claim="proof" if std > 0 else "heuristic",
        settings={
            "clipping_norm": clipping_norm,
            "noise_multiplier": noise_multiplier,
            "delta": delta,
            "adjacency": adjacency,
            "accountant": accountant,
        },
        adaptive=("gallery", "learned_inverter"),
        simulate=lambda own, observed: clipped(own, clipping_norm),
        mechanism=Mechanism("update", clipping_norm, std),
    )


def _accounted(
    sigma: float, clip: float, delta: float, adjacency: Adjacency, accountant: Accountant
) -> PrivacySpent | None:
    if sigma == 0:
        return None
    replaced = adjacency == "replace"
    epsilon = epsilon_of(sigma / 2 if replaced else sigma, delta, 1, accountant)
    words = "replace the client's data (sensitivity 2 C)" if replaced else "add/remove the client (sensitivity C)"
    about = f"Opacus {accountant.upper()}, one release, {words}"
    return PrivacySpent(epsilon, delta, sigma, clip, about, "update", "replace_one" if replaced else "add_remove")
