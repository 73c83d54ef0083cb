"""Taps in Lightning, Accelerate and the Hugging Face Trainer: what they see, what they say they see."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import frostglass
from frostglass.core.errors import BadInput
from frostglass.federated.recorded import read_record
from frostglass.vision.borrowed import import_torchvision

SOURCE = str(Path(frostglass.__file__).parents[1])
WORKER = Path(__file__).with_name("trainer_worker.py")
LIMIT = 240


def needs(package: str, extra: str) -> None:
    """Skips where a trainer is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # these packages import it by themselves
    pytest.importorskip(package, reason=f"{package} is not installed; pip install 'frostglass[{extra}]'")


@pytest.fixture(scope="module")
def worker() -> Any:
    sys.path.insert(0, str(WORKER.parent))
    try:
        import trainer_worker
    finally:
        sys.path.remove(str(WORKER.parent))
    return trainer_worker


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote; the whole process group is killed if it does not end."""
    needs("lightning", "lightning")
    needs("accelerate", "hf")
    folder = tmp_path_factory.mktemp("trainers")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    running = subprocess.Popen(
        [*launch, str(WORKER), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": SOURCE}, start_new_session=True,
    )  # fmt: skip
    try:
        said = running.communicate(timeout=LIMIT)[0]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    assert running.returncode == 0, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_under_ddp_each_process_s_own_gradient_is_recorded(distributed: Path, name: str) -> None:
    for rank in range(2):
        held = read_record(distributed / name / "record" / f"rank-{rank}")
        assert held.info.engine == name
        assert "before anything is averaged" in held.info.note
        assert [u.header.round for u in held.updates] == [1, 2, 3, 4]
        for got in held.updates:
            assert (got.header.clients, got.header.examples) == (1, 2)
            update, _ = got.payload()
            own = load_file(distributed / f"{name}-own-{rank}-{got.header.round}.safetensors")
            assert update.keys() == own.keys()
            assert all(torch.equal(update[n], own[n]) for n in own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_under_ddp_training_is_the_same(distributed: Path, name: str) -> None:
    for rank in range(2):
        plain, tapped = (load_file(distributed / f"{name}-{how}-{rank}.safetensors") for how in ("plain", "tapped"))
        assert all(torch.equal(plain[n], tapped[n]) for n in plain)
    other = load_file(distributed / f"{name}-own-0-1.safetensors")
    mine = load_file(distributed / f"{name}-own-1-1.safetensors")
    assert not all(torch.equal(mine[n], other[n]) for n in mine)  # or the own one could not be told from the average


@pytest.mark.slow
def test_beside_a_hook_of_the_user_s_the_average_is_recorded_and_said_to_be_one(distributed: Path) -> None:
    for rank in range(2):
        held = read_record(distributed / "hooked" / "record" / f"rank-{rank}")
        assert "average over all 2 processes" in held.info.note
        assert [(u.header.round, u.header.clients) for u in held.updates] == [(1, 2), (2, 2), (3, 2), (4, 2)]
        assert {u.header.examples for u in held.updates} == {4}, "those of both"
        own = [load_file(distributed / f"accelerate-own-{r}-1.safetensors") for r in range(2)]
        update, _ = held.updates[0].payload()
        for n, g in update.items():
            torch.testing.assert_close(g, (own[0][n] + own[1][n]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_lightning_on_one_device_sees_its_own_gradient(tmp_path: Path, worker: Any) -> None:
    needs("lightning", "lightning")
    plain, _ = worker.fit(tmp_path / "plain", distributed=False, tap=False, accumulate_grad_batches=2)
    module, watch = worker.fit(tmp_path, distributed=False, accumulate_grad_batches=2, gradient_clip_val=1e9)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    held = read_record(tmp_path / "record" / "rank-0")
    assert "own gradient" in held.info.note
    assert [(u.header.round, u.header.examples) for u in held.updates] == [(1, 4), (2, 4)]
    for got, first, second in zip(held.updates, watch[::2], watch[1::2], strict=True):
        update, _ = got.payload()
        for n, g in update.items():
            torch.testing.assert_close(g, (first[n] + second[n]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_lightning_with_an_optimiser_that_unscales_in_its_own_step(tmp_path: Path) -> None:
    """A fused Adam under mixed precision: what it is handed is still multiplied by the scale of the loss."""
    needs("lightning", "lightning")
    from lightning import LightningModule, Trainer
    from lightning.pytorch.plugins import MixedPrecision

    from frostglass.federated.lightning_tap import RecordGradients

    class Module(LightningModule):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.net, self.fused = nn.Linear(16, 3), fused
            nn.init.zeros_(self.net.weight)
            nn.init.zeros_(self.net.bias)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), fused=self.fused)

    data = [(torch.full((1, 4, 4), i / 8), i % 3) for i in range(8)]
    norms = []
    for fused in (False, True):
        folder = tmp_path / str(fused)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))],
            callbacks=[RecordGradients(folder)],
        )  # fmt: skip
        trainer.fit(Module(fused), torch.utils.data.DataLoader(data, batch_size=4))
        updates = read_record(folder / "rank-0").updates
        norms.append([float(torch.cat([g.flatten() for g in u.payload()[0].values()]).norm()) for u in updates])
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)  # the networks part after the first step, by half precision


@pytest.mark.slow
def test_lightning_with_optimisers_that_take_turns(tmp_path: Path) -> None:
    """The second steps on every batch, the first on every other one, and twice on the fourth."""
    needs("lightning", "lightning")
    from lightning import LightningModule, Trainer

    from frostglass.federated.lightning_tap import RecordGradients

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Linear(16, 3), nn.Linear(16, 3)

        def training_step(self, batch: Any, number: int) -> None:
            first, second = self.optimizers()
            for optimiser, net in (*[(first, self.a)] * (0, 1, 0, 2)[number], (second, self.b)):
                optimiser.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(net(batch[0].flatten(1)), batch[1]))
                optimiser.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.a, self.b)]

    data = [(torch.rand(1, 4, 4), i % 3) for i in range(14)]
    seen = []
    for every in (1, 2):
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[RecordGradients(tmp_path / str(every), every=every)],
        )  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
        updates = read_record(tmp_path / str(every) / "rank-0").updates
        seen.append([(next(iter(u.payload()[0]))[0], u.header.examples) for u in updates])
    first, second = seen
    assert first == [("b", 4), ("a", None), ("b", 4), ("b", 4), ("a", None), ("a", 2), ("b", 2)]
    assert second == [("b", 4), ("a", None), ("b", 4), ("a", 2)]


@pytest.mark.slow
def test_accelerate_on_one_device_sees_its_own_gradient(tmp_path: Path, worker: Any) -> None:
    needs("accelerate", "hf")
    _, watch = worker.accelerated(tmp_path, accumulate=2)
    held = read_record(tmp_path / "record" / "rank-0")
    assert len(held.updates) == 4
    assert held.updates[0].header.examples == 4
    for got, first, second in zip(held.updates, watch[::2], watch[1::2], strict=True):
        update, _ = got.payload()
        for n, g in update.items():
            torch.testing.assert_close(g, (first[n] + second[n]) / 2, rtol=1e-5, atol=1e-7)


def test_accelerate_refuses_what_hides_gradients(tmp_path: Path) -> None:
    from frostglass.federated.accelerate_tap import record_accelerate

    class Deep:
        distributed_type = "DistributedType.DEEPSPEED"

    with pytest.raises(BadInput, match="DEEPSPEED"):
        record_accelerate(Deep(), nn.Linear(1, 1), tmp_path)


def test_lightning_and_the_hugging_face_trainer_refuse_deepspeed(tmp_path: Path) -> None:
    needs("lightning", "lightning")
    needs("transformers", "hf")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    from frostglass.federated import lightning_tap, transformers_tap

    trainer = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(BadInput, match="DeepSpeed"):
        lightning_tap.RecordGradients(tmp_path / "record").on_train_start(trainer, nn.Linear(1, 1))
    args = SimpleNamespace(deepspeed_plugin=object(), max_grad_norm=1.0)
    with pytest.raises(BadInput, match="DeepSpeed"):
        transformers_tap.RecordGradients(tmp_path / "record").on_train_begin(args, None, None, model=nn.Linear(1, 1))
    assert not (tmp_path / "record").exists()


def test_fsdp1_is_refused_whichever_trainer_brings_it(tmp_path: Path) -> None:
    """Its shards are pieces of parameters strung together: no average, and of no parameter's shape."""
    needs("lightning", "lightning")
    needs("transformers", "hf")
    from torch.distributed.fsdp import FullyShardedDataParallel

    from frostglass.federated import accelerate_tap, lightning_tap, transformers_tap

    flat = object.__new__(FullyShardedDataParallel)  # a real one needs a process group
    nn.Module.__init__(flat)
    inner = nn.Linear(1, 1)  # Lightning's hooks are given the module inside the wrapper
    accelerator = SimpleNamespace(
        distributed_type="DistributedType.FSDP", scaler=None, num_processes=2, process_index=0, unwrap_model=lambda m: m
    )
    trainer = SimpleNamespace(strategy=SimpleNamespace(model=flat))
    args = SimpleNamespace(deepspeed_plugin=None, max_grad_norm=1.0)
    record = tmp_path / "record"
    for call in (
        lambda: accelerate_tap.record_accelerate(accelerator, flat, record),
        lambda: lightning_tap.RecordGradients(record).on_train_start(trainer, inner),
        lambda: transformers_tap.RecordGradients(record).on_train_begin(args, None, None, model=nn.Sequential(flat)),
    ):
        with pytest.raises(BadInput, match=r"FSDP1.*fully_shard"):
            call()
    assert not record.exists()


