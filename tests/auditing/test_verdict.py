"""Verdicts: each condition at its edge, the order, the gates of negative statements, and what trials are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from frostglass.auditing.cells import expand
from frostglass.auditing.claims import guarantee_of
from frostglass.auditing.plan import Plan, parse_plan
from frostglass.auditing.rows import headline
from frostglass.auditing.run import run_plan
from frostglass.auditing.score import summarise
from frostglass.auditing.scorecard import Cell, ImageScore, Labels, NullRank
from frostglass.auditing.verdict import audit_verdict, trials_of, with_verdicts
from frostglass.auditing.verdict_rules import EXIT_CODES, Evidence, Guarantee, decide, overall
from frostglass.auditing.wording import outcome
from frostglass.core.errors import BadInput
from frostglass.guarantees import rero
from frostglass.guarantees.interval import clopper_pearson
from frostglass.guarantees.summary import bounds
from scenes import small


def bound(gamma: float, total: float | None = None) -> Guarantee:
    return Guarantee(gamma, gamma if total is None else total, "the proof of a test", ("one assumption",))


def evidence(trials: int = 100, successes: int = 0, **more: Any) -> Evidence:
    return Evidence(trials, successes, **({"kappa": 0.01, "tolerance": 0.1} | more))


def test_the_four_verdicts_at_their_edges() -> None:
    lower = clopper_pearson(30, 100)[0]
    assert decide(evidence(successes=30, tolerance=lower - 1e-9)).verdict == "VIOLATED"
    assert decide(evidence(successes=30, tolerance=lower + 1e-9)).verdict == "INCONCLUSIVE"
    assert decide(evidence(successes=30, tolerance=0.9, guarantee=bound(lower - 1e-9, 1.0))).verdict == "BROKEN CLAIM"
    assert decide(evidence(successes=30, tolerance=0.9, guarantee=bound(lower + 1e-9, 1.0))).verdict == "INCONCLUSIVE"
    assert decide(evidence(guarantee=bound(0.1))).verdict == "BOUNDED"
    assert decide(evidence(guarantee=bound(0.1 + 1e-9))).verdict == "INCONCLUSIVE"
    assert decide(evidence(0)).verdict == "INCONCLUSIVE"


def test_violated_and_bounded_together_are_a_broken_claim_and_all_are_reported() -> None:
    found = decide(evidence(successes=30, guarantee=bound(0.05)))
    assert found.holds == ("BROKEN CLAIM", "VIOLATED", "BOUNDED")
    assert found.verdict == "BROKEN CLAIM"
    assert "implementation, the accounting or a stated assumption is wrong" in found.text
    assert "30 of 100 trials succeeded" in found.text


def test_bounded_needs_assumptions_a_clean_linter_and_the_total() -> None:
    assert decide(evidence(guarantee=bound(0.05))).verdict == "BOUNDED"
    assert decide(evidence(guarantee=bound(0.05), linter_errors=1)).verdict == "INCONCLUSIVE"
    assert decide(evidence(guarantee=bound(0.05, total=0.2))).verdict == "INCONCLUSIVE"
    assert decide(evidence(guarantee=Guarantee(0.05, 0.05, "nothing", ()))).verdict == "INCONCLUSIVE"
    assert decide(evidence(0, guarantee=bound(0.05))).verdict == "BOUNDED", "a proof needs no trial"


def test_what_guessing_explains_is_no_violation() -> None:
    """Half of 40 right among two candidates: the lower limit .338 exceeds a tolerance of .1, and shows nothing."""
    guessing = decide(evidence(40, 20, kappa=0.5))
    assert guessing.lower is not None
    assert guessing.lower > 0.1
    assert guessing.verdict == "INCONCLUSIVE"
    assert decide(evidence(40, 40, kappa=0.5)).verdict == "VIOLATED"
    proved = decide(evidence(40, 20, kappa=0.5, proved=20))
    assert proved.verdict == "VIOLATED"
    assert "verified algebraically" in proved.text


def test_one_proved_recovery_is_a_fact() -> None:
    found = decide(evidence(1, 1, proved=1))
    assert found.verdict == "VIOLATED"
    assert "whatever the number of trials" in found.text
    assert decide(evidence(1, 1)).verdict == "INCONCLUSIVE", "one success that is not proved is not enough"


def test_a_few_successes_violate_at_any_n() -> None:
    assert decide(evidence(3, 3)).verdict == "VIOLATED", "lower limit .29 of 3 of 3"


def test_tests_share_the_error() -> None:
    alone, many = decide(evidence(successes=18)), decide(evidence(successes=18, tests=20))
    assert (alone.verdict, many.verdict) == ("VIOLATED", "INCONCLUSIVE")
    assert (many.lower, many.upper) == clopper_pearson(18, 100, 1 - 0.05 / 20)
    assert "shared among 20 tests" in decide(evidence(successes=60, tests=20)).text


def test_what_cannot_be_counted_neither_violates_nor_breaks() -> None:
    found = decide(evidence(successes=100, guarantee=bound(0.2), invalid=("Trials are not independent.",)))
    assert found.verdict == "INCONCLUSIVE"
    assert not found.unsuccessful
    assert "trials are not independent" in found.text


def test_an_upper_limit_is_quoted_only_where_nothing_is_lacking() -> None:
    gated = decide(evidence(lacking=("No positive control passed.",)))
    assert not gated.unsuccessful
    assert "at most" not in gated.text
    assert "says nothing against the attack" in gated.text
    free = decide(evidence())
    assert free.unsuccessful
    assert "at most 0.0362 (two-sided" in free.text


@pytest.mark.parametrize("lacking", [(), ("No positive control passed.",)])
def test_an_attack_that_beats_guessing_is_not_called_unsuccessful_below_the_tolerance(lacking) -> None:
    found = decide(evidence(30, 30, tolerance=1.0, lacking=lacking))
    assert (found.verdict, found.unsuccessful) == ("INCONCLUSIVE", False)
    assert "more often than guessing" in found.text
    assert "at least 0.884" in found.text
    assert "Nothing is shown" not in found.text
    assert "at most" not in found.text


def test_nothing_is_ever_called_safe() -> None:
    for made in (evidence(), evidence(guarantee=bound(0.01)), evidence(successes=50), evidence(1, 1, proved=1)):
        assert "safe" not in decide(made).text.lower()


def test_exit_codes_and_the_total() -> None:
    assert EXIT_CODES == {"BOUNDED": 0, "VIOLATED": 10, "INCONCLUSIVE": 11, "BROKEN CLAIM": 12}
    assert overall([]) == "INCONCLUSIVE"
    assert overall(["BOUNDED", "BOUNDED"]) == "BOUNDED"
    assert overall(["BOUNDED", "INCONCLUSIVE"]) == "INCONCLUSIVE"
    assert overall(["BOUNDED", "VIOLATED"]) == "VIOLATED"
    assert overall(["VIOLATED", "BROKEN CLAIM"]) == "BROKEN CLAIM"


# ---------------------------------------------------------------- from cells


def plan_of(defenses: tuple[str, ...] = ("none",), scenarios: int = 1, **top: Any) -> Plan:
    stages = ("init", "early", "final", "middle")
    made = [
        {
            "name": f"s{i}",
            "model": {"name": "mlp", "stage": stages[i % 4]} | ({"weights": f"{stages[i % 4]}.pt"} if i % 4 else {}),
            "client": {"batch": top.get("batch", 1), "batches": 40},
            "defense": [{"name": d} for d in defenses],
            "attack": [{"name": "linear_exact"}],
        }
        for i in range(scenarios)
    ]
    return parse_plan({"scenario": made, **{k: v for k, v in top.items() if k != "batch"}})


def image(i: int, *, hit: bool = False, p: float | None = 0.001, **more: Any) -> ImageScore:
    null = None if p is None else NullRank(n0=999, p={"ssim": p})
    score = {"psnr": 30.0 if hit else 8.0, "ssim": 0.9 if hit else 0.1, "proved": False}
    return ImageScore(**({"id": f"i{i}", "sha256": f"{i:064x}", "null": null, **score} | more))


def cells_of(plan: Plan, images: dict[str, list[ImageScore]] | list[ImageScore], **more: Any) -> list[Cell]:
    made = []
    for c in expand(plan):
        held = images if isinstance(images, list) else images[f"{c.scenario.name}/{c.defense.label}"]
        fields: dict[str, Any] = {
            "id": c.id, "title": c.title, "scenario": c.scenario.name, "attack": c.attack.name, "status": "done",
            "defense": c.defense.label, "defense_claim": "none", "model": "mlp", "mode": "train", "threat": "t",
            "grants": ["examples"], "upper_bound": False, "batch": c.scenario.client.batch, "batches": 40,
            "update": "gradient", "labels": Labels(source="unused"), "images": held,
        }  # fmt: skip
        made.append(Cell(**(fields | more)))
    return made


def verdicts(plan: Plan, images: Any, **more: Any) -> list[Any]:
    return [c.verdict for c in with_verdicts(plan, cells_of(plan, images, **more))]


def test_a_calibrated_score_counts_and_one_that_any_image_reaches_does_not() -> None:
    plan = plan_of()
    assert verdicts(plan, [image(i, hit=True) for i in range(40)])[0].verdict == "VIOLATED"
    typical = verdicts(plan, [image(i, hit=True, p=0.5) for i in range(40)])[0]
    assert (typical.verdict, typical.successes) == ("INCONCLUSIVE", 0)
    unranked = verdicts(plan, [image(i, hit=True, p=None) for i in range(40)])[0]
    assert unranked.verdict == "INCONCLUSIVE"
    assert "the SSIM of a target could not be calibrated" in unranked.text
    proved = verdicts(plan, [image(i, hit=True, p=None, proved=True) for i in range(40)])[0]
    assert proved.verdict == "VIOLATED"


def test_matching_within_a_batch_uses_up_the_chance() -> None:
    """Chance .05 shared by 4 images: ranks above .0125 are no success, and one target a message is a trial."""
    plan = plan_of(batch=4)
    some = verdicts(plan, [image(i, hit=True, p=0.02) for i in range(160)])[0]
    assert (some.trials, some.successes) == (40, 0)
    all_ = verdicts(plan, [image(i, hit=True, p=0.0124) for i in range(160)])[0]
    assert (all_.trials, all_.successes) == (40, 40)


def test_the_target_of_a_trial_is_fixed_by_the_seed_and_not_by_the_result() -> None:
    plan = plan_of(batch=4)
    rows = [image(i, hit=True) for i in range(160)]
    lost = [row.model_copy(update={"ssim": 0.0}) for row in rows]
    chosen = [r.id for i in range(0, 160, 4) for r in rows[i : i + 4]]
    hits = []
    for place in range(4):
        mixed = [rows[i] if i % 4 == place else lost[i] for i in range(160)]
        hits.append(sum(trials_of(plan, cells_of(plan, mixed)[0]).outcomes))
    assert sum(hits) == 40, "each message has one target, whatever was recovered"
    assert max(hits) < 25
    assert len(chosen) == 160


def test_messages_that_share_images_are_no_independent_trials() -> None:
    plan = plan_of()
    found = verdicts(plan, [image(i % 20, hit=True) for i in range(40)])[0]
    assert found.verdict == "INCONCLUSIVE"
    assert "not independent" in found.text


def test_an_augmented_image_is_known_by_its_name() -> None:
    """Flipped in the second message, it has other pixels."""
    plan = plan_of()
    rows = [image(i, hit=True).model_copy(update={"id": f"i{i % 20}"}) for i in range(40)]
    found = verdicts(plan, rows)[0]
    assert found.verdict == "INCONCLUSIVE"
    assert "not independent" in found.text


def test_one_message_is_one_trial_whatever_is_known_of_its_size() -> None:
    """A recorded message that does not say how many images it holds, eight of which were matched in a pool."""
    plan = plan_of()
    (cell,) = cells_of(plan, [image(i, hit=True) for i in range(8)], batches=1, batch=1, pool=8)
    assert len(trials_of(plan, cell).outcomes) == 1
    assert verdicts(plan, cell.images, batches=1, batch=1, pool=8)[0].verdict == "INCONCLUSIVE"


def test_an_attack_that_returns_many_rows_has_as_many_tries(tmp_path: Path) -> None:
    """The closest of 128 rows of noise is closer than 95 % of other images as often as not."""
    plan = small(
        {"name": "imprint"}, data={"source": "digits"}, model={"name": "imprinted", "options": {}},
        client={"batch": 1, "batches": 3}, defense=[{"name": "noise", "std": 0.01}],
        threat={"grants": ["modified_model"]}, report={"threshold": {"metric": "ssim", "value": 0.0}},
    )  # fmt: skip
    (cell,) = run_plan(parse_plan(plan), tmp_path / "run", device=torch.device("cpu")).cells
    assert cell.rows == 128
    assert min(i.null.p["ssim"] for i in cell.images if i.null is not None) <= 0.05
    assert cell.verdict is not None
    assert cell.verdict.successes == 0
    assert 'grant "examples"' in cell.verdict.text
    exact = plan | {"scenario": [plan["scenario"][0] | {"defense": [{"name": "none"}]}]}
    (undefended,) = run_plan(parse_plan(exact), tmp_path / "exact", device=torch.device("cpu")).cells
    assert undefended.rows is None


def test_a_rank_at_the_level_itself_counts() -> None:
    """2 / 120 is .05 / 3, and written to six digits it is more."""
    plan = plan_of(batch=3)
    at = NullRank(n0=119, p={"ssim": round(2 / 120, 6)})
    above = NullRank(n0=118, p={"ssim": round(2 / 119, 6)})
    for null, hits in ((at, 40), (above, 0)):
        found = trials_of(plan, cells_of(plan, [image(i, hit=True, null=null) for i in range(120)])[0])
        assert sum(found.outcomes) == hits


def test_a_threshold_on_a_metric_without_a_rank_is_told_so() -> None:
    report = {"metrics": ["psnr", "ssim", "iip_pixels"], "threshold": {"metric": "iip_pixels", "value": 1.0}}
    found = verdicts(plan_of(report=report), [image(i, extra={"iip_pixels": float(i > 3)}) for i in range(40)])[0]
    assert found.verdict == "INCONCLUSIVE"
    assert "iip_pixels compares with a pool and takes no rank" in found.text
    assert "other images of" not in found.text


def test_the_same_weights_are_one_checkpoint_whatever_they_are_called() -> None:
    won, lost = [image(i, hit=True) for i in range(40)], [image(i) for i in range(40)]
    held = {f"s{i}/{d}": won if d == "none" else lost for i in range(3) for d in ("none", "noise")}

    def lacking(models: list[dict[str, str]]) -> list[str]:
        made = [
            {"name": f"s{i}", "model": {"name": "mlp", **m}, "client": {"batch": 1, "batches": 40},
             "defense": [{"name": "none"}, {"name": "noise"}], "attack": [{"name": "linear_exact"}]}
            for i, m in enumerate(models)
        ]  # fmt: skip
        return next(v for v in verdicts(parse_plan({"scenario": made}), held) if v.role == "test").lacking

    assert "at 1 checkpoint (" in lacking([{"stage": s} for s in ("init", "early", "final")])[0]
    assert lacking([{}, {"weights": "epoch1/model.pt"}, {"weights": "epoch9/model.pt"}]) == []


def test_a_negative_statement_needs_trials_checkpoints_and_a_control() -> None:
    lost, won = [image(i) for i in range(40)], [image(i, hit=True) for i in range(40)]
    defended = {"s0/noise": lost, "s1/noise": lost, "s2/noise": lost}
    control = {"s0/none": won, "s1/none": lost, "s2/none": lost}
    both = ("none", "noise")
    full = verdicts(plan_of(both, 3), defended | control)
    tests = [v for v in full if v.role == "test"]
    assert len(tests) == 3
    assert all(v.unsuccessful and not v.lacking for v in tests)
    no_control = [v for v in verdicts(plan_of(both, 3), defended | dict.fromkeys(control, lost)) if v.role == "test"]
    assert all("positive control" in v.text and not v.unsuccessful for v in no_control)
    two = [v for v in verdicts(plan_of(both, 2), defended | control) if v.role == "test"]
    assert all("2 checkpoints (early, init), not at 3" in v.text for v in two)
    few = verdicts(plan_of(both, 3), {k: v[:29] for k, v in (defended | control).items()})
    assert all("29 trials, and 30 are the least" in v.text for v in few if v.role == "test")
    gap = verdicts(plan_of(both, 3), defended | control, objective=0.9, objective_at_truth=0.1)
    assert all("above the objective of the truth" in v.text for v in gap if v.role == "test")


def test_the_verdict_says_what_it_was_decided_on_and_that_other_pictures_were_recognisable() -> None:
    """Three of four images reach the threshold; the one that was drawn does not, and could not have counted."""
    plan = plan_of(batch=4)
    none = NullRank(n0=0, p={})
    lost = trials_of(plan, cells_of(plan, [image(i, ssim=0.1 * i, null=none) for i in range(4)])[0]).about[0]
    place = int(lost.split("image ")[2].split(" of 4")[0]) - 1
    assert f"has SSIM {0.1 * place:.3g} (SSIM at least 0.5 is needed)" in lost
    rows = [image(i, hit=i != place, null=none) for i in range(4)]
    found = verdicts(plan, rows, objective=0.9, objective_at_truth=0.1)[0]
    assert (found.verdict, found.successes, found.trials) == ("INCONCLUSIVE", 0, 1)
    assert found.text.startswith("3 of 4 images are recognisable (SSIM at least 0.5), but how often that happens")
    assert f"drawn by the seed: image {place + 1} of 4, which has SSIM 0.1" in found.text
    assert "takes 99 other images of the target's class to compare with, and the source holds 0" in found.text
    assert "as it rests on 1 trial, and 30 are the least" in found.text
    assert "the attack failed" not in found.text
    absent = [image(i, hit=True, null=none) for i in range(4)]
    absent[place] = image(place, psnr=None, ssim=None, null=None)
    assert "which has no picture" in verdicts(plan, absent)[0].text
    typical = verdicts(plan, [image(i, hit=True, p=0.5) for i in range(8)])[0]
    assert "2 of these 2 are recognisable" in typical.text
    assert "As close to other images of the class, so not counted: 2 of 2" in typical.text


def test_controls_and_attacks_beside_the_primary_one_have_no_part_in_the_total() -> None:
    won, lost = [image(i, hit=True) for i in range(40)], [image(i) for i in range(40)]
    plan = plan_of(("none", "noise"))
    cells = with_verdicts(plan, cells_of(plan, {"s0/none": won, "s0/noise": lost}))
    assert [c.verdict.role for c in cells if c.verdict] == ["control", "test"]
    assert audit_verdict(cells).verdict == "INCONCLUSIVE"
    assert audit_verdict(cells).tests == 1
    bare = plan_of()
    alone = with_verdicts(bare, cells_of(bare, won))
    assert audit_verdict(alone).verdict == "VIOLATED"
    assert audit_verdict(alone).exit_code == 10
    named = parse_plan(
        {"scenario": [{"attack": [{"name": "linear_exact"}, {"name": "thaw"}]}],
         "threat": {"grants": ["examples", "labels"]}, "verdict": {"primary": "thaw"}}
    )  # fmt: skip
    assert [c.verdict.role for c in with_verdicts(named, cells_of(named, won)) if c.verdict] == ["exploratory", "test"]


def test_a_failed_cell_keeps_the_total_from_being_bounded() -> None:
    plan = plan_of(("dp_sgd",), verdict={"tolerance": 0.9})
    done = with_verdicts(plan, cells_of(plan, [image(i) for i in range(40)]))
    assert audit_verdict(done).verdict == "BOUNDED"
    failed = with_verdicts(plan, cells_of(plan, [], status="failed"))
    assert audit_verdict(failed).verdict == "INCONCLUSIVE"
    assert "1 of them was not finished" in audit_verdict(failed).text


def test_what_a_cell_has_proved_before_it_failed_counts_in_the_total() -> None:
    plan = plan_of()
    cells = with_verdicts(plan, cells_of(plan, [image(0, hit=True, proved=True)], status="failed"))
    assert audit_verdict(cells).verdict == "VIOLATED"
    assert "verified algebraically" in audit_verdict(cells).text


def test_identification_has_its_own_chance() -> None:
    plan = plan_of(verdict={"event": "identified", "tolerance": 0.1})
    rows = [image(i, identified=i < 12, candidates=50) for i in range(40)]
    found = verdicts(plan, rows)[0]
    assert (found.kappa, found.successes, found.trials) == (0.02, 12, 40)
    assert "among 50 equally likely candidates" in found.event
    mixed = [r.model_copy(update={"candidates": 50 + i % 2}) for i, r in enumerate(rows)]
    assert "no common chance" in verdicts(plan, mixed)[0].text
    assert "No image was named" in " ".join(trials_of(plan, cells_of(plan, [image(0)])[0]).invalid)
    below = plan_of(verdict={"event": "identified", "tolerance": 0.1, "chance": 0.01})
    assert "below the chance" in verdicts(below, [image(i, identified=False, candidates=5) for i in range(40)])[0].text


@pytest.mark.parametrize(("scenarios", "word"), [(1, "identified"), (4, "nothing shown by this attack")])
def test_the_headline_of_a_game_and_its_verdict_decide_alike(scenarios: int, word: str) -> None:
    """4 of 40 among 45 candidates: beyond guessing at 95 %, and not where four tests share the error."""
    plan = plan_of(scenarios=scenarios, verdict={"event": "identified", "tolerance": 0.025, "chance": 0.01})
    rows = [image(i, identified=i < 4, candidates=45) for i in range(40)]
    played = summarise([[row] for row in rows], plan.report.threshold)
    cells = with_verdicts(plan, cells_of(plan, rows, summary=played))
    for cell in cells:
        assert cell.verdict is not None
        assert outcome(cell).word == word
        assert (cell.verdict.verdict == "VIOLATED") is (word == "identified")
        assert ("shared among 4 tests" in outcome(cell).sentence) is (scenarios > 1)
    assert ("named in 4 of 40 messages" in headline(cells)) is (word == "identified")


def test_naming_an_image_that_stands_twice_in_its_message_proves_nothing() -> None:
    """Decoys are none of the message's images, so whoever knows the other copy names it without the update."""
    plan = plan_of(verdict={"event": "identified", "tolerance": 0.1}, batch=2)
    rows = [row for i in range(20) for row in (image(2 * i, identified=True, candidates=50), image(2 * i + 1))]
    played = summarise([rows[i : i + 2] for i in range(0, 40, 2)], plan.report.threshold)
    (fair,) = with_verdicts(plan, cells_of(plan, rows, summary=played))
    assert fair.verdict is not None
    assert fair.verdict.verdict == "VIOLATED"
    rows[1] = rows[1].model_copy(update={"sha256": rows[0].sha256})
    (cell,) = with_verdicts(plan, cells_of(plan, rows, summary=played))
    assert cell.verdict is not None
    assert cell.verdict.verdict == "INCONCLUSIVE"
    assert "stands twice in its message" in outcome(cell).sentence


