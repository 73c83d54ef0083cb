"""The identification game: right where the message decides it, at chance where it does not, by every statistic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from frostglass.attacks.identification.encodings import Mixes
from frostglass.attacks.identification.gallery import gallery
from frostglass.attacks.identification.statistics import Images, Rehearsed, Updates, evidence_of
from frostglass.auditing.plan import Plan, parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import prepare
from frostglass.auditing.score import Scored, score
from frostglass.auditing.simulate import Round, play
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import GradientMessage
from victims import Reused

CPU = torch.device("cpu")
RUN = Runtime(Rng.from_seed(5, "gallery"))


def plan_of(
    defense: dict[str, Any] | None = None,
    *,
    batch: int = 1,
    batches: int = 1,
    model: dict[str, Any] | None = None,
    n: int = 20,
    seed: int = 0,
    **client: Any,
) -> Plan:
    scenario = {
        "data": {"source": "digits"},
        "model": model or {"name": "mlp", "options": {"hidden": [32]}},
        "client": {"batch": batch, "batches": batches} | client,
        "defense": [defense or {"name": "none"}],
        "attack": [{"name": "gallery"}],
    }
    threat = {"grants": ["examples", "gallery", "defence", "local_plan"], "gallery": n}
    return parse_plan({"seed": seed, "scenario": [scenario], "threat": threat})


def rounds(plan: Plan) -> list[Round]:
    prepared = prepare(plan, 0, CPU)
    defense = make_defense(plan.scenario[0].defense[0])
    return [play(prepared, defense, unit) for unit in range(prepared.units)]


def identified(played: Round) -> bool:
    scored = score(drive(gallery(), played.seen, RUN), played, ["psnr"], null=False)
    assert scored.identified is not None
    return scored.identified


BN = {"name": "small_bn_cnn", "options": {"width": 4}}
GN = {"name": "small_bn_cnn", "options": {"width": 4, "norm": "group"}}
CASES: list[tuple[str, dict[str, Any], dict[str, Any], type]] = [
    ("one image", {}, {}, Updates),
    ("a batch", {}, {"batch": 4, "model": GN}, Updates),
    ("BatchNorm, one image", {}, {"model": BN}, Updates),
    ("BatchNorm, a batch", {}, {"batch": 3, "model": BN}, Rehearsed),
    ("clipped", {"name": "clip_and_noise", "clipping_norm": 0.1, "noise_multiplier": 0.0}, {"batch": 3}, Updates),
    ("faint noise", {"name": "noise", "std": 1e-4}, {"batch": 2}, Updates),
    ("DP-SGD, faint", {"name": "dp_sgd", "noise_multiplier": 1e-3, "clipping_norm": 0.5}, {"batch": 3}, Images),
    ("pruned", {"name": "pruning", "fraction": 0.99}, {"batch": 2}, Rehearsed),
    ("signs", {"name": "sign"}, {"batch": 2}, Rehearsed),
    ("four bits", {"name": "quantisation"}, {"batch": 2}, Rehearsed),
    ("Soteria", {"name": "soteria"}, {"batch": 2}, Rehearsed),
    ("two steps", {}, {"batch": 2, "update": "delta", "local_steps": 2, "lr": 0.05}, Rehearsed),
    ("stack", {"stack": [{"name": "pruning"}, {"name": "noise", "std": 1e-4}]}, {"batch": 2}, Rehearsed),
]


@pytest.mark.parametrize(("defense", "client", "kind"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_message_without_much_noise_names_its_image(
    defense: dict[str, Any], client: dict[str, Any], kind: type
) -> None:
    for played in rounds(plan_of(defense or None, batches=3, **client)):
        assert isinstance(evidence_of(played.seen, RUN), kind)
        assert identified(played)


@pytest.mark.parametrize(
    "defense",
    [{"name": "instahide", "k": 2}, {"name": "instahide", "k": 4}, {"name": "mixup", "k": 4}],
    ids=["InstaHide, k = 2", "InstaHide, k = 4", "Mixup, k = 4"],
)
def test_encodings_are_identified_through_their_exact_recovery(defense: dict[str, Any]) -> None:
    played = rounds(plan_of(defense, batch=6, batches=5, n=50, model={"name": "mlp", "options": {"hidden": [256]}}))
    assert all(isinstance(evidence_of(p.seen, RUN), Mixes) for p in played)
    assert sum(identified(p) for p in played) >= 4


def test_under_heavy_noise_it_is_no_better_than_chance() -> None:
    defense = {"name": "dp_sgd", "noise_multiplier": 500.0}
    right = sum(identified(p) for p in rounds(plan_of(defense, batches=60, n=5)))
    assert right <= 25  # 12 are expected; a binomial exceeds 25 once in twenty thousand


def test_streamed_statistics_are_those_of_rehearsals() -> None:
    for defense, batch in (
        ({"name": "clip_and_noise", "clipping_norm": 0.5}, 3),
        ({"name": "noise", "std": 0.01}, 2),
        (None, 1),
    ):
        (played,) = rounds(plan_of(defense, batch=batch))
        found = evidence_of(played.seen, Runtime(dtype=torch.float64))
        assert isinstance(found, Updates)
        slow = Rehearsed(found.setting)
        torch.testing.assert_close(found.scores(slice(0, 20), 7), slow.scores(slice(0, 20), 7), rtol=1e-7, atol=1e-9)


def test_per_image_statistics_are_the_likelihood_ratio() -> None:
    """<u, r> - ||u||^2 / 2 with u the clipped gradient and r the noisy sum without the others."""
    (played,) = rounds(plan_of({"name": "dp_sgd", "clipping_norm": 0.3}, batch=1))
    found = evidence_of(played.seen, Runtime(dtype=torch.float64))
    assert isinstance(found, Images)
    s = found.setting
    scores = found.scores(slice(0, 20), 32)
    for i in (0, 7, 19):
        own = s.update_of(s.gallery.images[i : i + 1], s.gallery.targets[i : i + 1])
        u, r = (torch.cat([g.flatten() for g in x.values()]) for x in (own, s.observed))
        assert float(u.norm()) <= 0.3 * (1 + 1e-9)
        assert float(scores[i]) == pytest.approx(float(u @ r - u @ u / 2), rel=1e-6)


def test_networks_that_cannot_be_streamed_are_gone_through_one_by_one() -> None:
    (played,) = rounds(plan_of({"name": "dp_sgd", "clipping_norm": 0.3}, batch=3))
    found = evidence_of(played.seen, Runtime(dtype=torch.float64))
    assert isinstance(found, Images)
    assert found.setting.streams
    slow = Images(replace(found.setting, streams=False))
    torch.testing.assert_close(found.scores(slice(0, 20), 8), slow.scores(slice(0, 20), 8), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("defense", [None, {"name": "dp_sgd", "clipping_norm": 0.3}])
def test_a_weight_that_is_used_outside_of_its_layer_is_rehearsed(defense: dict[str, Any] | None) -> None:
    (played,) = rounds(plan_of(defense, batch=3))
    torch.manual_seed(1)
    model = Reused(64, 10)
    sent = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    seen = replace(played.seen, model=model, messages=(replace(played.seen.messages[0], gradients=sent),))
    found = evidence_of(seen, RUN)
    assert isinstance(found, Rehearsed | Images)
    assert not found.setting.streams


@pytest.mark.parametrize("defense", [{"name": "none"}, {"name": "dp_sgd", "noise_multiplier": 0.0}])
def test_dropout_follows_from_the_run_and_leaves_pytorchs_generator_alone(defense: dict[str, Any]) -> None:
    """Each candidate's masks have an address: those that a run resumes with are those that it would have drawn."""
    (played,) = rounds(plan_of(defense, batch=3))
    model = nn.Sequential(nn.Dropout(0.5), played.seen.model)
    gradients = {f"1.{name}": g for name, g in played.seen.gradients.items()}
    seen = replace(played.seen, model=model, mode="train", messages=(GradientMessage(gradients, "gradient"),))
    whole = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        whole.append(evidence_of(seen, RUN).scores(slice(0, 20), 8))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(evidence_of(seen, RUN).scores(slice(7, 20), 8), whole[0][7:])