@pytest.mark.slow
def test_the_hugging_face_trainer_says_that_it_clips(tmp_path: Path) -> None:
    needs("transformers", "hf")
    from transformers import Trainer, TrainingArguments

    from frostglass.federated.transformers_tap import RecordGradients

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 3)

        def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": 100 * nn.functional.cross_entropy(self.head(pixels.flatten(1)), labels)}

    data = [{"pixels": torch.rand(1, 4, 4), "labels": torch.tensor(i % 3)} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, max_grad_norm=0.5, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    tap = RecordGradients(tmp_path / "record", every=2)
    Trainer(model=Net(), args=arguments, train_dataset=data, callbacks=[tap]).train()
    held = read_record(tmp_path / "record" / "rank-0")
    assert "clipped to a norm of 0.5" in held.info.note
    assert [(u.header.round, u.header.examples) for u in held.updates] == [(1, 4), (3, 4)]
    for got in held.updates:
        norm = torch.cat([g.flatten() for g in got.payload()[0].values()]).norm()
        assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("lightning", "lightning", "lightning"), ("lightning_tap", "lightning", "lightning"),
     ("transformers_tap", "transformers", "hf")],
)  # fmt: skip
def test_a_package_that_is_missing_is_named_with_its_extra(
    module: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"frostglass.federated.{module}", raising=False)
    with pytest.raises(BadInput, match=rf"{package}: it is not installed; run pip install 'frostglass\[{extra}\]'\."):
        importlib.import_module(f"frostglass.federated.{module}")
