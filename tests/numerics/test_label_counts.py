"""Count estimators: the identity, permutations of classes, whole numbers, and what is said without signal."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frostglass.numerics import label_counts, label_learn, label_likelihood, label_pool
from frostglass.numerics.label_counts import Head


def head_of(
    counts: Tensor, *, width: int = 16, gain: float = 0.3, noise: float = 0.3, seed: int = 0
) -> tuple[Head, Tensor, Tensor]:
    """(head, features, labels) of random positive features with labels that have nothing to do with them."""
    made = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    weight = gain * torch.randn(len(counts), width, generator=made, dtype=torch.float64)
    bias = 0.1 * torch.randn(len(counts), generator=made, dtype=torch.float64)
    spread = torch.randn(len(labels), width, generator=made, dtype=torch.float64)
    features = (1 + noise * spread).clamp_min(0)
    return gradient(weight, bias, features, labels), features, labels


def gradient(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> Head:
    error = torch.softmax(features @ weight.T + bias, 1) - torch.nn.functional.one_hot(labels, len(weight))
    return Head(weight, bias, error.T @ features / len(labels), error.mean(0), len(labels))


whole_counts = st.lists(st.integers(0, 7), min_size=3, max_size=10).filter(lambda c: sum(c) > 0)


@settings(deadline=None, max_examples=40)
@given(whole_counts, st.integers(0, 3))
def test_least_squares_is_exact_where_all_features_agree(counts: list[int], seed: int) -> None:
    truth = torch.tensor(counts, dtype=torch.float64)
    head, _, _ = head_of(truth, noise=0.0, seed=seed)
    for posterior in (label_counts.posterior_observed(head), None):
        if posterior is None:
            logits = head.weight.sum(1) + head.bias
            posterior = torch.softmax(logits, 0).expand(len(truth), -1)
        found = label_counts.least_squares_counts(head.grad_bias, posterior, head.examples, ridge=1e-8)
        assert torch.equal(found.counts, truth)
        assert found.residual < 1e-3


@settings(deadline=None, max_examples=25)
@given(whole_counts, st.integers(0, 3), st.randoms(use_true_random=False))
def test_permuting_the_classes_permutes_the_counts(counts: list[int], seed: int, random: object) -> None:
    truth = torch.tensor(counts, dtype=torch.float64)
    head, _, _ = head_of(truth, seed=seed)
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    moved = Head(head.weight[order], head.bias[order], head.grad_weight[order], head.grad_bias[order], head.examples)
    here, there = (
        label_counts.least_squares_counts(h.grad_bias, label_counts.posterior_observed(h), h.examples)
        for h in (head, moved)
    )
    assert torch.allclose(here.estimate[order], there.estimate, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-2, 2), min_size=2, max_size=8), st.integers(1, 48), st.sampled_from([1e-6, 1e-2, 1.0, 100.0])
)
def test_least_squares_counts_are_whole_and_add_up_whatever_the_gradient(
    values: list[float], examples: int, ridge: float
) -> None:
    bias = torch.tensor(values, dtype=torch.float64)
    posterior = label_counts.posterior_uniform(len(values))
    found = label_counts.least_squares_counts(bias, posterior, examples, ridge=ridge)
    assert int(found.counts.sum()) == examples
    assert bool((found.counts >= 0).all())
    assert torch.equal(found.counts, found.counts.round())


def test_without_signal_the_ridge_falls_back_to_the_guess() -> None:
    """A saturated network: M is the identity, the gradient zero, and nothing can be known."""
    found = label_counts.least_squares_counts(torch.zeros(5).double(), torch.eye(5).double(), 10)
    assert torch.allclose(found.estimate, torch.full((5,), 2.0).double(), atol=1e-6)
    assert torch.equal(found.counts, label_counts.guess(5, 10))


def test_the_mean_feature_of_one_image_is_its_feature() -> None:
    head, features, _ = head_of(torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(label_counts.mean_feature(head), features[0])


def test_a_missing_bias_gradient_is_replaced_by_row_sums() -> None:
    head, features, _ = head_of(torch.tensor([2.0, 0.0, 3.0, 1.0]), noise=0.0)
    estimate = label_counts.bias_gradient(head.grad_weight, float(features.sum(1).mean()))
    assert torch.allclose(estimate, head.grad_bias)


def test_classes_without_an_image_get_the_mean_posterior() -> None:
    p = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.3, 0.2]])
    m = label_counts.posterior_measured(p, torch.tensor([0, 0]))
    assert torch.allclose(m, p.double().mean(0).expand(3, -1))
    assert torch.allclose(m.sum(1), torch.ones(3).double())


def varied(generator: torch.Generator, images: int) -> tuple[Tensor, Tensor]:
    """(weight, features) of an untrained network: features vary in few directions, posteriors from image to image."""
    weight = 0.2 * torch.randn(8, 32, generator=generator, dtype=torch.float64)
    directions = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    return weight, 3 + 0.5 * torch.randn(images, 2, generator=generator, dtype=torch.float64) @ directions


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_most_likely_counts_correct_the_identity(with_bias: bool) -> None:
    made = torch.Generator().manual_seed(9)
    right = {"identity": 0, "likelihood": 0}
    for _ in range(8):
        weight, features = varied(made, 416)
        labels = torch.randint(8, (16,), generator=made)
        head = gradient(weight, torch.zeros(8).double(), features[:16], labels)
        if not with_bias:
            level = float(features[16:].sum(1).mean())
            head = replace(head, grad_bias=label_counts.bias_gradient(head.grad_weight, level))
        truth = torch.bincount(labels, minlength=8).double()
        start = label_counts.least_squares_counts(head.grad_bias, label_counts.posterior_observed(head), 16)
        rule = label_likelihood.learn_likelihood(head, [features[16:216], features[216:]], with_bias=with_bias)
        found = label_likelihood.apply_likelihood(rule, head)
        assert int(found.counts.sum()) == 16
        assert 0 < rule.right <= 1
        right["identity"] += torch.equal(start.counts, truth)
        right["likelihood"] += torch.equal(found.counts, truth)
    assert right["likelihood"] > right["identity"], right


def test_the_moments_are_those_of_every_image_with_every_label() -> None:
    """Mean and covariance of K [gb, gW], centred and projected, against images with a label written out one by one."""
    weight, features = varied(torch.Generator().manual_seed(5), 40)
    weight = weight[:3]
    head = gradient(weight, torch.zeros(3).double(), features[:6], torch.tensor([0, 0, 1, 2, 2, 2]))
    rule = label_likelihood.learn_likelihood(head, [features])
    u = torch.cat([torch.ones(40, 1).double(), (features - rule.centre) @ rule.basis], 1)
    p = (features @ weight.T).softmax(1)
    counts = torch.tensor([2.0, 1.0, 3.0]).double()
    total = torch.zeros_like(rule.shared)
    for c, n in enumerate(counts):
        v = ((p - torch.eye(3).double()[c])[:, :, None] * u[:, None]).flatten(1)
        torch.testing.assert_close(rule.mean[c], v.mean(0))
        total += n * torch.cov(v.T, correction=0)
    found = label_likelihood._covariance(rule, counts)
    off = ~torch.eye(len(found)).bool()
    torch.testing.assert_close(found[off], total[off], rtol=1e-9, atol=1e-12)  # the ridge is on the diagonal


def test_the_likelihood_knows_distinct_labels_and_is_the_same_twice() -> None:
    weight, features = varied(torch.Generator().manual_seed(3), 206)
    labels = torch.tensor([7, 1, 4, 0, 2, 6])
    head = gradient(weight, torch.zeros(8).double(), features[:6], labels)
    first, second = (label_likelihood.learn_likelihood(head, [features[6:]], distinct=True) for _ in range(2))
    assert first.right == second.right
    found = label_likelihood.apply_likelihood(first, head)
    assert torch.equal(found.counts, torch.bincount(labels, minlength=8).double())


@given(st.integers(0, 30), st.integers(1, 6), st.booleans())
@settings(deadline=None)
def test_whole_counts_are_the_nearest_ones_in_the_metric(seed: int, total: int, distinct: bool) -> None:
    """Against all counts of that sum: single exchanges from a start nearby end among the three best."""
    made = torch.Generator().manual_seed(seed)
    root = torch.eye(4).double() + 0.2 * torch.randn(4, 4, generator=made, dtype=torch.float64)
    metric, estimate = root @ root.T, torch.rand(4, generator=made, dtype=torch.float64)
    estimate = estimate * total / estimate.sum()
    most = 1 if distinct else total
    if total > 4 * most:
        total = 4 * most
    found = label_likelihood.nearest_counts(estimate, metric, total, most)
    every = [c for c in itertools.product(range(most + 1), repeat=4) if sum(c) == total]
    cost = [
        float((torch.tensor(c).double() - estimate) @ metric @ (torch.tensor(c).double() - estimate)) for c in every
    ]
    mine = float((found - estimate) @ metric @ (found - estimate))
    assert tuple(found.int().tolist()) in every
    assert mine <= sorted(cost)[min(2, len(cost) - 1)] + 1e-9


def test_two_batches_with_other_counts_can_have_one_gradient() -> None:
    """What only reads the classifier's gradient is wrong for one of them (`bench/label_limit.py` does it to images)."""
    made = torch.Generator().manual_seed(2)
    weight = torch.randn(4, 6, generator=made, dtype=torch.float64)
    bias, labels = torch.zeros(4).double(), torch.arange(24) % 4
    start = 1 + 0.5 * torch.randn(24, 6, generator=made, dtype=torch.float64)
    seen = gradient(weight, bias, start, labels)
    other = labels.clone()
    other[int((start[labels == 0] @ (weight[1] - weight[0])).argmax()) * 4] = 1

    def missing(features: Tensor) -> Tensor:
        there = gradient(weight, bias, features, other)
        return (there.summed - seen.summed)[1:].flatten()  # rows sum to 0

    features = start
    for _ in range(10):
        slopes = torch.autograd.functional.jacobian(missing, features).flatten(1)
        features = features - (torch.linalg.pinv(slopes) @ missing(features)).view_as(features)
    twin = gradient(weight, bias, features, other)
    assert float((features - start).square().mean().sqrt()) < 0.5 * float(start.std())  # images differ by more
    assert not torch.equal(torch.bincount(other), torch.bincount(labels))
    torch.testing.assert_close(twin.grad_weight, seen.grad_weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(twin.grad_bias, seen.grad_bias, rtol=0, atol=1e-12)


def test_decoding_takes_the_most_likely_tails() -> None:
    tails = torch.tensor([[[0.9, 0.8, 0.1], [0.5, 0.2, 0.0], [0.05, 0.0, 0.0]]])
    counts, expected = label_learn.decode(tails, 3)
    assert counts.tolist() == [[2.0, 1.0, 0.0]]
    assert float(expected) == pytest.approx((0.9 + 0.8 + 0.5) / 3, abs=1e-6)


@given(st.integers(1, 30), st.integers(2, 6), st.integers(1, 3), st.integers(0, 5))
@settings(deadline=None)
def test_decoded_counts_add_up_even_beyond_the_simulated_levels(k: int, classes: int, levels: int, seed: int) -> None:
    tails = torch.rand(2, classes, levels, generator=torch.Generator().manual_seed(seed))
    counts, expected = label_learn.decode(tails, k)
    assert counts.sum(1).tolist() == [k, k]
    assert bool((expected <= 1).all())


def confident() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, bias, features, labels) of a network that is right for most images and almost sure of all."""
    made = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 24, generator=made, dtype=torch.float64)
    labels = torch.randint(6, (2000,), generator=made)
    shown = torch.where(torch.rand(2000, generator=made) < 0.85, labels, torch.randint(6, (2000,), generator=made))
    aim = weight / weight.norm(dim=1, keepdim=True)
    strength = 1 + torch.rand(2000, 1, generator=made, dtype=torch.float64)
    noise = torch.randn(2000, 24, generator=made, dtype=torch.float64)
    return weight, torch.zeros(6).double(), (0.7 + 0.3 * noise + strength * aim[shown]).clamp_min(0), labels


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_learned_rule_beats_the_guess_on_a_confident_network_from_its_weights_alone(with_bias: bool) -> None:
    weight, bias, features, labels = confident()
    made = torch.Generator().manual_seed(5)
    k = 8
    picks = [torch.randint(len(labels), (k,), generator=made) for _ in range(40)]
    heads = [gradient(weight, bias, features[i], labels[i]) for i in picks]
    pool = label_pool.pool_from_weights(weight, bias, float(features.mean()), made)
    rule = label_learn.learn(heads[0], pool, distinct=False, with_bias=with_bias, batches=900, steps=150)
    assert rule.gain_low > 0
    gains = []
    for i, head in zip(picks, heads, strict=True):
        truth = torch.bincount(labels[i], minlength=6).double()
        found, expected, _ = label_learn.apply(rule, head)
        assert int(found.sum()) == k
        assert 0 <= expected <= 1
        gains.append(float((k / 6 - truth).abs().sum() - (found - truth).abs().sum()) / (2 * k))
    mean = torch.tensor(gains)
    assert float(mean.mean() - 1.96 * mean.std() / len(mean) ** 0.5) > 0


def test_learning_leaves_the_global_generator_alone_and_repeats() -> None:
    weight, bias, _, _ = confident()
    head = gradient(weight, bias, torch.ones(2, 24).double(), torch.tensor([0, 1]))
    before = torch.get_rng_state()
    rules = []
    for _ in range(2):
        pool = label_pool.pool_from_weights(weight, bias, 1.0, torch.Generator().manual_seed(0), size=500)
        rules.append(label_learn.learn(head, pool, distinct=True, with_bias=True, batches=240, steps=20))
    assert torch.equal(before, torch.get_rng_state())
    assert label_learn.apply(rules[0], head)[1] == label_learn.apply(rules[1], head)[1]


def test_distinct_labels_cannot_outnumber_the_classes_that_a_pool_shows() -> None:
    head = Head(torch.zeros(3, 2).double(), torch.zeros(3).double(), torch.zeros(3, 2), torch.zeros(3), 3)
    pool = label_pool.Pool(torch.ones(4, 2).double(), torch.zeros(4, 3).double(), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="distinct"):
        label_pool.simulate(pool, head, 5, distinct=True, coupled=False, generator=torch.Generator())
