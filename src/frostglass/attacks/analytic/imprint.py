"""Imprint: a malicious server reads images out of a layer of bins that it put into the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frostglass.attacks.analytic.first_layer import FirstLinear, find_first_linear
from frostglass.attacks.analytic.imprint_scan import collinear_rows, model_report
from frostglass.attacks.analytic.proof import prove
from frostglass.attacks.inversion.target import refuse_broken_values, update_problems
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import Scalars
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation

__all__ = ["ImprintAttack", "binned_rows", "imprint", "model_report"]

SILENT = 1e-5
"""Part of the greatest bias gradient below which a bin is taken to be empty: rounding leaves about 1e-7 of it."""


@dataclass(frozen=True)
class Found:
    """[r, d] inputs of the layer, one for each bin that is not empty."""

    inputs: Tensor


@dataclass(frozen=True)
class ImprintAttack:
    """See `imprint`."""

    name: str
    steps: int = 1
    every: int = 1
    needs: frozenset[Knows] = frozenset({Knows.MODIFIED_MODEL})

    def check(self, seen: Observation) -> list[str]:
        """Sentences on why this observation cannot be attacked."""
        problems = update_problems(seen)
        layer, missing = find_first_linear(seen)
        if layer is None:
            return [*problems, missing]
        if layer.grad_bias is None or layer.bias is None or len(collinear_rows(layer.weight)) < 2:
            problems.append(
                f"attack imprint: {layer.name!r} is no layer of bins; let the server put one there, as "
                'model.name = "imprinted" does.'
            )
        return problems

    def init(self, seen: Observation, run: Runtime) -> Found:
        """Nothing yet."""
        refuse_broken_values(seen)
        c, h, w = seen.image_shape
        return Found(torch.zeros(0, c * h * w, dtype=torch.float64))

    def step(self, seen: Observation, state: Found, run: Runtime, t: int) -> tuple[Found, Scalars]:
        """All of it: differences of neighbouring bins."""
        layer, _ = find_first_linear(seen)
        assert layer is not None
        inputs = binned_rows(layer, seen.examples)
        return Found(inputs), {"bins_filled": len(inputs)}

    def done(self, state: Found) -> bool:
        """One step is all."""
        return False

    def read(self, seen: Observation, state: Found) -> Reconstruction:
        """A row for each filled bin: an image, or a mean of images that share it; proved if all images are alone."""
        layer, _ = find_first_linear(seen)
        assert layer is not None
        images = layer.to_images(state.inputs, seen.image_shape).cpu()
        proof = prove(seen, images) if len(images) and len(images) == seen.examples else None
        holds = proof is not None and proof.holds
        return Reconstruction(
            images=seen.domain.clamp(images).float(),
            proved=torch.full((len(images),), holds, dtype=torch.bool),
            objective=proof.error if proof is not None else float("nan"),
            targets=proof.targets if proof is not None and holds else None,
            info={
                "layer": layer.name,
                "bins": len(layer.weight),
                "bins_filled": len(images),
                "malicious": True,
                **({} if proof is None else proof.told),
            },
        )


def binned_rows(layer: FirstLinear, examples: int | None) -> Tensor:
    """[r, d] (gW_i - gW_{i+1}) / (gb_i - gb_{i+1}) in float64, units in the order of their thresholds."""
    assert layer.bias is not None
    assert layer.grad_bias is not None
    units = collinear_rows(layer.weight)
    order = units[layer.bias[units].argsort(descending=True)]  # from the lowest threshold to the highest
    g, b = layer.grad_weight[order].double().cpu(), layer.grad_bias[order].double().cpu()
    g = g - torch.cat([g[1:], torch.zeros_like(g[:1])])
    b = b - torch.cat([b[1:], torch.zeros_like(b[:1])])
    if examples is not None and examples < len(b):
        filled = b.abs().topk(examples).indices.sort().values
    else:
        filled = torch.arange(len(b))
    filled = filled[b[filled].abs() > SILENT * layer.grad_bias.double().cpu().abs().max()]
    return g[filled] / b[filled, None]


@ATTACKS.register(paper="Fowl et al. 2022, ICLR (Robbing the Fed)", family="analytic", malicious=True)
def imprint() -> ImprintAttack:
    """The malicious ceiling: the server puts a layer of brightness bins into the model and reads images out of it.

    Exact for every image that is alone in its bin, whatever the network behind it. `frostglass check --model` warns a
    client of such a layer.
    """
    return ImprintAttack("imprint")
