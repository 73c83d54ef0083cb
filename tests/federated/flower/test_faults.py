"""Clients that break: the round goes on without them, and the record says why."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from federations import federate, plan, weights
from frostglass.core.errors import BadInput
from frostglass.federated.federation import federation_of
from frostglass.federated.flower import AuditTap, LocalGrid, client_app, plan_client_app, run_local
from frostglass.federated.flower.wire import record_of, state_of
from frostglass.federated.local_client import LocalClient, mean_state
from frostglass.federated.recorded import read_record
from frostglass.federated.recording import Received, Recorder

ONE = plan(rounds="1")


def spoiling(partition: int, spoil):
    """A mod that spoils the reply of one client."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == partition and message.metadata.message_type == "train":
            spoil(reply)
        return reply

    return mod


def changed(change):
    """Changes the state in a reply."""

    def spoil(reply) -> None:
        reply.content["arrays"] = record_of(change(state_of(reply.content)))

    return spoil


def nan(state):
    return state | {"head.bias": state["head.bias"] * math.nan}


def huge(state):
    return state | {"head.weight": state["head.weight"] + 1e20}


def shapes(state):
    return state | {"head.weight": torch.zeros(3, 5)}


def fewer(state):
    return {n: t for n, t in state.items() if n != "head.bias"}


def test_weights_in_half_precision_leave_the_network_in_its_own_types(tmp_path) -> None:
    def half(state):
        return {n: t.half() if t.is_floating_point() else t for n, t in state.items()}

    federate(ONE, tmp_path / "half", mods=[spoiling(i, changed(half)) for i in range(3)])
    federate(ONE, tmp_path / "single")
    got, wanted = weights(tmp_path / "half"), weights(tmp_path / "single")
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        torch.testing.assert_close(got[name], value, rtol=2e-3, atol=2e-3)


def raises(reply) -> None:
    raise RuntimeError("the client's disk is gone")


def garbage(reply) -> None:
    held = dict(reply.content["arrays"])
    held["head.bias"] = Array("float32", (10,), "numpy.ndarray", b"no array")
    reply.content["arrays"] = ArrayRecord(held)


def no_examples(reply) -> None:
    reply.content["metrics"] = MetricRecord({"num-examples": -3})


def two_records(reply) -> None:
    reply.content["more"] = ArrayRecord({"x": torch.zeros(1)})


@pytest.mark.parametrize(
    ("spoil", "reason", "has_tensors"),
    [
        (changed(nan), "10 values that are not finite", True),
        (changed(huge), "the update has length", True),
        (changed(shapes), "has shape (3, 5)", True),
        (changed(fewer), "1 entries are missing", True),
        (raises, "the client's disk is gone", False),
        (garbage, "cannot be read", False),
        (no_examples, "is no number above 0", False),
        (two_records, "2 array records", False),
    ],
)
def test_a_broken_update_is_left_out_and_named(spoil, reason, has_tensors, tmp_path) -> None:
    history = federate(ONE, tmp_path, mods=[spoiling(1, spoil)])
    row = history["rounds"][1]
    assert [c["client"] for c in row["clients"]] == ["0", "2"]
    (lost,) = row["left_out"]
    assert lost["client"] == "1"
    assert reason in lost["reason"]
    assert any("left out: client 1" in text for text in history["said"])
    made = federation_of(ONE)
    done = [made.client(i).train(made.model.state_dict(), 1) for i in (0, 2)]
    others = mean_state([d.state for d in done], [d.examples for d in done])
    got = weights(tmp_path)
    for name, value in others.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)
    headers = [u.header for u in read_record(tmp_path / "recorded").updates]
    assert sorted(h.client for h in headers) == ["0", "1", "2"]
    bad = next(h for h in headers if h.client == "1")
    assert reason in f"{bad.reason} {bad.problems}"
    assert (bad.file is not None) is has_tensors
    assert (bad.sha256 is not None) is has_tensors
    assert all(h.file is not None and not h.problems for h in headers if h.client != "1")


def test_what_a_client_says_about_itself_may_be_anything(tmp_path) -> None:
    def nonsense(reply) -> None:
        said = {"loss": math.nan, "epsilon": "many", "unit": "u" * 10_000, "partition-id": "x", "more": [1.0, 2.0]}
        reply.content["frostglass"] = ConfigRecord(said | {f"key {i}": i for i in range(1000)})

    row = federate(ONE, tmp_path, mods=[spoiling(1, nonsense)])["rounds"][1]
    assert [c["client"] for c in row["clients"]] == ["0", "1", "2"]
    assert row["clients"][1] == {"client": "1", "examples": 67}
    assert math.isfinite(row["loss"])
    for said in ({}, {"delta": 1e-5}, {"unit": "image"}, {"delta": 1e-5, "unit": "u"}):

        def bare(reply, said=said) -> None:
            reply.content["frostglass"] = ConfigRecord({"epsilon": 1.0, **said})

        row = federate(ONE, tmp_path / f"epsilon {said}", mods=[spoiling(1, bare)])["rounds"][1]
        assert "epsilon" not in row["clients"][1]  # of what, and at which delta?
    for value in (1e308, -1e308):

        def enormous(reply, value=value) -> None:
            reply.content["frostglass"] = ConfigRecord({"loss": value, "partition-id": 1})

        row = federate(ONE, tmp_path / f"loss {value}", mods=[spoiling(1, enormous)])["rounds"][1]
        assert math.isfinite(row["loss"])
    header = read_record(tmp_path / "recorded").updates[1].header
    assert len(header.model_dump_json()) < 5000

    def long(reply) -> None:
        raise RuntimeError("x" * 10_000_000)

    row = federate(ONE, tmp_path / "long", mods=[spoiling(1, long)])["rounds"][1]
    assert len(row["left_out"][0]["reason"]) < 600
    assert len(read_record(tmp_path / "long" / "recorded").updates) == 3


