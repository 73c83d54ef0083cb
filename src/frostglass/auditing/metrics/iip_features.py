"""Image identifiability precision in the features of the audited network."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.auditing.metrics.identification import copies, identified, pool_words
from frostglass.auditing.metrics.registry import METRICS, Metric, MetricContext, NotAvailable
from frostglass.numerics.bn import bn_layers
from frostglass.numerics.local_update import in_mode

CHUNK = 64


def penultimate(model: nn.Module, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
    """What the network's classifier is given, in eval mode, so that no image depends on the others; float32.

    Raises:
        NotAvailable: the last Linear layer that was called does not make the logits, so there is nothing to compare; or
            BatchNorm normalises by the batch in eval mode too, so that features depend on the other images.
    """
    if any(getattr(layer, "running_mean", None) is None for layer in bn_layers(model).values()):
        raise NotAvailable("a BatchNorm layer keeps no running statistics, so that features depend on the other images")
    held: list[tuple[int, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear)
        held[:] = [(module.out_features, given[0].detach())]

    like = next(model.parameters())
    hooks = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, nn.Linear)]
    rows = []
    try:
        with torch.no_grad(), in_mode(model, "eval"):
            for part in images.split(CHUNK):
                held.clear()
                logits = model(part.to(like.device, like.dtype))
                if not held or held[0][0] != logits.shape[1] or held[0][1].shape[:-1] != (len(part),):
                    raise NotAvailable("the network does not end in a Linear layer, so it has no penultimate features")
                rows.append(held[0][1].cpu().float())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(rows)


def iip_features_values(
    found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"], context: MetricContext
) -> Float[Tensor, " b"]:
    """1 if the own original is the nearest of `context.pool` by cosine of the audited network's features, else 0.

    Raises:
        NotAvailable: the network has no penultimate features.
    """
    del truth  # it is in the pool
    own, pool = penultimate(context.model, found), penultimate(context.model, context.pool)
    return identified(own, pool, context.index, copies(context))


@METRICS.register(paper="Yin et al. 2021, CVPR (GradInversion)")
def iip_features() -> Metric:
    """1 if the nearest of a pool of originals in the audited network's features is the own one; higher is closer."""
    return Metric("iip_features", iip_features_values, needs_context=True, about=pool_words)
