"""Training one network: plain, with Mixup or with InstaHide; logs, checkpoints without keys, resume with new ones."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frostglass.core.errors import BadInput
from frostglass.core.files import write_json, write_text, written_beside
from frostglass.core.randomness import Rng, global_draws
from frostglass.defenses.honesty import RESUMED, caution
from frostglass.defenses.sets.owner import Progress, load_progress
from frostglass.federated.feeds import EncodedFeed, Feed, feed_of, takes_encodings
from frostglass.federated.first_step import refuse_untrainable
from frostglass.federated.train_plan import MethodPlan, TrainingPlan, TrainPlan
from frostglass.vision.byte_images import ByteImages
from frostglass.vision.networks import build
from frostglass.vision.weights import save_weights

CHECKPOINT, LEDGER, LOG, RESULT = "checkpoint.safetensors", "ledger.safetensors", "log.csv", "result.json"
_TEST_BATCH = 500

Tell = Callable[[str], object]
Tick = Callable[[int], object]


def learning_rate(plan: TrainingPlan, step: int, steps: int) -> float:
    """At `step` of `steps`: a rise over the first 30 % and a fall to nothing (both cosine), steps, or constant."""
    if plan.schedule == "constant":
        return plan.lr
    if plan.schedule == "steps":
        epoch = step * plan.epochs // steps
        return plan.lr * plan.gamma ** sum(epoch >= m for m in plan.milestones)
    peak = 0.3 * steps
    if step < peak:
        return plan.lr * (0.04 + 0.96 * (1 - math.cos(math.pi * step / peak)) / 2)
    return plan.lr * (1 + math.cos(math.pi * (step - peak) / max(steps - peak, 1))) / 2


@dataclass
class Run:
    """One method with one seed.

    Args:
        plan: the whole plan.
        method, seed: which of its runs.
        train, test: images.
        folder: where log, checkpoints and result go.
        device: of network and images.
        tell: told of each epoch in words; tick: of each step.
        keep: called when an epoch has ended well, before anything of it is written.
    """

    plan: TrainPlan
    method: MethodPlan
    seed: int
    train: ByteImages
    test: ByteImages
    folder: Path
    device: torch.device
    tell: Tell = lambda text: None
    tick: Tick = lambda steps: None
    keep: Callable[[], object] = lambda: None

    def __call__(self, *, resume: bool = False) -> dict[str, Any]:
        """Trains to the end and returns the result, which is also in `result.json`.

        Args:
            resume: goes on behind the last finished epoch; an encoder draws new keys and keeps its exposures.

        Raises:
            BadInput: settings that cannot be met, or a checkpoint of another run.
        """
        if resume and (self.folder / RESULT).exists():
            return self._result_before()
        self.rng = Rng.from_seed(self.seed, "training")
        self.feed: Feed = feed_of(self.train, self.method, self.plan.training, self.rng, self.device)
        self.model = self._network()
        t = self.plan.training
        self.optimizer = torch.optim.SGD(self.model.parameters(), t.lr, t.momentum, weight_decay=t.weight_decay)
        start = self._resume() if resume else 0
        rows = self._rows_before(start)
        with ExitStack() as open_files:
            writer = None
            for epoch in range(start, t.epochs):
                row = self._epoch(epoch)
                rows.append(row)
                self.keep()
                self._log(rows)
                self._save(epoch + 1)
                writer = writer or _tensorboard(self.folder, open_files)  # a first epoch that fails leaves no file
                for name, value in row.items():
                    if writer is not None and name != "epoch":
                        writer.add_scalar(name, float(value), epoch + 1)
                if writer is not None:
                    writer.flush()  # by itself every two minutes, and a resumed run does not write these rows again
        return self._end(rows)

    def _result_before(self) -> dict[str, Any]:
        path = self.folder / RESULT
        try:
            held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not {"method", "seed", "plain", "encoded", "encodings_per_image"} <= set(held):
                raise ValueError("what a result holds is missing")
        except (OSError, ValueError, TypeError) as wrong:
            raise BadInput(f"--resume: {path} cannot be used ({wrong}); delete its folder to start anew.") from None
        (self.folder / CHECKPOINT).unlink(missing_ok=True)  # a kill came between the two
        return held

    def _network(self) -> nn.Module:
        _, channels, _, size = self.train.images.shape
        model = build(
            self.plan.model.name, classes=self.train.classes, channels=channels, size=size,
            options=self.plan.model.options, rng=self.rng.at("model"),
        )  # fmt: skip
        model = (model if self.method.kind == "plain" else takes_encodings(model, self.method.sees)).to(self.device)
        shape, batch = tuple(self.train.images.shape[1:]), self.plan.training.batch
        refuse_untrainable(model, self.plan.model.name, shape, len(self.train), batch)
        return model

    def _epoch(self, epoch: int) -> dict[str, float]:
        t = self.plan.training
        per_epoch = -(-len(self.train) // t.batch)
        begun, seen, rate = time.perf_counter(), 0, t.lr
        summed = torch.zeros((), dtype=torch.float64, device=self.device)  # read once: every look waits for the device
        self.model.train()
        for number, (images, targets) in enumerate(self.feed.batches(epoch)):
            rate = learning_rate(t, epoch * per_epoch + number, t.epochs * per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            # of the forward pass alone: what an encoder draws must not follow from the plan's seed
            with global_draws(self.rng.at("dropout", epoch, number), self.device):
                outputs = self.model(images)
            loss = nn.functional.cross_entropy(outputs, targets)
            loss.backward()
            self.optimizer.step()
            summed += loss.detach().double() * len(images)
            seen += len(images)
            self.tick(1)
        total = float(summed)
        if not math.isfinite(total):
            raise BadInput(f"training.lr: {t.lr} made the loss infinite in epoch {epoch + 1}; lower it.")
        seconds = time.perf_counter() - begun
        row = {"epoch": epoch + 1, "loss": total / seen, "lr": rate, "seconds": round(seconds, 2),
               "test_plain": self.accuracy_plain()}  # fmt: skip
        row["encodings_per_image"] = self._exposure()
        self.tell(f"epoch {epoch + 1}/{t.epochs}: loss {row['loss']:.4f}, plain test {row['test_plain']:.4f}")
        return row

    def _exposure(self) -> float:
        """Encodings that an image is in, on average."""
        ledger = self.feed.encoder.ledger if self.feed.encoder is not None else None
        return float(ledger.total.float().mean()) if ledger is not None else 0.0

    # ---- tests

    @torch.no_grad()
    def accuracy_plain(self) -> float:
        """Share of test images that are right when the network sees them as they are."""
        self.model.eval()
        right = 0
        for start in range(0, len(self.test), _TEST_BATCH):
            part = slice(start, start + _TEST_BATCH)
            found = self.model(self.feed.plain(self.test.images[part])).argmax(1).cpu()
            right += int((found == self.test.labels[part]).sum())
        return right / len(self.test)

    @torch.no_grad()
    def accuracy_encoded(self) -> dict[int, float]:
        """{n: share of test images that are right by the mean over n encodings}; empty for a plain network."""
        counts = self.plan.evaluation.encodings
        if not isinstance(self.feed, EncodedFeed) or not counts:
            return {}
        self.model.eval()
        right = dict.fromkeys(counts, 0)
        step = max(1, 2000 // max(counts))
        for start in range(0, len(self.test), step):
            part = slice(start, start + step)
            found = self.feed.predictions(self.model, self.test.images[part], counts, self.plan.evaluation.min_private)
            for n in counts:
                right[n] += int((found[n].argmax(1).cpu() == self.test.labels[part]).sum())
        return {n: r / len(self.test) for n, r in right.items()}

    # ---- files

    def _log(self, rows: list[dict[str, float]]) -> None:
        with written_beside(self.folder / LOG) as beside, beside.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def _rows_before(self, start: int) -> list[dict[str, float]]:
        path = self.folder / LOG
        if start == 0 or not path.exists():
            return []
        try:
            with path.open(newline="", encoding="utf-8") as held:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(held)]
            return [row | {"epoch": int(row["epoch"])} for row in rows if row["epoch"] <= start]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as wrong:
            raise BadInput(f"--resume: {path} cannot be used ({wrong!r}); delete it to go on without it.") from None

    def _save(self, epochs: int) -> None:
        """Weights, buffers, momentum and the number of epochs: no generator state and no key."""
        from safetensors.torch import save_file

        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            held = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if held is not None:
                tensors[f"momentum.{name}"] = held
        kept = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        ledger = self.feed.encoder.ledger if self.feed.encoder is not None else None
        if ledger is not None:  # before the weights: exposures that were counted twice are better than none
            Progress(self.method.label, ledger.first, ledger.partner).save(self.folder / LEDGER)
        with written_beside(self.folder / CHECKPOINT) as beside:
            save_file(kept, beside, metadata={"epochs": str(epochs), "format": "pt"})

    def _resume(self) -> int:
        """Epochs that are done."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0
        try:
            with safe_open(path, framework="pt") as held:
                done = int((held.metadata() or {})["epochs"])
                tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 - not a dict
            self._restore(tensors)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as wrong:
            raise BadInput(f"--resume: {path} cannot be used ({wrong}); delete it to start anew.") from None
        encoder = self.feed.encoder
        if encoder is not None:
            encoder.epochs = 0 if encoder.reuse else done  # kept encodings are gone: new ones are made and counted
            if encoder.reuse:
                caution([RESUMED])
            if not (self.folder / LEDGER).exists():
                raise BadInput(
                    f"--resume: {self.folder / LEDGER} is missing, which counts the exposure so far; bring it back, or "
                    "start anew in an empty folder."
                )
            self._recount(load_progress(self.folder / LEDGER))
        return done

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(state)
        for name, parameter in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                self.optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(self.device)

    def _recount(self, known: Progress) -> None:
        assert self.feed.encoder is not None
        assert self.feed.encoder.ledger is not None
        self.feed.encoder.ledger.count_earlier(known.first, known.partner)

    def _end(self, rows: list[dict[str, float]]) -> dict[str, Any]:
        encoded = self.accuracy_encoded()
        encoder = self.feed.encoder
        result = {
            "method": self.method.label,
            "seed": self.seed,
            "epochs": self.plan.training.epochs,
            "images": len(self.train),
            "test_images": len(self.test),
            "seconds": round(sum((row["seconds"] for row in rows), 0.0), 1),
            "plain": rows[-1]["test_plain"] if rows else self.accuracy_plain(),  # the log may have been lost
            "encoded": {str(n): value for n, value in encoded.items()},
            "encodings_per_image": self._exposure(),
            "pixels": self.method.takes,
            "insecure": encoder is not None and encoder.insecure,
        }
        if encoder is not None and encoder.ledger is not None:  # {encodings: images}; which images is the owner's alone
            result["exposure_histogram"] = {str(n): images for n, images in encoder.ledger.histogram().items()}
        save_weights(self.model, self.folder / "model.safetensors")
        if encoder is not None:
            write_text(self.folder / "privacy.txt", encoder.report() + "\n")
        write_json(self.folder / RESULT, result)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return result


def _tensorboard(folder: Path, open_files: ExitStack) -> Any:
    """A writer if TensorBoard is installed, else None; the CSV log is written either way."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except (ImportError, RuntimeError):  # its own imports fail where torchvision does not fit torch
        return None
    writer = SummaryWriter(str(folder))
    open_files.callback(writer.close)
    return writer