def test_a_client_without_images_says_so(tmp_path) -> None:
    made = federation_of(ONE)

    def make(context) -> LocalClient:
        client = made.client(context.node_config["partition-id"])
        if client.name == "2":
            client.images, client.labels = client.images[:0], client.labels[:0]
        return client

    row = federate(ONE, tmp_path, client=client_app(make))["rounds"][1]
    assert [c["client"] for c in row["clients"]] == ["0", "1"]
    assert row["left_out"] == [
        {"client": "2", "examples": None, "reason": "has no images, so there is nothing to train on."}
    ]


def test_the_reason_that_a_client_gives_steers_no_terminal(tmp_path) -> None:
    def lying(reply) -> None:
        raise RuntimeError("gone\x1b[2J\nround 1/1: accuracy 1.0000")

    history = federate(ONE, tmp_path, mods=[spoiling(1, lying)])
    (said,) = [text for text in history["said"] if "left out: client 1" in text]
    assert "\x1b" not in said
    assert [part.strip().partition(" ")[0] for part in said.splitlines()] == ["round", "left"]


def test_a_round_without_a_good_update_keeps_the_weights_and_says_so(tmp_path) -> None:
    history = federate(plan(), tmp_path, mods=[spoiling(i, changed(nan)) for i in range(3)])
    start, end = federation_of(plan()).model.state_dict(), weights(tmp_path)
    assert all(torch.equal(start[n], end[n]) for n in start)
    assert [len(row["left_out"]) for row in history["rounds"]] == [0, 3, 3]
    assert sum("no update could be used" in note for note in history["notes"]) == 2
    assert len(read_record(tmp_path / "recorded").updates) == 6


class Losing(LocalGrid):
    """The second client dies in the middle of a round: its reply never comes."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return [m for m in replies if m.metadata.src_node_id != 2 or m.metadata.message_type != "train"]


def test_a_client_that_dies_is_missed(tmp_path) -> None:
    history = federate(ONE, tmp_path, grid=Losing)
    row = history["rounds"][1]
    assert [c["client"] for c in row["clients"]] == ["0", "2"]
    assert row["left_out"] == [{"client": "1", "examples": None, "reason": "no reply in time"}]
    assert [h.header.reason for h in read_record(tmp_path / "recorded").updates if h.header.client == "1"] == [
        "no reply in time"
    ]


class Answering(LocalGrid):
    """The second client is gone, and the SuperLink says so in its place, as node 1234."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        if not messages or messages[0].metadata.message_type != "train":
            return replies
        lost = Message(Error(code=3, reason="Node is unavailable"), reply_to=messages[1])
        lost.metadata.__dict__["_src_node_id"] = 1234
        return [*(m for m in replies if m.metadata.src_node_id != 2), lost]


def test_a_lost_client_is_recorded_once_under_its_own_name(tmp_path) -> None:
    row = federate(ONE, tmp_path, grid=Answering)["rounds"][1]
    assert row["left_out"] == [{"client": "1", "examples": None, "reason": "Node is unavailable"}]
    headers = [u.header for u in read_record(tmp_path / "recorded").updates]
    assert sorted(h.client for h in headers) == ["0", "1", "2"]


class Empty(LocalGrid):
    def get_node_ids(self):
        return []


def test_nobody_there_is_a_sentence(tmp_path) -> None:
    with pytest.raises(BadInput, match=r"no client is connected after 0.5 seconds"):
        federate(plan(rounds="1\nwait = 0.5"), tmp_path, grid=Empty)


class Few(LocalGrid):
    def get_node_ids(self):
        return [1, 3]


def test_those_that_are_there_go_on_alone(tmp_path) -> None:
    history = federate(plan(rounds="1\nwait = 0.5"), tmp_path, grid=Few)
    assert [c["client"] for c in history["rounds"][1]["clients"]] == ["0", "2"]
    assert history["notes"] == ["2 of 3 clients were connected after 0.5 seconds."]


# ---- the record


def test_the_tap_outlives_its_folder(tmp_path) -> None:
    def vanishing(message, context, call_next):
        if (tmp_path / "recorded").is_dir():
            shutil.rmtree(tmp_path / "recorded", ignore_errors=True)
            (tmp_path / "recorded").write_text("a file where the folder was")
        return call_next(message, context)

    history = federate(plan(), tmp_path, mods=[vanishing])
    federate(plan(), tmp_path / "other")
    left, right = weights(tmp_path), weights(tmp_path / "other")
    assert all(torch.equal(left[n], right[n]) for n in left), "recording changed the training"
    assert any(note.startswith("record:") for note in history["notes"]), "silently lost"


