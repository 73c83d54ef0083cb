"""Soteria: the classifier's gradient loses the features that carry most of the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frostglass.core.batch import Batch
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Randomness
from frostglass.core.update import LocalPlan, Update
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.called import called_with
from frostglass.numerics.compress import largest, sent_only
from frostglass.numerics.fedavg import drawn_order
from frostglass.numerics.labels import classifier_layer
from frostglass.numerics.local_update import in_mode, local_update

CHUNK = 32
"""Features whose gradients are taken together."""


@DEFENSES.register(paper="Sun et al. 2021, CVPR (Soteria)")
def soteria(*, fraction: float = 0.8) -> Defense:
    """Zeroes the columns of the classifier's gradient that belong to features of small ||dr/dx|| / |r|; a heuristic.

    All other layers leave as they are, so an attack that matches those alone is not hindered.

    Args:
        fraction: share of the features that are zeroed; 0 for none, below 1.
    """
    if not 0 <= fraction < 1:
        raise BadInput(f"soteria: fraction = {fraction} must be at least 0 and below 1.")

    def gradient(model: nn.Module, batch: Batch, plan: LocalPlan, randomness: Randomness) -> Update:
        order = drawn_order(plan, len(batch), randomness.rng().at("order"))
        trace = local_update(model, batch.images, batch.targets, plan, order=order)
        sent = dict(trace.gradients)
        if fraction:
            name = classifier_layer(model, batch.targets.shape[1], batch.images.shape[1:])
            if name is None or f"{name}.weight" not in sent:
                raise BadInput("defense soteria: the model has no linear classifier; Soteria needs one.")
            keep = representation_mask(model, name, batch.images, fraction, plan.mode)
            sent[f"{name}.weight"] = sent[f"{name}.weight"] * keep.to(sent[f"{name}.weight"])
        return Update(sent, trace.bn, len(batch), plan, buffers=trace.buffers)

    return Defense(
        "soteria",
        gradient=gradient,
        settings={"fraction": fraction},
        adaptive=("thaw", "learned_inverter"),
        simulate=sent_only,
        per_example=False,
    )


def representation_mask(model: nn.Module, layer: str, images: Tensor, fraction: float, mode: str) -> Tensor:
    """[features] bool: those that stay. Score of feature f: sum over images of ||dr_f/dx|| / |r_f| (Sun et al., Eq. 6).

    Args:
        model: in any mode; computed in `mode`, its buffers stay.
        layer: the linear layer whose inputs are the features.
        images: [b, c, h, w].
        fraction: of the features that goes, those of the smallest scores.
        mode: of the client.
    """
    read: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, args, out: read.append(args[0]))
    x = images.detach().requires_grad_(True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with torch.enable_grad(), in_mode(model, mode):
            called_with(model, buffers, x)
    finally:
        handle.remove()
    features = read[0]
    b, f = features.shape
    slopes = []
    for rows in torch.eye(f, dtype=features.dtype, device=features.device).split(CHUNK):
        ups = rows[:, None, :].expand(-1, b, -1)
        (found,) = torch.autograd.grad(features, x, ups, retain_graph=True, is_grads_batched=True)
        slopes.append(found.flatten(2).norm(dim=2))
    size = features.detach().abs().T
    # a feature that is 0 (a dead ReLU) has a column of zeros anyway and scores nothing
    score = torch.where(size > 0, torch.cat(slopes) / size.clamp_min(1e-12), torch.zeros_like(size)).sum(1)
    return largest(score, f - round(fraction * f))
