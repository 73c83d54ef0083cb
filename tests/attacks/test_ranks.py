"""Seeds over real processes: two ranks give what one gives, and a killed rank ends the run with a sentence."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from frostglass.attacks.inversion import ranks
from frostglass.attacks.inversion.choice import AgreeingMean
from frostglass.attacks.inversion.elimination import Elimination
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.store import CheckpointStore, load_tensors
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime, World

RUN = Runtime(Rng.from_seed(0, "ranks"), dtype=torch.float64)


def attack(steps: int, seeds: int = 3) -> Any:
    return ATTACKS["grad_inversion"].make(
        steps=steps, seeds=seeds, consensus_start=10, every=5, group=0.05, matching="cosine", bn_weight=1e-3
    )


def observed() -> Any:
    from victims import observe

    return observe("small_bn_cnn", size=8, width=3, dtype=torch.float64)[0]


def joined(rank: int, size: int, folder: str, timeout: float = 30.0) -> World:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    from datetime import timedelta

    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    return World(rank, size)


def worker(rank: int, size: int, folder: str, steps: int, seeds: int) -> None:
    torch.set_num_threads(1)
    world = joined(rank, size, folder)
    events: list[Event] = []
    with ranks.joined_world() as found:
        assert found == world
        result = drive(attack(steps, seeds), observed(), replace(RUN, world=world), emit=events.append)
    last = [e.values for e in events if e.kind == "progress"][-1]
    kept = {"images": result.images, "objective": result.objective, "info": dict(result.info), "best": last["best"]}
    torch.save(kept, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def many(seeds: int) -> Any:
    """Seeds of which some are dropped on the way, the others averaged in the end."""
    whole = replace(attack(20, seeds), consensus=None)
    return replace(whole, eliminate=Elimination((0.3, 0.6)), combine=AgreeingMean(within=9, shared=0))


def chooser(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = joined(rank, size, folder)
    result = drive(many(5), observed(), replace(RUN, world=world))
    torch.save({"images": result.images, "info": dict(result.info)}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def stores(folder: str, rank: int) -> tuple[CheckpointStore, CheckpointStore]:
    made = [CheckpointStore(Path(folder) / f"{rank}-{slot}.safetensors", torch.device("cpu")) for slot in "ab"]
    return made[0], made[1]


def doomed(rank: int, size: int, folder: str, mortal: int | None) -> None:
    """Rank `mortal` dies in the middle; the other writes down what it is told."""
    torch.set_num_threads(1)
    world = joined(rank, size, folder, timeout=20)

    def die(event: Event) -> None:
        if rank == mortal and event.kind == "progress" and event.step == 15:
            os.kill(os.getpid(), signal.SIGKILL)

    store = ranks.RankStore(stores(folder, rank), world)
    told = "finished"
    try:
        run = replace(RUN, world=world)
        result = drive(attack(20), observed(), run, emit=die, store=store, save_every=4)
        torch.save(result.images, Path(folder) / f"{rank}.pt")
    except ranks.RankLost as wrong:
        told = str(wrong)
    (Path(folder) / f"{rank}.txt").write_text(told)
    sys.stdout.flush()
    os._exit(0)  # the group cannot be left in order once a rank is gone


def spawn(target: Any, *args: Any, size: int = 2) -> list[int | None]:
    context = mp.get_context("spawn")
    made = [context.Process(target=target, args=(rank, size, *args)) for rank in range(size)]
    for process in made:
        process.start()
    for process in made:
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in made]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 1])
def test_two_ranks_equal_one_over_twenty_steps_with_a_refresh(tmp_path: Path, seeds: int) -> None:
    """With one seed the second rank holds none, and still takes part."""
    assert spawn(worker, str(tmp_path), 20, seeds) == [0, 0]
    alone = drive(attack(20, seeds), observed(), RUN)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["objective"] == pytest.approx(alone.objective, rel=1e-9)
        assert found["best"] == pytest.approx(alone.objective, rel=1e-9)
        torch.testing.assert_close(found["images"], alone.images, rtol=1e-6, atol=1e-7)  # read in float32
        assert found["info"]["seed"] == alone.info["seed"]
        assert found["info"]["seeds"] == seeds


@pytest.mark.slow
def test_two_ranks_drop_and_average_the_seeds_that_one_would(tmp_path: Path) -> None:
    assert spawn(chooser, str(tmp_path)) == [0, 0]
    alone = drive(many(5), observed(), RUN)
    assert alone.info["seeds_eliminated"] == 3
    assert alone.info["images_averaged"]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["images"], alone.images, rtol=1e-6, atol=1e-7)
        assert found["info"].keys() == alone.info.keys()
        for name, value in alone.info.items():
            assert found["info"][name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_a_sentence_and_a_checkpoint(tmp_path: Path) -> None:
    codes = spawn(doomed, str(tmp_path), 1)
    assert codes == [0, -signal.SIGKILL]
    told = (tmp_path / "0.txt").read_text()
    assert "another rank was killed or is late" in told
    assert "--resume" in told
    for rank in range(2):
        steps = [load_tensors(slot.path)[1]["step"] for slot in stores(str(tmp_path), rank)]
        assert max(steps) >= 12
    (tmp_path / "meeting").unlink()
    assert spawn(doomed, str(tmp_path), None) == [0, 0]
    assert (tmp_path / "0.txt").read_text() == "finished"
    alone = drive(attack(20), observed(), RUN)
    torch.testing.assert_close(torch.load(tmp_path / "1.pt"), alone.images, rtol=1e-6, atol=1e-7)


def test_seeds_are_dealt_to_ranks_by_number() -> None:
    dealt = [ranks.seeds_of(World(rank, 3), 8) for rank in range(3)]
    assert dealt == [(0, 3, 6), (1, 4, 7), (2, 5)]
    assert ranks.seeds_of(World(2, 3), 2) == ()
    assert ranks.seeds_of(World(), 2) == (0, 1)


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with ranks.joined_world() as world:
        assert world == World()
    x = torch.ones(2)
    assert ranks.total(x, World(), "") is x
    assert ranks.lowest(x, World(), "") is x
    assert ranks.from_rank(x, 0, World(), "") is x
    assert ranks.gathered(3, World(), "") == [3]


def test_ranks_that_cannot_meet_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for missing in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(missing, raising=False)
    with pytest.raises(BadInput, match="torchrun"), ranks.joined_world():
        pass


def test_checkpoints_two_deep_resume_from_the_latest_common_step(tmp_path: Path) -> None:
    store = ranks.RankStore(stores(str(tmp_path), 0), World())
    template = {"x": torch.zeros(1)}
    assert store.load(template) is None
    for step in (4, 8, 12):
        store.save(step, {"x": torch.full((1,), float(step))})
    again = ranks.RankStore(stores(str(tmp_path), 0), World())
    kept = again.load(template)
    assert kept is not None
    assert kept[0] == 12
    assert float(kept[1]["x"]) == 12
    again.save(16, template)  # must replace step 8
    held = [s.load(template) for s in stores(str(tmp_path), 0)]
    assert sorted(k[0] for k in held if k is not None) == [12, 16]