def test_the_order_of_candidates_says_nothing_and_hangs_on_the_pixels() -> None:
    plan = plan_of(batches=200, n=5)
    prepared = prepare(plan, 0, CPU)
    none = make_defense(plan.scenario[0].defense[0])
    places = [play(prepared, none, unit).truth._Sealed__value.place for unit in range(200)]  # type: ignore[attr-defined]
    counts = torch.bincount(torch.tensor(places), minlength=5)
    assert int(counts.min()) > 20  # 40 each are expected
    assert len(counts) == 5


def test_candidates_are_of_the_targets_class_distinct_and_outside_the_rest_of_the_batch() -> None:
    (played,) = rounds(plan_of(batch=4, n=100))
    g = played.seen.gallery
    assert g is not None
    truth = played.truth._Sealed__value  # type: ignore[attr-defined]
    assert torch.equal(g.images[truth.place], truth.private.images[0])
    assert torch.equal(g.other_images, truth.private.images[1:])
    assert len({x.numpy().tobytes() for x in g.images}) == len(g) == 100
    assert bool((g.targets == truth.private.targets[0]).all())
    others = {x.numpy().tobytes() for x in g.other_images}
    assert not others & {x.numpy().tobytes() for x in g.images}


def test_without_the_grant_there_is_no_gallery_and_no_choice() -> None:
    plan = plan_of()
    threat = plan.threat.model_copy(update={"grants": ["examples"]})
    scenario = plan.scenario[0].model_copy(update={"attack": plan.scenario[0].attack})
    prepared = prepare(plan.model_copy(update={"threat": threat, "scenario": [scenario]}), 0, CPU)
    played = play(prepared, make_defense(scenario.defense[0]), 0)
    assert played.seen.gallery is None
    assert gallery().check(played.seen)
    assert played.truth._Sealed__value.place is None  # type: ignore[attr-defined]


