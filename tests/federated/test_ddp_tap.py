"""Taps in torch.distributed: the own gradient is recorded exactly, and training does not notice."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import frostglass
from frostglass.federated.gradient_tap import GradientTap
from frostglass.federated.recorded import Record, read_record

WORLD = 3
"""No power of two, so that dividing and multiplying by the inverse would round differently."""
WORKER = Path(__file__).with_name("ddp_worker.py")
SOURCE = str(Path(frostglass.__file__).parents[1])
LIMIT = 180


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all processes have written; they are killed if they do not end."""
    folder = tmp_path_factory.mktemp("ddp")
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(WORLD), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": SOURCE},
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    end = time.monotonic() + LIMIT
    said = []
    try:
        for process in running:
            said.append(process.communicate(timeout=max(1.0, end - time.monotonic()))[0])
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return folder


def record(folder: Path, name: str, rank: int) -> Record:
    return read_record(folder / f"{name}-record" / f"rank-{rank}")


@pytest.mark.parametrize(
    "name",
    ["one_bucket", "buckets", "accumulated", "carried", "fp16", "broken", "chosen", "joined", "joined_few"],
)
def test_training_gives_the_same_weights_to_the_last_bit(done: Path, name: str) -> None:
    for rank in range(WORLD):
        plain, tapped = (load_file(done / f"{name}-{how}-{rank}.safetensors") for how in ("plain", "tapped"))
        assert plain.keys() == tapped.keys()
        assert all(torch.equal(plain[n], tapped[n]) for n in plain), name


@pytest.mark.parametrize("name", ["one_bucket", "buckets", "accumulated", "fp16"])
def test_the_record_holds_each_process_s_own_gradient(done: Path, name: str) -> None:
    for rank in range(WORLD):
        held = record(done, name, rank)
        assert not held.problems
        assert [u.header.round for u in held.updates] == [1, 2, 3, 4]
        for got in held.updates:
            own = load_file(done / f"{name}-own-{rank}-{got.header.round}.safetensors")
            update, _ = got.payload()
            assert update.keys() == own.keys()
            assert all(torch.equal(update[n], own[n]) for n in own)


@pytest.mark.parametrize("name", ["joined", "joined_few"])
def test_what_a_process_sends_after_its_last_batch_is_not_recorded(done: Path, name: str) -> None:
    """Under `ddp.join` these are zeros, in place of a gradient."""
    for rank in range(WORLD):
        held = record(done, name, rank)
        assert not held.problems
        assert [u.header.round for u in held.updates] == list(range(1, 5 + rank))
        assert {u.header.examples for u in held.updates} == {4 + rank}
        for got in held.updates:
            own = load_file(done / f"{name}-own-{rank}-{got.header.round}.safetensors")
            update, _ = got.payload()
            assert update.keys() == own.keys()
            assert all(torch.equal(update[n], own[n]) for n in own)


def test_the_gradient_belongs_to_the_weights_that_are_recorded_with_it(done: Path) -> None:
    """With the state that was sent and the batch, the gradient can be computed again."""
    sys.path.insert(0, str(WORKER.parent))
    try:
        from ddp_worker import batch, network, own_gradient
    finally:
        sys.path.remove(str(WORKER.parent))
    for got in record(done, "buckets", 1).updates:
        model = network()
        model.load_state_dict(got.sent())
        again = own_gradient(model, [batch(1, 10 * (got.header.round - 1))])
        update, _ = got.payload()
        assert all(torch.equal(update[n], again[n]) for n in again)


def test_headers_say_what_was_seen(done: Path) -> None:
    held = record(done, "accumulated", 2)
    assert held.info.engine == "ddp"
    assert "own gradient, before anything is averaged" in held.info.note
    first = held.updates[0].header
    assert (first.client, first.clients, first.kind) == ("rank 2", 1, "gradient")
    assert first.examples == 12  # two micro-batches of six images
    assert first.metrics == {"micro_batches": 2.0}
    plan = first.local_plan()
    assert plan is not None
    assert (plan.kind, plan.mode) == ("gradient", "train")
    assert record(done, "one_bucket", 0).updates[0].header.examples == 4


def test_a_pass_on_top_of_an_average_is_not_said_to_be_an_own_gradient(done: Path) -> None:
    """Accumulation without `no_sync`: the second pass sends the average of the first with its own gradient."""
    held = record(done, "carried", 1)
    assert [u.header.round for u in held.updates] == list(range(1, 9))
    for got in held.updates:
        told = [p for p in got.header.problems if "no own gradient" in p]
        assert len(told) == (got.header.round % 2 == 0)
    assert not any(u.header.problems for u in record(done, "accumulated", 1).updates)


def test_steps_are_chosen_and_bounded_and_unscaled(done: Path) -> None:
    held = record(done, "chosen", 0)
    assert [u.header.round for u in held.updates] == [1]
    own = load_file(done / "chosen-own-0-1.safetensors")
    update, _ = held.updates[0].payload()
    assert all(torch.equal(update[n], own[n] / 4) for n in own)


def test_a_broken_tap_records_nothing_and_breaks_nothing(done: Path) -> None:
    assert not record(done, "broken", 0).updates


def test_fsdp_shows_shards_of_the_average_and_says_so(done: Path) -> None:
    average = load_file(done / "average-0.safetensors")
    parts: dict[str, list[torch.Tensor]] = {}
    for rank in range(WORLD):
        held = read_record(done / "shards" / f"rank-{rank}")
        assert "only reduced shards are visible" in held.info.note
        (got,) = held.updates
        assert (got.header.clients, got.header.examples) == (WORLD, (4 + rank) * WORLD), (
            "each takes the others for its like"
        )
        assert f"shard {rank} of {WORLD}" in got.header.problems[0]
        for name, part in got.payload()[0].items():
            parts.setdefault(name, []).append(part)
    for name, whole in average.items():
        assert parts[name][0].shape[0] < whole.shape[0]
        torch.testing.assert_close(torch.cat(parts[name]), whole, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_recorded_is_refused(done: Path) -> None:
    hooked, bare, whole, scaled, flat = json.loads((done / "refused-0.json").read_text())
    assert "it takes only one" in hooked
    assert "Sequential is no DistributedDataParallel" in bare
    assert "no parameter is a DTensor" in whole
    assert "unscaled before the step" in scaled
    assert "FSDP1" in flat
    assert not (done / "refused").exists()


def test_a_module_with_an_open_tap_is_pickled_and_copied_without_it(tmp_path: Path) -> None:
    """As `torch.save(model)` and processes that are spawned do; whoever reads it needs no Frostglass."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    held = io.BytesIO()
    with GradientTap(tmp_path / "record", engine="own", note="test", most=1) as tap:
        tap.watch(model)
        torch.save(model, held)
        assert b"frostglass" not in held.getvalue()
        held.seek(0)
        for other in (torch.load(held, weights_only=False), copy.deepcopy(model)):
            assert torch.equal(other(torch.ones(5, 3)), model(torch.ones(5, 3)))
            other(input=torch.ones(5, 3))
        tap.take(model, {})
    assert not model._forward_pre_hooks
    (update,) = read_record(tmp_path / "record").updates
    assert update.header.examples == 10, "the copies are counted, or the module is not"
