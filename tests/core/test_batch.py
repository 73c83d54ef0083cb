"""Batches, domains, labels, and the seal around the truth."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from frostglass.core.batch import Batch, Domain, Sealed, one_hot
from frostglass.core.errors import BadInput


def batch(n: int = 3) -> Batch:
    ids = tuple("abcdefgh"[:n])
    return Batch(torch.rand(n, 3, 4, 5), one_hot(list(range(n)), 10), Domain(), ids)


@pytest.mark.parametrize(
    "arguments", [(1, 1), (2, 0), (float("nan"), 1), (0, 1, (0.0,), (0.0,)), (0, 1, (0.0,), (float("nan"),))]
)
def test_a_domain_that_cannot_be_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="domain"):
        Domain(*arguments)


def test_constants_of_other_lengths_are_refused() -> None:
    with pytest.raises(BadInput, match="as long as mean"):
        Domain(0, 1, (0.1, 0.2), (0.3,))


def test_normalising_and_back() -> None:
    domain = Domain(-1, 1, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(domain.denormalise(domain.normalise(x)), x)
    assert domain.normalise(x).dtype == torch.float64
    assert domain.clamp(torch.tensor([-3.0, 0.2, 3.0])).tolist() == pytest.approx([-1, 0.2, 1])


def test_one_hot_is_what_it_says() -> None:
    assert one_hot([2, 0], 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot(torch.tensor([1.0]), 2).tolist() == [[0, 1]]
    assert one_hot([], 4).shape == (0, 4)


@pytest.mark.parametrize("labels", [[3], [-1], [0, 7]])
def test_labels_outside_the_classes_are_refused_with_both_numbers(labels: list[int]) -> None:
    with pytest.raises(BadInput, match=r"do not fit a model with 3 outputs; give labels from 0"):
        one_hot(labels, 3)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.5]), torch.tensor([float("nan")]), torch.zeros(2, 2), torch.zeros(())]
)
def test_labels_that_are_no_list_of_whole_numbers_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="whole numbers"):
        one_hot(labels, 3)


def test_a_batch_takes_rows_with_their_names() -> None:
    held = batch()
    taken = held.take([2, 0])
    assert taken.ids == ("c", "a")
    assert torch.equal(taken.images, held.images[[2, 0]])
    assert torch.equal(taken.targets, held.targets[[2, 0]])
    assert len(taken) == 2
    assert taken.image_shape == (3, 4, 5)
    assert taken.to(torch.device("cpu"), torch.float64).targets.dtype == torch.float64


def test_a_batch_needs_as_many_names_as_images() -> None:
    with pytest.raises(BadInput, match="2 names for 1 images"):
        Batch(torch.rand(1, 3, 4, 4), one_hot([0], 2), Domain(), ("a", "b"))


class Secret:
    def __repr__(self) -> str:
        raise AssertionError("the seal printed the truth")

    __str__ = __repr__


def test_the_seal_shows_nothing() -> None:
    sealed = Sealed(Secret())
    assert repr(sealed) == str(sealed) == f"{sealed}" == "Sealed(...)"
    assert repr([sealed]) == "[Sealed(...)]"
    assert not hasattr(sealed, "__dict__")
    assert not [name for name in dir(sealed) if not name.startswith("_") and name != "open_for_scoring"]
    assert isinstance(sealed.open_for_scoring(), Secret)


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy, json.dumps, vars, len, iter])
def test_the_seal_is_not_copied_or_read(leak: object) -> None:
    with pytest.raises(TypeError):
        leak(Sealed([1, 2, 3]))  # type: ignore[operator]


def test_the_seal_takes_no_attributes() -> None:
    with pytest.raises(AttributeError):
        Sealed(1).note = 2  # type: ignore[attr-defined]
