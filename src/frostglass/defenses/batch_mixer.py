"""Encoding one batch within itself: what the registered defences do in an audit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from frostglass.core.batch import Batch, Domain
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.defenses.encoder import encoded_domain
from frostglass.defenses.key_ring import KeyRing
from frostglass.numerics.key_rows import KeyRows, MixLaw
from frostglass.numerics.keystream import Secret
from frostglass.numerics.mixing import Labels, Mask, coarse_targets, mix_torch


@dataclass(frozen=True)
class BatchMixer:
    """Encodes one batch within itself: what the registered defences do in an audit.

    Args:
        law, mask, labels: as in `InstaHide`.
        pool: further private images of the client, which serve as partners too.
        public: [M, c, h, w] public images in the batch's domain, for the slots that are not private.
    """

    law: MixLaw
    mask: Mask
    labels: Labels
    pool: Batch | None = None
    public: Tensor | None = None

    def __call__(self, batch: Batch, randomness: Randomness) -> Batch:
        """The encodings of `batch`, one per row, in [-1, 1]; pure given `Insecure(seed)`.

        Raises:
            BadInput: the private or the public images are fewer than their distinct slots, or differ in shape.
        """
        images, targets = batch.images, batch.targets
        if self.pool is not None:
            if self.pool.image_shape != batch.image_shape or self.pool.targets.shape[1] != targets.shape[1]:
                raise BadInput("pool: its images or classes differ in shape from the batch.")
            images = torch.cat([images, self.pool.images.to(images)])
            targets = torch.cat([targets, self.pool.targets.to(targets)])
        if self.public is not None and tuple(self.public.shape[1:]) != batch.image_shape:
            raise BadInput(f"public: images of shape {tuple(self.public.shape[1:])} against {batch.image_shape}.")
        table, public = self._unit(images, batch.domain), None
        if self.public is not None:
            public = self._unit(self.public.to(images), batch.domain)
        ring = KeyRing(
            Secret.draw(randomness), self.law, "iid", len(images), 0 if public is None else len(public), ahead=0
        )
        indices, weights = ring.draw(np.arange(len(batch)))
        bits = ring.mask(len(batch), table.shape[1]) if self.mask == "sign" else None
        inside = self.law.private
        mixed = mix_torch(table, public, inside, KeyRows(indices, weights, bits), self.mask, images.device)
        share = torch.from_numpy(weights[:, :inside]).to(targets)
        rows = torch.from_numpy(indices[:, :inside]).to(targets.device)
        soft = (share[..., None] * targets[rows]).sum(1)
        return Batch(
            mixed.view_as(batch.images),
            coarse_targets(soft, self.labels),
            encoded_domain(batch.image_shape[0]),
            batch.ids,
        )

    @staticmethod
    def _unit(images: Tensor, domain: Domain) -> Tensor:
        """[n, d] in [0, 1]."""
        return ((images - domain.low) / (domain.high - domain.low)).flatten(1)
