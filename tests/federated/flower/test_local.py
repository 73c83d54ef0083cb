"""The in-process engine: Flower's apps do what federated averaging by hand does."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from federations import federate, plan, weights
from frostglass.federated.federation import federation_of
from frostglass.federated.flower.local_grid import LocalGrid, _identity
from frostglass.federated.global_accuracy import accuracy_of
from frostglass.federated.local_client import mean_state
from frostglass.federated.recorded import read_record

ALPHA = plan().replace("clients = 3", "clients = 3\nalpha = 1.0")


@pytest.mark.parametrize("text", [plan(), ALPHA], ids=["even", "dirichlet"])
def test_the_same_as_averaging_by_hand(text, tmp_path) -> None:
    history = federate(text, tmp_path)
    made = federation_of(text)
    state = dict(made.model.state_dict())
    clients = [made.client(i) for i in range(3)]
    for r in (1, 2):
        done = [c.train(state, r) for c in clients]
        state = mean_state([d.state for d in done], [d.examples for d in done])
    got = weights(tmp_path)
    assert got.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)
        assert got[name].dtype == value.dtype
    assert history["rounds"][2]["accuracy"] == accuracy_of(made, state).plain
    assert [len(row["clients"]) for row in history["rounds"]] == [0, 3, 3]
    assert [c["client"] for c in history["rounds"][1]["clients"]] == ["0", "1", "2"]
    assert sum(c["examples"] for c in history["rounds"][1]["clients"]) == len(made.train)


def test_what_is_recorded_is_what_was_sent(tmp_path) -> None:
    text = plan(rounds="1")
    federate(text, tmp_path)
    made, record = federation_of(text), read_record(tmp_path / "recorded")
    assert record.problems == ()
    assert [u.header.client for u in record.updates] == ["0", "1", "2"]
    start = made.model.state_dict()
    for i, update in enumerate(record.updates):
        done = made.client(i).train(start, 1)
        delta, buffers = update.payload()
        assert delta.keys() == done.update.gradients.keys()
        for name, value in done.update.gradients.items():
            torch.testing.assert_close(delta[name], value, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(buffers[n], done.state[n]) for n in buffers)
        assert any(n.endswith("running_mean") for n in buffers)
        sent = update.sent()
        assert all(torch.equal(sent[n], start[n]) for n in start)
        h = update.header
        assert (h.kind, h.examples, h.round, h.reason, h.problems) == ("delta", len(made.rows[i]), 1, "", [])
        assert h.local_plan() == made.plan.client.local_plan()
    about = json.loads((tmp_path / "recorded" / "record.json").read_text())
    assert about["engine"] == "flower"
    assert about["model"]["name"] == "small_bn_cnn"
    assert about["image_shape"] == [1, 8, 8]


def test_who_takes_part_follows_from_the_seed(tmp_path) -> None:
    text = plan(rounds="4\nclients = 1")
    first, second = federate(text, tmp_path / "a"), federate(text, tmp_path / "b")
    chosen = [[c["client"] for c in row["clients"]] for row in first["rounds"][1:]]
    assert all(len(c) == 1 for c in chosen)
    assert len({c[0] for c in chosen}) > 1, "always the same client"
    assert chosen == [[c["client"] for c in row["clients"]] for row in second["rounds"][1:]]
    other = federate(text.replace('name = "small"', 'name = "small"\nseed = 5'), tmp_path / "c")
    left, right = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert not torch.equal(left["head.weight"], weights(tmp_path / "c")["head.weight"])
    assert other["seed"] == 5


def test_kept_buffers_never_leave(tmp_path) -> None:
    text = 'buffers = "keep"\n' + plan()
    history = federate(text, tmp_path)
    start, end = federation_of(text).model.state_dict(), weights(tmp_path)
    assert all(torch.equal(start[n], end[n]) for n in start if "running" in n or "tracked" in n)
    assert not torch.equal(start["head.weight"], end["head.weight"])
    for update in read_record(tmp_path / "recorded").updates:
        assert update.payload()[1] == {}
    assert history["rounds"][2]["accuracy"] > 0.4, "judged with statistics that nobody has"


def test_the_private_names_of_flower_are_there() -> None:
    """LocalGrid stands on these; a new version of Flower may move them."""
    for name in ("_run_id", "_task_id", "_node_id"):
        assert name in vars(TaskIdentity)
    before = {n: getattr(TaskIdentity, n) for n in ("_run_id", "_task_id", "_node_id")}
    with _identity():
        message = Message(RecordDict(), 1, MessageType.TRAIN)
        assert message.metadata.run_id == 1
        reply = Message(RecordDict(), reply_to=message)
        for name in ("_message_id", "_src_node_id"):
            assert name in reply.metadata.__dict__
        reply.metadata.__dict__["_src_node_id"] = 7
        assert reply.metadata.src_node_id == 7
    assert {n: getattr(TaskIdentity, n) for n in before} == before
    assert "content" in inspect.signature(Message.__init__).parameters


def test_an_app_that_raises_gives_an_errored_reply() -> None:
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise RuntimeError("broken\nclient")

    grid = LocalGrid(app, 2)
    with _identity():
        replies = grid.send_and_receive([Message(RecordDict(), n, MessageType.TRAIN) for n in grid.get_node_ids()])
    assert [m.error.reason for m in replies] == ["RuntimeError: broken client"] * 2
    assert [m.metadata.src_node_id for m in replies] == [1, 2]
    with pytest.raises(NotImplementedError):
        grid.push_messages([])
