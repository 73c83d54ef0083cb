"""A received model, looked through for layers that no training makes and that hand images over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng

Rule: TypeAlias = Literal["imprint", "trap_weights", "pass_through"]

ENOUGH = 8
"""Units that must look alike before a layer is suspect."""
ALIKE = 0.9999
"""Cosine from which two rows count as one direction; trained rows of 16 entries or more do not come near it."""
PIVOTS = 256
"""Rows that all others are compared with in a large layer."""


@dataclass(frozen=True)
class Finding:
    """One suspect layer.

    Args:
        layer: name of its weight.
        rule: what it looks like.
        units: how many of its units do.
        text: a sentence or two for a client, with what to do.
    """

    layer: str
    rule: Rule
    units: int
    text: str


def scan_model(model: nn.Module | Mapping[str, Tensor]) -> list[Finding]:
    """Every layer of a received model that looks like a reconstruction trap; an empty list is no proof of innocence.

    Three signatures: rows of one direction with thresholds of their own (Fowl et al. 2022), rows with exactly one
    number of negative weights each (trap weights, Boenisch et al. 2023), convolutions that hand pixels through.

    Args:
        model: a network, or a state dict alone.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    found: list[Finding] = []
    for name, weight in state.items():
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            continue
        w = weight.detach().float()
        if w.ndim == 2 and min(w.shape) > 1:
            found += _linear_findings(name, w, state.get(name.removesuffix("weight") + "bias"))
        elif w.ndim == 4 and w[0].numel() >= 9:
            found += _convolution_findings(name, w)
    return found


def collinear_rows(weight: Float[Tensor, "h d"]) -> Int[Tensor, " n"]:
    """Rows of the largest set that shares one direction; rows of zeros count for none."""
    norms = weight.norm(dim=1)
    alive = (norms > 1e-12 * norms.max().clamp_min(1e-30)).nonzero().flatten()
    if len(alive) < 2:
        return alive[:0]
    rows = weight[alive] / norms[alive, None]
    step = max(1, len(alive) // PIVOTS)
    alike = rows[::step] @ rows.T > ALIKE
    return alive[alike[alike.sum(1).argmax()]]


def _linear_findings(name: str, w: Tensor, bias: object) -> list[Finding]:
    found = []
    rows = collinear_rows(w) if w.shape[1] >= 16 else torch.zeros(0, dtype=torch.long)
    if len(rows) >= ENOUGH:
        thresholds = len(set(bias.detach().float()[rows].tolist())) if isinstance(bias, Tensor) else 1
        found.append(
            Finding(
                name,
                "imprint",
                len(rows),
                f"{len(rows)} of {len(w)} units of {name!r} have one and the same direction"
                + (f" and {thresholds} thresholds" if thresholds > 1 else "")
                + ": a layer of bins, out of which a server reads single images; do not train this model.",
            )
        )
    d = w.shape[1]
    negative = (w < 0).sum(1)
    usual = negative.mode().values
    equal = int((negative == usual).sum())
    # chance gives each row its own count: two of 64 entries or more agree with probability below 0.1
    if d >= 64 and len(w) >= ENOUGH and 0 < int(usual) < d and equal >= max(ENOUGH, 0.9 * len(w)) and not found:
        found.append(
            Finding(
                name,
                "trap_weights",
                equal,
                f"{equal} of {len(w)} units of {name!r} have exactly {int(usual)} negative weights of {d}: trap "
                "weights, which few images excite, so that each hands its image over; do not train this model.",
            )
        )
    return found


def _convolution_findings(name: str, w: Tensor) -> list[Finding]:
    single = (w != 0).flatten(1).sum(1) == 1
    count = int(single.sum())
    if count < 3 or count < min(len(w), w.shape[1]):
        return []
    return [
        Finding(
            name,
            "pass_through",
            count,
            f"{count} of {len(w)} filters of {name!r} copy one pixel each: such a convolution hands the image through "
            "to a layer that can store it; ask the server why.",
        )
    ]


def model_report(
    spec: str, *, classes: int = 10, channels: int = 3, size: int = 32
) -> tuple[str, list[dict[str, Any]], bool]:
    """(sentences, the same as values, whether a layer is suspect) about a received model.

    Args:
        spec: a .safetensors, .pt or .pth file, of which no code is run, package.module:factory, or a built-in name.
        classes, channels, size: for a factory that asks for them.

    Raises:
        BadInput: neither a file nor a factory, or one that cannot be read.
    """
    from frostglass.vision import networks, weights

    path = Path(spec)
    held: nn.Module | Mapping[str, Tensor]
    if path.exists() or path.suffix in (".safetensors", ".pt", ".pth"):
        held = weights.read_weights(path)
    elif ":" in spec or spec in networks.MODELS:
        held = networks.build(spec, classes=classes, channels=channels, size=size, rng=Rng.from_seed(0))
    else:
        raise BadInput(f"model: {spec!r} is neither a file nor package.module:factory; give one of them.")
    found = scan_model(held)
    lines = [f"{f.rule}: {f.text}" for f in found]
    text = "\n".join(lines or ["No trap of a known kind was found; that is no proof that there is none."])
    return text, [asdict(f) for f in found], bool(found)
