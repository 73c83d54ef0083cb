"""A record of updates: whole, full, damaged, and never in the way of the training it watches."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan
from frostglass.federated.gradient_tap import GradientTap
from frostglass.federated.record_header import HEADERS, INFO, digest
from frostglass.federated.recorded import read_record
from frostglass.federated.recording import Received, Recorder

STATE = {"w": torch.arange(6.0).view(2, 3), "steps": torch.tensor(3)}
PLAN = LocalPlan("delta", epochs=2, minibatch=4)


def update(value: float = 1.0) -> dict[str, Tensor]:
    return {"w": torch.full((2, 3), float(value))}


def filled(folder: Path, updates: int = 2, **settings: object) -> Path:
    with Recorder(folder, engine="test", **settings) as record:  # type: ignore[arg-type]
        record.sent(1, STATE)
        for i in range(updates):
            record.received(Received(1, f"client {i}", update(i), {"steps": torch.tensor(4)}, examples=7, plan=PLAN))
    return folder


def test_what_was_received_is_read_back(tmp_path: Path) -> None:
    held = read_record(filled(tmp_path / "r", model={"name": "mlp"}, image_shape=(1, 8, 8)))
    assert (held.info.engine, held.info.model, held.info.image_shape) == ("test", {"name": "mlp"}, (1, 8, 8))
    assert held.problems == ()
    assert [u.header.client for u in held.updates] == ["client 0", "client 1"]
    last = held.updates[1]
    assert last.header.local_plan() == PLAN
    assert last.header.examples == 7
    gradients, buffers = last.payload()
    torch.testing.assert_close(gradients, update(1))
    assert int(buffers["steps"]) == 4
    torch.testing.assert_close(last.sent(), STATE)


def test_rounds_that_send_the_same_share_a_file(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", engine="test") as record:
        record.sent(1, STATE)
        record.sent(2, {n: t.clone() for n, t in STATE.items()})
        record.sent(3, {**STATE, "w": STATE["w"] + 1})
    assert len(list((tmp_path / "r" / "sent").iterdir())) == 2


def test_a_full_record_keeps_header_and_hash_and_says_why(tmp_path: Path) -> None:
    room = sum(t.numel() * t.element_size() for t in STATE.values()) + 40
    held = read_record(filled(tmp_path / "r", 3, max_bytes=room))
    first, *others = held.updates
    assert first.header.file is not None
    for i, one in enumerate(others, 1):
        assert one.header.file is None
        assert "full" in one.header.reason
        assert one.header.sha256 == digest({"update.w": update(i)["w"], "buffer.steps": torch.tensor(4)})
        with pytest.raises(BadInput, match="full"):
            one.payload()


def test_a_slow_disk_drops_tensors_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    record = Recorder(tmp_path / "r", engine="test", in_flight=1)
    save = record._save

    def slow(name: str, tensors: dict[str, Tensor]) -> None:
        gate.wait(30)
        save(name, tensors)

    monkeypatch.setattr(record, "_save", slow)
    for i in range(5):
        record.received(Received(1, str(i), update(i)))
    gate.set()
    record.close()
    held = read_record(tmp_path / "r")
    dropped = [u.header for u in held.updates if u.header.file is None]
    assert len(held.updates) == 5
    assert len(dropped) >= 2  # one in the writer's hands, two in the queue
    assert all(h.reason == "the disk is slower than the clients" and h.sha256 for h in dropped)
    assert {h.number for h in (u.header for u in held.updates)} == {1, 2, 3, 4, 5}


def test_a_tap_in_a_training_loop_waits_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are chosen and bounded, so that none of them may be missing because they came quickly."""
    tap = GradientTap(tmp_path / "r", engine="test", note="own", most=30)
    save = tap.recorder._save

    def slow(name: str, tensors: dict[str, Tensor]) -> None:
        time.sleep(0.05)  # many steps of this loop; the test holds however long it is
        save(name, tensors)

    monkeypatch.setattr(tap.recorder, "_save", slow)
    net = torch.nn.Linear(3, 2)
    for step in range(30):
        torch.nn.init.constant_(net.weight, float(step))
        tap.take(net, {"weight": torch.full((2, 3), float(step))})
    tap.close()
    held = read_record(tmp_path / "r").updates
    assert [u.header.round for u in held] == list(range(1, 31))
    for step, got in enumerate(held):
        assert float(got.payload()[0]["weight"][0, 0]) == float(got.sent()["weight"][0, 0]) == step


