"""Whole runs: same plan, same result; a broken cell fails alone; the truth reaches scoring and nobody before it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frostglass.attacks.registry import ATTACKS
from frostglass.auditing import run as running
from frostglass.auditing.plan import Plan, load_plan, parse_plan
from frostglass.auditing.rows import headline
from frostglass.auditing.run import run_plan
from frostglass.auditing.scorecard import AuditReport, load_scorecard
from frostglass.auditing.simulate import Truth
from frostglass.core.batch import Sealed
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.events import Event
from frostglass.core.journal import read_journal
from frostglass.core.reconstruction import Reconstruction
from scenes import Custom, outcome_of, same_outcome, small

CPU = torch.device("cpu")


def go(plan: dict[str, Any] | Plan, out: Path, **keywords: Any) -> AuditReport:
    return run_plan(plan if isinstance(plan, Plan) else parse_plan(plan), out, device=CPU, **keywords)


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers attacks for one test."""
    ATTACKS.names()
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))

    def add(name: str, call: Any = lambda seen, run: None, **more: Any) -> None:
        def make() -> Custom:
            """An attack that a test made."""
            return Custom(call, name=name, **more)

        ATTACKS.register(name)(make)

    return add


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    heard: list[Event] = []
    report = go(small(), tmp_path / "deep" / "run", emit=heard.append)
    folder = tmp_path / "deep" / "run"
    held = {p.name for p in folder.iterdir()}
    assert held == {
        ".run.json", "plan.toml", "events.jsonl", "checkpoints", "reconstruction.safetensors", "scorecard.json",
        "report.html",
    }  # fmt: skip
    assert load_scorecard(folder / "scorecard.json") == report.scorecard
    (cell,) = report.cells
    assert (cell.status, cell.batches, cell.batch, cell.iterations) == ("done", 2, 2, 30)
    assert len(cell.images) == 4
    assert cell.settings["attack"]["tv"] == ATTACKS["thaw"].parameters["tv"].default, "defaults are settings too"
    assert cell.settings["model"]["options"]["hidden"] == [16]
    assert cell.objective is not None
    assert cell.objective_at_truth is not None
    assert cell.objective_at_truth < cell.objective
    kinds = [e.kind for e in heard]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_finished")
    assert kinds.count("attack_started") == 2
    assert [r["kind"] for r in read_journal(folder / "events.jsonl")] == kinds


def test_the_same_plan_twice_gives_the_same_result(tmp_path: Path) -> None:
    plan = small([{"name": "thaw", "steps": 20, "every": 10}, {"name": "spear"}], report={"show_images": True})
    torch.manual_seed(1)
    go(plan, tmp_path / "a")
    torch.manual_seed(2)
    go(plan, tmp_path / "b")
    same_outcome(tmp_path / "a", tmp_path / "b")


def test_another_seed_gives_another_result(tmp_path: Path) -> None:
    for seed in (0, 1):
        go(small(seed=seed), tmp_path / str(seed))
    one, other = (outcome_of(tmp_path / s)[1] for s in "01")
    assert not any(torch.equal(one[k], other[k]) for k in one)


def test_the_resolved_plan_of_a_run_can_be_run_again(tmp_path: Path) -> None:
    go(small(), tmp_path / "a")
    go(load_plan(tmp_path / "a" / "plan.toml"), tmp_path / "b")
    same_outcome(tmp_path / "a", tmp_path / "b")


def test_images_are_written_only_when_they_may_be_shown(tmp_path: Path) -> None:
    go(small(), tmp_path / "hidden")
    go(small(report={"show_images": True}), tmp_path / "shown")
    assert not list((tmp_path / "hidden").rglob("*film*"))
    assert not (tmp_path / "hidden" / "pictures.safetensors").exists()
    pictures = outcome_of(tmp_path / "shown")[2]
    assert any("/film/" in k for k in pictures)
    private = next(v for k, v in pictures.items() if k.endswith("/private"))
    raw = private[0].numpy().tobytes()[:64]
    for path in (tmp_path / "hidden").rglob("*"):
        assert path.is_dir() or raw not in path.read_bytes(), f"{path.name} holds private pixels"
    assert outcome_of(tmp_path / "hidden")[1].keys() == outcome_of(tmp_path / "shown")[1].keys()


