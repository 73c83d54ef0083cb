"""Auxiliary images are other images: whatever is a private one in this scenario is taken out of them."""

from __future__ import annotations

import pytest
import torch

from frostglass.auditing.plan import Plan, parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import prepare
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


def test_nothing_left_to_give_away() -> None:
    with pytest.raises(BadInput, match="every image of threat"):
        prepare(plan(4, batch=1797), 0, torch.device("cpu"))
