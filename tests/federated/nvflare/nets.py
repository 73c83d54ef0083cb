"""A network, images and a record of what leaves, importable by NVFlare's processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.dxo_filter import DXOFilter
from sklearn.datasets import load_digits
from torch import Tensor, nn

from frostglass.core.batch import Batch, Domain, one_hot


class Small(nn.Module):
    """With BatchNorm, so that there are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x.flatten(1)).relu()).relu())


WHAT: dict[str, Any] = {"network": "nets:Small", "classes": 10, "channels": 1, "size": 8}


def batch(site: str, count: int = 4) -> Batch:
    """Digits of a site; each has others."""
    held = load_digits()
    start = 50 * int(site.rsplit("-", 1)[-1])
    rows = slice(start, start + count)
    images = torch.tensor(held.images[rows] / 16, dtype=torch.float32)[:, None]
    return Batch(
        images, one_hot(torch.as_tensor(held.target[rows]), 10), Domain(), tuple(f"{site} {i}" for i in range(count))
    )


class KeepSent(DXOFilter):
    """The last filter of a client: writes down what really leaves."""

    def __init__(self, folder: str) -> None:
        super().__init__(supported_data_kinds=[DataKind.WEIGHT_DIFF, DataKind.WEIGHTS], data_kinds_to_filter=None)
        self.folder = folder

    def process_dxo(self, dxo: DXO, shareable: Any, fl_ctx: Any) -> None:
        number = shareable.get_header("current_round", -1)
        np.savez(
            f"{self.folder}/{fl_ctx.get_identity_name()}-{number}.npz",
            **{k: np.asarray(v) for k, v in dxo.data.items()},
        )
