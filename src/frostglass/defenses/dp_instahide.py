"""DP-InstaHide: mixing, then noise on the pixels. A theorem with weak constants, which are always printed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.core.update import PrivacySpent
from frostglass.defenses.accounting import epsilon_of
from frostglass.defenses.encoder import encoded_domain
from frostglass.defenses.key_ring import KeyRing
from frostglass.defenses.noise import Law, drawn
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.key_rows import KeyRows, MixLaw
from frostglass.numerics.keystream import Secret
from frostglass.numerics.mixing import mix_torch

Weights = Literal["equal", "random"]

PIXELS = "pixels of one image; labels are not private"
"""What its epsilon is about."""


@dataclass(frozen=True)
class NoisyMixer:
    """Encodes one batch: means of k of its images, each image once in every slot, and noise.

    Args:
        k: images in one encoding, and encodings that hold an image.
        std: of the noise, in units of pixels in [0, 1]; encodings live in [-1, 1], where it is twice that.
        law: of the noise.
        equal: coefficients 1 / k; else drawn, none above `c1`.
        c1: greatest coefficient.
    """

    k: int
    std: float
    law: Law
    equal: bool
    c1: float

    def __call__(self, batch: Batch, randomness: Randomness) -> Batch:
        """[b, c, h, w] encodings in [-1, 1] with exact soft labels; pure given `Insecure(seed)`."""
        if len(batch) < self.k:
            raise BadInput(f"dp_instahide: k = {self.k} is above the {len(batch)} images of a client; lower it.")
        unit = ((batch.images - batch.domain.low) / (batch.domain.high - batch.domain.low)).flatten(1)
        mixing = MixLaw(self.k, self.k, 1.0 if self.equal else self.c1)
        ring = KeyRing(Secret.draw(randomness), mixing, "permutation", len(batch), 0, ahead=0)
        indices, weights = ring.draw(np.arange(len(batch)))
        if self.equal:
            weights = np.full_like(weights, 1 / self.k)
        mixed = mix_torch(unit, None, self.k, KeyRows(indices, weights, None), "none", unit.device)
        noise = drawn(randomness.rng().at("dp_instahide noise"), self.law, mixed)
        share = torch.from_numpy(weights).to(batch.targets)
        targets: Tensor = (share[..., None] * batch.targets[torch.from_numpy(indices).to(batch.targets.device)]).sum(1)
        domain = encoded_domain(batch.image_shape[0])
        return Batch(domain.clamp(mixed + 2 * self.std * noise).view_as(batch.images), targets, domain, batch.ids)


@DEFENSES.register(paper="Borgnia et al. 2021 (DP-InstaHide); constants recomputed")
def dp_instahide(
    *,
    k: int = 4,
    std: float = 0.1,
    law: Law = "gaussian",
    weights: Weights = "equal",
    c1: float = 0.65,
    delta: float = 1e-5,
) -> Defense:
    """Means of k images with noise on the pixels: a proof for pixels alone, whose epsilon is nominal; labels leave.

    Replacing one image by another moves every encoding that holds it by up to (high - low) c_max sqrt(d) in L2 norm
    (times d instead of sqrt(d) in L1), d being all pixel values of an image, and each image is in k encodings. At a
    noise that leaves images usable, epsilon is in the thousands. Labels are mixed and sent exactly: not private.

    Args:
        k: images in one encoding.
        std: standard deviation of the noise, pixels being in [0, 1]; 0 mixes only and proves nothing.
        law: "gaussian", or "laplace" as in the paper (delta is then 0).
        weights: "equal" coefficients, c_max = 1 / k, or "random" ones up to c1.
        c1: greatest coefficient of random weights.
        delta: of (epsilon, delta).
    """
    if k < 1 or not std >= 0 or not 0 < delta < 1:
        raise BadInput(f"dp_instahide: k = {k} must be from 1, std = {std} at least 0 and delta = {delta} in (0, 1).")
    equal = weights == "equal"
    if not equal:
        MixLaw(k, k, c1).check()
    c_max = 1 / k if equal else c1
    return Defense(
        "dp_instahide",
        encode=NoisyMixer(k, std, law, equal, c1),
        claim="proof" if std > 0 else "heuristic",
        settings={"k": k, "std": std, "law": law, "weights": weights, "c1": c1, "delta": delta},
        encodes=True,
        adaptive=("learned_inverter", "spear"),
        account=lambda batch: spent_on(batch, k, std, law, c_max, delta),
    )


def spent_on(batch: Batch, k: int, std: float, law: Law, c_max: float, delta: float) -> PrivacySpent | None:
    """Privacy of one encoded batch, replacing one image; None without noise."""
    if std == 0:
        return None
    d = batch.images[0].numel()
    if law == "laplace":
        sensitivity = c_max * d * k  # L1 norms of k encodings add up
        scale = std / math.sqrt(2)
        about = "pure DP, replace one image, k encodings of each"
        return PrivacySpent(sensitivity / scale, 0.0, std / sensitivity, sensitivity, about, PIXELS, "replace_one")
    sensitivity = c_max * math.sqrt(d * k)
    sigma = std / sensitivity
    about = "Opacus RDP, one release, replace one image, k encodings of each"
    return PrivacySpent(epsilon_of(sigma, delta, 1), delta, sigma, sensitivity, about, PIXELS, "replace_one")