def test_the_callers_switches_are_left_alone(tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    before = torch.get_rng_state()
    go(small(), tmp_path / "a")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_attack_never_meets_the_truth(tmp_path: Path, attack: Any) -> None:
    """While an attack works, nothing that it is given leads to the seal, to private images, or to the plan's seed."""
    met: list[int] = []

    def look(seen: Any, run: Any) -> None:
        reached, waiting = set(), [seen, run]
        while waiting:
            held = waiting.pop()
            if id(held) in reached or isinstance(held, type) or type(held).__name__ in ("module", "function"):
                continue
            reached.add(id(held))
            assert not isinstance(held, Sealed | Truth)
            if not isinstance(held, torch.Tensor):
                waiting += (
                    gc.get_referents(held) if not isinstance(held, torch.nn.Module) else list(vars(held).values())
                )
        met.append(len(reached))

    attack("looking", look)
    report = go(small({"name": "looking"}), tmp_path / "a")
    assert report.cells[0].error is None
    assert len(met) == 2


def test_reading_and_choosing_happen_before_the_seal_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    opened, saved = Sealed.open_for_scoring, running.RunFolder.save_result
    monkeypatch.setattr(Sealed, "open_for_scoring", lambda self: (order.append("open"), opened(self))[1])

    def save(self: Any, cell: str, unit: int, result: Any, about: Any) -> None:
        order.append("save")
        saved(self, cell, unit, result, about)

    monkeypatch.setattr(running.RunFolder, "save_result", save)
    go(small(), tmp_path / "a")
    assert order == ["save", "open"] * 2


def test_a_second_process_does_not_touch_a_run_that_is_going_on(tmp_path: Path, attack: Any) -> None:
    met: list[bool] = []

    def second(seen: Any, run: Any) -> None:
        mine = tmp_path / "a" / ".scorecard.json.x.part"
        mine.touch()
        with pytest.raises(BadInput, match="another process is at work"):
            go(plan, tmp_path / "a", resume=True)
        met.append(mine.exists())

    attack("meanwhile", second)
    plan = small({"name": "meanwhile"})
    assert go(plan, tmp_path / "a").cells[0].error is None
    assert met == [True, True]
    go(plan, tmp_path / "a", resume=True)


BROKEN: list[tuple[Any, str]] = [
    (AttackFailed("custom: broke"), "custom: broke"),
    (RuntimeError("shapes\nmore"), "RuntimeError: shapes"),
    (ValueError("\n\n"), "ValueError: no detail"),
    (KeyError("x"), "KeyError: 'x'"),
    (AssertionError(), "AssertionError: no detail"),
    (MemoryError(), "out of memory; lower client.batch"),
    (RuntimeError("[enforce at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: x"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "sentence"), BROKEN, ids=lambda v: type(v).__name__)
def test_a_cell_that_breaks_fails_alone(tmp_path: Path, attack: Any, error: Exception, sentence: str) -> None:
    def broken(seen: Any, run: Any) -> None:
        raise error

    attack("broken", broken)
    quick = {"name": "thaw", "steps": 2, "every": 1}
    heard: list[Event] = []
    report = go(small([{"name": "broken"}, quick]), tmp_path / "a", emit=heard.append)
    assert [c.status for c in report.cells] == ["failed", "done"]
    failed = report.cells[0]
    assert sentence in (failed.error or "")
    assert "\n" not in (failed.error or "")
    assert (failed.images, failed.summary, failed.objective) == ([], None, None)
    assert (tmp_path / "a" / "report.html").exists()
    assert [e.where for e in heard if e.kind == "cell_failed"] == [failed.id]
    assert "/1" not in "".join(e.where for e in heard if e.where.startswith(failed.id))


def test_memory_is_really_exhausted_in_a_sentence(tmp_path: Path, attack: Any) -> None:
    attack("greedy", lambda seen, run: torch.empty(2**50))
    (cell,) = go(small({"name": "greedy"}), tmp_path / "a").cells
    assert (cell.error or "").startswith("out of memory; lower client.batch, data.size or the attack's seeds")


def test_debug_lets_the_unexpected_through(tmp_path: Path, attack: Any) -> None:
    attack("broken", lambda seen, run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(small({"name": "broken"}), tmp_path / "a", debug=True)


def test_a_result_that_is_not_finite_is_a_failure_and_no_score(tmp_path: Path, attack: Any) -> None:
    def nothing(seen: Any) -> Reconstruction:
        return Reconstruction(torch.full((1, *seen.image_shape), torch.nan), torch.ones(1, dtype=torch.bool), 0.0)

    attack("nan", found=nothing)
    (cell,) = go(small({"name": "nan"}), tmp_path / "a").cells
    assert (cell.status, cell.images) == ("failed", [])


def test_what_an_attack_says_of_itself_never_breaks_the_scorecard(tmp_path: Path, attack: Any) -> None:
    def odd(seen: Any) -> Reconstruction:
        info = {"error": float("inf"), "noise": float("nan"), "fine": 3}
        return Reconstruction(
            torch.zeros(0, *seen.image_shape), torch.zeros(0, dtype=torch.bool), float("nan"), info=info
        )

    attack("odd", found=odd)
    (cell,) = go(small({"name": "odd"}), tmp_path / "a").cells
    assert cell.error is None
    assert cell.info == {"error": "inf", "noise": "nan", "fine": 3}
    assert cell.objective is None
    assert cell.summary is not None
    assert (cell.summary.matched, cell.summary.psnr_median) == (0, None)


def test_a_failure_in_a_later_batch_keeps_the_earlier_ones_and_says_so(tmp_path: Path, attack: Any) -> None:
    calls: list[int] = []

    def second(seen: Any, run: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise AttackFailed("broke")

    attack("second", second)
    (cell,) = go(small({"name": "second"}), tmp_path / "a").cells
    assert (cell.status, len(cell.images)) == ("failed", 2)
    assert cell.summary is not None
    assert cell.summary.batches == 1
    assert any("Failed after 1 of 2 batches" in w for w in cell.warnings)


def test_a_failed_cell_is_tried_again_on_resume(tmp_path: Path, attack: Any) -> None:
    broken = [True]

    def maybe(seen: Any, run: Any) -> None:
        if broken[0]:
            raise MemoryError

    attack("maybe", maybe)
    assert go(small({"name": "maybe"}), tmp_path / "a").scorecard.failed
    broken[0] = False
    assert not go(small({"name": "maybe"}), tmp_path / "a", resume=True).scorecard.failed


def test_problems_of_all_scenarios_come_together_and_nothing_is_written(tmp_path: Path) -> None:
    first = small()["scenario"][0]
    others = [
        first | {"name": "too many", "client": {"batch": 9}},
        first | {"name": "no layer", "model": {"name": "small_bn_cnn"}, "attack": [{"name": "spear"}]},
        first | {"name": "no folder", "data": {"source": f"folder:{tmp_path}/none"}},
    ]
    with pytest.raises(BadInput) as wrong:
        go({"scenario": [first, *others], "threat": {"grants": ["examples"]}}, tmp_path / "run")
    text = str(wrong.value)
    for words in ("client.batch = 9 x cohort = 1 is more than the 8 images", "no layer: spear", "does not exist"):
        assert words in text
    assert not (tmp_path / "run").exists()


def test_a_client_step_that_cannot_be_computed_is_bad_input(tmp_path: Path) -> None:
    """BatchNorm over one value a channel: torch refuses it in train mode."""
    plan = small(model={"name": "resnet20", "options": {}}, data={"size": 4}, client={"batch": 1})
    with pytest.raises(BadInput, match="the client's step cannot be computed: ValueError: Expected more than 1 value"):
        go(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_headlines_count_messages_and_name_the_worst(tmp_path: Path) -> None:
    plan = small([{"name": "spear"}, {"name": "thaw", "steps": 2, "every": 1}], model={"options": {"hidden": [64]}})
    report = go(plan, tmp_path / "a")
    assert report.headline.startswith("From 2 gradients of “small”: 4 of 4 images recovered exactly")
    assert "knew the number of images and the labels." in report.headline
    assert str(report).startswith(report.headline)
    assert headline([]) == "No cell finished: nothing was measured."


def test_the_scorecard_of_every_registered_defence_is_json(tmp_path: Path) -> None:
    from frostglass.defenses.registry import DEFENSES

    names = [e.name for e in DEFENSES if not [p for p in e.parameters.values() if p.default is p.empty]]
    quick = {"name": "thaw", "steps": 2, "every": 1}
    plan = small(quick, defense=[{"name": n} for n in names], client={"batch": 4, "batches": 1})
    report = go(plan, tmp_path / "a")
    assert [c.defense for c in report.cells] == names
    assert not report.scorecard.failed
    held = json.loads((tmp_path / "a" / "scorecard.json").read_text())
    assert len(held["cells"]) == len(names)
    spent = {c["defense"]: c["privacy_spent"] for c in held["cells"]}
    assert spent["none"] is None
    assert spent["dp_sgd"]["epsilon"] > 0
