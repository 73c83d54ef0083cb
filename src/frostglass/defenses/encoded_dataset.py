"""InstaHide as a data set or a collate function: for DataLoader, DDP, Lightning, Accelerate and the like."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from frostglass.core.errors import BadInput
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sources import images_and_labels, rows_of


class EncodingCollate:
    """Turns row numbers into a batch of fresh encodings: a `collate_fn`, used as torchvision's MixUp and CutMix are.

        encode = EncodingCollate(InstaHide(k=4), (images, labels), num_classes=10)
        for x, y in DataLoader(range(len(images)), batch_size=128, shuffle=True, collate_fn=encode): ...

    Unlike those, partners come from the whole set and not from the batch alone. Safe in workers: each has its own
    keys, and all count in the one exposure ledger of `encoder`. Other ranks have ledgers of their own: for
    `max_exposure` and `rounds` to mean what they say, each rank holds its own shard (`own_part`).

    `rounds` of the encoder limits how often an image may come first. With `reuse` all rounds are encoded here and now,
    kept in memory and replayed: epoch e takes those of round e mod `rounds`, in workers too.

    Args:
        encoder: mixes and counts; give each set its own.
        train_set: (images, labels), a TensorDataset, or a map-style data set of (image tensor, label); of this rank.
            A map-style one is read once, so that its random transforms stand still: give them to the encoder as
            `augmentation` instead.
        num_classes: number of classes.
        workers: DataLoader workers that may use it at a time; None for as many as there are cores.

    Raises:
        BadInput: images or labels that cannot be encoded, or a negative number of workers.
    """

    def __init__(
        self, encoder: InstaHide, train_set: Any, num_classes: int | None = None, workers: int | None = None
    ) -> None:
        self.encoder, self.classes = encoder, num_classes
        self.images, self.labels = images_and_labels(train_set)
        encoder.begin(self.images, self.labels, num_classes)
        encoder.share((os.cpu_count() or 1) if workers is None else workers)
        rounds = (encoder.rounds or 0) if encoder.reuse else 0
        # made before there are workers, which would each make, and keep, other ones
        self._kept = [encoder.kept_round(self.images, self.labels, r, num_classes) for r in range(rounds)]
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # seen by workers that live on over epochs

    def __len__(self) -> int:
        return len(self.images)

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch: new keys, and new augmented copies under augment = "per_epoch"; workers see it too."""
        if epoch < 0:
            raise BadInput(f"epoch: {epoch} must be at least 0.")
        self._epoch.fill_(epoch)

    def __call__(self, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """(encodings [b, c, h, w] in [-1, 1], soft targets [b, classes]) whose first images are `rows`.

        Raises:
            BadInput: a row that is not in the set, or `max_exposure` or `rounds` reached.
        """
        if self._kept:
            made = self._kept[self.epoch % len(self._kept)].take(rows_of(rows, len(self)))
            return made.images, made.targets
        made = self.encoder.encode_rows(self.images, self.labels, torch.as_tensor(rows), self.epoch, self.classes)
        return made.images, made.targets


class _Rows(list[tuple[Tensor, Tensor]]):
    """Rows of one batch with the batch itself, so that `soft_collate` need not stack them again."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        super().__init__(zip(images, targets, strict=True))
        self.whole = images, targets


class EncodedDataset(Dataset[tuple[Tensor, Tensor]]):
    """Private images as encodings: item i is a fresh encoding (image, soft target) whose first image is i.

    For any DataLoader; with samplers (also DistributedSampler) each rank encodes the rows that its sampler names, with
    keys of its own, and partners from the set it was given. Give a rank its part of the images alone
    (`own_part`) if it must not mix, or see, those of others, or if `max_exposure` or `rounds` are to hold over all.

        data = EncodedDataset((images, labels), InstaHide(k=4), num_classes=10)
        loader = DataLoader(data, batch_size=128, shuffle=True, num_workers=2, collate_fn=soft_collate)
        for epoch in range(epochs):
            data.set_epoch(epoch)
            for x, y in loader:
                loss = torch.nn.functional.cross_entropy(model(x), y)

    Args:
        train_set, encoder, num_classes, workers: as `EncodingCollate`.

    Attributes:
        encode: the `EncodingCollate` behind it.

    Raises:
        BadInput: images or labels that cannot be encoded.
    """

    def __init__(
        self, train_set: Any, encoder: InstaHide, num_classes: int | None = None, workers: int | None = None
    ) -> None:
        self.encode = EncodingCollate(encoder, train_set, num_classes, workers)

    @property
    def encoder(self) -> InstaHide:
        """With ledger and report."""
        return self.encode.encoder

    def __len__(self) -> int:
        return len(self.encode)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """(image [c, h, w] in [-1, 1], target [classes]), another one at each call unless `reuse` is on.

        Raises:
            IndexError: no such row (-1 is the last one); it ends a plain loop over the set.
            BadInput: `max_exposure` or `rounds` reached.
        """
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} images")
        images, targets = self.encode([int(row) % len(self)])
        return images[0], targets[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch, encoded in one go; the loader of torch uses it."""
        return _Rows(*self.encode([int(row) for row in rows]))

    def set_epoch(self, epoch: int) -> None:
        """As `EncodingCollate.set_epoch`; a DistributedSampler has one of its own, to be called beside it."""
        self.encode.set_epoch(epoch)


def soft_collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """[(image, soft target)] -> (images [b, c, h, w], targets [b, classes]); free for a batch of `EncodedDataset`."""
    if isinstance(rows, _Rows):
        return rows.whole
    images, targets = default_collate(rows)
    return images, targets


class KeywordCollate:
    """`soft_collate` for trainers that take dictionaries, such as Hugging Face's `Trainer` (`data_collator`).

    Args:
        images, labels: keys under which the model takes them.
    """

    def __init__(self, images: str = "pixel_values", labels: str = "labels") -> None:
        self.images, self.labels = images, labels

    def __call__(self, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """{images: [b, c, h, w], labels: [b, classes]}."""
        images, targets = soft_collate(rows)
        return {self.images: images, self.labels: targets}


def own_part(images: int, rank: int, world: int) -> Tensor:
    """Rows of this rank: disjoint parts of equal size (up to world - 1 images are left out), by stride.

    Raises:
        BadInput: rank outside 0 .. world - 1, or fewer images than ranks.
    """
    if not 0 <= rank < world:
        raise BadInput(f"rank: {rank} is not in 0 .. {world - 1}.")
    if images < world:
        raise BadInput(f"images: {images} do not divide among {world} ranks.")
    return torch.arange(rank, images - images % world, world)


def encoded_loader(data: EncodedDataset, batch_size: int, **options: Any) -> DataLoader[tuple[Tensor, Tensor]]:
    """A shuffling DataLoader over `data` with one torch thread in each worker; `options` as for DataLoader.

    Raises:
        BadInput: more workers than the ledger of `data` is shared with.
    """
    settings = {"shuffle": "sampler" not in options, "collate_fn": soft_collate, "worker_init_fn": _one_thread}
    return DataLoader(data, batch_size, **{**settings, **options})


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)  # on a loaded machine threads of several workers get in each other's way
