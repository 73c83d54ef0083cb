"""Finding the linear layer that reads the pixels, and what stands between it and them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from frostglass.core.threat import Observation
from frostglass.numerics.local_update import in_mode


@dataclass(frozen=True)
class FirstLinear:
    """A Linear layer whose input is scale * image + offset, element by element.

    Args:
        name: of the module.
        weight: [h, d]; bias: [h].
        grad_weight: [h, d]; grad_bias: [h], None if the layer has no bias or its gradient was not sent.
        scale, offset: [d] from pixels to the layer's input.
        relu: True if nothing of what the layer writes below 0 goes on (probed, however the ReLU is written).
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    grad_weight: Tensor
    grad_bias: Tensor | None
    scale: Tensor
    offset: Tensor
    relu: bool

    def to_images(self, inputs: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Layer inputs [r, d] -> images [r, c, h, w]."""
        return ((inputs - self.offset.to(inputs)) / self.scale.to(inputs)).view(-1, *shape)


def find_first_linear(seen: Observation) -> tuple[FirstLinear | None, str]:
    """(the layer, "") or (None, a sentence on what is missing)."""
    c, h, w = seen.image_shape
    size = c * h * w
    linears = {n: m for n, m in seen.model.named_modules() if isinstance(m, nn.Linear) and m.in_features == size}
    if not linears:
        return None, f"the model has no Linear layer that reads all {size} pixel values; this attack needs one."
    probes = _probe(seen, linears)
    if probes is None:
        return None, "the model's first Linear layer is not reached from the image alone; this attack needs that."
    name, inputs, relu = probes
    low, high, mixed, image = inputs
    span = seen.domain.high - seen.domain.low
    scale = (high - low) / span
    offset = low - scale * seen.domain.low
    if bool((scale == 0).any()) or not torch.allclose(mixed, scale * image + offset, atol=1e-4, rtol=1e-4):
        return None, f"the input of {name!r} is not the image scaled pixel by pixel; this attack needs that."
    if f"{name}.weight" not in seen.gradients:
        return None, f"the gradient of {name!r} was not sent; this attack needs it."
    layer = linears[name]
    return FirstLinear(
        name,
        layer.weight.detach(),
        None if layer.bias is None else layer.bias.detach(),
        seen.gradients[f"{name}.weight"],
        seen.gradients.get(f"{name}.bias"),
        scale,
        offset,
        relu,
    ), ""


def _probe(
    seen: Observation, linears: dict[str, nn.Linear]
) -> tuple[str, tuple[Tensor, Tensor, Tensor, Tensor], bool] | None:
    """What each candidate layer reads for a dark, a bright and a mixed image; the first one reached is taken."""
    low, high = seen.domain.low, seen.domain.high
    weights = next(iter(seen.model.parameters()))
    mixed = torch.linspace(low, high, int(torch.tensor(seen.image_shape).prod()), dtype=weights.dtype)
    mixed = mixed.to(weights.device).view(1, *seen.image_shape)
    batch = torch.cat([torch.full_like(mixed, low), torch.full_like(mixed, high), mixed])
    reads: list[tuple[str, Tensor]] = []

    def spy(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            reads.append((name, args[0].detach().clone()))

        return hook

    handles = [m.register_forward_pre_hook(spy(n)) for n, m in linears.items()]
    try:
        with torch.no_grad(), in_mode(seen.model, "eval"):
            seen.model(batch)
    finally:
        for handle in handles:
            handle.remove()
    fitting = [(n, x) for n, x in reads if x.ndim == 2 and len(x) == 3]
    if not fitting:
        return None
    name, x = fitting[0]
    return name, (x[0], x[1], x[2], mixed.flatten()), _stops_below_zero(seen, linears[name], batch)


def _stops_below_zero(seen: Observation, layer: nn.Module, images: Tensor) -> bool:
    """Whether the logits have a slope in what the layer writes above 0, and none in what it writes below."""
    held: list[Tensor] = []

    def leaf(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        if held:  # a layer that is called again
            return None
        held.append(out.detach().clone().requires_grad_(True))
        return held[0].clone()  # a ReLU may work in place

    handle = layer.register_forward_hook(leaf)
    try:
        with torch.enable_grad(), in_mode(seen.model, "eval"):
            logits = seen.model(images)
            uneven = torch.arange(1, logits.shape[1] + 1).to(logits)  # their plain sum may be constant
            slope = torch.autograd.grad((uneven * logits).sum(), held[0], allow_unused=True)[0]
    finally:
        handle.remove()
    if slope is None:
        return False
    below, above = slope[held[0] < 0], slope[held[0] > 0]
    return len(below) > 0 and not bool(below.any()) and bool(above.any())
