"""Fitting a small generator to images: a VAE whose decoder is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.vision.generators import Decoder, doublings_of, group_norm, widths_of
from frostglass.vision.networks import torch_draws_from


class Encoder(nn.Module):
    """The decoder's mirror image: images to mean and log variance of their latent."""

    def __init__(self, *, latent: int, channels: int, size: int, width: int) -> None:
        super().__init__()
        doublings = doublings_of(size)
        self.size = 2**doublings * -(-size // 2**doublings)
        widths = widths_of(width, doublings)[::-1]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, widths[0], 3, 1, 1)]
        for inputs, outputs in pairwise(widths):
            layers += [group_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 4, 2, 1)]
        self.body = nn.Sequential(*layers, group_norm(widths[-1]), nn.SiLU(), nn.Flatten())
        self.head = nn.Linear(widths[-1] * (self.size // 2**doublings) ** 2, 2 * latent)

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        """(mean, log variance), [b, d] each."""
        more = self.size - images.shape[-1]
        framed = nn.functional.pad(images - 0.5, (0, more, 0, more))
        mean, spread = self.head(self.body(framed)).chunk(2, dim=1)
        return mean, spread.clamp(-10, 4)


@dataclass(frozen=True)
class FitSettings:
    """How a generator is fitted.

    Args:
        latent: length of a latent.
        width: half the channels at half the size, a quarter of those on smaller grids.
        steps: of Adam.
        batch: images a step.
        lr: peak learning rate, which falls to 0 along a cosine.
    """

    latent: int = 256
    width: int = 24
    steps: int = 2500
    batch: int = 32
    lr: float = 2e-3

    def __post_init__(self) -> None:
        least = {"latent": 1, "width": 1, "steps": 1, "batch": 1}
        wrong = [
            f"generator.{n}: {getattr(self, n)} must be from {v}." for n, v in least.items() if getattr(self, n) < v
        ]
        if not self.lr > 0:
            wrong.append(f"generator.lr: {self.lr} must be above 0.")
        if wrong:
            raise BadInput(wrong)


@dataclass(frozen=True)
class Fitted:
    """A decoder, and how well its VAE repeats images.

    Args:
        decoder: in eval mode.
        psnr: dB, mean over the images held out (over all images if there are fewer than 20).
        rate: nats of information a latent carries, mean.
        held_out: images that it did not see, 0 if there are fewer than 20 in all.
    """

    decoder: Decoder
    psnr: float
    rate: float
    held_out: int


def fit(
    images: Float[Tensor, "n c s s"],
    settings: FitSettings,
    rng: Rng,
    *,
    device: torch.device | None = None,
    progress: Callable[[int, float], None] = lambda step, psnr: None,
) -> Fitted:
    """Fits a VAE (Kingma & Welling 2014) with the variance of its pixels at its optimum (Rybkin et al. 2021).

    A tenth of the images, 500 at the most, is held out. The same images, settings and `rng` give the same weights.

    Args:
        images: in [0, 1], square, from 8 pixels a side.
        settings: sizes and schedule.
        rng: of weights, batches and noise.
        device: where it computes; the CPU if None.
        progress: told after every step of the step and the PSNR of its batch.

    Raises:
        BadInput: images of another shape, or values that stopped being finite.
    """
    if images.shape[-1] != images.shape[-2] or len(images) < 2:
        raise BadInput(
            f"generator: {len(images)} images of {images.shape[-2]} x {images.shape[-1]} must be square, and at least "
            "2; add images, or give a size."
        )
    shape = {"channels": int(images.shape[1]), "size": int(images.shape[-1])}
    sizes = {"latent": settings.latent, "width": settings.width, **shape}
    with torch_draws_from(rng.at("weights")):
        encoder, decoder = Encoder(**sizes), Decoder(**sizes)
    order = rng.at("held out").permutation(len(images))
    held = min(500, len(images) // 10) if len(images) >= 20 else 0
    kept, seen = (images[order[:held]], images[order[held:]]) if held else (images, images)
    encoder, decoder = encoder.to(device), decoder.to(device)
    _train(encoder, decoder, seen, settings, rng, progress)
    psnr, rate = _quality(encoder, decoder, kept)
    return Fitted(decoder.cpu().eval().requires_grad_(False), psnr, rate, held)


def _train(
    encoder: Encoder,
    decoder: Decoder,
    images: Tensor,
    settings: FitSettings,
    rng: Rng,
    progress: Callable[[int, float], None],
) -> None:
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(weights, lr=settings.lr)
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / min(100, 1 + settings.steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        pick = rng.at("batch", step).integers(len(images), (min(settings.batch, len(images)),))
        batch = images[pick].to(weights[0].device)
        flip = (rng.at("flip", step).uniform((len(batch), 1, 1, 1)) < 0.5).to(batch.device)
        batch = torch.where(flip, batch.flip(-1), batch)
        mean, spread = encoder(batch)
        noise = rng.at("noise", step).normal(mean.shape, like=mean)
        error = (decoder(mean + (0.5 * spread).exp() * noise) - batch).square().mean()
        # -log likelihood at the best pixel variance: n/2 log(error) up to a constant, for images of n values
        loss = 0.5 * batch[0].numel() * error.clamp_min(1e-8).log() + divergence(mean, spread).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1000.0)
        optimizer.step()
        psnr = -10 * math.log10(max(float(error.detach()), 1e-10))
        if not math.isfinite(psnr) or not math.isfinite(float(loss.detach())):
            raise BadInput(f"generator: the loss became non-finite at step {step}; lower lr.")
        progress(step + 1, psnr)


def divergence(mean: Float[Tensor, "b d"], spread: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """KL(N(mean, exp(spread)) || N(0, I)) in nats."""
    return 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1)


@torch.no_grad()
def _quality(encoder: Encoder, decoder: Decoder, images: Tensor) -> tuple[float, float]:
    """(PSNR of the images through the mean of their latents, nats)."""
    errors, rates = [], []
    for part in images.split(64):
        batch = part.to(next(encoder.parameters()).device)
        mean, spread = encoder(batch)
        errors.append((decoder(mean) - batch).square().flatten(1).mean(1))
        rates.append(divergence(mean, spread))
    psnr = -10 * torch.cat(errors).clamp_min(1e-10).log10()
    return float(psnr.mean()), float(torch.cat(rates).mean())
