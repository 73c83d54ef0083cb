"""A sweep: checked as a whole, resumable point by point, shared among ranks, and drawn."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.optimize import brentq
from scipy.stats import norm

from command_line import call
from documented import misfits
from frostglass.app.commands import sweep as sweep_command
from frostglass.app.commands.sweep import command
from frostglass.auditing.plan import DefensePlan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.sweep import Sweep, _epsilon, bound_of
from frostglass.auditing.sweep_plan import SweepPlan, parse_sweep, points
from frostglass.auditing.sweep_report import COLUMNS, write_sweep
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.runtime import World
from frostglass.core.update import LocalPlan, PrivacySpent
from frostglass.defenses.registry import DEFENSES
from frostglass.federated.rounds import Budget, Images, correct, train
from frostglass.guarantees.rero import gaussian
from frostglass.vision import datasets, networks

CPU = torch.device("cpu")


def values_of(**parts: Any) -> dict[str, Any]:
    return {
        "trials": 3,
        "model": {"name": "mlp", "options": {"hidden": [16]}},
        "client": {"batch": 4},
        "threat": {"grants": ["examples", "gallery", "defence"], "gallery": 10},
        "training": {"rounds": 4, "clients": 2, "seeds": [0]},
        "vary": [
            {"name": "nothing"},
            {"defense": {"name": "pruning"}, "knob": "fraction", "values": [0.5, 0.9]},
            {"defense": {"name": "dp_sgd"}, "knob": "noise_multiplier", "values": [2.0]},
        ],
    } | parts


def small(**parts: Any) -> SweepPlan:
    return parse_sweep(values_of(**parts))


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_local_steps_on_one_draw_are_no_draws_of_their_own(steps: int) -> None:
    """One round: an image is in all local steps or in none. The exact epsilon of that pair, found without Opacus."""
    q, sigma, delta = 0.01, 1.0, 1e-5
    defense = make_defense(DefensePlan(name="dp_sgd", noise_multiplier=sigma, delta=delta))
    budget = Budget(1, 1, 5, 0.1, 0.0, poisson=True)
    assert budget.rate(500) == q
    shift = math.sqrt(steps) / sigma

    def above(epsilon: float, sign: int) -> float:
        """The larger hockey stick of the mixture and the noise alone, in both directions."""
        ratio = math.exp(sign * epsilon) - (1 - q)
        if ratio <= 0:
            return 0.0
        x = (math.log(ratio / q) + shift**2 / 2) / shift
        none, mixed = norm.sf(x), (1 - q) * norm.sf(x) + q * norm.sf(x - shift)
        if sign > 0:
            return float(mixed - math.exp(epsilon) * none)
        return float((1 - none) - math.exp(epsilon) * (1 - mixed))

    exact = brentq(lambda e: max(above(e, 1), above(e, -1)) - delta, 1e-6, 60)
    found = _epsilon(defense, budget, 500, steps)
    assert exact <= found <= 1.2 * exact + 0.9


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def test_points_resume_and_ranks_agree(tmp_path: Path) -> None:
    plan = small()
    sweep = Sweep(plan, tmp_path / "one", CPU)
    rows = sweep()
    assert [r["title"] for r in rows] == [
        "nothing", "pruning, fraction = 0.5", "pruning, fraction = 0.9", "dp_sgd, noise_multiplier = 2",
    ]  # fmt: skip
    assert all(r["lower"] <= r["rate"] <= r["upper"] for r in rows)
    assert all(0 <= r["accuracy_lower"] <= r["accuracy"] <= r["accuracy_upper"] <= 1 for r in rows)
    assert rows[0]["successes"] == 3
    assert [r["bound"] for r in rows[:3]] == [None] * 3
    assert rows[3]["bound"] == pytest.approx(gaussian(0.1, 2.0))
    assert rows[3]["epsilon_of_training"] > 0
    kept = sweep.path(points(plan)[0])
    before = kept.stat().st_mtime_ns
    sweep.path(points(plan)[2]).unlink()
    assert len(sweep.rows()) == 3
    assert without_time(sweep()) == without_time(rows)
    assert kept.stat().st_mtime_ns == before, "a finished point was computed again"
    halves = [Sweep(plan, tmp_path / "two", CPU, World(rank, 2)) for rank in range(2)]
    assert len(halves[1]()) == 2
    assert without_time(halves[0]()) == without_time(rows)


def test_points_of_other_images_are_not_put_on_one_curve(tmp_path: Path) -> None:
    for name, images in {"a": datasets.load("digits", size=8), "b": datasets.load("digits", size=8)}.items():
        for i in range(60):
            place = tmp_path / name / str(i % 2) / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = images.images[i + 500 * (name == "b")][0]
            Image.fromarray((pixels * 255).round().byte().numpy()).save(place)
    (tmp_path / "data").symlink_to(tmp_path / "a")
    vary, threat = [{"name": "a"}, {"defense": {"name": "sign"}}], {"grants": ["examples", "gallery"], "gallery": 4}
    plan = small(vary=vary, threat=threat, data={"source": f"folder:{tmp_path / 'data'}", "size": 8}, trials=2)
    sweep = Sweep(plan, tmp_path / "out", CPU)
    rows = sweep()
    sweep.path(points(plan)[1]).unlink()
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(tmp_path / "b")
    with pytest.raises(BadInput, match="are not those that"):
        sweep()
    (tmp_path / "data").unlink()
    (tmp_path / "data").symlink_to(tmp_path / "a")
    assert without_time(sweep()) == without_time(rows)


@pytest.mark.parametrize("resume", [False, True])
def test_a_sweep_that_was_killed_before_its_plan_was_whole_blocks_nothing(tmp_path: Path, resume: bool) -> None:
    (tmp_path / ".plan.toml.abc.part").write_text("na")
    sweep_command._claim(tmp_path, "plan", resume, 0)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is not empty"):
        sweep_command._claim(tmp_path, "plan", resume, 0)


def test_what_a_kill_left_half_written_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "plan.toml", tmp_path / "out"
    path.write_text(small(vary=[{"name": "nothing"}], trials=2).to_toml())
    assert call(capsys, "sweep", path, "--out", out)[0] == 0
    names = sorted(out.rglob("*"))
    for stray in (out / ".data.json.abc.part", out / "cells" / ".01.json.abc.part"):
        stray.write_bytes(b"half")
    assert call(capsys, "sweep", path, "--out", out, "--resume")[0] == 0
    assert sorted(out.rglob("*")) == names


def test_the_command_writes_json_csv_and_a_picture(tmp_path: Path) -> None:
    toml = tmp_path / "sweep.toml"
    toml.write_text(small(vary=[{"name": "a"}, {"defense": {"name": "sign"}}]).to_toml(), encoding="utf-8")
    out = tmp_path / "run"
    done = CliRunner().invoke(command, [str(toml), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "All numbers in %" in done.output
    held = json.loads((out / "sweep.json").read_text())
    assert misfits("sweep.json", held) == []
    assert [p["family"] for p in held["points"]] == ["a", "sign"]
    with (out / "sweep.csv").open(newline="") as lines:
        assert [r["title"] for r in csv.DictReader(lines)] == ["a", "sign"]
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(BadInput, match="not empty"):
        CliRunner().invoke(command, [str(toml), "--out", str(out)], catch_exceptions=False)
    again = CliRunner().invoke(command, [str(toml), "--out", str(out), "--resume"], catch_exceptions=False)
    assert again.exit_code == 0
    fresh, few = tmp_path / "a" / "fresh", ["--set", "threat.gallery=1000000"]
    with pytest.raises(BadInput, match="gallery"):
        CliRunner().invoke(command, [str(toml), "--out", str(fresh), *few], catch_exceptions=False)
    assert not (tmp_path / "a").exists(), "a refused sweep keeps its folder from the corrected command"
    other = ["--set", "trials=4", "--resume"]
    with pytest.raises(BadInput, match="another plan"):
        CliRunner().invoke(command, [str(toml), "--out", str(out), *other], catch_exceptions=False)


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path) -> None:
    row = dict.fromkeys(COLUMNS) | {
        "title": "a $x_$ b", "family": "a $x_$ b", "attack": "gallery", "rate": 0.5, "lower": 0.1, "upper": 0.9,
        "accuracy": 0.5, "accuracy_lower": 0.4, "accuracy_upper": 0.6,
    }  # fmt: skip
    del row["error"]
    paths = write_sweep(small(name="costs $x_$ now"), [row], tmp_path)
    assert paths[-1].read_bytes()[:4] == b"\x89PNG"


def test_an_attack_that_draws_images_is_measured_by_its_event(tmp_path: Path) -> None:
    plan = small(
        attack={"name": "linear_exact"}, event={"metric": "psnr", "value": 40.0}, client={"batch": 1},
        threat={"grants": ["examples"]}, vary=[{"name": "nothing"}, {"defense": {"name": "noise", "std": 1.0}}],
    )  # fmt: skip
    rows = Sweep(plan, tmp_path, CPU)()
    assert [r["successes"] for r in rows] == [3, 0]
    assert [r["chance"] for r in rows] == [None, None]
    assert "PSNR of the first image reaches 40" in rows[0]["event"]


def test_a_clients_knob_and_the_bound_over_its_steps() -> None:
    plan = small(
        client={"batch": 2, "update": "delta"},
        vary=[{"defense": {"name": "dp_sgd"}, "knob": "client.local_steps", "values": [1, 4]}],
    )
    found = [bound_of(DEFENSES["dp_sgd"].make(), 0.1, p) for p in points(plan)]
    assert found == [pytest.approx(gaussian(0.1, 1.0, t)) for t in (1, 4)]
    noisy = DEFENSES["dp_instahide"].make(std=1e-3)
    spent = PrivacySpent(1.0, 1e-5, 1.0, 1.0, "test")
    assert bound_of(noisy, 0.1, points(plan)[0], spent) == pytest.approx(0.1 * math.e + 1e-5)
    pure = replace(spent, delta=0.0)  # as Laplace noise proves
    assert bound_of(noisy, 0.1, points(plan)[0], pure) == pytest.approx(0.1 * math.e)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"vary": [{"defense": {"name": "prunning"}}]}, "'prunning' is not a known defense"),
        ({"vary": [{"defense": {"name": "noise"}, "knob": "sdt", "values": [1]}]}, "unknown parameter of 'noise'"),
        ({"vary": [{"defense": {"name": "noise"}, "knob": "std"}]}, "knob and values belong together"),
        ({"vary": [{"knob": "client.bach", "values": [1]}]}, "'client.bach' is not known"),
        ({"vary": [{"knob": "client.batch", "values": [0]}]}, "client.batch"),
        ({"trials": 0}, "trials"),
        ({"attack": {"name": "galery"}}, "'galery' is not a known attack"),
        ({"threat": {"grants": ["examples"]}}, "needs the grant 'gallery'"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_is_wrong_is_said_before_any_compute(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        small(**parts)


def test_a_mistake_that_all_points_share_is_told_once_and_in_the_words_of_the_plan() -> None:
    for parts, sentence in (
        ({"attack": {"name": "thawx"}}, "attack.name: 'thawx' is not a known attack; did you mean 'thaw'."),
        ({"model": {"name": "mlp", "options": {"hidden": 5}}},
         "model.options.hidden: 5 is not a list of whole numbers, which 'mlp' takes there."),
        ({"vary": [{"knob": "client.lr", "values": ["a"]}]},
         "vary.0.values.0: 'a' is not valid: input should be a finite number."),
        ({"training": {"seeds": [-1]}},
         "training.seeds.0: -1 is not valid: input should be greater than or equal to 0."),
    ):  # fmt: skip
        with pytest.raises(BadInput) as wrong:
            small(**parts)
        assert wrong.value.problems == (sentence,)


def digits() -> tuple[Images, Images]:
    held = datasets.load("digits", size=None)
    return (
        Images(held.images[:1400], held.labels[:1400], 10),
        Images(held.images[1400:], held.labels[1400:], 10),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "least"),
    [
        ("none", {}, 0.8),
        ("instahide", {"k": 2, "mask": "abs"}, 0.4),
        ("pruning", {"fraction": 0.99}, 0.6),
        ("sign", {}, 0.8),
    ],
)
def test_training_through_a_defence_learns(name: str, settings: dict[str, Any], least: float) -> None:
    held, test = digits()
    model = networks.build("mlp", classes=10, channels=1, size=8, options={"hidden": [64]}, rng=Rng.from_seed(0))
    defense = DEFENSES[name].make(**settings)
    budget = Budget(120, 4, 8, 0.1, 0.9, poisson=False)
    made = train(model, held, defense, LocalPlan(), budget, Rng.from_seed(1))
    before = correct(model, test, held, defense, 0) / len(test.images)
    assert correct(made, test, held, defense, 0) / len(test.images) > max(least, before)


@pytest.mark.parametrize(("name", "low"), [("none", 0.0), ("mixup", -1.0)])
def test_running_statistics_are_those_of_what_clients_train_on(name: str, low: float) -> None:
    held, _ = digits()
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1, momentum=1.0), torch.nn.Flatten(), torch.nn.Linear(64, 10))
    budget = Budget(2, 3, 8, 0.1, 0.9, poisson=False)
    made = train(model, held, DEFENSES[name].make(), LocalPlan(), budget, Rng.from_seed(1))
    seen = low + (1 - low) * float(held.images.mean())  # mixing leaves the mean where it was
    assert float(made[0].running_mean) == pytest.approx(seen, abs=0.05)  # type: ignore[index]


def test_federated_averaging_moves_by_the_mean_difference() -> None:
    held, _ = digits()
    model = networks.build("mlp", classes=10, channels=1, size=8, options={"hidden": []}, rng=Rng.from_seed(0))
    plan = LocalPlan(kind="delta", local_steps=2, lr=0.05)
    none = DEFENSES["none"].make()
    made = train(model, held, none, plan, Budget(1, 3, 4, 0.1, 0.9, poisson=False), Rng.from_seed(1))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), made.parameters(), strict=True))
    with pytest.raises(BadInput, match="more than the 1400"):
        train(model, held, none, plan, Budget(1, 200, 8, 0.1, 0.9, poisson=False), Rng.from_seed(1))


def test_poisson_sampling_takes_every_image_by_its_own_coin() -> None:
    from frostglass.federated.rounds import _members

    budget = Budget(1, 2, 4, 0.1, 0.0, poisson=True)
    sizes, empty = [], 0
    for r in range(300):
        members = _members(100, budget, Rng.from_seed(r))
        rows = torch.cat(members)
        assert len(rows.unique()) == len(rows)
        sizes.append(len(rows))
        empty += any(len(m) == 0 for m in members)
    assert sum(sizes) / 300 == pytest.approx(8, abs=0.6)
    assert empty
