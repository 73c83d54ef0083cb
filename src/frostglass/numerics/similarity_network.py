"""A small siamese network: encodings that share an image get embeddings that point the same way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from frostglass.core.errors import BadInput

FORMAT = "frostglass similarity network"
BATCH = 256
"""Encodings embedded at a time."""


@dataclass(frozen=True)
class Shape:
    """What the network reads and how large it is.

    Args:
        channels, size: of an encoding (square).
        width: channels of its first stage.
        stages: each halves the side and, from the second on, doubles the width.
        features: numbers in an embedding.
    """

    channels: int = 3
    size: int = 32
    width: int = 32
    stages: int = 3
    features: int = 128


class SimilarityNetwork(nn.Module):
    """Encodings [n, c, s, s] in [-1, 1] -> embeddings [n, features] of length 1; sees absolute values alone."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        widths = [shape.width * 2**i for i in range(shape.stages)]
        # |y|, and its differences to the right and below, whose sign the mask leaves alone within a block
        layers: list[nn.Module] = [nn.Conv2d(3 * shape.channels, widths[0], 3, padding=1, bias=False)]
        for i, w in enumerate(widths):
            before = widths[max(0, i - 1)]
            layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, w, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1, bias=False)]
        side = shape.size
        for _ in widths:
            side = (side + 1) // 2
        layers += [
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(widths[-1] * side * side, shape.features),
        ]
        self.body = nn.Sequential(*layers)

    def forward(self, encodings: Float[Tensor, "n c s s"]) -> Float[Tensor, "n f"]:
        """Unit vectors."""
        y = encodings.abs()
        right = nn.functional.pad(y[..., 1:] - y[..., :-1], (0, 1))
        down = nn.functional.pad(y[..., 1:, :] - y[..., :-1, :], (0, 0, 0, 1))
        made: Tensor = self.body(torch.cat([y * 4 - 1, right * 4, down * 4], 1))
        return nn.functional.normalize(made, dim=1)


def misfit(shape: Shape, image_shape: tuple[int, ...]) -> str:
    """Why a network of that shape cannot embed encodings of `image_shape`; empty where it can."""
    want = (shape.channels, shape.size, shape.size)
    if image_shape == want:
        return ""
    if image_shape[1] != image_shape[2]:
        return f"network: it reads square encodings alone, and these are {' x '.join(map(str, image_shape))}."
    fitted, given = (" x ".join(map(str, s)) for s in (want, image_shape))
    return f"network: it was fitted to {fitted} and the encodings are {given}; fit one with --size and --channels."


def embed(network: SimilarityNetwork, encodings: Float[Tensor, "n c s s"]) -> Float[Tensor, "n f"]:
    """One pass for each encoding, without gradients; on the device of the network, back on the CPU.

    Raises:
        BadInput: the network was fitted to encodings of another shape.
    """
    wrong = misfit(network.shape, tuple(encodings.shape[1:]))
    if wrong:
        raise BadInput(wrong)
    place = next(network.parameters()).device
    training = network.training
    network.eval()
    with torch.no_grad():
        made = torch.cat([network(part.to(place).float()).cpu() for part in encodings.split(BATCH)])
    network.train(training)
    return made


def save_network(network: SimilarityNetwork, path: Path, **about: str) -> None:
    """Weights and shape as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    from frostglass.core.files import written_beside

    # one entry: safetensors writes several in an arbitrary order, and the same fit should give the same file
    note = {"frostglass": json.dumps({"format": FORMAT, "shape": asdict(network.shape), **about}, sort_keys=True)}
    with written_beside(path) as beside:
        save_file({k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}, beside, metadata=note)


def load_network(path: Path) -> SimilarityNetwork:
    """What `save_network` wrote, in eval mode.

    Raises:
        BadInput: no such file, or one of another kind.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadInput(f"network: {path} does not exist; fit one with `frostglass fit-similarity`.")
    try:
        with safe_open(path, framework="pt") as held:
            note = json.loads((held.metadata() or {}).get("frostglass", "{}"))
            if note.get("format") != FORMAT:
                raise BadInput(f"network: {path} is no similarity network; fit one with `frostglass fit-similarity`.")
            with torch.random.fork_rng(devices=[]):  # what it draws is replaced at once
                network = SimilarityNetwork(Shape(**note["shape"]))
            network.load_state_dict({k: held.get_tensor(k) for k in held.keys()})  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as wrong:
        raise BadInput(f"network: {path} cannot be read ({wrong}); fit it anew.") from None
    return network.eval()
