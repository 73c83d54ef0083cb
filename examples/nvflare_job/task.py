"""The network and the digits of the NVFlare example. NVFlare builds the network anew from its class and arguments."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from frostglass.core.batch import Batch, one_hot
from frostglass.core.update import LocalPlan
from frostglass.vision.normalise import Normalise, domain_of

WHAT = {"network": "task:Net", "classes": 10, "channels": 1, "size": 8}
"""Of the network, as frostglass's filters take it."""

PLAN = {"mode": "train", "lr": 0.1, "minibatch": 30, "epochs": 1}
"""Of every client's training."""


class Net(nn.Module):
    """Two convolutions and a linear layer; takes [b, 1, 8, 8] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Normalise((0.3,), (0.4,)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """[b, 10] logits."""
        return self.net(images)


def digits(site: str, sites: int = 2) -> tuple[Tensor, Tensor]:
    """The images of "site-1", "site-2", ...: every other one each, and the last 297 of all for tests ("test")."""
    held = load_digits()
    images, labels = torch.tensor(held.images / 16, dtype=torch.float32)[:, None], torch.tensor(held.target)
    if site == "test":
        return images[1500:], labels[1500:]
    part = int(site.rsplit("-", 1)[-1]) - 1
    return images[:1500][part::sites], labels[:1500][part::sites]


def private(site: str) -> Batch:
    """The same for the gate."""
    images, labels = digits(site)
    return Batch(images, one_hot(labels, 10), domain_of(Net()), tuple(f"{site} {i}" for i in range(len(images))))


def plan() -> LocalPlan:
    """For a client."""
    return LocalPlan(kind="delta", **PLAN)  # type: ignore[arg-type]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in eval mode."""
    return float((model.eval()(images).argmax(1) == labels).float().mean())
