"""Writing an encoded set: shards of all rounds in one secret order, whole or not there, going on after a kill."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.files import alone_in, write_json, written_beside
from frostglass.core.randomness import Insecure
from frostglass.defenses.cost import cost_of
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.sets.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    problems_of,
    read_manifest,
    sha256_of,
    shard_name,
)
from frostglass.defenses.sets.owner import Counts, Progress, digest_of, load_counts, load_progress
from frostglass.defenses.sources import Images, PrivateSet, PublicPool
from frostglass.numerics.keystream import Secret

SHARD_BYTES = 256 * 2**20
"""Size of a shard unless `shard_rows` says otherwise."""


class SetWriter:
    """Writes one encoded set.

    The rows of all rounds stand in one secret random order, drawn from the operating system: an order round by round
    would tell which rows share an image. Each shard has a key of its own, wiped when the next one begins. In the set
    there are no names, ids, hashes of sources or counts per image; those are in `ledger`, readable by the owner alone.
    An interrupted run keeps finished shards and its progress (no key); it goes on with new keys and a new order of
    what is left. `out` appears when everything is written, by one renaming.

    Args:
        encoder: an `InstaHide` with partners = "iid" ("permutation" repeats partners within a set).
        images, targets, num_classes: the whole private set, as in `InstaHide.encode_rows`.
        out: folder that must not exist yet.
        rounds: encodings of each image as first image; every further one makes the images easier to recover.
        names: one per image, for the ledger.
        ledger: owner's file with the exposure of each image; one that exists is continued. None: out + ".ledger.json".
        with_targets: False leaves targets out of the set.
        shard_rows: encodings in a shard; None for about 256 MiB.
        class_names: what class index i stands for, for the ledger: labels may be as private as the images.

    Raises:
        BadInput: settings that cannot be met, or files that are in the way.
    """

    def __init__(
        self,
        encoder: InstaHide,
        images: Images,
        targets: Tensor | NDArray[np.int64] | Sequence[int],
        num_classes: int | None,
        out: Path,
        *,
        rounds: int = 1,
        names: Sequence[str] | None = None,
        ledger: Path | None = None,
        with_targets: bool = True,
        shard_rows: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.class_names = class_names
        self.encoder, self.images, self.targets, self.classes = encoder, images, targets, num_classes
        out = Path(os.path.abspath(out))
        self.out, self.rounds, self.with_targets = out, rounds, with_targets
        self.ledger = Path(os.path.abspath(ledger)) if ledger else out.with_name(out.name + ".ledger.json")
        self.state = out.with_name(f".{out.name}.resume")
        self.staging = out.with_name(f".{out.name}.partial")
        self._check(rounds, shard_rows)
        self.data = PrivateSet(images, targets, num_classes)
        self.names = tuple(names) if names is not None else tuple(f"image {i}" for i in range(len(self.data)))
        width = 2 if encoder.dtype == torch.bfloat16 else 4
        row = width * int(np.prod(self.data.shape)) + (4 * self.data.classes if with_targets else 0)
        self.shard_rows = shard_rows or max(1, SHARD_BYTES // row)
        self.digest = digest_of(images, self.data.labels)

    def _check(self, rounds: int, shard_rows: int | None) -> None:
        found = []
        if rounds < 1:
            found.append(f"rounds: {rounds} must be at least 1.")
        if shard_rows is not None and shard_rows < 1:
            found.append(f"shard_rows: {shard_rows} must be at least 1.")
        if self.encoder.partners != "iid":
            found.append('partners: an encoded set takes "iid"; permutations give exact counts to an attacker.')
        if self.encoder.ledger is not None:
            found.append("encoder: this one has encoded before; give each set an InstaHide of its own.")
        if self.out in (self.ledger, *self.ledger.parents):
            found.append(f"--ledger: {self.ledger} lies in the set, which is to be shared; name a file outside it.")
        if found:
            raise BadInput(found)

    # ---- the run

    def write(self, *, resume: bool = False, tick: Callable[[int], object] = lambda rows: None) -> dict[str, Any]:
        """Encodes and writes everything that is not there yet.

        Args:
            resume: goes on with an interrupted encoding of the same images under the same settings.
            tick: told of the rows of each finished shard (of those found at the start too).

        Returns:
            The manifest.

        Raises:
            BadInput: `out` exists, an interrupted encoding is there and `resume` is off, other images or settings,
                `max_exposure` reached (then nothing is kept), another process is writing this set, or the disk cannot
                be written.
        """
        prior = load_counts(self.ledger, self.digest, len(self.data))
        finished = self._finished(resume)
        if finished is not None:
            return finished
        try:
            with _written(self.out), ExitStack() as held:  # unless a step within names another file
                progress = self._begin(resume, held)
                prior = prior.without(progress)
                tick(sum(s["rows"] for s in progress.shards))
                self._shards(prior, progress, tick)
                return self._end(self._others(prior, progress), progress)
        except _NotWritten as wrong:
            path, reason, fix = wrong.args
            if self.state.exists():
                fix = f"what is finished is kept: {fix} and go on with --resume"
            elif "another" not in fix:
                fix += ", or name another place"
            raise BadInput(f"encode: {path} cannot be written ({reason}); {fix}.") from None

    def _finished(self, resume: bool) -> dict[str, Any] | None:
        """The manifest, if a kill came between the renaming of the whole set and the clearing up."""
        if not os.path.lexists(self.out):  # a link that leads nowhere is in the way of the renaming too
            return None
        if not (resume and self.state.exists() and self.out.is_dir()):
            raise BadInput(f"encode: {self.out} exists; name a new folder.")
        manifest = read_manifest(self.out)
        wrong = problems_of(self.out, manifest)
        if wrong:
            raise BadInput(wrong)
        self._discard()
        self._drop_parts()
        return manifest

    def _begin(self, resume: bool, held: ExitStack) -> Progress:
        """How far the set has come; its folder is ours until `held` ends."""
        settings = self._settings()
        if self.staging.is_dir():
            held.enter_context(alone_in(self.staging, "encode"))
        self._drop_parts()
        if not self.state.exists():
            shutil.rmtree(self.staging, ignore_errors=True)
            zeros = torch.zeros(len(self.data), dtype=torch.int64)
            progress = Progress(settings, zeros, zeros.clone(), name=os.urandom(16).hex())
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.staging.mkdir(mode=0o700)
            held.enter_context(alone_in(self.staging, "encode"))
            with _written(self.state):
                progress.save(self.state)
            return progress
        if not resume:
            raise BadInput(
                f"encode: an encoding of {self.out.name} was interrupted; go on with --resume, or delete {self.state} "
                f"and {self.staging} to start anew."
            )
        progress = load_progress(self.state)
        if progress.settings != settings:
            raise BadInput(f"--resume: {self.out.name} was begun with other images or settings; use those, or delete "
                           f"{self.state} to start anew.")  # fmt: skip
        self._drop_unfinished(progress)
        return progress

    def _drop_parts(self) -> None:
        """Removes half-written states and ledgers that a kill left beside the set: they tell exposure by image.

        Not those of a ledger that was named, which another encoding may be writing.
        """
        for name in (self.state.name, f"{self.out.name}.ledger.json"):
            for part in self.out.parent.glob(f".{glob.escape(name)}.*.part"):
                part.unlink(missing_ok=True)

    def _drop_unfinished(self, progress: Progress) -> None:
        """Removes what a kill left half done; a shard that was not booked is not part of the set."""
        self.staging.mkdir(mode=0o700, exist_ok=True)
        booked = {s["file"]: s["sha256"] for s in progress.shards}
        for path in self.staging.iterdir():
            if path.name not in booked:
                path.unlink()
        for name, sha256 in booked.items():
            if not (self.staging / name).is_file() or sha256_of(self.staging / name) != sha256:
                raise BadInput(f"--resume: finished shard {name} is missing or changed; delete {self.state} and start "
                               "anew.")  # fmt: skip

    def _count(self, prior: Counts, progress: Progress) -> None:
        """Opens the encoder's ledger with what earlier sets and finished shards hold."""
        self.encoder.begin(self.images, self.targets, self.classes)
        assert self.encoder.ledger is not None
        self.encoder.ledger.count_earlier(prior.first + progress.first, prior.partner + progress.partner)

    def _shards(self, prior: Counts, progress: Progress, tick: Callable[[int], object]) -> None:
        try:
            self._count(prior, progress)
            self._encode(progress, tick)
        except BadInput:  # max_exposure: it cannot end, and nothing has been released, so nothing has been exposed
            self._discard()
            raise

    def _encode(self, progress: Progress, tick: Callable[[int], object]) -> None:
        ledger = self.encoder.ledger
        assert ledger is not None
        order = self._order(progress)
        for start in range(0, len(order), self.shard_rows):
            before = ledger.first, ledger.partner
            number = len(progress.shards)
            path = self.staging / shard_name(number)
            rows = order[start : start + self.shard_rows]
            self._shard(path, rows, number)
            progress.shards.append({"file": path.name, "rows": len(rows), "sha256": sha256_of(path)})
            progress.first += ledger.first - before[0]
            progress.partner += ledger.partner - before[1]
            with _written(self.state):
                progress.save(self.state)
            tick(len(rows))

    def _order(self, progress: Progress) -> NDArray[np.int64]:
        """First images of all rows still to be made, in a secret order that says nothing about rounds."""
        left = torch.arange(len(self.data)).repeat_interleave(self.rounds - progress.first).numpy()
        seed = self.encoder.insecure_seed
        secret = Secret.draw() if seed is None else Secret.draw(Insecure(seed)).at("set order", len(progress.shards))
        stream = secret.stream("set order")
        secret.wipe()
        order: NDArray[np.int64] = left[stream.permutation(len(left))] if len(left) else left
        stream.wipe()
        return order

    def _shard(self, path: Path, rows: NDArray[np.int64], number: int) -> None:
        from safetensors.torch import save_file

        # the epoch is the shard's number: a key of its own, and that of the last shard is wiped
        made = self.encoder.encode_rows(self.images, self.targets, rows, number, self.classes)
        tensors = {"images": made.images.cpu()}
        if self.with_targets:
            tensors["targets"] = made.targets.cpu().contiguous()
        with _written(path), written_beside(path) as beside:
            save_file(tensors, beside, metadata={"format": "pt"})

    def _others(self, prior: Counts, progress: Progress) -> Counts:
        """`prior` with the sets of these images that were finished meanwhile, which count against the limit too."""
        ledger = self.encoder.ledger
        assert ledger is not None
        now = load_counts(self.ledger, self.digest, len(self.data)).without(progress)
        try:
            ledger.count_earlier(now.first - prior.first, now.partner - prior.partner)
        except BadInput:
            self._discard()
            raise
        return now

    def _end(self, prior: Counts, progress: Progress) -> dict[str, Any]:
        self.encoder.forget()
        manifest = self._manifest(prior, progress)
        write_json(self.staging / MANIFEST, manifest)
        with _written(self.ledger, "free it, or name another --ledger"):
            prior.beside(progress).save(self.ledger, self.names, self.class_names)
        umask = os.umask(0)
        os.umask(umask)
        self.staging.chmod(0o777 & ~umask)
        self.staging.rename(self.out)
        self.state.unlink(missing_ok=True)
        return manifest

    def _discard(self) -> None:
        self.state.unlink(missing_ok=True)
        shutil.rmtree(self.staging, ignore_errors=True)

    # ---- what is said

    def _settings(self) -> str:
        public = self.encoder.public
        held = {
            "encoder": self.encoder.settings(), "insecure_seed": self.encoder.insecure_seed, "rounds": self.rounds,
            "shard_rows": self.shard_rows, "targets": self.with_targets, "images": self.digest,
            "public": None if public is None else [*map(int, public.images.shape), public.crop, sample_digest(public)],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def _manifest(self, prior: Counts, progress: Progress) -> dict[str, Any]:
        law, public = self.encoder.law, self.encoder.public
        own = progress.first + progress.partner
        before = prior.first + prior.partner
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "encodings": sum(s["rows"] for s in progress.shards),
            "shape": list(self.data.shape),
            "classes": self.data.classes,
            **self.encoder.manifest(),
            "rounds": self.rounds,
            "labels": self.encoder.labels if self.with_targets else "none",
            "pixels": [0.0 if self.encoder.mask == "abs" else -1.0, 1.0],
            "exposure_histogram": histogram(own),
            "cost": cost_of(
                law.k, law.private, len(self.data), 0 if public is None else len(public), self.rounds
            ).lines(),
            "shards": progress.shards,
        }
        if before.any():
            manifest["exposure_histogram_with_earlier_sets"] = histogram(own + before)
        return manifest


