"""Learned perceptual similarity: optional, and never a reason to go online."""

from __future__ import annotations

import hashlib
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from frostglass.auditing.metrics.registry import METRICS, Metric, NotAvailable
from frostglass.core.errors import BadInput
from frostglass.vision.borrowed import import_torchvision

BACKBONE = "alexnet-owt-7be5be79.pth"
"""torchvision's AlexNet, where torch's hub keeps it; the name holds the first digits of its SHA-256."""
CHUNK = 32
LEAST = 31
"""AlexNet's two poolings leave nothing of a smaller image."""


def lpips_values(found: Float[Tensor, "b c h w"], truth: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Distance of AlexNet features, weighted by LPIPS 0.1 (Zhang et al. 2018), per image; grey is repeated in colour.

    Raises:
        NotAvailable: the package `lpips` or the backbone's weights are not on this machine. Nothing is downloaded.
    """
    network = _network()
    parts = []
    with torch.no_grad():
        for a, b in zip(found.split(CHUNK), truth.split(CHUNK), strict=True):
            x, y = (t.float().clamp(0, 1).expand(-1, 3, -1, -1) for t in (a, b))
            parts.append(network(x, y, normalize=True).flatten().double())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _network() -> Any:
    if find_spec("lpips") is None or find_spec("torchvision") is None:
        raise NotAvailable("the package lpips is not installed; run pip install 'frostglass[metrics]'")
    path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    if not path.is_file():
        raise NotAvailable(
            f"the backbone's weights {BACKBONE} are not in {path.parent}, and nothing is downloaded unasked; put "
            f"torchvision's file there (https://download.pytorch.org/models/{BACKBONE})"
        )
    return _loaded(path, path.stat().st_mtime_ns)


@cache
def _loaded(path: Path, changed: int) -> Any:
    """The network with its linear heads, which the package brings, and the backbone from `path`.

    The package's own way to the backbone downloads what is missing, so it builds a random one, and ours replaces it.
    """
    del changed  # a key of the cache alone
    digits = Path(BACKBONE).stem.rsplit("-", 1)[1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(digits):
        raise NotAvailable(f"{path} is not the file that its name says (SHA-256 {digest[:12]}...); replace it")
    try:
        import_torchvision()  # the package imports it by itself, which fails beside a torch of another build
        import lpips as package
    except (BadInput, ImportError) as wrong:
        raise NotAvailable(f"the package lpips cannot be imported ({str(wrong).splitlines()[0]})") from wrong
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision by an old name
        network = package.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    wanted = dict(network.net.named_parameters())  # "slice2.3.weight" is torchvision's "features.3.weight"
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[f"features.{name.partition('.')[2]}"])
    return network.eval().requires_grad_(False)


@METRICS.register(paper="Zhang et al. 2018, CVPR (LPIPS 0.1, AlexNet)")
def lpips() -> Metric:
    """Learned perceptual distance from 0, n/a without package and weights (never downloaded); lower is closer."""
    return Metric("lpips", lpips_values, higher_is_closer=False, least_side=LEAST)
