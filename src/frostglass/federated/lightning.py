"""Lightning: private images as a DataModule of encodings. Needs `pip install 'frostglass[lightning]'`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from frostglass.core.errors import BadInput
from frostglass.defenses.encoded_dataset import EncodedDataset, encoded_loader
from frostglass.defenses.instahide import InstaHide

try:
    from lightning import LightningDataModule
except ImportError:
    raise BadInput("lightning: it is not installed; run pip install 'frostglass[lightning]'.") from None

_Base: Any = LightningDataModule


class EncodedDataModule(_Base):  # type: ignore[misc]
    """Trains on encodings and validates on plain images, as the network expects their pixels.

    The trainer must rebuild its loaders each epoch (`reload_dataloaders_every_n_epochs=1`), which starts a new epoch of
    keys. Under DDP each rank has keys of its own and encodes the rows that its sampler names.

    Args:
        train_set: as for `EncodedDataset`.
        encoder: mixes and counts; its `rounds` and `reuse` hold as in `EncodedDataset`.
        num_classes: number of classes.
        validation_set: (images, labels) or a data set; None for no validation.
        batch_size: of both loaders.
        options: for DataLoader (num_workers, pin_memory, ...).

    Raises:
        BadInput: images or labels that cannot be encoded.
    """

    def __init__(
        self,
        train_set: Any,
        encoder: InstaHide,
        num_classes: int,
        validation_set: Any = None,
        batch_size: int = 128,
        **options: Any,
    ) -> None:
        super().__init__()
        workers = options.get("num_workers", 0)
        self.data = EncodedDataset(train_set, encoder, num_classes, workers=workers)
        self.validation_set, self.batch_size, self.options = validation_set, batch_size, options

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Fresh encodings, under the keys of the trainer's current epoch."""
        self.data.set_epoch(0 if self.trainer is None else int(self.trainer.current_epoch))
        return encoded_loader(self.data, self.batch_size, **self.options)

    def val_dataloader(self) -> Any:
        """Plain images in [-1, 1] (absolute values under mask = "abs") with their class indices."""
        if self.validation_set is None:
            return []
        from torch.utils.data import TensorDataset

        from frostglass.defenses.sources import images_and_labels

        images, labels = images_and_labels(self.validation_set)
        plain = self.data.encoder.plain_for_inference(torch.as_tensor(images)).float()
        return DataLoader(TensorDataset(plain, torch.as_tensor(labels)), self.batch_size)
