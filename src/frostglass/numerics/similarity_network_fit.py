"""Fits the similarity network to encodings of other images, made on the way.

Each step encodes a batch of images twice, with fresh partners, coefficients and slots; the two encodings of one image
must find each other among all others (InfoNCE, van den Oord et al. 2018). Nothing of the attacked set is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.similarity_network import Shape, SimilarityNetwork, embed


@dataclass(frozen=True)
class FitSettings:
    """How the network is fitted.

    Args:
        steps: of AdamW.
        batch: images a step, each encoded twice.
        lr: at its highest; warmed up, then falling along a cosine.
        temperature: of the InfoNCE loss.
        width, features: as in `Shape`.

    Raises:
        BadInput: numbers out of range.
    """

    steps: int = 1500
    batch: int = 128
    lr: float = 2e-3
    temperature: float = 0.07
    width: int = 24
    features: int = 128

    def __post_init__(self) -> None:
        if min(self.steps, self.width, self.features) < 1 or self.batch < 2 or not 0 < self.lr < 1:
            raise BadInput(
                f"fit-similarity: steps {self.steps}, batch {self.batch}, width {self.width}, features {self.features} "
                f"and lr {self.lr} must be from 1, 2, 1, 1 and within 0 and 1."
            )


@dataclass(frozen=True)
class Fitted:
    """The network, and the share of held-out pairs of encodings that rank right (AUC; 0.5 is chance, NaN: too few)."""

    network: SimilarityNetwork
    auc: float
    loss: float


def coefficient_rows(law: MixLaw, count: int, rng: Rng) -> Tensor:
    """[count, k] coefficients under `law` from an ordinary generator; no keys, only examples to learn from."""
    draw, kept, missing = rng.numpy(), [], count
    while missing > 0:
        if law.law == "dirichlet":
            weights = draw.standard_gamma([3.0] + [1.0] * (law.k - 1), (2 * missing + 8, law.k))
        else:
            weights = np.abs(draw.standard_normal((2 * missing + 8, law.k)))
        rows = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        kept.append(rows[law.accepts(rows)][:missing])
        missing -= len(kept[-1])
    return torch.from_numpy(np.concatenate(kept))


def pairs(
    images: Float[Tensor, "n c h w"], law: MixLaw, batch: int, rng: Rng
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Absolute values of two encodings of each of `batch` images, in a private slot each, partners from `images`."""
    a, b, _, _ = pairs_and_rows(images, law, batch, rng)
    return a, b


def pairs_and_rows(
    images: Float[Tensor, "n c h w"], law: MixLaw, batch: int, rng: Rng
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"], Int64[Tensor, "b k"], Int64[Tensor, "b k"]]:
    """`pairs`, and which images each of the two encodings holds."""
    chosen = rng.at("images").integers(len(images), (batch,))
    made, held = [], []
    for side in (0, 1):
        here = rng.at("side", side)
        weights = coefficient_rows(law, batch, here.at("coefficients"))
        index = here.at("partners").integers(len(images), (batch, law.k))
        slot = here.at("slot").integers(law.private, (batch,))
        index[torch.arange(batch), slot] = chosen
        mixed = images.new_zeros(batch, *images.shape[1:])
        for j in range(law.k):
            mixed += weights[:, j, None, None, None].to(images) * images[index[:, j]]
        made.append(mixed.abs())
        held.append(index)
    return made[0], made[1], held[0], held[1]


def fit(
    images: Float[Tensor, "n c h w"],
    law: MixLaw,
    settings: FitSettings,
    rng: Rng,
    *,
    device: torch.device,
    progress: Callable[[int, float], object] = lambda step, loss: None,
) -> Fitted:
    """Fits a network; the same images, settings and key give the same network on one device.

    Args:
        images: in [-1, 1], at least 64; none of those that are attacked. A tenth is held out.
        law: k, private slots and bounds of the encodings to be compared.
        progress: told of step and loss.

    Raises:
        BadInput: too few images, or images that are not square.
    """
    if len(images) < 64 or images.shape[-1] != images.shape[-2]:
        raise BadInput(f"fit-similarity: {tuple(images.shape)} must be at least 64 square images.")
    law.check()
    order = rng.at("split").permutation(len(images))
    held, seen = images[order[: len(images) // 10]], images[order[len(images) // 10 :]].to(device)
    shape = Shape(int(images.shape[1]), int(images.shape[-1]), settings.width, features=settings.features)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(rng.at("weights").key[:4], "big"))
        network = SimilarityNetwork(shape).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=1e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps + 1, pct_start=0.1)
    loss = torch.zeros(())
    right = torch.arange(settings.batch, device=device)
    for step in range(settings.steps):
        a, b = pairs(seen, law, settings.batch, rng.at("step", step))
        z = network(torch.cat([a, b]))
        alike = z[: settings.batch] @ z[settings.batch :].T / settings.temperature
        loss = (nn.functional.cross_entropy(alike, right) + nn.functional.cross_entropy(alike.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        progress(step + 1, float(loss.detach()))
    network = network.cpu().eval()
    return Fitted(network, held_out_auc(network, held, law, rng.at("held out")), float(loss.detach()))


def held_out_auc(network: SimilarityNetwork, images: Float[Tensor, "n c h w"], law: MixLaw, rng: Rng) -> float:
    """P(two encodings of one image score above two that share none), on pairs of held-out images.

    Of few images nearly all pairs share a partner; those say nothing. NaN where none are left.
    """
    a, b, left, right = pairs_and_rows(images, law, min(400, 4 * len(images)), rng)
    s = embed(network, a) @ embed(network, b).T
    same = s.diagonal().contiguous()
    shared = torch.stack([(left[i, :, None, None] == right[None]).any(0).any(-1) for i in range(len(left))])
    other = s[~shared]
    if not len(other):
        return float("nan")
    ranked = torch.searchsorted(other.sort().values, same)
    return float(ranked.double().mean() / len(other))
