"""What every registered metric must hold to."""

from __future__ import annotations

import pytest
import torch

from frostglass.auditing.metrics.registry import METRICS, Metric
from frostglass.core.randomness import Rng
from frostglass.vision import datasets

N = 4


@pytest.fixture(params=METRICS.names())
def metric(request: pytest.FixtureRequest) -> Metric:
    return METRICS[request.param].make()


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    truth = datasets.load("photos", size=32, rows=range(N)).images
    noise = Rng.from_seed(0).normal(truth.shape)
    amount = torch.tensor([0.02, 0.05, 0.1, 0.2])[:, None, None, None]
    return (truth + amount * noise).clamp(0, 1), truth


def test_one_value_an_image(metric: Metric) -> None:
    assert metric.score(*pair()).shape == (N,)


def test_permuting_the_images_permutes_the_scores(metric: Metric) -> None:
    found, truth = pair()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(metric.score(found[order], truth[order]), metric.score(found, truth)[order])


def test_more_noise_scores_worse_and_identity_scores_best(metric: Metric) -> None:
    found, truth = pair()
    scores = metric.score(found, truth) * (1 if metric.higher_is_closer else -1)
    best = metric.score(truth, truth) * (1 if metric.higher_is_closer else -1)
    assert bool((best > scores.max()).all())
    assert float(scores[0]) > float(scores[3])


def test_a_score_does_not_depend_on_the_other_images(metric: Metric) -> None:
    found, truth = pair()
    alone = torch.cat([metric.score(found[i : i + 1], truth[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(alone, metric.score(found, truth))
