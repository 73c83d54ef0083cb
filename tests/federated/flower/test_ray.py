"""Flower's simulation on Ray: the same weights as in this process, and the same manners."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("ray")
pytest.importorskip("flwr")

from federations import federate, plan, weights
from frostglass.federated.flower.engines import on_ray
from frostglass.federated.recorded import read_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution"),
]

DEFENCES = """
[[defense]]
name = "instahide"
k = 2
partners = "permutation"
max_exposure = 2
[[defense]]
name = "pruning"
fraction = 0.5
"""


def test_local_and_ray_give_the_same_weights(tmp_path) -> None:
    """Two of three clients a round, so that one takes part twice: its images are in two encodings already by then.

    Its ledger lasts from one actor to the other, and it is named although it only sends an error.
    """
    import ray

    text = "insecure_seed = 1\n" + plan(rounds="2\nclients = 2") + DEFENCES
    said: list[str] = []
    (tmp_path / "ray").mkdir()
    on_ray(text, tmp_path / "ray", said.append)
    assert not ray.is_initialized(), "Ray was left running"
    assert not any("no update could be used" in line for line in said), said
    federate(text, tmp_path / "local")
    left, right = weights(tmp_path / "local"), weights(tmp_path / "ray")
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-5, atol=1e-7)
    local, other = (json.loads((tmp_path / e / "history.json").read_text()) for e in ("local", "ray"))
    assert (local["engine"], other["engine"]) == ("local", "ray")
    for a, b in zip(local["rounds"], other["rounds"], strict=True):
        assert [c["client"] for c in a["clients"]] == [c["client"] for c in b["clients"]]
        assert a["left_out"] == b["left_out"]
        assert a["accuracy"] == b["accuracy"]
    assert [len(row["clients"]) for row in other["rounds"]] == [0, 2, 1]
    (lost,) = other["rounds"][2]["left_out"]
    assert lost["client"] in {c["client"] for c in other["rounds"][1]["clients"]}
    assert "max_exposure" in lost["reason"]
    assert said[-1].startswith("round 2/2: accuracy")
    record = read_record(tmp_path / "ray" / "recorded")
    assert [u.header.defence for u in record.updates] == ["instahide+pruning"] * 4
    assert record.problems == ()