def test_a_game_that_the_verdict_cannot_count_is_no_headline() -> None:
    plan = plan_of(verdict={"event": "identified", "tolerance": 0.1})
    rows = [image(0, identified=True, candidates=50) for _ in range(40)]
    played = summarise([[row] for row in rows], plan.report.threshold)
    (cell,) = with_verdicts(plan, cells_of(plan, rows, summary=played))
    assert cell.verdict is not None
    assert cell.verdict.verdict == "INCONCLUSIVE"
    assert outcome(cell).tone == "nothing"
    assert "cannot be counted: The same image is in several messages" in outcome(cell).sentence
    assert "named" not in headline([cell])


# ---------------------------------------------------------------- guarantees


def only_cell(plan: Plan) -> Any:
    return next(iter(expand(plan)))


def test_the_proof_of_a_defence_and_its_steps() -> None:
    one = {"name": "dp_sgd", "noise_multiplier": 2.0}
    plan = parse_plan(small(defense=[one]))
    found = guarantee_of(plan, only_cell(plan), 0.05)
    assert found is not None
    assert found.observed == found.total == rero.gaussian(0.05, 2.0)
    many = parse_plan(small(defense=[one], client={"update": "delta", "local_steps": 4}))
    more = guarantee_of(many, only_cell(many), 0.05)
    assert more is not None
    assert more.observed == rero.gaussian(0.05, 2.0, 4)
    bare = parse_plan(small())
    assert guarantee_of(bare, only_cell(bare), 0.05) is None
    heuristic = parse_plan(small(defense=[{"name": "instahide", "k": 2}]))
    assert guarantee_of(heuristic, only_cell(heuristic), 0.05) is None


