"""Spaces that a network draws from: latents of a generator, or the weights of an untrained one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from frostglass.attacks.inversion.spaces import Space
from frostglass.attacks.inversion.target import Target
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.called import copied
from frostglass.vision.generators import Untrained


def latent(generator: nn.Module, *, limit: float = 3.0) -> Space:
    """Latents of a fitted generator, each row its own, from N(0, I) and within `limit` standard deviations.

    Args:
        generator: maps [b, *latent_shape] to images in [0, 1]; another size is resized (bilinear), and colour is
            averaged or grey repeated where the channels differ.
        limit: greatest absolute value of a latent's entry.
    """
    held = _Moved(generator)
    shape = tuple(generator.latent_shape)  # type: ignore[arg-type]

    def images(z: Tensor, target: Target) -> Tensor:
        return _as_pixels(held.on(z)(z), target)

    return Space(
        start=lambda target, rows, rng, like: rng.normal((rows, *shape), like=like),
        images=images,
        box=lambda z, target: z.clamp(-limit, limit),
        per_row=True,
    )


def untrained(width: int = 32, depth: int = 2) -> Space:
    """Weights of an `Untrained` network, a vector, which draws one image from each of as many fixed noises.

    Every seed has weights of its own and the same noise.
    """
    if width < 1 or depth < 1:
        raise BadInput(f"attack.width: {width} channels in {depth} steps; both must be from 1.")
    made: dict[tuple[int, int, int], Untrained] = {}
    noises: dict[tuple[torch.device, torch.dtype, tuple[int, ...]], Tensor] = {}

    def network(target: Target) -> Untrained:
        channels, height, width_ = target.seen.image_shape
        key = (channels, height, width_)
        if key not in made:
            with torch.random.fork_rng(devices=[]):  # its weights come from `initial_weights`
                made[key] = Untrained(channels=channels, size=(height, width_), width=width, depth=depth)
        return made[key]

    def images(z: Tensor, target: Target) -> Tensor:
        net = network(target)
        key = z.device, z.dtype, (_rows(target), *net.latent_shape)
        if key not in noises:  # drawn on the CPU, so once
            noises[key] = Rng.from_seed(0, "deep image prior").normal(key[2], like=z.detach())
        return _as_pixels(functional_call(net, unflattened(net, z), (noises[key],)), target)

    return Space(
        start=lambda target, rows, rng, like: initial_weights(network(target), rng, like),
        images=images,
    )


def initial_weights(net: nn.Module, rng: Rng, like: Tensor) -> Tensor:
    """He initialisation by path, as one vector: convolutions N(0, 2 / fan_in), norms 1, biases 0."""
    parts = []
    for name, p in net.named_parameters():
        if p.ndim > 1:
            parts.append(math.sqrt(2 / p[0].numel()) * rng.at(name).normal(p.shape, like=like))
        else:
            parts.append(torch.full_like(p, float(name.endswith("weight")), dtype=like.dtype, device=like.device))
    return torch.cat([p.detach().flatten() for p in parts])


def unflattened(net: nn.Module, z: Tensor) -> dict[str, Tensor]:
    """The network's parameters, by name, out of a vector; on its graph."""
    named = dict(net.named_parameters())
    pieces = z.split([p.numel() for p in named.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}


class _Moved:
    """Copies of a network where it is needed; the one given stays where it is."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.held: dict[tuple[torch.device, torch.dtype], nn.Module] = {}

    def on(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        where = (like.device, like.dtype)
        if where not in self.held:
            self.held[where] = copied(self.network).to(*where).eval().requires_grad_(False)
        return self.held[where]


def _as_pixels(images: Tensor, target: Target) -> Tensor:
    """Images in [0, 1] -> the victim's normalised space, in its size and channels."""
    channels, height, width = target.seen.image_shape
    if images.shape[-2:] != (height, width):
        images = nn.functional.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return target.low + (target.high - target.low) * images


def _rows(target: Target) -> int:
    assert target.seen.examples is not None  # every inversion needs the grant
    return target.seen.examples
