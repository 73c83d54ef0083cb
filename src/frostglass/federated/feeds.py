"""Where batches come from: plain images, or encodings of them; and how test images look to the network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from frostglass.core.batch import one_hot
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide, average_predictions
from frostglass.defenses.public_pool import open_pool
from frostglass.federated.train_plan import MethodPlan, Sees, TrainingPlan
from frostglass.vision.byte_images import ByteImages
from frostglass.vision.normalise import Normalise

_PAD = 4


class Feed(Protocol):
    """Batches for training and for plain inference."""

    @property
    def encoder(self) -> InstaHide | None:
        """What encodes, None for plain images."""

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, soft targets) of one epoch."""

    def plain(self, images: Tensor) -> Tensor:
        """uint8 test images as the network takes them."""


class PlainFeed:
    """Images in [0, 1] in an order that follows from `rng`."""

    encoder: None = None

    def __init__(self, held: ByteImages, plan: TrainingPlan, rng: Rng, device: torch.device) -> None:
        self.images, self.plan, self.rng = held.images.to(device), plan, rng
        self.targets = one_hot(held.labels, held.classes).to(device)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [b, c, h, w], one-hot targets [b, classes])."""
        order = self.rng.at("order", epoch).permutation(len(self.images)).to(self.images.device)
        for number, rows in enumerate(order.split(self.plan.batch)):
            draws = self.rng.at("augmentation", epoch, number).generator()
            images = augmented(self.images[rows], self.plan.augmentation, draws)
            yield self.plain(images), self.targets[rows]

    def plain(self, images: Tensor) -> Tensor:
        """[0, 1]."""
        return images.to(self.images.device).float() / 255


class EncodedFeed:
    """Encodings; keys come from the operating system, whatever the plan's seed."""

    def __init__(self, held: ByteImages, method: MethodPlan, plan: TrainingPlan, device: torch.device) -> None:
        self.encoder: InstaHide = encoder_of(method, plan, held.images.shape[-1])
        pool = self.encoder.public
        # rows beside a memory map must be an array too (on the CPU); elsewhere tensors
        images: Any = held.images.to(device) if pool is None or pool.crop else held.images.numpy()
        self.set, self.classes, self.batch, self.device = (images, held.labels), held.classes, plan.batch, device
        self.encoder.begin(images, held.labels, held.classes)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(encodings [b, c, h, w] in [-1, 1], soft targets [b, classes])."""
        for images, targets in self.encoder.epoch(self.set, self.batch, self.classes):
            yield images.to(self.device), targets.to(self.device)

    def plain(self, images: Tensor) -> Tensor:
        """[-1, 1], and absolute values under mask = "abs"."""
        return self.encoder.plain_for_inference(images.to(self.device))

    def predictions(self, model: nn.Module, images: Tensor, counts: list[int], min_private: float) -> dict[int, Tensor]:
        """{n: mean probabilities [b, classes] over n encodings}, the smaller n within the larger."""
        most = max(counts)
        # a view of the private set, which the ledger does not know: these encodings never leave the process
        partners = None if self.encoder.public is not None else self.set[0][:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PrivacyCaution)
            made = self.encoder.encode_for_inference(self._like_the_set(images), most, min_private, partners)
        logits = model(made.images.to(self.device)).view(len(images), most, -1)
        return {n: average_predictions(logits[:, :n].flatten(0, 1), n) for n in counts}

    def _like_the_set(self, images: Tensor) -> Any:
        return images.to(self.device) if isinstance(self.set[0], Tensor) else images.numpy()


def encoder_of(method: MethodPlan, plan: TrainingPlan, size: int) -> InstaHide:
    """The encoder of a method.

    Raises:
        BadInput: settings that cannot be met.
    """
    pool = open_pool(method.public, size) if method.public else None
    private = method.private or (min(2, method.k) if pool is not None else method.k)
    change = None if plan.augmentation == "none" else lambda images: augmented(images, plan.augmentation, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyCaution)  # privacy.txt of the run says the same
        return InstaHide(
            k=method.k, private=private, c1=method.c1, c2=method.c2, law=method.law, labels=method.labels,
            mask="none" if method.kind == "mixup" else method.mask, partners=method.partners, public=pool,
            max_exposure=method.max_exposure, rounds=method.rounds, reuse=method.reuse, augment=method.augment,
            insecure_seed=method.insecure_seed, augmentation=change,
        )  # fmt: skip


def augmented(images: Tensor, kind: str, draws: torch.Generator | None) -> Tensor:
    """[n, c, h, w] -> the same: random crop after padding by 4 with black, and a flip for "crop_flip".

    Args:
        images: any dtype.
        kind: "none", "crop" or "crop_flip".
        draws: of offsets and flips; None for torch's own generator (an augmentation is no key).
    """
    if kind == "none":
        return images
    n, _, h, w = images.shape
    padded = nn.functional.pad(images, (_PAD, _PAD, _PAD, _PAD))
    offsets = torch.randint(0, (2 * _PAD + 1) ** 2, (n,), generator=draws)
    out = torch.empty_like(images)
    sorted_rows, counts = offsets.argsort().to(images.device), offsets.bincount(minlength=(2 * _PAD + 1) ** 2)
    for offset, rows in enumerate(sorted_rows.split(counts.tolist())):
        if len(rows):  # one copy for each of the 81 places, and no index for every pixel
            top, left = divmod(offset, 2 * _PAD + 1)
            out[rows] = padded[rows, :, top : top + h, left : left + w]
    if kind == "crop_flip":
        turn = (torch.rand(n, generator=draws) < 0.5).nonzero()[:, 0].to(images.device)
        out[turn] = out[turn].flip(-1)
    return out


def takes_encodings(model: nn.Module, sees: Sees = "pixels") -> nn.Module:
    """The same network with its input normalisation undone: encodings in [-1, 1] are seen as they are.

    Args:
        model: changed in place.
        sees: "magnitudes" puts 2 |x| - 1 before it, for encodings and plain images alike. Under the sign mask this
            loses nothing (the sign of a pixel is a fair coin given |x|) and spares the network learning it.
    """
    for module in model.modules():
        if isinstance(module, Normalise):
            channels = module.mean.shape[1]
            module.constants = ((0.0,) * channels, (1.0,) * channels)
            module.mean.zero_()
            module.std.fill_(1.0)
    if sees == "magnitudes":
        model.register_forward_pre_hook(_magnitudes)
    return model


def _magnitudes(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].abs() * 2 - 1,)


def feed_of(held: ByteImages, method: MethodPlan, plan: TrainingPlan, rng: Rng, device: torch.device) -> Feed:
    """What a method trains on.

    Raises:
        BadInput: images and settings that do not go together.
    """
    if plan.augmentation != "none" and held.images.shape[-1] < 2 * _PAD:
        raise BadInput(f"training.augmentation: images of {held.images.shape[-1]} pixels are too small to crop.")
    if method.kind == "plain":
        return PlainFeed(held, plan, rng, device)
    return EncodedFeed(held, method, plan, device)
