"""InstaHide behind a DataLoader, twice: as a data set, and as a collate function in the manner of MixUp and CutMix.

    python examples/dataloader.py

Both are safe in worker processes: each worker has keys of its own, and all count in one exposure ledger.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from frostglass.core.randomness import Rng
from frostglass.defenses.encoded_dataset import EncodedDataset, EncodingCollate, soft_collate
from frostglass.defenses.instahide import InstaHide
from frostglass.vision.byte_images import load_bytes
from frostglass.vision.networks import build


def train(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """One epoch; the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return sum(losses) / len(losses)


def main(epochs: int = 3, limit: int | None = None, workers: int = 2) -> list[float]:
    """Mean loss of each epoch: first with the data set, then with the collate function."""
    digits = load_bytes("digits", size=8, limit=limit)
    model = build("small_bn_cnn", classes=10, channels=1, size=8, rng=Rng.from_seed(0))
    losses = []

    data = EncodedDataset((digits.images, digits.labels), InstaHide(k=4), num_classes=10, workers=workers)
    loader = DataLoader(data, batch_size=64, shuffle=True, num_workers=workers, collate_fn=soft_collate)
    for epoch in range(epochs):
        data.set_epoch(epoch)
        losses.append(train(model, loader))

    encode = EncodingCollate(InstaHide(k=4), (digits.images, digits.labels), num_classes=10, workers=workers)
    rows = range(len(encode))
    loader = DataLoader(rows, batch_size=64, shuffle=True, num_workers=workers, collate_fn=encode)  # type: ignore
    for epoch in range(epochs):
        encode.set_epoch(epoch)
        losses.append(train(model, loader))
    print(encode.encoder.report())
    return losses


if __name__ == "__main__":
    print("mean losses:", ", ".join(f"{loss:.3f}" for loss in main()))
