"""Small real observations that tests attack: built by the same code as audits, from bundled images."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.core.batch import Batch, one_hot
from frostglass.core.defense import Defense
from frostglass.core.randomness import Rng
from frostglass.core.threat import Facts, Gallery, Knows, Observation, ThreatModel
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.bn import running_statistics
from frostglass.numerics.local_update import local_update
from frostglass.vision import datasets, networks

ALL = frozenset(Knows)


class Reused(nn.Module):
    """A network whose first weight is used a second time, outside of its layer.

    Args:
        pixels: of an image.
        classes: outputs.
    """

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(pixels, 8), nn.Linear(pixels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[b, classes] logits."""
        hidden = torch.tanh(self.inner(x.flatten(1)))
        return self.head(torch.tanh(nn.functional.linear(hidden, self.inner.weight.t())))


def photo_batch(size: int, batch: int) -> Batch:
    """The first bundled photographs."""
    held = datasets.load("photos", size=size, rows=range(batch))
    domain = networks.domain_of(networks.build("mlp", classes=10, channels=3, size=size, rng=Rng.from_seed(0)))
    return Batch(held.images, one_hot(held.labels, 10), domain, held.names)


def observe(
    name: str,
    *,
    size: int = 16,
    batch: int = 2,
    mode: str = "train",
    knows: frozenset[Knows] = ALL,
    plan: LocalPlan | None = None,
    dtype: torch.dtype = torch.float32,
    auxiliary: bool = False,
    **options: Any,
) -> tuple[Observation, Batch]:
    """(what a server sees, the private batch) of an undefended client."""
    private = photo_batch(size, batch)
    model = networks.build(name, classes=10, channels=3, size=size, options=options, rng=Rng.from_seed(1)).to(dtype)
    private = replace(private, images=private.images.to(dtype), targets=private.targets.to(dtype))
    model.train(mode == "train")
    local = plan or LocalPlan(mode="train" if mode == "train" else "eval")
    trace = local_update(model, private.images, private.targets, local)
    update = Update(trace.gradients, trace.bn, batch, local)
    facts = Facts(
        domain=networks.domain_of(model),
        mode=mode,
        image_shape=private.image_shape,
        classes=10,
        labels=private.targets,
        local_plan=local,
        bn_running=running_statistics(model),
        auxiliary=photo_batch(size, 8).images.to(dtype).flip(-1) if auxiliary else None,
        gallery=candidates(private),
        defence=Defense("none", claim="none"),
    )
    return ThreatModel("test", knows).observe(model, [update], facts), private


def candidates(private: Batch) -> Gallery:
    """The first private image, last among the photographs that are not in the batch."""
    b = len(private)
    free = photo_batch(private.image_shape[1], 8).images[b:].to(private.images)
    images = torch.cat([free, private.images[:1]])
    return Gallery(images, private.targets[:1].expand(len(images), -1), private.images[1:], private.targets[1:])


def frozen_copy(seen: Observation) -> dict[str, Tensor]:
    """All tensors of an observation, to compare with later."""
    kept = {f"model.{k}": v.clone() for k, v in seen.model.state_dict().items()}
    kept |= {f"gradient.{k}": v.clone() for k, v in seen.gradients.items()}
    held = {"labels": seen.labels, "auxiliary": seen.auxiliary}
    if seen.gallery is not None:
        held |= {f"gallery.{f.name}": getattr(seen.gallery, f.name) for f in fields(seen.gallery)}
    for kind, granted in (("batch", seen.bn_batch), ("running", seen.bn_running)):
        for layer, s in (granted or {}).items():
            held |= {f"{kind}.{layer}.mean": s.mean, f"{kind}.{layer}.var": s.var}
    return kept | {name: t.clone() for name, t in held.items() if isinstance(t, Tensor)}
