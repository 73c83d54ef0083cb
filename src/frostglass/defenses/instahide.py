"""InstaHide: encodes private images by mixing and masking. Broken as a privacy mechanism; the class says how."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from frostglass._version import __version__
from frostglass.core.batch import Batch
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.defenses.batch_mixer import BatchMixer
from frostglass.defenses.cost import Cost, cost_of
from frostglass.defenses.encoder import Encoded, RowEncoder
from frostglass.defenses.exposure import rounds_used_up
from frostglass.defenses.honesty import INFERENCE, WARNING, caution, histogram_line
from frostglass.defenses.inference import TestEncodings, average_predictions
from frostglass.defenses.key_ring import KeyRing
from frostglass.defenses.registry import DEFENSES
from frostglass.defenses.sets.owner import digest_of
from frostglass.defenses.sources import Images, as_rows, check_images, images_and_labels
from frostglass.numerics.key_rows import KeyRows, Law, MixLaw
from frostglass.numerics.mixing import Labels, Mask, affine, mix


class InstaHide(RowEncoder):
    """Encodes each private image as a masked mix of k images, under one-time keys that nobody keeps.

    This hides little, and the library says so: InstaHide is **broken**. It gives no (epsilon, delta). The sign mask
    adds nothing (from |x~| = |mix| everything that x~ holds follows). Encoding anew in every epoch, the paper's own
    recipe, is what breaks it: every fresh encoding of an image is one more equation about it, and from a few dozen
    the images have been recovered (Carlini et al. 2021). `max_exposure`, `rounds` and `reuse` delay that and do not
    prevent it. For privacy with a proof use DP-SGD.

    Keys come from 256 bits of the operating system per process and epoch, through AES-256-CTR, in separate streams
    for indices, coefficients and mask; they are never stored, pickled or printed. A copy, a forked worker or a resumed
    encoder draws new ones.

    Args:
        k: images in one encoding.
        private: how many of them are private; k (the default) mixes inside the set, fewer need `public`.
        c1: no coefficient exceeds it.
        c2: private coefficients sum to at least this (cross-dataset mode).
        law: of the coefficients: "folded_normal" as released, "dirichlet" as in GradAttack.
        mask: "sign" as in the paper, "abs" (the same information, no mask key), "none" (Mixup).
        labels: "exact" publishes the coefficients; "quantised" rounds to quarters; "renormalised" has mass 1.
        partners: "iid", or "permutation" as in the paper (each image once per slot and epoch: exact counts).
        public: pool for the public slots: images or a `PublicPool`.
        max_exposure: encodings that no image may exceed; beyond it encoding is refused. Counted in this process and
            its DataLoader workers: ranks of a distributed run that share images exceed it together, so give each rank
            its own shard.
        rounds: fresh encodings of the whole set that may be made, by `epoch` or by any plug-in: no image comes first
            in more. None for one per epoch, as in the paper. Counted as `max_exposure` is.
        reuse: `epoch`, `EncodedDataset` and what builds on it keep the encodings of the `rounds` (default 1), in
            memory, and train on them again. They belong to one set; another needs an `InstaHide` of its own.
        insecure_seed: keys that repeat, for tests and benchmarks; every output is marked.
        dtype: of the encodings, torch.float32 or torch.bfloat16.
        augment: "per_epoch" augments each image once an epoch (the paper); "per_use" at every use. Public images
            are not augmented.
        augmentation: [n, c, h, w] -> the same shape and dtype; None for no augmentation.
        backend: which code mixes: "auto", "fused" (numba on a CPU, Triton on CUDA) or "torch".

    Attributes:
        ledger: exposure of each image, for the owner alone; None before the first encoding.
        cautions: what about these settings makes an attack easier.

    Raises:
        BadInput: settings that cannot be met.
    """

    # ---- a plain training loop

    def epoch(self, train_set: Any, batch_size: int, num_classes: int, drop_last: bool = False) -> Iterator[Encoded]:
        """One epoch of encodings in random order: each image is slot 0 once, partners come from the whole set.

        Args:
            train_set: (images, labels), a TensorDataset, or any map-style data set of (image tensor, label), which is
                read once: give random transforms as `augmentation`. Always the same set: another one needs an
                `InstaHide` of its own.
            batch_size: the last batch may be shorter; `drop_last` leaves it out.
            num_classes: number of classes.

        Yields:
            Encoded batches, which unpack as (images, targets).

        Raises:
            BadInput: at the call: settings or images that cannot be encoded, `rounds` are used up without `reuse`, or
                with `reuse` another set than the one whose encodings are kept.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise BadInput(f"batch_size: {batch_size!r} must be a whole number from 1.")
        number = self.epochs
        again = self.rounds is not None and number >= self.rounds
        if again and not (self.reuse and self._kept):
            raise BadInput(rounds_used_up(cast(int, self.rounds)))
        if self._train_set is None or self._train_set[0] is not train_set:
            self._train_set = train_set, images_and_labels(train_set)
        images, labels = self._train_set[1]
        data = self._private(images, labels, num_classes)
        kept = self.kept_round(images, labels, number, num_classes) if self.reuse else None
        self.epochs += 1
        with self._lock:
            order = self._keys(number, len(data)).streams["order"].permutation(len(data))
        end = len(order) - len(order) % batch_size if drop_last else len(order)
        if kept is None:
            parts = (order[i : i + batch_size] for i in range(0, end, batch_size))
            return (self.encode_rows(images, labels, part, number, num_classes) for part in parts)
        return (kept.take(order[i : i + batch_size]) for i in range(0, end, batch_size))

    def kept_round(self, images: Images, targets: Any, epoch: int, num_classes: int | None = None) -> Encoded:
        """With `reuse`: the encodings of all images, in their order, that `epoch` trains on; made once and kept.

        Args:
            images, targets, num_classes: as in `encode_rows`.
            epoch: from 0; the first `rounds` are made, later ones take them in turn.

        Raises:
            BadInput: `reuse` is off, images that cannot be encoded, another set than before, or `rounds` reached.
        """
        if not self.reuse or self.rounds is None:
            raise BadInput("reuse: off in this encoder, which keeps no encodings; make it with reuse=True.")
        data = self._private(images, targets, num_classes)
        if self._kept_of is None or self._kept_of[0] is not data:
            digest = digest_of(images, data.labels)
            if self._kept_of is not None and self._kept_of[1] != digest:
                raise BadInput("reuse: the encodings kept are those of another set; give each set its own InstaHide.")
            self._kept_of = data, digest
        for number in range(len(self._kept), min(epoch + 1, self.rounds)):
            self._kept.append(self.encode_rows(images, targets, np.arange(len(data)), number, num_classes))
        return self._kept[epoch % len(self._kept)]

    # ---- inference

    def plain_for_inference(self, x: Tensor) -> Tensor:
        """Plain test images as the network expects pixels: in [-1, 1], and |.| of that if it was trained on "abs"."""
        check_images(x, "x")
        scale, shift = affine(x.dtype)
        plain = x.to(self.dtype) * scale + shift
        return plain.abs() if self.mask == "abs" else plain

    def encode_for_inference(
        self, x: Images, n: int = 10, min_private: float = 0.5, partners: Images | None = None
    ) -> TestEncodings:
        """`n` encodings of each test image, with fresh partners and keys; average the predictions over them.

        Warning: many encodings of one image sent to a server are themselves an attack surface: their mean square
        already shows the image. Keep n small, or predict where the images are.

        Args:
            x: [b, c, h, w] test images.
            n: encodings per image (the authors use 10 to 20).
            min_private: least coefficient of the test image; the authors advise about 0.5.
            partners: [m, c, h, w] images for the other k - 1 slots; the public pool if left out. Where it is the
                private set itself, its images' exposure is counted.

        Raises:
            BadInput: no partners, or `min_private` cannot be reached.
        """
        check_images(x, "x")
        if not isinstance(n, int | np.integer) or n < 1:
            raise BadInput(f"n: {n!r} must be a whole number from 1.")
        if partners is None and self.public is None:
            raise BadInput("partners: without a public pool, give the images to mix with (e.g. the training set).")
        law = MixLaw(self.law.k, 1, self.law.c1, 0.0, self.law.law, min_private)
        law.check()
        if n > 1:
            caution([INFERENCE])
        shape, b = tuple(x.shape[1:]), len(x)
        pool = self.pool_of(partners, shape, x.dtype, law.k - 1)
        with self._lock:
            ring = KeyRing(self._secret(-1), law, "iid", b, len(pool), ahead=0)
            indices, weights = ring.draw(np.repeat(np.arange(b), n))
            if partners is not None and self._set is not None and partners is self._set[0] and self.ledger is not None:
                self.ledger.add(np.empty(0, np.int64), indices[:, 1:])
            table, drawn = pool.rows_for(indices[:, 1:], shape, ring.streams["crops"])
            rows = as_rows(x)
            bits = ring.mask(b * n, rows.shape[1]) if self.mask == "sign" else None
            ring.wipe()
        device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        out = torch.empty(b * n, rows.shape[1], dtype=self.dtype, device=device)
        keys = KeyRows(np.concatenate([indices[:, :1], drawn], 1), weights, bits)
        mix(rows, table, 1, keys, self.mask, out, self.backend)
        return TestEncodings(out.view(b * n, *shape), n, self.insecure)

    # ---- honesty

    def settings(self) -> dict[str, Any]:
        """Parameters of the encoding, fit for print."""
        law = self.law
        return {
            "k": law.k,
            "private": law.private,
            "c1": law.c1,
            "c2": law.c2,
            "law": law.law,
            "mask": self.mask,
            "labels": self.labels,
            "partners": self.partners,
            "rounds": self.rounds,
            "reuse": self.reuse,
            "max_exposure": self.max_exposure,
            "dtype": str(self.dtype).removeprefix("torch."),
            "augment": self.augment if self.augmentation is not None else None,
        }

    def cost(self) -> Cost | None:
        """What undoing these encodings is claimed to cost and what it has cost; None before the first encoding."""
        if self.ledger is None or not self.ledger.first.any():
            return None
        public = 0 if self.public is None else len(self.public)
        return cost_of(self.law.k, self.law.private, len(self.ledger), public, int(self.ledger.first.max()))

    def manifest(self) -> dict[str, Any]:
        """What may stand beside published encodings: settings, exposure histogram, version, warning; never a key."""
        histogram, cost = {} if self.ledger is None else self.ledger.histogram(), self.cost()
        return {
            **self.settings(),
            "images": 0 if self.ledger is None else len(self.ledger),
            "public_images": 0 if self.public is None else len(self.public),
            "exposure_histogram": {str(count): images for count, images in histogram.items()},
            "cautions": self.cautions,
            "insecure": self.insecure,
            "cost": [] if cost is None else cost.lines(),
            "guarantee": "no (epsilon, delta)",
            "warning": WARNING,
            "library": f"frostglass {__version__}",
        }

    def report(self) -> str:
        """Exposure, the claimed cost of an attack, and what is not guaranteed, as text for the owner."""
        images = 0 if self.ledger is None else len(self.ledger)
        public = 0 if self.public is None else len(self.public)
        lines = [WARNING, "guarantee: no (epsilon, delta)"]
        if self.insecure:
            lines.append("INSECURE: keys come from insecure_seed; anybody who knows it can undo these encodings")
        lines.append("settings: " + ", ".join(f"{name} = {value}" for name, value in self.settings().items()))
        if self.ledger is None:
            lines.append("exposure: nothing has been encoded yet")
        else:
            total, first, partner = (t.float() for t in (self.ledger.total, self.ledger.first, self.ledger.partner))
            lines.append(
                f"exposure of {images} private images, beside {public} public ones (images in encodings): "
                + histogram_line(self.ledger.histogram())
            )
            lines.append(
                f"encodings per image: mean {total.mean():.1f}, most {total.max():.0f}; as first image "
                f"{first.mean():.1f}, as partner {partner.mean():.1f}"
            )
            lines.append(
                "counted in this process and its DataLoader workers alone; other ranks, if there are any, each have a "
                "ledger of their own and must hold a shard of their own"
            )
            cost = self.cost()
            lines += [] if cost is None else cost.lines()
        rounds = "a fresh one every epoch, which is what breaks InstaHide" if self.rounds is None else str(self.rounds)
        made = 0 if self.ledger is None or not len(self.ledger) else int(self.ledger.first.max())
        if self.rounds is not None and made > self.rounds:
            rounds += f" asked for in a run; {made} were made, as each resumption makes its own"
        lines.append(f"rounds of fresh encodings: {rounds}")
        lines += [f"caution: {text}" for text in self.cautions]
        return "\n".join(lines)

    def __repr__(self) -> str:
        marked = ", INSECURE" if self.insecure else ""
        return f"InstaHide({', '.join(f'{name}={value!r}' for name, value in self.settings().items())}{marked})"


