"""Wrong implementations of differential privacy are caught by the real verdicts, and their correct twins are not.

The game is a canary gallery: N gradients at right angles, one of which is in the message, and the attacker knows all of
them. Then the best test is the greatest inner product, and the theorem is nearly reached.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from frostglass.auditing.cells import expand
from frostglass.auditing.plan import Plan, parse_plan
from frostglass.auditing.scorecard import Cell, ImageScore, Labels, Verdict
from frostglass.auditing.verdict import with_verdicts
from frostglass.core.randomness import Rng
from frostglass.guarantees import rero

N, TRIALS, SIGMA, CLIP = 100, 200, 1.0, 1.0
RAW = 8.0
"""Norm of a gradient before clipping."""

Client = Callable[[np.ndarray, Rng], np.ndarray]
"""(gradient of each message [rounds, d], key of the noise) -> what is sent [rounds, d]."""


def clipped(gradients: np.ndarray, norm: float) -> np.ndarray:
    size = np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients * np.minimum(1.0, norm / np.maximum(size, 1e-30))


def noise(shape: tuple[int, ...], key: Rng) -> np.ndarray:
    return SIGMA * CLIP * key.numpy().standard_normal(shape)


def correct(gradients: np.ndarray, key: Rng) -> np.ndarray:
    return clipped(gradients, CLIP) + noise(gradients.shape, key)


def clip_too_wide(gradients: np.ndarray, key: Rng) -> np.ndarray:
    return clipped(gradients, 4 * CLIP) + noise(gradients.shape, key)


def noise_first(gradients: np.ndarray, key: Rng) -> np.ndarray:
    return clipped(gradients + noise(gradients.shape, key), CLIP)


def same_noise(gradients: np.ndarray, key: Rng) -> np.ndarray:
    return clipped(gradients, CLIP) + noise(gradients.shape[1:], key)  # one draw for all rounds


def known_seed(gradients: np.ndarray, key: Rng) -> np.ndarray:
    return clipped(gradients, CLIP) + noise(gradients.shape, Rng.from_seed(1234))


def play(client: Client, seed: int, rounds: int = 1, attack: str = "sum", candidates: int = N) -> list[bool]:
    """Whether the target is named in each trial; target and noise are drawn anew."""
    root = Rng.from_seed(seed, "canaries")
    basis = np.eye(rounds * candidates)
    shapes = basis.reshape(rounds, candidates, -1) * RAW  # other directions in every round: the model has moved on
    outcomes = []
    for t in range(TRIALS):
        target = int(root.at("target", t).integers(candidates, (1,)))
        seen = client(shapes[:, target], root.at("noise", t))
        if attack == "difference":
            seen = np.stack([seen[0] - seen[1], seen[1] - seen[0]])
        if attack == "seed":
            seen = seen - noise(seen.shape, Rng.from_seed(1234))
        scores = np.einsum("rnd,rd->n", shapes, seen)
        outcomes.append(int(scores.argmax()) == target)
    return outcomes


def plan_for(releases: int) -> Plan:
    claim = {"unit": "image", "adjacency": "add_remove", "noise_multiplier": SIGMA}
    client = {"update": "delta", "local_steps": releases} if releases > 1 else {}
    return parse_plan(
        {
            "scenario": [
                {
                    "model": {"name": "mlp"},
                    "client": {"batch": 1, "batches": TRIALS, **client},
                    "defense": [{"name": "dp_sgd", "noise_multiplier": SIGMA}],
                    "attack": [{"name": "linear_exact"}],
                }
            ],
            "verdict": {"event": "identified", "tolerance": 0.95, "claim": claim | {"releases": releases}},
        }
    )


def judged(outcomes: list[bool], releases: int = 1) -> Verdict:
    plan = plan_for(releases)
    own = next(iter(expand(plan)))
    rows = [
        ImageScore(id=str(i), sha256=f"{i:064x}", psnr=None, ssim=None, proved=False, identified=hit, candidates=N)
        for i, hit in enumerate(outcomes)
    ]
    cell = Cell(
        id=own.id, title=own.title, scenario=own.scenario.name, attack="gallery", defense="dp_sgd",
        defense_claim="proof", model="mlp", mode="train", threat="t", grants=[], upper_bound=False, batch=1,
        batches=TRIALS, update="gradient", status="done", labels=Labels(source="unused"), images=rows,
    )  # fmt: skip
    found = with_verdicts(plan, [cell])[0].verdict
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("client", "rounds", "attack"),
    [
        (clip_too_wide, 1, "sum"),
        (noise_first, 1, "sum"),
        (same_noise, 2, "difference"),
        (known_seed, 1, "seed"),
    ],
)
def test_a_wrong_implementation_is_a_broken_claim(client: Client, rounds: int, attack: str) -> None:
    for seed in range(3):
        found = judged(play(client, seed, rounds, attack), rounds)
        assert found.verdict == "BROKEN CLAIM", found.text
        assert found.lower is not None
        assert found.gamma is not None
        assert found.lower > found.gamma


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_correct_twin_is_not_flagged_in_twenty_repetitions(rounds: int) -> None:
    gamma = rero.gaussian(1 / N, SIGMA, rounds)
    rates = []
    for seed in range(20):
        outcomes = play(correct, seed, rounds)
        found = judged(outcomes, rounds)
        assert "BROKEN CLAIM" not in found.holds, found.text
        assert found.gamma == pytest.approx(gamma)
        rates.append(sum(outcomes) / TRIALS)
    assert gamma / 2 <= float(np.mean(rates)) <= gamma, "the attack is close to the bound, and below it"


def test_a_slight_mistake_is_beyond_so_few_trials() -> None:
    """A clip 5 % too wide: the audit sees nothing, and what it then says rests on the proof and its assumptions."""
    found = judged(play(lambda g, k: clipped(g, 1.05 * CLIP) + noise(g.shape, k), 0))
    assert found.verdict == "BOUNDED"
    assert any("clipped" in a for a in found.assumptions)


def test_the_same_difference_is_no_help_against_fresh_noise() -> None:
    found = judged(play(correct, 0, 2, "difference"), 2)
    assert "BROKEN CLAIM" not in found.holds