def test_the_tap_outlives_a_full_disk(tmp_path, monkeypatch) -> None:
    def full(self, name, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recorder, "_save", full)
    history = federate(plan(), tmp_path)
    assert [len(row["clients"]) for row in history["rounds"]] == [0, 3, 3]
    headers = [u.header for u in read_record(tmp_path / "recorded").updates]
    assert len(headers) == 6
    assert all(h.file is None and "No space left" in h.reason for h in headers)


def test_a_recorder_that_raises_stops_nothing(tmp_path, monkeypatch) -> None:
    def broken(self, *args):
        raise ValueError("a defect")

    monkeypatch.setattr(Recorder, "sent", broken)
    monkeypatch.setattr("frostglass.federated.flower.tap.taken_down", broken)
    history = federate(ONE, tmp_path)
    assert len(history["rounds"][1]["clients"]) == 3
    assert all("a defect" in u.header.reason for u in read_record(tmp_path / "recorded").updates)


def test_a_full_record_names_what_it_dropped(tmp_path) -> None:
    size = sum(t.numel() * t.element_size() for t in federation_of(ONE).model.state_dict().values())
    text = plan(f"[record]\nmax_bytes = {int(3.5 * size)}\n")
    federate(text, tmp_path)
    record = read_record(tmp_path / "recorded")
    assert len(record.updates) == 6
    dropped = [u.header for u in record.updates if u.header.file is None]
    assert dropped
    assert all("the record is full" in h.reason and h.sha256 for h in dropped)
    held = sum(f.stat().st_size for f in (tmp_path / "recorded").rglob("*.safetensors"))
    assert held < 4 * size


def test_recording_can_be_off(tmp_path) -> None:
    federate(plan("[record]\non = false\n"), tmp_path)
    assert not (tmp_path / "recorded").exists()


def test_tensors_that_share_memory_are_recorded(tmp_path) -> None:
    """Tied weights: safetensors refuses tensors in one memory, so they are taken apart."""
    a = torch.randn(6, 4)
    tied = {"w": a, "tied": a, "row": a[1], "turned": a.t(), "none": torch.zeros(0)}
    with Recorder(tmp_path / "recorded", engine="flower") as recorder:
        recorder.sent(1, tied)
        recorder.received(Received(1, "0", tied, {"steps": torch.tensor(3)}))
    assert recorder.problems == []
    (update,) = read_record(tmp_path / "recorded").updates
    delta, buffers = update.payload()
    assert all(torch.equal(delta[n], t) and torch.equal(update.sent()[n], t) for n, t in tied.items())
    assert int(buffers["steps"]) == 3


# ---- other people's strategies


class AuditedStock(AuditTap, FedAvg):
    pass


def test_the_tap_before_flowers_own_fedavg(tmp_path) -> None:
    """It turns counters into float64 and sums as replies come in; clients and tap cope."""
    from flwr.serverapp import ServerApp

    made, ends = federation_of(plan()), []
    server = ServerApp()

    with Recorder(tmp_path / "recorded", engine="flower") as recorder:

        @server.main()
        def main(grid, context):
            strategy = AuditedStock(model=made.model, recorder=recorder, fraction_evaluate=0.0, min_train_nodes=3)
            result = strategy.start(grid, record_of(made.model.state_dict()), num_rounds=2)
            ends.append((strategy, result))

        run_local(server, plan_client_app(plan(), mods=[spoiling(0, changed(nan))]), 3)
    (strategy, result) = ends[0]
    assert [len([a for a in strategy.answers[r] if not a.reason]) for r in (1, 2)] == [2, 2]
    assert result.arrays.to_torch_state_dict()["body.1.num_batches_tracked"].dtype == torch.float64
    assert len(read_record(tmp_path / "recorded").updates) == 6
    federate(plan(), tmp_path / "own", mods=[spoiling(0, changed(nan))])
    for name, value in weights(tmp_path / "own").items():
        got = result.arrays.to_torch_state_dict()[name]
        torch.testing.assert_close(got.to(value.dtype), value, rtol=1e-4, atol=1e-5)


def test_what_clients_say_does_not_pile_up_in_memory(tmp_path, monkeypatch) -> None:
    def long(reply) -> None:
        reply.content["frostglass"] = ConfigRecord({"partition-id": 1, "more": "x" * 10**6, "list": [1.0] * 10**5})

    held: list[AuditTap] = []
    real = AuditTap.aggregate_train

    def watched(self, server_round, replies):
        held.append(self)
        return real(self, server_round, replies)

    monkeypatch.setattr(AuditTap, "aggregate_train", watched)
    federate(ONE, tmp_path, mods=[spoiling(1, long)])
    said = {a.client: a.about for a in held[0].answers[1]}
    assert said["1"].keys() == {"partition-id", "more"}
    assert len(str(said["1"])) < 1000
