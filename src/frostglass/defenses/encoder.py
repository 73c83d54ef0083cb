"""The encoder at work: which keys, which images, how many times each has been used, and what comes out."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from frostglass.core.batch import Batch, Domain
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure
from frostglass.defenses.exposure import ExposureLedger
from frostglass.defenses.honesty import RANKS, caution, cautions_of
from frostglass.defenses.key_ring import KeyRing, Partners, forget_on_fork, process_path, world_size
from frostglass.defenses.sources import Augmentation, Images, PrivateSet, PublicPool, augment
from frostglass.numerics.key_rows import KeyRows, Law, MixLaw, mask_width
from frostglass.numerics.keystream import Secret
from frostglass.numerics.mixing import Backend, Labels, Mask, as_source, coarse_targets, mix, mix_targets

_MASK_BYTES = 1 << 16  # keystream made at a time: it is used up before it leaves the cache


@functools.cache
def encoded_domain(channels: int) -> Domain:
    """[-1, 1] and no further normalisation: the network sees encodings as they are."""
    return Domain(-1.0, 1.0, (0.0,) * channels, (1.0,) * channels)


@dataclass(frozen=True)
class Encoded:
    """A batch of encodings; unpacks as (images, targets).

    Args:
        images: [b, c, h, w] in [-1, 1] ([0, 1] under the "abs" mask), up to the rounding of float32 (about 2e-7).
        targets: [b, classes], non-negative, mass at most 1.
        domain: what a pixel may be: [-1, 1], mean 0, std 1.
        insecure: made with `insecure_seed`, so anybody can rebuild the keys.
    """

    images: Float[Tensor, "b c h w"]
    targets: Float[Tensor, "b k"]
    domain: Domain
    insecure: bool

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.images, self.targets))

    def take(self, rows: NDArray[np.int64]) -> Encoded:
        """The encodings `rows`, in that order."""
        index = torch.from_numpy(rows).to(self.images.device)
        return replace(self, images=self.images[index], targets=self.targets[index])

    def batch(self) -> Batch:
        """The same as the core's noun; rows are named by position only."""
        return Batch(self.images, self.targets, self.domain, tuple(f"encoding {i}" for i in range(len(self.images))))