# The report of `frostglass cost` for the challenge's setting with 5,000 images, so that help() shows it too.
_COST = [textwrap.fill(t, 116, subsequent_indent="  ") for t in cost_of(6, 2, 5000, 1_280_000, 50).text().splitlines()]
InstaHide.__doc__ = f"{InstaHide.__doc__}\n{textwrap.indent(chr(10).join(_COST), ' ' * 4)}\n"

__all__ = ["InstaHide", "TestEncodings", "average_predictions", "instahide"]


@DEFENSES.register("instahide", paper="Huang et al. 2020, ICML (InstaHide); broken by Carlini et al. 2021")
def instahide(
    *,
    k: int = 4,
    private: int | None = None,
    c1: float = 0.65,
    c2: float = 0.3,
    law: Law = "folded_normal",
    mask: Mask = "sign",
    labels: Labels = "exact",
    pool: Batch | None = None,
    public: Tensor | None = None,
) -> Defense:
    """Masked mixes of k images of the batch; a broken heuristic, no (epsilon, delta), the mask adds nothing.

    Args:
        k: images in one encoding.
        private: how many of them are private; fewer than k need `public`.
        c1: no coefficient exceeds it.
        c2: private coefficients sum to at least this where `private` < k.
        law: of the coefficients, see `MixLaw`.
        mask: "sign", "abs" or "none".
        labels: "exact", "quantised" or "renormalised".
        pool: further private images of the client, partners beside the batch.
        public: [M, c, h, w] public images, in the batch's domain.

    Raises:
        BadInput: settings that cannot be met.
    """
    mixing = MixLaw(k, k if private is None else private, c1, c2, law)
    mixing.check()
    if (mixing.private < k) != (public is not None):
        raise BadInput(f"private, public: {k - mixing.private} of k = {k} slots are public; public images must match.")
    return Defense(
        "instahide",
        encode=BatchMixer(mixing, mask, labels, pool, public),
        claim="heuristic",
        settings={"k": k, "private": mixing.private, "c1": c1, "c2": c2, "law": law, "mask": mask, "labels": labels},
        encodes=True,
        adaptive=("spear", "gallery", "learned_inverter"),
    )
