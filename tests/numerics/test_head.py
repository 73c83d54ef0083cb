"""The classifier's inputs from its gradient: exact where they exist, and a residual that says when they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frostglass.core.batch import one_hot
from frostglass.core.randomness import Rng
from frostglass.numerics import head

CLASSES, FEATURES = 10, 200


def layer(seed: int, confidence: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = Rng.from_seed(seed, "layer")
    weight = confidence * rng.at("w").normal((CLASSES, FEATURES)).double() / FEATURES**0.5
    return weight, 0.1 * rng.at("b").normal((CLASSES,)).double()


def gradient_of(weight: Tensor, bias: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    d = targets.sum(1, keepdim=True) * torch.softmax(inputs @ weight.T + bias, 1) - targets
    return d.T @ inputs / len(inputs), d.mean(0)


def solved(targets: Tensor, seed: int, confidence: float = 1.0, believed: Tensor | None = None) -> tuple[float, float]:
    """(residual, largest relative error) of random non-negative inputs, their gradients rounded to float32."""
    weight, bias = layer(seed, confidence)
    inputs = Rng.from_seed(seed, "inputs").normal((len(targets), FEATURES)).double().relu()
    grad_weight, grad_bias = (g.float() for g in gradient_of(weight, bias, inputs, targets))
    rng = Rng.from_seed(seed, "solve")
    wanted = targets if believed is None else believed
    problem = head.prepare(weight, bias, grad_weight, grad_bias, wanted, rng)
    mixing, residual = head.solve(problem, rng, starts=24)
    found = head.inputs_of(problem, mixing)
    distance = torch.cdist(inputs, found) / inputs.norm(dim=1, keepdim=True)  # images of one label are in any order
    nearest = distance.argmin(1)
    assert len(set(nearest.tolist())) == len(targets) or residual > head.ACCEPTED
    return residual, float(distance.amin(1).max())


@pytest.mark.parametrize("labels", [[3], [1, 7], [2, 2], [0, 5, 5, 9], [4, 4, 4, 4], [0, 1, 2, 3, 3, 5]])
def test_inputs_are_exact_with_distinct_and_repeated_labels(labels: list[int]) -> None:
    residual, error = solved(one_hot(labels, CLASSES).double(), seed=len(labels))
    assert residual < head.ACCEPTED
    assert error < 1e-5


@pytest.mark.parametrize("labels", [[0, 3, 3, 8], [0, 9, 8, 1, 1, 2, 4, 8]])
def test_inputs_are_exact_where_the_network_is_confident(labels: list[int]) -> None:
    residual, error = solved(one_hot(labels, CLASSES).double(), seed=5, confidence=3.0)
    assert residual < head.ACCEPTED
    assert error < 1e-5


def test_mixed_labels_that_lost_mass_are_no_obstacle() -> None:
    targets = torch.zeros(3, CLASSES, dtype=torch.float64)
    targets[0, 1], targets[0, 4], targets[1, 2], targets[2, 7] = 0.6, 0.4, 0.7, 1.0
    residual, error = solved(targets, seed=6)
    assert residual < head.ACCEPTED
    assert error < 1e-5


def test_wrong_labels_leave_a_residual() -> None:
    truth, wrong = (one_hot(rows, CLASSES).double() for rows in ([0, 3, 3, 8], [0, 3, 4, 8]))
    residual, _ = solved(truth, seed=7, believed=wrong)
    assert residual > 100 * head.ACCEPTED


def test_as_many_images_as_classes_are_refused() -> None:
    weight, bias = layer(0)
    targets = one_hot(list(range(CLASSES)), CLASSES).double()
    with pytest.raises(ValueError, match="classes - 1"):
        head.prepare(weight, bias, weight, bias, targets, Rng.from_seed(0))


def test_values_that_are_not_finite_are_refused() -> None:
    weight, bias = layer(0)
    broken = torch.full_like(weight, float("nan"))
    with pytest.raises(ValueError, match="finite"):
        head.prepare(weight, bias, broken, bias, one_hot([1], CLASSES).double(), Rng.from_seed(0))


def test_the_jacobian_is_the_derivative_of_the_residual() -> None:
    weight, bias = layer(1)
    targets = one_hot([1, 1, 6], CLASSES).double()
    inputs = Rng.from_seed(1, "inputs").normal((3, FEATURES)).double().relu()
    problem = head.prepare(weight, bias, *gradient_of(weight, bias, inputs, targets), targets, Rng.from_seed(2))
    mixing = Rng.from_seed(3).normal((3, 3)).double()
    _, slope = head._normal_equations(problem, mixing, 1.0)
    step = 1e-6
    for k in range(9):
        moved = torch.zeros(9, dtype=torch.float64)
        moved[k] = step
        ahead = head._value(problem, mixing + moved.view(3, 3), 1.0)
        behind = head._value(problem, mixing - moved.view(3, 3), 1.0)
        assert (ahead - behind) / (2 * step) == pytest.approx(2 * float(slope[k]), rel=1e-4, abs=1e-8)


def test_label_candidates_hold_the_truth_and_name_certain_labels() -> None:
    weight, bias = layer(2, confidence=3.0)
    for labels in ([3], [0, 4], [5, 5], [1, 1, 2, 9], [0, 0, 0, 7, 8]):
        targets = one_hot(labels, CLASSES).double()
        inputs = Rng.from_seed(len(labels), "inputs").normal((len(labels), FEATURES)).double().relu()
        _, grad_bias = gradient_of(weight, bias, inputs, targets)
        found = head.label_candidates(grad_bias, len(labels), limit=1000)
        assert any(torch.equal(n, targets.sum(0)) for n in found)
        assert all(int(n.sum()) == len(labels) for n in found)


def test_impossible_bias_gradients_have_no_label_candidates() -> None:
    assert head.label_candidates(torch.tensor([-1.0, -1.0, 0.5]), 1) == []