class _NotWritten(Exception):
    """(file that could not be written, why, what to do); work that is finished stays."""


@contextmanager
def _written(path: Path, fix: str = "make room") -> Iterator[None]:
    """Turns what a full disk, or a place that takes no files, raises into a sentence that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as wrong:
        reason = getattr(wrong, "strerror", None) or _reason(str(wrong))
        raise _NotWritten(path, reason, fix) from None


def _reason(text: str) -> str:
    """The operating system's words in what safetensors makes of them."""
    found = re.search(r'(?:message: "|I/O error: )([^"(]*[^"( ])', text)
    return found[1] if found else text


def sample_digest(pool: PublicPool) -> str:
    """SHA-256 of up to 64 images spread evenly over the pool: tells pools apart without reading all of one."""
    rows = np.unique(np.linspace(0, len(pool) - 1, 64).astype(np.int64))
    h = hashlib.sha256()
    for row in rows:
        image = pool.images[int(row)]
        h.update(np.ascontiguousarray(image.cpu().numpy() if isinstance(image, Tensor) else image).tobytes())
    return h.hexdigest()


def histogram(counts: Tensor) -> dict[str, int]:
    """{appearances: number of images}, as JSON has it."""
    values, images = counts.unique(return_counts=True)
    return {str(int(v)): int(n) for v, n in zip(values, images, strict=True)}
