"""A step on a copy of a network, before it is trained: what torch would refuse after minutes is said at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng, global_draws
from frostglass.federated.exchange import device_of
from frostglass.numerics.bn import bn_layers
from frostglass.numerics.called import copied


def refuse_untrainable(model: nn.Module, name: str, image_shape: tuple[int, ...], images: int, batch: int) -> None:
    """Nothing, where the network can make every step of an epoch; it and torch's generators stay as they are.

    Args:
        model: on its device.
        name: as the plan has it.
        image_shape: (channels, height, width).
        images: in an epoch.
        batch: images in a step; the last one may hold fewer.

    Raises:
        BadInput: no parameter is trained, the network does not take float32 images in train mode, or the last step
            holds one image, of which BatchNorm cannot take statistics.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise BadInput(f"model: {name!r} has no parameter that is trained; set requires_grad where it is made.")
    last = images % batch or batch
    if min(images, batch) > 1:
        wrong = _problem(model, image_shape, 2)
        if wrong is not None:
            raise BadInput(f"model: {name!r} cannot be trained on float32 images ({wrong}); change what makes it.")
    if last > 1:
        return
    wrong = _problem(model, image_shape, 1)
    if wrong is not None and bn_layers(model):
        raise BadInput(
            f"training.batch: {batch} leaves one of {images} images to a step of its own, where BatchNorm has no "
            f"statistics ({wrong}); choose another size."
        )
    if wrong is not None:
        raise BadInput(f"model: {name!r} cannot be trained on a single float32 image ({wrong}); change what makes it.")


def outputs_of_copy(model: nn.Module, image_shape: tuple[int, ...], images: int) -> Tensor:
    """What a copy answers in train mode to so many black images; torch's generators stay as they are."""
    black = torch.zeros(images, *image_shape, device=device_of(model))
    with global_draws(Rng.from_seed(0, "first step"), black.device):
        answer: Tensor = copied(model).train()(black)
    return answer


def _problem(model: nn.Module, image_shape: tuple[int, ...], images: int) -> str | None:
    """What torch says to one step on so many images; None if it takes it."""
    try:
        outputs_of_copy(model, image_shape, images).logsumexp(1).sum().backward()
    except (ValueError, RuntimeError, TypeError) as wrong:
        return f"{type(wrong).__name__}: {str(wrong).splitlines()[0].rstrip('.')}"
    return None