def test_every_message_that_a_claim_counts_has_all_its_local_steps() -> None:
    """Three messages of four steps: sqrt(12) / sigma. Sampled, they are three draws, not twelve."""
    claim = {"unit": "image", "adjacency": "add_remove", "noise_multiplier": 8.0, "releases": 3}
    client = {"update": "delta", "local_steps": 4, "batch": 2}

    def gamma(rate: float) -> tuple[float, float]:
        claimed = {"claim": claim | {"sampling_rate": rate}}
        plan = parse_plan(small(client=client, defense=[{"name": "dp_sgd"}], verdict=claimed))
        found = guarantee_of(plan, only_cell(plan), 0.1)
        assert found is not None
        return found.observed, found.total

    observed, total = gamma(1.0)
    assert observed == pytest.approx(rero.gaussian(0.1, 8.0, 4))
    assert total == pytest.approx(rero.gaussian(0.1, 8.0, 12))
    q = 0.5
    threshold = norm.isf(0.1)  # no less than what the test of three messages' sum gets, each there by a coin
    counts = np.arange(4)
    least = float((binom.pmf(counts, 3, q) * norm.sf(threshold - counts * 2 / 8 / math.sqrt(3))).sum())
    assert max(gamma(1.0)[0], least) <= gamma(q)[1] < total


