"""What every registered metric must hold to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from frostglass.auditing.metrics.registry import METRICS, Metric, MetricContext, NotAvailable
from frostglass.core.randomness import Rng
from frostglass.vision import datasets, networks

N = 4


@pytest.fixture(params=METRICS.names())
def metric(request: pytest.FixtureRequest) -> Metric:
    made = METRICS[request.param].make()
    try:
        probe = torch.zeros(1, 3, side(made), side(made))
        made.values(probe, probe, context(probe, [0]))
    except NotAvailable as why:
        pytest.skip(f"{made.name}: {why}")
    return made


def side(metric: Metric) -> int:
    return max(32, metric.least_side)


def context(pool: Tensor, index: list[int]) -> MetricContext:
    _, channels, _, size = pool.shape
    model = networks.build("small_bn_cnn", classes=10, channels=channels, size=size, rng=Rng.from_seed(0))
    return MetricContext(pool, torch.tensor(index), model)


def scores(metric: Metric, found: Tensor, truth: Tensor, rows: list[int] | None = None) -> Tensor:
    """`truth` are the rows of the pool named, the first ones if none are."""
    pool = datasets.load("photos", size=truth.shape[-1]).images
    return metric.values(found, truth, context(pool, list(range(len(truth))) if rows is None else rows))


def pair(metric: Metric) -> tuple[Tensor, Tensor]:
    """The more noise the later the image."""
    truth = datasets.load("photos", size=side(metric), rows=range(N)).images
    noise = Rng.from_seed(0).normal(truth.shape)
    amount = torch.tensor([0.02, 0.05, 0.1, 0.2])[:, None, None, None]
    return (truth + amount * noise).clamp(0, 1), truth


def test_one_finite_value_an_image(metric: Metric) -> None:
    found = scores(metric, *pair(metric))
    assert (found.shape, found.dtype) == ((N,), torch.float64)
    assert bool(found.isfinite().all())


def test_it_is_deterministic_and_leaves_its_inputs_alone(metric: Metric) -> None:
    found, truth = pair(metric)
    before = found.clone(), truth.clone()
    assert torch.equal(scores(metric, found, truth), scores(metric, found, truth))
    assert torch.equal(found, before[0])
    assert torch.equal(truth, before[1])


def test_permuting_the_images_permutes_the_scores(metric: Metric) -> None:
    found, truth = pair(metric)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(scores(metric, found[order], truth[order], order), scores(metric, found, truth)[order])


def test_more_noise_scores_worse_and_identity_scores_best(metric: Metric) -> None:
    found, truth = pair(metric)
    sign = 1 if metric.higher_is_closer else -1
    held, best = sign * scores(metric, found, truth), sign * scores(metric, truth, truth)
    if metric.needs_context:  # found or not found: noise of this size may cost nothing
        assert bool((best >= held.max()).all())
        return
    assert bool((best > held.max()).all())
    one = pair(metric)[1][:1].expand(N, -1, -1, -1)
    noisy = (one + (found - truth)).clamp(0, 1)
    assert bool((sign * scores(metric, noisy, one)).diff().lt(0).all())


def test_a_score_does_not_depend_on_the_other_images(metric: Metric) -> None:
    found, truth = pair(metric)
    alone = torch.cat([scores(metric, found[i : i + 1], truth[i : i + 1], [i]) for i in range(N)])
    torch.testing.assert_close(alone, scores(metric, found, truth))


def test_grey_images_are_scored_too(metric: Metric) -> None:
    found, truth = (t.mean(1, keepdim=True) for t in pair(metric))
    pool = datasets.load("photos", size=truth.shape[-1]).images.mean(1, keepdim=True)
    assert metric.values(found, truth, context(pool, list(range(N)))).isfinite().all()


@pytest.mark.parametrize("name", METRICS.names())
def test_the_docs_describe_it(name: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    (line,) = [row for row in text.splitlines() if row.startswith(f"| `{name}` |")]
    metric = METRICS[name].make()
    assert ("higher" if metric.higher_is_closer else "lower") in line
    assert metric.least_side == 1 or f"| {metric.least_side} |" in line
