"""Clients, gates, recorders and filters given networks and updates that lie on a device."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pretend_device
from federations import federate, plan
from frostglass.auditing.outgoing import outgoing_checks
from frostglass.core.batch import Batch, one_hot
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.update import LocalPlan
from frostglass.defenses.dp_sgd import dp_sgd
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide
from frostglass.defenses.pruning import pruning
from frostglass.federated.ddp import LocalGradients
from frostglass.federated.exchange import device_of, protected, statistics_sent
from frostglass.federated.feeds import takes_encodings
from frostglass.federated.gate import Gate, Outgoing, Ruling
from frostglass.federated.gradient_tap import GradientTap, gradients_of
from frostglass.federated.local_client import NOTHING, LocalClient, dirichlet_split, mean_state
from frostglass.federated.recorded import read_record
from frostglass.federated.recording import Received, Recorder
from frostglass.numerics.client_step import computed_step
from frostglass.vision import borrowed, datasets
from frostglass.vision.networks import build
from frostglass.vision.normalise import domain_of

HERE, THERE = torch.device("cpu"), pretend_device.DEVICE
HELD = datasets.load("digits", size=8)
PLAN = LocalPlan("delta", epochs=1, minibatch=8, lr=0.1, momentum=0.9)


def network(name: str = "small_bn_cnn") -> nn.Module:
    options = {"width": 4} if name == "small_bn_cnn" else {"hidden": [16]}
    return build(name, classes=10, channels=1, size=8, options=options, rng=Rng.from_seed(0))


def same(there: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    assert there.keys() == here.keys()
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, atol=1e-5, rtol=1e-4)


# ---- clients


def trained(defence: str, model: torch.device, images: torch.device) -> LocalClient:
    own, more = network("mlp" if defence == "dp_sgd" else "small_bn_cnn"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyCaution)
        if defence == "encoder":
            own, more = takes_encodings(own), {"encoder": InstaHide(k=2, insecure_seed=1)}
        elif defence == "pool":
            pool = (HELD.images[50:60] * 255).to(torch.uint8).numpy()
            own, more = takes_encodings(own), {"encoder": InstaHide(k=3, private=2, public=pool, insecure_seed=1)}
        elif defence == "dp_sgd":
            more = {"defense": dp_sgd(noise_multiplier=0.0)}
    held, labels = HELD.images[:20].to(images), HELD.labels[:20].to(images)
    return LocalClient("a", own.to(model), held, labels, 10, PLAN, seed=3, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("defence", ["none", "encoder", "pool", "dp_sgd"])
@pytest.mark.parametrize(("model", "images"), [(THERE, THERE), (THERE, HERE), (HERE, THERE)])
def test_a_client_trains_where_its_network_lies(defence: str, model: torch.device, images: torch.device) -> None:
    far, near = trained(defence, model, images), trained(defence, HERE, HERE)
    state = {n: t.clone() for n, t in near.model.state_dict().items()}  # what an engine sends lies on the CPU
    for round in (1, 2):
        got, want = far.train(state, round), near.train(state, round)
        same(got.state, want.state)
        same(dict(got.update.gradients), dict(want.update.gradients))
        assert device_of(far.model) == model
        assert all(t.device == model for t in got.state.values())
        after, sent = protected(
            far.model, {n: t.to(model) for n, t in state.items()}, got.state, pruning(fraction=0.5), Insecure(0),
            examples=20, plan=PLAN,
        )  # fmt: skip
        assert sent.examples == 20
        state = {n: t.cpu() for n, t in after.items()}


def test_means_splits_and_statistics_of_what_lies_there() -> None:
    sent = network().state_dict()
    one = LocalPlan("delta", lr=0.1)
    done = computed_step(
        network(), Batch(HELD.images[:6], one_hot(HELD.labels[:6], 10), domain_of(network()), tuple("abcdef")),
        one, NOTHING, Rng.from_seed(0),
    )  # fmt: skip
    after = {n: done.buffers.get(n, t) for n, t in sent.items()}
    far_sent, far_after = ({n: t.to(THERE) for n, t in s.items()} for s in (sent, after))
    got = statistics_sent(network().to(THERE), far_sent, far_after, (1, 8, 8), 6)
    want = statistics_sent(network(), sent, after, (1, 8, 8), 6)
    for name, s in want.items():
        torch.testing.assert_close(got[name].mean.cpu(), s.mean)
        assert got[name].count == s.count
    same(mean_state([far_sent, far_after], [1, 3]), mean_state([sent, after], [1, 3]))
    parts = [dirichlet_split(x, 3, 1.0, Rng.from_seed(0)) for x in (HELD.labels.to(THERE), HELD.labels)]
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


# ---- the gate


def outgoing(model: torch.device, update: torch.device, private: torch.device, name: str = "mlp") -> Outgoing:
    made = network(name)
    held = Batch(HELD.images[:3], one_hot(HELD.labels[:3], 10), domain_of(made), ("a", "b", "c"))
    done = computed_step(made, held, LocalPlan(mode="train"), NOTHING, Rng.from_seed(0)).update
    sent = {n: t.to(update) for n, t in made.state_dict().items()}
    moved = {n: g.to(update) for n, g in done.gradients.items()}
    bn = {n: type(s)(s.mean.to(update), s.var.to(update), s.count) for n, s in done.bn.items()}
    return Outgoing(
        made.to(model), sent, type(done)(moved, bn, 3, done.plan), held.to(private), NOTHING, 1, "site"
    )  # fmt: skip


def ruling(private: torch.device, given: Outgoing, exact: bool) -> Ruling:
    rows = torch.arange(100, 700)
    decoys = HELD.images[rows].to(private), HELD.labels[rows].to(private)
    checks = outgoing_checks(
        exact_recovery=exact, gallery=0.5, decoys=decoys, candidates=3, targets=1, randomness=Insecure(1)
    )
    return Gate(checks, budget=200.0)(given)


@functools.cache
def ruling_here(name: str, exact: bool) -> Ruling:
    return ruling(HERE, outgoing(HERE, HERE, HERE, name), exact)


@pytest.mark.parametrize(
    ("name", "exact", "model", "update", "private"),
    [
        ("mlp", True, THERE, THERE, THERE),
        ("mlp", True, THERE, HERE, THERE),
        ("mlp", False, HERE, THERE, HERE),
        ("mlp", False, THERE, HERE, HERE),
        ("small_bn_cnn", False, THERE, HERE, HERE),
    ],
)
def test_the_gate_finds_the_same_wherever_things_lie(
    name: str, exact: bool, model: torch.device, update: torch.device, private: torch.device
) -> None:
    got, want = ruling(private, outgoing(model, update, private, name), exact), ruling_here(name, exact)
    assert got.decision is not None
    assert want.decision is not None
    assert got.decision.not_run == want.decision.not_run
    assert [(f.check, f.exceeded) for f in got.decision.findings] == [
        (f.check, f.exceeded) for f in want.decision.findings
    ]
    assert len(got.decision.findings) == (3 if exact else 2)
    assert got.passed == want.passed


# ---- recorders and taps


def test_a_recorder_takes_tensors_from_there(tmp_path: Path) -> None:
    made = network()
    sent = made.state_dict()
    gradients = {n: torch.ones_like(p) for n, p in made.named_parameters()}
    size = sum(t.numel() * t.element_size() for t in sent.values())
    for folder, device in (("here", HERE), ("there", THERE)):
        with Recorder(tmp_path / folder, engine="own", max_bytes=2 * size) as recorder:
            recorder.sent(1, {n: t.to(device) for n, t in sent.items()})
            for client in "abcd":  # the last are beyond the limit, and hashed alone
                own = {n: g.detach().to(device) for n, g in gradients.items()}
                recorder.received(Received(1, client, own, {"b": torch.zeros(2, device=device)}, examples=2))
        assert not recorder.problems
    there, here = read_record(tmp_path / "there"), read_record(tmp_path / "here")
    assert [u.header.sha256 for u in there.updates] == [u.header.sha256 for u in here.updates]
    assert any(u.header.file is None for u in there.updates)
    same(there.updates[0].payload()[0], here.updates[0].payload()[0])


def one_pass(model: nn.Module) -> None:
    device = device_of(model)
    model.zero_grad()
    nn.functional.cross_entropy(model(HELD.images[:4].to(device)), HELD.labels[:4].to(device)).backward()


@pytest.mark.parametrize("scale", [None, lambda: 8.0])
def test_a_gradient_tap_in_a_loop_there(scale: Any, tmp_path: Path) -> None:
    kept = []
    for device in (HERE, THERE):
        model = network().to(device)
        folder = tmp_path / device.type
        with GradientTap(folder, engine="own", note="", every=2, loss_scale=scale) as tap:
            tap.watch(model)
            for _ in range(3):
                one_pass(model)
                tap.take(model, gradients_of(model))
        assert not tap.recorder.problems
        kept.append(read_record(folder).updates)
        assert [u.header.examples for u in kept[-1]] == [4, 4]
    same(kept[1][0].payload()[0], kept[0][0].payload()[0])


def test_the_hook_of_distributed_data_parallel_copies_buckets_from_there(tmp_path: Path) -> None:
    model = network().to(THERE)
    one_pass(model)
    wrapped: Any = SimpleNamespace(module=model, register_forward_pre_hook=model.register_forward_pre_hook)
    with GradientTap(tmp_path / "record", engine="own", note="") as tap:
        hook = LocalGradients(wrapped, tap, lambda state, bucket: bucket, None)
        held, answered = list(model.parameters()), list[bool]()

        def reduced(_: Tensor) -> None:
            for part, last in ((held[:4], False), (held[4:], True)):
                bucket: Any = SimpleNamespace(
                    parameters=lambda part=part: part, gradients=lambda part=part: [p.grad for p in part],
                    is_last=lambda last=last: last,
                )  # fmt: skip
                answered.append(hook(None, bucket) is bucket)

        x = torch.ones(1, requires_grad=True)
        x.register_hook(reduced)  # in a backward pass, where DDP calls it
        x.sum().backward()
        assert answered == [True, True]
    assert not tap.recorder.problems
    (update,) = read_record(tmp_path / "record").updates
    same(gradients_of(model), update.payload()[0])


def test_accelerate_s_tap_there(tmp_path: Path) -> None:
    borrowed.import_torchvision()
    pytest.importorskip("accelerate", reason="accelerate is not installed; pip install 'frostglass[hf]'")
    from frostglass.federated.accelerate_tap import record_accelerate

    model = network().to(THERE)
    loop: Any = SimpleNamespace(
        distributed_type="NO", scaler=None, num_processes=1, process_index=0, sync_gradients=True,
        unwrap_model=lambda m: m, backward=lambda loss: loss.backward(),
    )  # fmt: skip
    with record_accelerate(loop, model, tmp_path) as tap:
        x, y = HELD.images[:4].to(THERE), HELD.labels[:4].to(THERE)
        tap.backward(nn.functional.cross_entropy(model(x), y))
    (update,) = read_record(tmp_path / "rank-0").updates
    same(gradients_of(model), update.payload()[0])


def test_lightning_s_callback_there(tmp_path: Path) -> None:
    borrowed.import_torchvision()  # before Lightning does it by itself
    pytest.importorskip("lightning", reason="lightning is not installed; pip install 'frostglass[lightning]'")
    from frostglass.federated.lightning_tap import RecordGradients

    model = network().to(THERE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(model=model), optimizers=[optimizer])
    record = RecordGradients(tmp_path)
    record.on_train_start(trainer, model)
    record.on_train_batch_start(trainer, model, (HELD.images[:4].to(THERE), HELD.labels[:4].to(THERE)), 0)
    one_pass(model)
    record.on_before_optimizer_step(trainer, model, optimizer)
    record.on_train_end(trainer, model)
    (update,) = read_record(tmp_path / "rank-0").updates
    assert update.header.examples == 4
    same(gradients_of(model), update.payload()[0])


# ---- Flower


def test_flower_s_clients_with_networks_there(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="flwr is not installed; pip install 'frostglass[flower]'")
    from frostglass.federated.federation import federation_of
    from frostglass.federated.flower import audit_mod, client_app, gate_mod, protect_mod

    text = plan(rounds="1", clients="2", limit="60")
    made = federation_of(text)
    local: LocalPlan = made.plan.client.local_plan()
    ended = []
    for name, device in (("here", HERE), ("there", THERE)):
        model = copy.deepcopy(made.model).to(device)

        def client(context: Any, model: nn.Module = model) -> LocalClient:
            own = made.client(context.node_config["partition-id"])
            return LocalClient(own.name, model, own.images, own.labels, own.classes, own.plan, seed=1)

        def private(context: Any, device: torch.device = device) -> Batch:
            return made.private(context.node_config["partition-id"]).to(device)

        gate = Gate(outgoing_checks(exact_recovery=False), action="warn", on_failure="closed", budget=200.0)
        recorder = Recorder(tmp_path / f"{name}-client", engine="flower")
        app = client_app(
            client,
            mods=[
                audit_mod(recorder, model, local),
                gate_mod(gate, model, local, private),
                protect_mod(pruning(fraction=0.5), model, local),
            ],
        )
        history = federate(text, tmp_path / name, client=app)
        recorder.close()
        assert not recorder.problems
        assert all(c.get("reason", "") == "" for c in history["rounds"][1]["clients"])
        ended.append(load_file(next((tmp_path / name).glob("*.safetensors"))))
    same(ended[1], ended[0])


# ---- NVFlare


def test_nvflare_s_filters_given_tensors_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvflare", reason="nvflare is not installed; pip install 'frostglass[nvflare]'")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "federated" / "nvflare"))
    import nets
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContextManager

    from frostglass.federated.nvflare.defence_filter import DefenceFilter
    from frostglass.federated.nvflare.gate_filter import GateFilter
    from frostglass.federated.nvflare.record_filter import RecordFilter

    def shareable(kind: str, data: dict[str, Tensor], **meta: Any) -> Any:
        made = DXO(kind, data, meta).to_shareable()
        made.set_header("current_round", 1)
        return made

    ctx = FLContextManager(identity_name="site-1", job_id="job").new_context()
    ctx.set_peer_context(FLContextManager(identity_name="site-2", job_id="job").new_context())
    torch.manual_seed(0)
    sent, after = nets.Small().state_dict(), nets.Small().state_dict()
    found: dict[str, list[dict[str, Tensor]]] = {}
    for name, device in (("here", HERE), ("there", THERE)):
        start, end = ({n: t.to(device) for n, t in s.items()} for s in (sent, after))
        ctx.set_prop(FLContextKey.TASK_DATA, shareable(DataKind.WEIGHTS, sent), private=True, sticky=False)
        pruned = DefenceFilter("pruning", **nets.WHAT, settings={"fraction": 0.5})
        gate = GateFilter(
            "frostglass.auditing.outgoing:outgoing_checks", "nets:batch", **nets.WHAT, plan={"lr": 0.1},
            settings={"exact_recovery": False}, action="block", on_failure="closed", budget=200.0,
        )  # fmt: skip
        record = RecordFilter(str(tmp_path / name), **nets.WHAT)
        record.handle_event(EventType.START_RUN, ctx)
        for one in (pruned, gate, record):
            one.handle_event(EventType.AFTER_TASK_DATA_FILTER, ctx)
        for kind in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
            data = end if kind == DataKind.WEIGHTS else {n: end[n] - start[n] for n in end}
            given = shareable(kind, data, examples=4)
            for one in (pruned, gate, record):
                given = one.process(given, ctx)
            left = dict(from_shareable(given).data)
            assert all(t.device == device for t in left.values())
            found.setdefault(name, []).append(left)
        record.handle_event(EventType.END_RUN, ctx)
        found[name] += [u.payload()[0] for u in read_record(tmp_path / name).updates]
    assert len(found["there"]) == 4
    for got, want in zip(found["there"], found["here"], strict=True):
        same(got, want)
    sys.modules.pop("nets", None)
