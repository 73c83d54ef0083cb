"""What encoding costs in training: time of an epoch of ResNet-20 with InstaHide (k = 4) against plain, same loader.

    python bench/train_overhead.py --threads 1          (about five minutes; --quick for a smoke run)

Both go through the same DataLoader (no workers, batch 128, 32-pixel colour images): the plain one gathers and scales
the rows that the encoded one mixes and masks. Epochs alternate, so that other load on the machine meets both alike; the
ratio is that of the medians, and of the fastest epochs.
"""

from __future__ import annotations

import statistics
import time
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from frostglass.core.randomness import Rng
from frostglass.defenses.encoded_dataset import EncodedDataset, soft_collate
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide
from frostglass.vision.networks import build
from harness import parser, save, spread

TARGET = 1.10


class Plain(Dataset[tuple[Tensor, Tensor]]):
    """The same rows without encoding."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[rows].float() / 255, self.targets[rows]


def epoch(model: torch.nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(seconds of the epoch, seconds of it spent waiting for batches)."""
    begun, waited = time.perf_counter(), 0.0
    batches = iter(loader)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            return time.perf_counter() - begun, waited
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def main() -> None:
    options = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", PrivacyCaution)
    n, repeats = (640, 2) if options.quick else (2560, 7)
    draws = np.random.default_rng(0)
    images = torch.from_numpy(draws.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8))
    labels = torch.from_numpy(draws.integers(0, 10, n))
    sets = {
        "plain": (Plain(images, torch.nn.functional.one_hot(labels, 10).float()), lambda batch: batch),
        "instahide k=4": (EncodedDataset((images, labels), InstaHide(k=4), 10), soft_collate),
    }
    times: dict[str, list[float]] = {name: [] for name in sets}
    waits: dict[str, list[float]] = {name: [] for name in sets}
    model = build("resnet20", classes=10, channels=3, size=32, rng=Rng.from_seed(0)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    for repeat in range(repeats + 1):
        for name, (data, collate) in sets.items():
            loader = DataLoader(data, 128, shuffle=True, collate_fn=collate)
            seconds, waited = epoch(model, loader, optimizer)
            if repeat:  # the first warms up (numba loads its compiled code)
                times[name].append(seconds)
                waits[name].append(waited)
    medians = {name: statistics.median(t) for name, t in times.items()}
    rows = [
        {"loader": name, "seconds per epoch": spread(times[name]), "seconds in the loader": spread(waits[name]),
         "images per second": round(n / medians[name])}
        for name in sets
    ]  # fmt: skip
    ratio = medians["instahide k=4"] / medians["plain"]
    best = min(times["instahide k=4"]) / min(times["plain"])
    extra = statistics.median(waits["instahide k=4"]) - statistics.median(waits["plain"])
    save(
        "train_overhead", options.threads, rows, options.out, images=n, network="resnet20", batch=128,
        ratio_of_medians=round(ratio, 4), ratio_of_bests=round(best, 4), target=TARGET,
        share_of_an_epoch_that_encoding_adds=round(extra / medians["plain"], 5),
    )  # fmt: skip


if __name__ == "__main__":
    main()