class RowEncoder:
    """Settings, keys and ledger of one encoder; parameters as in `InstaHide`."""

    def __init__(
        self,
        k: int = 4,
        private: int | None = None,
        c1: float = 0.65,
        c2: float = 0.3,
        law: Law = "folded_normal",
        mask: Mask = "sign",
        labels: Labels = "exact",
        partners: Partners = "iid",
        public: Images | PublicPool | None = None,
        max_exposure: int | None = None,
        rounds: int | None = None,
        reuse: bool = False,
        insecure_seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        augment: Literal["per_epoch", "per_use"] = "per_epoch",
        augmentation: Augmentation | None = None,
        backend: Backend = "auto",
    ) -> None:
        whole = _whole(k=k, private=private, max_exposure=max_exposure, rounds=rounds, insecure_seed=insecure_seed)
        k, private, max_exposure, rounds, insecure_seed = cast(Any, whole)
        self.law = MixLaw(k, k if private is None else private, c1, c2, law)
        self.mask, self.labels, self.partners = mask, labels, partners
        self.public = public if public is None or isinstance(public, PublicPool) else PublicPool(public)
        self.max_exposure, self.insecure_seed, self.dtype = max_exposure, insecure_seed, dtype
        self.rounds, self.reuse = (rounds or 1) if reuse else rounds, reuse
        self.augment, self.augmentation, self.backend = augment, augmentation, backend
        self._check()
        self.ledger: ExposureLedger | None = None
        self.epochs = 0
        self._restored = self._rekeyed = 0
        self.forget()
        if self.cautions:
            caution(self.cautions)

    def _check(self) -> None:
        self.law.check()
        found = []
        if self.law.private < self.law.k and self.public is None:
            found.append(f"public: {self.law.k - self.law.private} of k = {self.law.k} slots are public; give a pool.")
        if self.law.private == self.law.k and self.public is not None:
            found.append(f"private: all {self.law.k} slots are private, so the pool has no use; give private < k.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                found.append(f"{name}: {getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}.")
        if found:
            raise BadInput(found)

    def forget(self) -> None:
        """No keys, no private images: the state of a new, copied or unpickled encoder."""
        self.forget_keys()
        self._set: tuple[Any, Any, int, PrivateSet] | None = None
        self._kept: list[Encoded] = []
        self._kept_of: tuple[PrivateSet, str] | None = None
        self._train_set: tuple[Any, tuple[Any, Any]] | None = None
        forget_on_fork(self)

    def forget_keys(self) -> None:
        """No keys, no lock that another thread may hold: the state of a forked encoder. The images are there anyway."""
        self._lock = threading.RLock()
        self._ring: tuple[tuple[int, int, int], KeyRing] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _NOT_KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._restored += 1  # a copy with an insecure seed must not repeat the key rows of its original
        self.forget()

    @property
    def cautions(self) -> list[str]:
        """What about these settings makes an attack easier; recorded in report and manifest."""
        return cautions_of(self.law.k, self.public is not None, self._blank_labels)

    @property
    def _blank_labels(self) -> bool:
        """Whether quarters may round a whole target to nothing: a private share below 1/8 does."""
        return self.labels == "quantised" and self.law.private < self.law.k and self.law.c2 < 0.125

    @property
    def insecure(self) -> bool:
        """Whether outputs are made with `insecure_seed`."""
        return self.insecure_seed is not None

    def domain(self, channels: int) -> Domain:
        """What a pixel of an encoding may be: [-1, 1], and no normalisation by the model."""
        return encoded_domain(channels)

    def pool_of(self, images: Images | None, shape: tuple[int, ...], dtype: object, slots: int) -> PublicPool:
        """`images`, or else the public pool, checked against images of `shape` [c, h, w] and `dtype`."""
        pool = self.public if images is None else PublicPool(images)
        assert pool is not None
        pool.check(shape, dtype, slots)
        return pool

    def share(self, workers: int) -> None:
        """Lets `workers` DataLoader workers count in this encoder's ledger; call it before they start.

        Raises:
            BadInput: no set has been given yet (call `begin`), or a negative number of workers.
        """
        _whole(0, workers=workers)
        if self.ledger is None:
            raise BadInput("share: this encoder has no ledger yet; call begin(images, targets, num_classes) first.")
        self.ledger.share(workers)

    def begin(self, images: Images, targets: Any, num_classes: int | None = None) -> None:
        """Checks the private set and opens its ledger, without encoding anything."""
        self._private(images, targets, num_classes)

    def encode_rows(
        self,
        images: Images,
        targets: Tensor | NDArray[np.int64] | Sequence[int],
        rows: Sequence[int] | NDArray[np.int64] | Tensor,
        epoch: int = 0,
        num_classes: int | None = None,
        out: Tensor | None = None,
    ) -> Encoded:
        """Fresh encodings of `rows`, each mixed with partners from the whole set.

        `rounds` holds here too: no row comes first in more encodings than that, whatever the epochs are called.

        Args:
            images: [N, c, h, w], the whole private set (of this rank), uint8 or float32 in [0, 1]; must not change in
                place between calls. Another set needs an `InstaHide` of its own: the ledger counts by row.
            targets: [N] class indices or [N, classes] one-hot rows, of the whole set.
            rows: b row numbers: slot 0 of the encodings, in this order; repeats get different keys.
            epoch: a new number draws new keys, permutations and augmented copies.
            num_classes: needed for class indices.
            out: [b, c, h, w] memory of `dtype` to write to.

        Returns:
            Encoded(images [b, c, h, w], targets [b, classes]); unpacks as a pair.

        Raises:
            BadInput: fewer than k images, rows outside the set, bad labels or pixels, or `max_exposure` or `rounds`
                reached.
        """
        data = self._private(images, targets, num_classes)
        index = data.rows(rows)
        with self._lock:
            return self._encode(data, index, epoch, out)

    def _private(self, images: Images, targets: Any, classes: int | None) -> PrivateSet:
        version, known = _version(images) + _version(targets), self._set
        if known is not None and known[0] is images and known[1] is targets and known[2] == version:
            if classes is not None and classes != known[3].classes:
                raise BadInput(f"num_classes: {classes}, and {known[3].classes} before; keep it.")
            return known[3]
        data = PrivateSet(images, targets, classes)
        if data.table is not None:
            data.table = as_source(data.table, self.backend, alone=self.public is None)
        if self.ledger is not None and len(self.ledger) != len(data):
            raise BadInput(
                f"images: this encoder counts the exposure of {len(self.ledger)} images, not {len(data)}; give it the "
                "whole set each time and another set its own InstaHide."
            )
        if len(data) < self.law.private:
            raise BadInput(
                f"k: {self.law.private} distinct private images are not to be had from {len(data)}; lower k."
            )
        if self.public is not None:
            self.public.check(data.shape, data.images.dtype, self.law.k - self.law.private)
        if self.ledger is None:
            self.ledger = ExposureLedger(len(data), self.max_exposure, self.rounds)
            if world_size() > 1 and (self.max_exposure is not None or self.rounds is not None):
                caution([RANKS])
        self._set = (images, targets, version, data)
        return data

    def _keys(self, epoch: int, images: int) -> KeyRing:
        public = 0 if self.public is None else len(self.public)
        name = (epoch, images, public)
        if self._ring is None or self._ring[0] != name:
            if self._ring is not None:
                self._ring[1].wipe()
            self._ring = name, KeyRing(self._secret(epoch), self.law, self.partners, images, public)
        return self._ring[1]

    def _secret(self, epoch: int) -> Secret:
        if self.insecure_seed is None:
            return Secret.draw()
        self._rekeyed += 1  # going back to an earlier epoch must not go back to its keys
        path = process_path()
        return Secret.draw(Insecure(self.insecure_seed)).at(self._restored, self._rekeyed, epoch, *path)

    def _encode(self, data: PrivateSet, rows: NDArray[np.int64], epoch: int, out: Tensor | None) -> Encoded:
        ring = self._keys(epoch, len(data))
        indices, weights = ring.draw(rows)
        inside = self.law.private
        assert self.ledger is not None
        self.ledger.add(rows, indices[:, 1:inside])
        soft = mix_targets(data.labels, data.classes, inside, KeyRows(indices, weights))
        shape = (len(rows), *data.shape)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device=data.device)
        elif tuple(out.shape) != shape or out.dtype != self.dtype or not out.is_contiguous():
            raise BadInput(f"out: give contiguous memory of shape {shape} and {self.dtype}.")
        on_cpu = out.device.type == "cpu"
        step = max(1, _MASK_BYTES // mask_width(shape[1] * shape[2] * shape[3])) if on_cpu else len(rows)
        if 0 < len(rows) <= step:  # slices of tensors take as long as everything else here
            self._mix(data, ring, indices, weights, epoch, out)
        else:
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                self._mix(data, ring, indices[part], weights[part], epoch, out[part])
        return Encoded(out, coarse_targets(soft, self.labels).to(out.device), encoded_domain(shape[1]), self.insecure)

    def _mix(
        self,
        data: PrivateSet,
        ring: KeyRing,
        indices: NDArray[np.int64],
        weights: NDArray[np.float32],
        epoch: int,
        out: Tensor,
    ) -> None:
        inside = self.law.private
        private, indices = self._private_rows(data, indices, epoch)
        public = None
        if self.public is not None:
            public, drawn = self.public.rows_for(indices[:, inside:], data.shape, ring.streams["crops"])
            indices = np.concatenate([indices[:, :inside], drawn], 1)
        bits = ring.mask(len(indices), private.shape[1]) if self.mask == "sign" else None
        mix(private, public, inside, KeyRows(indices, weights, bits), self.mask, out, self.backend)

    def _private_rows(self, data: PrivateSet, index: NDArray[np.int64], epoch: int) -> tuple[Images, NDArray[np.int64]]:
        """(table, indices into it) of the private slots, augmented where asked."""
        inside = self.law.private
        if self.augmentation is not None and self.augment == "per_epoch":
            return data.augmented(epoch, self.augmentation), index
        if self.augmentation is None and data.table is not None:
            return data.table, index
        taken = data.gathered(index[:, :inside].reshape(-1))
        if self.augmentation is not None:
            taken = augment(taken, self.augmentation)
        place = np.arange(len(taken)).reshape(len(index), inside)
        return taken.flatten(1), np.concatenate([place, index[:, inside:]], 1)


def _version(values: Any) -> int:
    """How often a tensor was changed in place; 0 for others, and for inference tensors, which do not count it."""
    return int(values._version) if isinstance(values, Tensor) and not values.is_inference() else 0


def _whole(least: int = 1, **given: object) -> list[int | None]:
    """The values as int; raises BadInput unless each is None or a whole number from `least` (a seed: any)."""
    found, values = [], list[int | None]()
    for name, value in given.items():
        values.append(int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None)
        last, seed = values[-1], name == "insecure_seed"
        if value is not None and (last is None or (last < least and not seed)):
            found.append(f"{name}: {value!r} is not possible; give whole numbers{'' if seed else f' from {least}'}.")
    if found:
        raise BadInput(found)
    return values


_NOT_KEPT = ("_lock", "_ring", "_set", "_kept", "_kept_of", "_train_set")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "mask": ("sign", "abs", "none"),
    "labels": ("exact", "quantised", "renormalised"),
    "partners": ("iid", "permutation"),
    "dtype": (torch.float32, torch.bfloat16),
    "augment": ("per_epoch", "per_use"),
    "backend": ("auto", "fused", "torch", "reference"),
}
