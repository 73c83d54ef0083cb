"""Attacks that know the defence: their objective is 0 at the truth, and learning through it beats not looking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from frostglass.attacks.inversion.target import lay_out
from frostglass.attacks.learned.inverter import learned_inverter
from frostglass.attacks.learned.warm_start import learned_thaw
from frostglass.attacks.recipes.thaw import thaw
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import prepare
from frostglass.auditing.simulate import Round, play
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Observation

RUN = Runtime(Rng.from_seed(6, "adaptive"))
ALL = ["examples", "labels", "local_plan", "defence", "auxiliary"]


def played(defense: dict[str, Any], grants: list[str] | None = None, batches: int = 1, **client: Any) -> list[Round]:
    scenario = {
        "data": {"source": "digits"},
        "model": {"name": "lenet"},
        "client": {"batch": 1, "batches": batches} | client,
        "defense": [defense],
        "attack": [{"name": "thaw"}],
    }
    threat = {"grants": ALL if grants is None else grants, "auxiliary": "digits"}
    plan = parse_plan({"scenario": [scenario], "threat": threat})
    prepared = prepare(plan, 0, torch.device("cpu"))
    return [play(prepared, make_defense(plan.scenario[0].defense[0]), u) for u in range(prepared.units)]


def at_truth(defense: dict[str, Any], grants: list[str]) -> float:
    (one,) = played(defense, grants)
    private = one.truth._Sealed__value.private  # type: ignore[attr-defined]
    return thaw(tv=0.0).objective_of(one.seen, private.images, private.targets, RUN)


@pytest.mark.parametrize(
    "defense",
    [
        {"name": "pruning", "fraction": 0.99},
        {"name": "pruning", "fraction": 0.9, "scope": "layer"},
        {"name": "quantisation", "bits": 2},
        {"name": "sign"},
        {"name": "soteria", "fraction": 0.9},
        {"stack": [{"name": "pruning", "fraction": 0.9}, {"name": "sign"}]},
    ],
)
def test_matching_through_a_known_defence_is_zero_at_the_truth(defense: dict[str, Any]) -> None:
    assert at_truth(defense, ALL) == pytest.approx(0, abs=1e-5)
    assert at_truth(defense, [g for g in ALL if g != "defence"]) > 1e-4


def test_only_entries_that_were_sent_have_a_slope() -> None:
    (one,) = played({"name": "pruning", "fraction": 0.9})
    target = lay_out(one.seen, RUN)
    own = {n: torch.randn_like(g).requires_grad_(True) for n, g in target.gradients.items()}
    sent = target.as_sent(own)
    torch.stack([g.square().sum() for g in sent.values()]).sum().backward()
    assert all(torch.equal(own[n].grad != 0, target.gradients[n] != 0) for n in own)


def test_clipping_is_modelled() -> None:
    (one,) = played({"name": "clip_and_noise", "clipping_norm": 0.01, "noise_multiplier": 0.0})
    target = lay_out(one.seen, RUN)
    plain = lay_out(played({"name": "none"})[0].seen, RUN)
    for n, g in target.as_sent(plain.gradients).items():
        torch.testing.assert_close(g, target.gradients[n])


def mean_error(rounds: list[Round], images: list[torch.Tensor]) -> float:
    truth = [r.truth._Sealed__value.private.images for r in rounds]  # type: ignore[attr-defined]
    return float(torch.stack([(x - t).square().mean() for x, t in zip(images, truth, strict=True)]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("defense", [{"name": "sign"}, {"name": "pruning", "fraction": 0.99}])
def test_the_inverter_learns_through_the_defence(defense: dict[str, Any]) -> None:
    grants = [g for g in ALL if g != "labels"]
    rounds = played(defense, grants, batches=2)
    found = [drive(learned_inverter(rehearsals=300, training=120, hidden=256), r.seen, RUN).images for r in rounds]
    auxiliary = rounds[0].seen.auxiliary
    assert auxiliary is not None
    private = torch.cat([r.truth._Sealed__value.private.images for r in rounds])  # type: ignore[attr-defined]
    assert float((auxiliary[:, None] - private).abs().amax((2, 3, 4)).min()) > 0  # it learns on others alone
    guess = mean_error(rounds, [auxiliary.mean(0, keepdim=True)] * 2)
    assert mean_error(rounds, found) < 0.7 * guess


@pytest.mark.slow
def test_thaw_starts_where_the_inverter_ended() -> None:
    (one,) = played({"name": "none"})
    attack = learned_thaw(steps=3, lr=1e-6, rehearsals=50, training=20)
    frames: list[torch.Tensor] = []

    def keep(event: Any) -> None:
        if event.kind == "candidate":
            frames.append(event.tensors["images"])

    drive(attack, one.seen, RUN, emit=keep, film=[attack.first.steps, attack.steps])
    assert attack.steps == 1 + 20 + 3
    torch.testing.assert_close(frames[0], frames[1], atol=1e-4, rtol=0)


def test_rehearsals_that_are_all_alike_end_in_a_picture() -> None:
    """A single one has no spread to scale by: every value became infinite, and the run failed."""
    (one,) = played({"name": "none"})
    assert bool(drive(learned_inverter(rehearsals=1, training=1), one.seen, RUN).images.isfinite().all())
    assert one.seen.auxiliary is not None
    few = replace(one.seen, auxiliary=one.seen.auxiliary[:1])
    (sentence,) = learned_inverter().check(few)
    assert "auxiliary images are too few (1); give 2 at least" in sentence


def test_no_grant_no_use_of_the_defence() -> None:
    (one,) = played({"name": "sign"}, ["examples", "labels"])
    seen: Observation = one.seen
    assert seen.defence is None
    target = lay_out(seen, RUN)
    assert target.as_sent(target.gradients) is target.gradients