def test_a_claim_is_simulated_once_for_all_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated: list[object] = []

    def watched(*given: Any, **named: Any) -> Any:
        simulated.append(given)
        return bounds(*given, **named)

    monkeypatch.setattr("frostglass.auditing.claims.bounds", watched)
    claim = {"unit": "image", "adjacency": "add_remove", "noise_multiplier": 1.5, "releases": 7, "sampling_rate": 0.01}
    plan = parse_plan(small(defense=[{"name": "noise"}, {"name": "sign"}], verdict={"claim": claim}))
    first, second = (guarantee_of(plan, cell, 0.07) for cell in expand(plan))
    assert first == second
    assert len(simulated) == 1


def test_a_claim_counts_for_all_releases_and_sampling_does_not_hide_one_message() -> None:
    claim = {"unit": "image", "adjacency": "add_remove", "noise_multiplier": 1.0, "releases": 50, "sampling_rate": 0.01}
    plan = parse_plan(small(defense=[{"name": "noise"}], verdict={"claim": claim}))
    found = guarantee_of(plan, only_cell(plan), 0.01)
    assert found is not None
    assert found.observed == pytest.approx(rero.gaussian(0.01, 1.0))
    assert found.total == found.observed, "the sampled total is below what one message shows"
    unsampled = parse_plan(small(defense=[{"name": "noise"}], verdict={"claim": claim | {"sampling_rate": 1.0}}))
    whole = guarantee_of(unsampled, only_cell(unsampled), 0.01)
    assert whole is not None
    assert whole.total == pytest.approx(rero.gaussian(0.01, 1.0, 50))
    exchanged = parse_plan(
        small(defense=[{"name": "noise"}], verdict={"claim": claim | {"adjacency": "replace_one", "releases": 1}})
    )
    two = guarantee_of(exchanged, only_cell(exchanged), 0.01)
    assert two is not None
    assert two.observed == pytest.approx(rero.gaussian(0.01, 0.5))
    epsilon = {"unit": "image", "adjacency": "add_remove", "epsilon": 1.0, "delta": 1e-5}
    pure = parse_plan(small(defense=[{"name": "noise"}], verdict={"claim": epsilon}))
    third = guarantee_of(pure, only_cell(pure), 0.01)
    assert third is not None
    assert third.observed == pytest.approx(0.01 * math.e + 1e-5)
    undefended = parse_plan(small(verdict={"claim": epsilon}))
    assert guarantee_of(undefended, only_cell(undefended), 0.01) is None


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        ({"tolerance": 0.01}, "verdict.tolerance: 0.01 is below verdict.chance = 0.05"),
        ({"chance": 0.0}, "verdict.chance: 0 must be strictly between 0 and 1"),
        ({"chance": 1.0}, "verdict.chance: 1 must be strictly between 0 and 1"),
        ({"confidence": 1.0}, "verdict.confidence: 1 must be strictly"),
        ({"tolerance": 1.5}, "verdict.tolerance: 1.5 must be above 0 and at most 1"),
        ({"primary": "gallery"}, "verdict.primary: 'gallery' is no attack of this plan"),
        ({"claim": {"adjacency": "add_remove", "noise_multiplier": 1.0}}, "verdict.claim.unit: missing"),
        ({"claim": {"unit": "image", "noise_multiplier": 1.0}}, "verdict.claim.adjacency: missing"),
        ({"claim": {"unit": "image", "adjacency": "add_remove"}}, "give either it or epsilon"),
        (
            {"claim": {"unit": "image", "adjacency": "add_remove", "noise_multiplier": 0.0}},
            "verdict.claim.noise_multiplier: 0 must be above 0",
        ),
        (
            {"claim": {"unit": "image", "adjacency": "add_remove", "noise_multiplier": 1.0, "releases": 0}},
            "verdict.claim.releases: 0 must be at least 1",
        ),
        (
            {"claim": {"unit": "image", "adjacency": "add_remove", "noise_multiplier": 1.0, "sampling_rate": 1.5}},
            "verdict.claim.sampling_rate: 1.5 must be above 0 and at most 1",
        ),
        (
            {"claim": {"unit": "image", "adjacency": "add_remove", "epsilon": 1.0, "delta": 0.0}},
            "verdict.claim.delta: 0 must be strictly between",
        ),
        ({"event": "seen"}, "verdict.event: 'seen' is not valid"),
    ],
)
def test_what_no_verdict_could_be_given_on_is_refused(verdict: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as wrong:
        parse_plan(small(verdict=verdict))
    assert sentence in "\n".join(wrong.value.problems)


@pytest.mark.parametrize("gallery", [2, 3])
def test_a_game_that_guessing_wins_too_often_is_refused(gallery: int) -> None:
    top: dict[str, Any] = {"threat": {"grants": ["examples", "gallery"], "gallery": gallery}}
    with pytest.raises(BadInput, match=rf"threat.gallery: guessing among {gallery} candidates .* raise it to 4 at"):
        parse_plan(
            small({"name": "gallery"}, verdict={"event": "identified", "tolerance": 0.25, "chance": 0.01}, **top)
        )


def test_a_run_carries_its_verdict_everywhere(tmp_path: Path) -> None:
    plan = small(
        {"name": "linear_exact"}, data={"source": "digits"}, client={"batch": 1, "batches": 3},
        defense=[{"name": "none"}, {"name": "dp_sgd", "noise_multiplier": 8.0}], verdict={"tolerance": 0.2},
        report={"null": False},
    )  # fmt: skip
    report = run_plan(parse_plan(plan), tmp_path / "run", device=torch.device("cpu"))
    control, test = (c.verdict for c in report.cells)
    assert control is not None
    assert test is not None
    assert (control.verdict, control.role, control.proved) == ("VIOLATED", "control", 3)
    assert (test.verdict, test.role) == ("BOUNDED", "test")
    assert test.gamma == pytest.approx(rero.gaussian(0.05, 8.0))
    assert report.scorecard.verdict is not None
    assert report.scorecard.verdict.exit_code == 0
    page = report.html.read_text(encoding="utf-8")
    assert "BOUNDED" in page
    assert test.text.split(";")[0] in page
    assert "Verdict: BOUNDED over 1 test" in str(report)
    assert "BOUNDED" in (tmp_path / "run" / "events.jsonl").read_text()


def test_the_identification_game_from_end_to_end(tmp_path: Path) -> None:
    """The attack `gallery`, the bound of DP-SGD, and the words of the report, in one real run."""
    plan = small(
        {"name": "gallery"}, data={"source": "digits"}, client={"batch": 1, "batches": 30},
        defense=[{"name": "none"}, {"name": "dp_sgd", "noise_multiplier": 1.0}],
        threat={"grants": ["examples", "gallery", "defence"], "gallery": 20},
        verdict={"event": "identified", "tolerance": 0.3}, report={"null": False},
    )  # fmt: skip
    report = run_plan(parse_plan(plan), tmp_path / "run", device=torch.device("cpu"))
    control, test = report.cells
    assert control.verdict is not None
    assert test.verdict is not None
    assert (control.verdict.verdict, control.verdict.kappa, control.verdict.trials) == ("VIOLATED", 0.05, 30)
    assert test.verdict.gamma == pytest.approx(rero.gaussian(0.05, 1.0))
    assert "BROKEN CLAIM" not in test.verdict.holds
    assert test.verdict.lower is not None
    assert test.verdict.lower <= test.verdict.gamma
    assert "the right one of 20 candidates named in 30 of 30 messages (chance 0.05)" in report.headline
    assert "named among 20 candidates" in str(report)
    assert "identified" in report.html.read_text(encoding="utf-8")


def test_noisy_encodings_have_a_bound_too_with_weak_constants(tmp_path: Path) -> None:
    plan = small(
        {"name": "linear_exact"}, data={"source": "digits"}, client={"batch": 4, "batches": 1},
        defense=[{"name": "dp_instahide", "k": 2, "std": 4.0}], verdict={"tolerance": 0.9},
    )  # fmt: skip
    (cell,) = run_plan(parse_plan(plan), tmp_path / "run", device=torch.device("cpu")).cells
    assert cell.verdict is not None
    mu = math.sqrt(2) * math.sqrt(64) / 2 / 4.0  # two encodings hold an image, each moves by sqrt(d) / k
    assert cell.verdict.gamma == pytest.approx(rero.gdp(0.05, mu))
    assert any("labels are not private" in a for a in cell.verdict.assumptions)
