"""InstaHide in a Lightning Trainer, as a DataModule. Needs `pip install 'frostglass[lightning]'`.

python examples/lightning_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer

from frostglass.core.randomness import Rng
from frostglass.defenses.instahide import InstaHide
from frostglass.federated.lightning import EncodedDataModule
from frostglass.vision.byte_images import load_bytes
from frostglass.vision.networks import build


class Classifier(LightningModule):  # type: ignore[misc]
    """A small network trained on soft targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("small_bn_cnn", classes=10, channels=1, size=8, rng=Rng.from_seed(0))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Loss of a batch of encodings."""
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        """Accuracy on plain images."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


def main(epochs: int = 3, limit: int | None = None, root: str | None = None) -> tuple[Trainer, EncodedDataModule]:
    """Trains on digits."""
    digits = load_bytes("digits", size=8, limit=limit)
    cut = len(digits) * 4 // 5
    train, test = (digits.images[:cut], digits.labels[:cut]), (digits.images[cut:], digits.labels[cut:])
    data = EncodedDataModule(train, InstaHide(k=4, mask="none"), 10, test, batch_size=64)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1, default_root_dir=root,
    )  # fmt: skip
    trainer.fit(Classifier(), datamodule=data)
    return trainer, data


if __name__ == "__main__":
    done, _ = main()
    print({name: round(float(value), 3) for name, value in done.callback_metrics.items()})
