"""Auxiliary images are other images: whatever is a private one in this scenario is taken out of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from frostglass.auditing.plan import Plan, parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import Inputs, prepare
from frostglass.auditing.simulate import play
from frostglass.core.errors import BadInput


def plan(batches: int, batch: int = 2, **client: int) -> Plan:
    scenario = {
        "data": {"source": "digits"},
        "model": {"name": "mlp"},
        "client": {"batch": batch, "batches": batches} | client,
        "attack": [{"name": "thaw"}],
    }
    return parse_plan({"scenario": [scenario], "threat": {"grants": ["examples", "auxiliary"], "auxiliary": "digits"}})


@pytest.mark.parametrize(("batches", "cohort"), [(3, 1), (2, 2)])
def test_no_private_image_is_given_away(batches: int, cohort: int) -> None:
    ready = prepare(plan(batches, clients=cohort, cohort=cohort), 0, torch.device("cpu"))
    assert ready.auxiliary is not None
    assert len(ready.auxiliary) == 1797 - 2 * batches * cohort
    assert any("private ones here" in note for note in ready.data.notes)
    for unit in range(ready.units):
        truth = play(ready, make_defense(ready.scenario.defense[0]), unit).truth
        private = truth._Sealed__value.private.images  # type: ignore[attr-defined]
        assert float((ready.auxiliary[:, None] - private).abs().amax((2, 3, 4)).min()) > 0


@pytest.mark.parametrize("shape", [(3, 16, 24), (1, 12, 8)])
def test_they_have_the_height_and_width_of_the_private_ones(shape: tuple[int, int, int]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 4))
    given = Inputs(model, torch.rand(6, *shape), torch.arange(6) % 4)
    ready = prepare(plan(1), 0, torch.device("cpu"), given)
    assert ready.auxiliary is not None
    assert ready.auxiliary.shape == (1797, *shape)


def test_nothing_left_to_give_away() -> None:
    with pytest.raises(BadInput, match="every image of threat"):
        prepare(plan(4, batch=1797), 0, torch.device("cpu"))