def test_too_few_images_of_a_class_are_said() -> None:
    with pytest.raises(BadInput, match=r"more than the 1[78][0-9] that"):
        rounds(plan_of(n=1000))


def test_a_wrong_choice_is_scored_as_one() -> None:
    (played,) = rounds(plan_of())
    found = drive(gallery(), played.seen, RUN)
    wrong = replace(found, info=dict(found.info) | {"choice": (int(found.info["choice"]) + 1) % 20})
    scored: list[Scored] = [score(f, played, ["psnr"], null=False) for f in (found, wrong)]
    assert [s.identified for s in scored] == [True, False]
    assert {s.candidates for s in scored} == {20}


def test_sums_of_clients_are_attacked_where_they_add_up_and_refused_elsewhere() -> None:
    sums = {"batch": 2, "clients": 3, "cohort": 3, "batches": 2}
    for defense in (None, {"name": "dp_sgd", "noise_multiplier": 1e-3}):
        assert all(identified(p) for p in rounds(plan_of(defense, **sums)))
    told, equal = (
        rounds(plan_of({"name": "dp_sgd", "noise_multiplier": 0.5, "expected_batch": b}, **sums))[0] for b in (None, 2)
    )
    for name, sent in told.seen.gradients.items():
        assert torch.equal(sent, equal.seen.gradients[name])
    ratios = [evidence_of(played.seen, RUN).scores(slice(0, 20), 20) for played in (told, equal)]
    # The sum is the same, however it was divided.
    torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-5, atol=1e-6)
    plan = plan_of({"name": "sign"}, **sums)
    threat = plan.threat.model_copy(update={"grants": [*plan.threat.grants, "cohort"]})
    (played, _) = rounds(plan.model_copy(update={"threat": threat}))
    assert any("set client.cohort = 1" in p for p in gallery().check(played.seen))
    assert any("was told all other images" in w for w in gallery().warnings(played.seen))