def test_a_closed_tap_leaves_no_hook(tmp_path: Path) -> None:
    """One that is a function within a function would keep the module from being saved whole."""
    net = torch.nn.Linear(3, 2)
    with GradientTap(tmp_path / "r", engine="test", note="own") as tap:
        tap.watch(net)
        net(torch.ones(5, 3)).sum().backward()
        tap.take(net, {n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    assert not net._forward_pre_hooks
    torch.save(net, tmp_path / "whole.pt")
    assert read_record(tmp_path / "r").updates[0].header.examples == 5


def test_a_disk_that_does_not_answer_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, waits = threading.Event(), []
    record = Recorder(tmp_path / "r", engine="test", in_flight=1, patience=0.01)
    save, put = record._save, record._queue.put

    def hanging(name: str, tensors: dict[str, Tensor]) -> None:
        gate.wait(30)
        save(name, tensors)

    def counted(item: object, block: bool = True, timeout: float | None = None) -> None:
        waits.append(block)
        put(item, block, timeout)  # type: ignore[arg-type]

    monkeypatch.setattr(record, "_save", hanging)
    monkeypatch.setattr(record._queue, "put", counted)
    for i in range(8):
        record.received(Received(1, str(i), update(i)))
    gate.set()
    record.close()
    dropped = [u.header for u in read_record(tmp_path / "r").updates if u.header.file is None]
    assert len(dropped) >= 5
    assert waits[-2] is False  # the last update; then comes the end


def test_nothing_that_breaks_reaches_the_training(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "r", engine="test")
    record.sent(1, STATE)
    while not list((tmp_path / "r").glob("*/00001.safetensors")):  # else the writer may make the folder anew
        time.sleep(0.01)
    (tmp_path / "r").rename(tmp_path / "gone")
    (tmp_path / "r").write_text("in the way")
    record.received(Received(1, "a", update()))
    record.received(Received(1, "b", None, reason="died"))
    record.sent(2, {**STATE, "w": STATE["w"] + 1})
    record.received(Received(1, "c", {"w": "no tensor"}))  # type: ignore[dict-item]
    record.close()
    assert len(record.problems) >= 4


def test_a_closed_record_takes_nothing_and_can_be_closed_again(tmp_path: Path) -> None:
    """A DDP hook cannot be taken off: training goes on into a tap that was closed."""
    record = Recorder(tmp_path / "r", engine="test", in_flight=1)
    record.received(Received(1, "a", update()))
    record.close()
    for number in range(2, 7):
        record.sent(number, {"w": torch.full((2,), float(number))})
        record.received(Received(number, "a", update()))
    again = threading.Thread(target=record.close, daemon=True)
    again.start()
    again.join(10)
    assert not again.is_alive()
    assert record.problems == []
    assert [u.header.round for u in read_record(tmp_path / "r").updates] == [1]


def test_a_process_that_ends_without_closing_leaves_what_it_received(tmp_path: Path) -> None:
    """As a training that broke off does."""
    script = f"""
import torch
from frostglass.federated.recording import Received, Recorder
record = Recorder({str(tmp_path / "r")!r}, engine="test")
for number in range(1, 6):
    record.sent(number, {{"w": torch.full((300, 300), float(number))}})
    record.received(Received(number, "a", {{"w": torch.ones(300, 300)}}))
raise SystemExit("broke off")
"""
    subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
    kept = [u for u in read_record(tmp_path / "r").updates if u.header.file]  # a slow disk may leave the last one out
    assert len([u for u in kept if u.payload()]) >= 4


def test_texts_of_another_side_do_not_make_a_header_unreadable(tmp_path: Path) -> None:
    long = "x" * 2**21
    with Recorder(tmp_path / "r", engine="test") as record:
        record.received(Received(1, "a", update(), reason=long, problems=(long,) * 3))
        record.received(Received(1, long, None, problems=("p",) * 10**5, metrics={long: long}))
        record.received(Received(1, "b", None, metrics={f"m{i}": 1.0 for i in range(10**5)}))
    held = read_record(tmp_path / "r")
    assert held.problems == ()
    assert len(held.updates) == 3
    assert held.updates[1].header.problems[-1] == "99950 further problems"


def test_numbers_that_json_lacks_are_left_out(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", engine="test") as record:
        record.received(Received(1, "a", None, reason="died", metrics={"loss": float("nan"), "epsilon": 2.0}))
    (one,) = read_record(tmp_path / "r").updates
    assert one.header.metrics == {"epsilon": 2.0}
    assert one.header.reason == "died"


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name a new folder"):
        Recorder(filled(tmp_path / "r"), engine="test")
    with pytest.raises(BadInput, match="max_bytes = 0"):
        Recorder(tmp_path / "s", engine="test", max_bytes=0)


# ---- hostile and damaged records


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no record of updates"):
        read_record(tmp_path)
    filled(tmp_path / "taps" / "rank-1")
    with pytest.raises(BadInput, match=r"it holds a record for each process; give one of them, as .*rank-1\.$"):
        read_record(tmp_path / "taps")
    (tmp_path / INFO).write_text("{}")
    (tmp_path / HEADERS).write_text("")
    with pytest.raises(BadInput, match="no record of updates"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "line", [b'{"number": 3, "rou', b"\xff\xfe", b"[" * 100_000, b"[]", b'{"number": 0}', b" " + b"x" * 2**21]
)
def test_lines_that_are_no_headers_are_named(tmp_path: Path, line: bytes) -> None:
    folder = filled(tmp_path / "r")
    with (folder / HEADERS).open("ab") as out:
        out.write(line)
    held = read_record(folder)
    assert len(held.updates) == 2
    assert len(held.problems) == 1
    assert "line 3" in held.problems[0]


def test_files_that_are_not_what_was_recorded(tmp_path: Path) -> None:
    folder = filled(tmp_path / "r", 3)
    first, second, third = read_record(folder).updates
    path = folder / str(first.header.file)
    path.write_bytes(path.read_bytes()[:-3])
    (folder / str(third.header.file)).write_bytes((folder / str(second.header.file)).read_bytes())
    with pytest.raises(BadInput, match="cannot be read"):
        first.payload()
    second.payload()
    with pytest.raises(BadInput, match="SHA-256"):
        third.payload()


def test_a_safetensors_header_that_lies_about_sizes(tmp_path: Path) -> None:
    folder = filled(tmp_path / "r", 1)
    (one,) = read_record(folder).updates
    path = folder / str(one.header.file)
    head = json.dumps({"update.w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 24]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(24))
    with pytest.raises(BadInput, match="cannot be read"):
        one.payload()
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(BadInput, match="cannot be read"):
        one.payload()


def test_a_record_reads_nothing_outside_itself(tmp_path: Path) -> None:
    folder = filled(tmp_path / "r", 1)
    (tmp_path / "secret.safetensors").write_bytes((folder / "updates" / "000001.safetensors").read_bytes())
    line = json.loads((folder / HEADERS).read_text()) | {"file": "../secret.safetensors"}
    (folder / HEADERS).write_text(json.dumps(line))
    with pytest.raises(BadInput, match="outside the record"):
        read_record(folder).updates[0].payload()
