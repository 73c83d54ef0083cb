"""Leakage against utility: at each point an attack on many messages, its bound, and the accuracy of real training."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from frostglass.auditing.plan_checks import make_attack, make_defense
from frostglass.auditing.prepare import Prepared, prepare
from frostglass.auditing.score import Scored, score, summarise, unfit
from frostglass.auditing.simulate import local_plan, play
from frostglass.auditing.store import refuse_other_data
from frostglass.auditing.sweep_plan import Point, SweepPlan, points
from frostglass.auditing.wording import metric_words
from frostglass.core.defense import Defense
from frostglass.core.drive import drive, problems_of
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.files import write_json
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime, World
from frostglass.core.update import PrivacySpent
from frostglass.defenses.accounting import epsilon_of
from frostglass.federated.rounds import Budget, Images, correct, train
from frostglass.guarantees.interval import clopper_pearson
from frostglass.guarantees.rero import approximate_dp, gaussian, pure_dp
from frostglass.vision import datasets

CELLS, DATA = "cells", "data.json"
Tell = Callable[[str], object]
Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """One run of a sweep.

    Args:
        plan: checked.
        out: its folder; finished points are kept there and not computed again.
        device: of attacks and training.
        world: ranks that share the points: this one takes every `size`-th.
        tell: told of each point in words.
    """

    plan: SweepPlan
    out: Path
    device: torch.device
    world: World = field(default_factory=World)
    tell: Tell = lambda text: None

    def __call__(self) -> list[Row]:
        """All rows that are there when this rank has done its part, in the plan's order.

        Raises:
            BadInput: something that no point can be computed with, or other images or weights than those of finished
                points; what was finished stays.
        """
        todo = points(self.plan)
        data = self._data(todo[0])
        for number, point in enumerate(todo):
            if number % self.world.size != self.world.rank or self.path(point).exists():
                continue
            begun = time.perf_counter()
            row = self.row(point)
            row["seconds"] = round(time.perf_counter() - begun, 1)
            write_json(self.out / DATA, data)
            write_json(self.path(point), row)
            self.tell(f"{number + 1}/{len(todo)} {told(row)}")
        return self.rows()

    def _data(self, point: Point) -> dict[str, str]:
        """What the images and weights are known by: points from others would stand on one curve with the rest."""
        prepared = prepare(point.plan, 0, self.device)
        held, test = split(self.plan, prepared, Rng.from_seed(self.plan.seed, "digest"))
        digest = hashlib.sha256(prepared.digest())
        for t in (held.images, held.labels, test.images, test.labels):
            digest.update(t.cpu().contiguous().numpy().tobytes())
        value, path = {"sha256": digest.hexdigest()}, self.out / DATA
        if path.exists():
            refuse_other_data(self.out, path, value)
        return value

    def path(self, point: Point) -> Path:
        """Its file."""
        return self.out / CELLS / f"{point.id}.json"

    def rows(self) -> list[Row]:
        """Finished points."""
        paths = [self.path(p) for p in points(self.plan)]
        return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]

    def row(self, point: Point) -> Row:
        """Both halves of one point."""
        prepared = prepare(point.plan, 0, self.device)
        problems = unfit(point.plan.report, prepared.data.images, prepared.model)
        if problems:
            raise BadInput(problems)
        defense = make_defense(point.plan.scenario[0].defense[0])
        about = {
            "id": point.id, "title": point.title, "family": point.family, "knob": point.knob, "value": point.value,
            "claim": defense.claim, "adaptive_attacks": list(defense.adaptive), "settings": _plain(defense.settings),
            "attack": self.plan.attack.name,
        }  # fmt: skip
        try:
            return about | attacked(self.plan, point, prepared, defense) | trained(self.plan, point, prepared)
        except AttackFailed as wrong:
            return about | {"error": str(wrong)}


def attacked(plan: SweepPlan, point: Point, prepared: Prepared, defense: Defense) -> Row:
    """Success of the attack over independent messages, with its interval, chance and bound."""
    attack = make_attack(point.plan.scenario[0].attack[0])
    root = Rng.from_seed(plan.seed, "attack", attack.name).at(point.id)
    successes, last, spent = 0, None, None
    for unit in range(prepared.units):
        played = play(prepared, defense, unit)
        if unit == 0:
            problems = problems_of(attack, played.seen)
            if problems:
                raise BadInput([f"{point.title}: {p}" for p in problems])
        found = drive(attack, played.seen, Runtime(root.at(unit), prepared.device))
        last = score(found, played, point.plan.report.metrics, null=False)
        successes += succeeded(last, point)
        spent = played.spent
    assert last is not None
    lower, upper = clopper_pearson(successes, prepared.units, plan.confidence)
    kappa = None if last.candidates is None else 1 / last.candidates
    event = f"{metric_words(plan.event.metric)} of the first image reaches {plan.event.value:g}"
    return {
        "event": event if kappa is None else f"named among {last.candidates} candidates of its class",
        "statistic": found.info.get("statistic"),
        "trials": prepared.units,
        "independent": not prepared.repeats_images,
        "successes": successes,
        "rate": successes / prepared.units,
        "lower": lower,
        "upper": upper,
        "chance": kappa,
        "bound": None if kappa is None else bound_of(defense, kappa, point, spent),
        "epsilon_of_one_message": None if spent is None else spent.epsilon,
        "unit": None if spent is None else spent.unit,
    }


def succeeded(scored: Scored, point: Point) -> bool:
    """The event of one trial, fixed before the run."""
    if scored.identified is not None:
        return scored.identified
    summary = summarise([scored.private[:1]], point.plan.report.threshold)
    return summary is not None and summary.over_threshold.count > 0


def bound_of(defense: Defense, kappa: float, point: Point, spent: PrivacySpent | None = None) -> float | None:
    """gamma(kappa) of one message: of its Gaussian mechanisms, else of the (epsilon, delta) it spent; None unproved.

    The reference of a mechanism is the noise alone (add/remove): naming one of N candidates compares no two of them.
    """
    if defense.claim != "proof":
        return None
    client = point.plan.scenario[0].client
    steps = local_plan(client, "train").steps_for(client.batch)
    found = [
        gaussian(kappa, m.std / m.clip, steps if m.unit == "image" else 1)
        for m in defense.mechanisms
        if m.clip is not None and m.std > 0
    ]
    if not found and spent is not None:
        if spent.delta == 0:  # Laplace noise
            return pure_dp(kappa, spent.epsilon)
        return approximate_dp(kappa, spent.epsilon, spent.delta)
    return min(found, default=None)


def trained(plan: SweepPlan, point: Point, prepared: Prepared) -> Row:
    """Accuracy on images that were not trained on, of each seed, with an interval around all of them."""
    t, client = plan.training, point.plan.scenario[0].client
    by_seed, limits, epsilon = [], [], None
    for seed in t.seeds:
        rng = Rng.from_seed(seed, "sweep training")
        held, test = split(plan, prepared, rng.at("split"))
        defense, per_image = _for_training(point, client.batch)
        budget = Budget(t.rounds, t.clients, client.batch, t.lr, t.momentum, poisson=per_image)
        model = train(prepared.model, held, defense, local_plan(client, prepared.scenario.model.mode), budget, rng)
        right = correct(model, test, held, defense, seed)
        by_seed.append(right / len(test.images))
        limits.append(clopper_pearson(right, len(test.images), plan.confidence))
        if per_image and defense.claim == "proof":
            epsilon = _epsilon(defense, budget, len(held.images), local_plan(client, "train").steps_for(client.batch))
    return {
        "accuracy": sum(by_seed) / len(by_seed),
        "accuracy_lower": min(low for low, _ in limits),
        "accuracy_upper": max(high for _, high in limits),
        "accuracy_by_seed": by_seed,
        "test_images": len(test.images),
        "epsilon_of_training": epsilon,
    }


def _for_training(point: Point, batch: int) -> tuple[Defense, bool]:
    """(the defence, whether images are sampled by coins): DP-SGD divides by the expected batch then."""
    entry = point.plan.scenario[0].defense[0]
    per_image = any(part.name == "dp_sgd" for part in entry.parts)
    if not per_image:
        return make_defense(entry), False
    parts = [
        part.model_copy(update={"expected_batch": batch}) if part.name == "dp_sgd" else part for part in entry.parts
    ]
    return make_defense(entry.model_validate({"stack": [{"name": p.name, **p.settings} for p in parts]})), True


def _epsilon(defense: Defense, budget: Budget, images: int, steps: int) -> float:
    """Of the whole training, Poisson sampling included: one image is in one client's message of a round at the most.

    One coin a round decides for all its local steps, which are no draws of their own: together they are one release
    with as many times less variance. Where steps see minibatches an image is in fewer of them, and this is a bound.
    """
    settings = defense.settings if defense.name == "dp_sgd" else defense.settings["dp_sgd"]
    rate = budget.rate(images)
    return epsilon_of(settings["noise_multiplier"] / math.sqrt(steps), settings["delta"], budget.rounds, "rdp", rate)


def split(plan: SweepPlan, prepared: Prepared, rng: Rng) -> tuple[Images, Images]:
    """(training images, test images), on the device; a fifth is held out where the plan names no test source."""
    t, where = plan.training, plan.data
    channels, size = int(prepared.data.images.shape[1]), int(prepared.data.images.shape[-1])
    total = datasets.count(where.source)
    rows = Rng.from_seed(plan.seed, "sweep images").permutation(total)[: t.images].sort().values.tolist()
    held = datasets.load(where.source, size=size, channels=channels, rows=rows)
    order = rng.permutation(len(rows))
    cut = 0 if t.test is not None else max(1, len(rows) // 5)

    def on_device(images: torch.Tensor, labels: torch.Tensor) -> Images:
        return Images(images.to(prepared.device), labels.to(prepared.device), prepared.classes)

    if t.test is None:
        out = on_device(held.images[order[:cut]], held.labels[order[:cut]])
    else:
        other = datasets.load(t.test, size=size, channels=channels, limit=t.images)
        out = on_device(other.images, other.labels)
    return on_device(held.images[order[cut:]], held.labels[order[cut:]]), out


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def told(row: Row) -> str:
    """One line on a point."""
    if "error" in row:
        return f"{row['title']}: failed ({row['error']})"
    bound = "" if row["bound"] is None else f", bound {row['bound']:.3f}"
    return (
        f"{row['title']}: attack {row['successes']}/{row['trials']} [{row['lower']:.3f}, {row['upper']:.3f}]{bound}, "
        f"accuracy {row['accuracy']:.3f}"
    )


def complete(sweep: Sweep, wait: Callable[[], object]) -> list[Row]:
    """All rows, once the other ranks have written theirs; `wait` is called between two looks."""
    wanted = len(points(sweep.plan))
    while len(rows := sweep.rows()) < wanted:
        wait()
    return rows
