"""NVFlare's filters, called as its runners call them: what leaves, what is stopped, what is written down."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="nvflare is not installed; pip install 'frostglass[nvflare]'")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable, make_reply

from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.update import LocalPlan
from frostglass.federated.exchange import misfits
from frostglass.federated.local_client import NOTHING
from frostglass.federated.nvflare import availability
from frostglass.federated.nvflare.defence_filter import DefenceFilter
from frostglass.federated.nvflare.gate_filter import GateFilter
from frostglass.federated.nvflare.record_filter import RecordFilter
from frostglass.federated.recorded import Record, read_record
from frostglass.numerics.client_step import computed_step

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def nets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(HERE))
    import nets

    yield nets
    sys.modules.pop("nets", None)


def context(site: str, peer: str | None = None) -> FLContext:
    made = FLContextManager(identity_name=site, job_id="job").new_context()
    if peer is not None:
        made.set_peer_context(FLContextManager(identity_name=peer, job_id="job").new_context())
    return made


def weights(nets: Any, seed: int = 0) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    return {n: t.numpy().copy() for n, t in nets.Small().state_dict().items()}


def shareable(kind: str, data: dict[str, Any], round: int, **meta: Any) -> Shareable:
    made = DXO(kind, data, dict(meta)).to_shareable()
    made.set_header("current_round", round)
    return made


def tell_sent(filter: Any, ctx: FLContext, data: dict[str, Any], round: int) -> None:
    """As a runner does after the task's data filters."""
    ctx.set_prop(FLContextKey.TASK_DATA, shareable(DataKind.WEIGHTS, data, round), private=True, sticky=False)
    filter.handle_event(EventType.AFTER_TASK_DATA_FILTER, ctx)


def passed(filter: Any, sent: Shareable, ctx: FLContext) -> dict[str, Any]:
    return dict(from_shareable(filter.process(sent, ctx)).data)


def difference(nets: Any) -> dict[str, np.ndarray]:
    after, before = weights(nets, 1), weights(nets, 0)
    after["body.1.num_batches_tracked"] = after["body.1.num_batches_tracked"] + 3
    after["body.1.running_mean"] = after["body.1.running_mean"] + 0.5
    return {n: after[n] - before[n] for n in before}


TRAINED = ("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias")


# ---- defence


def test_pruning_a_difference_keeps_the_largest_and_leaves_buffers_alone(nets: Any) -> None:
    diff = difference(nets)
    given = {n: v.copy() for n, v in diff.items()}
    pruning = DefenceFilter("pruning", **nets.WHAT, settings={"fraction": 0.9})
    got = passed(pruning, shareable(DataKind.WEIGHT_DIFF, given, 1), context("site-1"))
    assert got.keys() == diff.keys()
    assert all(isinstance(v, np.ndarray | np.generic) and v.dtype == diff[n].dtype for n, v in got.items())
    for n in set(diff) - set(TRAINED):
        assert np.array_equal(got[n], diff[n]), n
    before, after = (np.concatenate([x[n].ravel() for n in TRAINED]) for x in (diff, got))
    kept = after != 0
    assert kept.sum() == pytest.approx(0.1 * len(after), abs=2)
    assert np.array_equal(after[kept], before[kept])
    assert np.abs(before[~kept]).max() <= np.abs(before[kept]).min()


def test_full_weights_are_defended_as_their_difference(nets: Any) -> None:
    before, diff = weights(nets), difference(nets)
    after = {n: before[n] + diff[n] for n in before}
    pruning, ctx = DefenceFilter("pruning", **nets.WHAT, settings={"fraction": 0.9}), context("site-1")
    tell_sent(pruning, ctx, before, 1)
    got = passed(pruning, shareable(DataKind.WEIGHTS, {n: v.copy() for n, v in after.items()}, 1), ctx)
    moved = np.concatenate([(got[n] - before[n]).ravel() for n in TRAINED])
    assert (moved != 0).mean() == pytest.approx(0.1, abs=0.01)
    assert np.array_equal(got["body.1.running_mean"], after["body.1.running_mean"])
    unseen = DefenceFilter("pruning", **nets.WHAT)
    with pytest.raises(BadInput, match="what the server sent is not known"):
        unseen.process(shareable(DataKind.WEIGHTS, after, 1), ctx)


@pytest.mark.parametrize("kind", [DataKind.WEIGHT_DIFF, DataKind.WEIGHTS])
def test_what_a_defence_keeps_back_does_not_move(nets: Any, kind: str) -> None:
    before, diff = weights(nets), difference(nets)
    filter, ctx = DefenceFilter("pruning", **nets.WHAT), context("site-1")
    head = {"body.4.weight", "body.4.bias"}
    filter._made = Defense(
        "theirs", protect=lambda u, _: replace(u, gradients={n: g for n, g in u.gradients.items() if n in head})
    )
    tell_sent(filter, ctx, before, 1)
    full = kind == DataKind.WEIGHTS
    got = passed(filter, shareable(kind, {n: before[n] * full + diff[n] for n in before}, 1), ctx)
    assert got.keys() == before.keys()
    for n in TRAINED:
        assert np.allclose(got[n] - before[n] * full, diff[n] if n in head else 0.0, atol=1e-7), n


@pytest.mark.parametrize("kind", [DataKind.WEIGHT_DIFF, DataKind.WEIGHTS])
def test_a_weight_under_two_names_is_defended_under_both(nets: Any, kind: str) -> None:
    filter, ctx = (
        DefenceFilter("pruning", **{**nets.WHAT, "network": "nets:Tied"}, settings={"fraction": 0.9}),
        context("s"),
    )
    before = {n: t.numpy().copy() for n, t in nets.Tied().state_dict().items()}
    after = {n: t.numpy().copy() for n, t in nets.Tied().state_dict().items()}
    tell_sent(filter, ctx, before, 1)
    given = after if kind == DataKind.WEIGHTS else {n: after[n] - before[n] for n in after}
    out = passed(filter, shareable(kind, given, 1), ctx)
    left = out["b.weight"] - (before["b.weight"] if kind == DataKind.WEIGHTS else 0)
    assert np.array_equal(out["a.weight"], out["b.weight"])
    assert (left == 0).mean() > 0.8, "the second name left undefended"
    alone = {n: v for n, v in given.items() if n != "a.weight"}
    with pytest.raises(BadInput, match=r"'b\.weight'"):
        filter.process_dxo(DXO(kind, alone), shareable(kind, alone, 1), ctx)


@pytest.mark.parametrize("unread", [DataKind.WEIGHT_DIFF, "packed"])
def test_weights_of_an_earlier_round_are_not_those_of_this_one(nets: Any, unread: str) -> None:
    """A server may send differences, or what another filter has packed: what was sent is then not known."""
    before, after = weights(nets), weights(nets, 1)
    filters = [DefenceFilter("pruning", **nets.WHAT), gate(nets, on_failure="closed")]
    for filter in filters:
        ctx = context("site-1")
        tell_sent(filter, ctx, before, 1)
        meta = {"PROCESSED_ALGORITHM": "packed"} if unread == "packed" else {}
        kind = DataKind.WEIGHTS if unread == "packed" else unread
        ctx.set_prop(FLContextKey.TASK_DATA, shareable(kind, before, 2, **meta), private=True, sticky=False)
        with contextlib.suppress(BadInput):  # NVFlare logs what a handler raises, and goes on
            filter.handle_event(EventType.AFTER_TASK_DATA_FILTER, ctx)
        with pytest.raises((BadInput, ContentBlockedException), match="what the server sent"):
            filter.process(shareable(DataKind.WEIGHTS, {n: v.copy() for n, v in after.items()}, 2), ctx)


def test_noise_comes_from_the_operating_system_unless_seeded(nets: Any) -> None:
    def noised(round: int = 1, site: str = "site-1", **more: Any) -> np.ndarray:
        noise = DefenceFilter("clip_and_noise", **nets.WHAT, settings={"clipping_norm": 1.0}, **more)
        return passed(noise, shareable(DataKind.WEIGHT_DIFF, difference(nets), round), context(site))["body.4.weight"]

    assert not np.array_equal(noised(), noised())
    assert np.array_equal(noised(seed=1), noised(seed=1))
    assert not np.array_equal(noised(seed=1), noised(round=2, seed=1))
    assert not np.array_equal(noised(seed=1), noised(site="site-2", seed=1))


def test_the_sign_of_an_update_survives(nets: Any) -> None:
    """NVFlare's differences are the negative of Frostglass's: clipping must shorten, not turn."""
    diff = difference(nets)
    clip = DefenceFilter("clip_and_noise", **nets.WHAT, settings={"clipping_norm": 1e-3, "noise_multiplier": 0.0})
    got = passed(clip, shareable(DataKind.WEIGHT_DIFF, {n: v.copy() for n, v in diff.items()}, 1), context("site-1"))
    before, after = (np.concatenate([x[n].ravel() for n in TRAINED]) for x in (diff, got))
    assert np.linalg.norm(after) == pytest.approx(1e-3, rel=1e-4)
    assert float(before @ after) > 0.999 * np.linalg.norm(before) * np.linalg.norm(after)


def test_torch_tensors_and_half_precision_come_back_as_they_were(nets: Any) -> None:
    diff = {n: torch.as_tensor(v) for n, v in difference(nets).items()}
    diff["body.4.weight"] = diff["body.4.weight"].half()
    got = passed(DefenceFilter("pruning", **nets.WHAT), shareable(DataKind.WEIGHT_DIFF, dict(diff), 1), context("a-1"))
    assert got["body.4.weight"].dtype == torch.float16
    assert all(isinstance(v, torch.Tensor) for v in got.values())


def test_what_is_not_of_the_network_does_not_leave_undefended(nets: Any) -> None:
    diff = difference(nets) | {"extra.weight": np.ones(3, np.float32)}
    with pytest.raises(BadInput, match=r"extra\.weight"):
        DefenceFilter("pruning", **nets.WHAT).process(shareable(DataKind.WEIGHT_DIFF, diff, 1), context("site-1"))
    packed = shareable(DataKind.WEIGHT_DIFF, difference(nets), 1, PROCESSED_ALGORITHM="HE")
    with pytest.raises(BadInput, match="'HE'"):
        DefenceFilter("pruning", **nets.WHAT).process(packed, context("site-1"))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [("instahide", None, "works on images"), ("dp_sgd", None, "works on images"), ("prunning", None, "did you mean"),
     ("pruning", {"fracton": 0.5}, "fracton")],
)  # fmt: skip
def test_wrong_defences_are_refused(nets: Any, name: str, settings: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        DefenceFilter(name, **nets.WHAT, settings=settings)


# ---- gate


def gate(nets: Any, **more: Any) -> GateFilter:
    settings = {"label_leakage": 0.8, "exact_recovery": False, "linter": False}
    plan = {"lr": 0.1, "mode": "train"}
    return GateFilter(
        "frostglass.auditing.outgoing:outgoing_checks", "nets:batch", **nets.WHAT, plan=plan, settings=settings, **more
    )


def honest(nets: Any, ctx: FLContext, filter: Any) -> Shareable:
    """One step of SGD on the site's own images, as NVFlare sends it."""
    model = nets.Small()
    tell_sent(filter, ctx, {n: t.numpy().copy() for n, t in model.state_dict().items()}, 1)
    plan = LocalPlan(kind="delta", lr=0.1)
    done = computed_step(model, nets.batch("site-1"), plan, NOTHING, torch_key())
    data = {n: -g.numpy() for n, g in done.update.gradients.items()}
    return shareable(DataKind.WEIGHT_DIFF, data, 1)


def torch_key() -> Any:
    from frostglass.core.randomness import Rng

    return Rng.from_seed(0)


def test_the_gate_blocks_what_leaks_labels(nets: Any, tmp_path: Path) -> None:
    filter, ctx = gate(nets, journal=str(tmp_path / "{site}.jsonl")), context("site-1")
    with pytest.raises(ContentBlockedException, match="100% of the labels"):
        filter.process(honest(nets, ctx, filter), ctx)
    row = json.loads((tmp_path / "site-1.jsonl").read_text())
    assert (row["client"], row["round"], row["passed"]) == ("site-1", 1, False)


def test_a_gate_that_warns_lets_the_same_values_pass(nets: Any) -> None:
    filter, ctx = gate(nets, action="warn"), context("site-1")
    sent = honest(nets, ctx, filter)
    before = {n: v.copy() for n, v in from_shareable(sent).data.items()}
    got = passed(filter, sent, ctx)
    assert all(np.array_equal(got[n], before[n]) for n in before)


@pytest.mark.parametrize(("on_failure", "stops"), [("open", False), ("closed", True)])
def test_an_update_that_cannot_be_judged_fails_open_or_closed(nets: Any, on_failure: Any, stops: bool) -> None:
    filter, ctx = gate(nets, on_failure=on_failure), context("site-1")  # what was sent is not known
    sent = shareable(DataKind.WEIGHT_DIFF, difference(nets), 1)
    if stops:
        with pytest.raises(ContentBlockedException, match="cannot be judged"):
            filter.process(sent, ctx)
    else:
        filter.process(sent, ctx)


def test_wrong_paths_are_named(nets: Any) -> None:
    with pytest.raises(BadInput, match="nets:nothing"):
        GateFilter("frostglass.auditing.outgoing:outgoing_checks", "nets:nothing", **nets.WHAT, plan={})


# ---- record


def recording(nets: Any, folder: Path, **more: Any) -> RecordFilter:
    made = RecordFilter(str(folder), **nets.WHAT, plan={"lr": 0.1}, **more)
    assert not folder.exists()  # NVFlare also builds components where the job is written
    made.handle_event(EventType.START_RUN, context("server"))
    return made


def ended(filter: RecordFilter, folder: Path) -> Record:
    filter.handle_event(EventType.END_RUN, context("server"))
    return read_record(folder)


def test_the_record_holds_what_arrived(nets: Any, tmp_path: Path) -> None:
    before, diff = weights(nets), difference(nets)
    filter = recording(nets, tmp_path / "record")
    counted = before | {"body.1.num_batches_tracked": np.float64(0.2)}  # as FedAvg of counters sends them
    for site in ("site-1", "site-2"):
        tell_sent(filter, context("server", site), counted, 4)
    sent = {n: v.copy() for n, v in diff.items()}
    got = passed(filter, shareable(DataKind.WEIGHT_DIFF, sent, 4, examples=7), context("server", "site-1"))
    assert all(np.array_equal(got[n], diff[n]) for n in diff)
    for v in sent.values():
        v.fill(0)  # the server goes on with its memory
    full = {n: before[n] + diff[n] for n in before}
    passed(filter, shareable(DataKind.WEIGHTS, full, 4), context("server", "site-2"))
    held = ended(filter, tmp_path / "record")
    assert (held.info.engine, held.info.model["name"]) == ("nvflare", "nets:Small")
    assert [(u.header.client, u.header.round, u.header.examples, u.header.kind) for u in held.updates] == [
        ("site-1", 4, 7, "delta"), ("site-2", 4, None, "delta")
    ]  # fmt: skip
    assert [u.header.metrics["kind"] for u in held.updates] == ["WEIGHT_DIFF", "WEIGHTS"]
    for one in held.updates:
        assert not one.header.problems
        update, buffers = one.payload()
        assert set(update) == set(TRAINED)
        for n, g in update.items():
            np.testing.assert_allclose(g.numpy(), -diff[n], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(buffers["body.1.running_mean"].numpy(), full["body.1.running_mean"])
        assert int(buffers["body.1.num_batches_tracked"]) == 3
        assert all(np.array_equal(t.numpy(), before[n]) for n, t in one.sent().items())
        assert not misfits(one.sent(), nets.Small())
    exact, _ = held.updates[0].payload()
    assert all(np.array_equal(exact[n].numpy(), -diff[n]) for n in TRAINED)


def test_errors_and_misfits_are_named(nets: Any, tmp_path: Path) -> None:
    filter, ctx = recording(nets, tmp_path / "record"), context("server", "site-2")
    tell_sent(filter, ctx, weights(nets), 0)
    filter.process(make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR), ctx)
    filter.process(shareable(DataKind.WEIGHT_DIFF, {}, 0), ctx)
    bad = difference(nets)
    bad["body.4.bias"] = np.full(10, np.nan, np.float32)
    passed(filter, shareable(DataKind.WEIGHT_DIFF, bad, 0), ctx)
    passed(filter, shareable(DataKind.WEIGHT_DIFF, {"other": np.ones(2, np.float32)}, 0), ctx)
    passed(filter, shareable(DataKind.WEIGHT_DIFF, {"word": "no array"}, 0), ctx)
    passed(filter, shareable(DataKind.WEIGHTS, weights(nets), 3), ctx)  # of a round that was not seen
    error, empty, nan, other, word, unseen = ended(filter, tmp_path / "record").updates
    assert "TASK_RESULT_FILTER_ERROR" in error.header.reason
    assert empty.header.reason == "nothing was sent"
    assert "not finite" in nan.header.problems[0]
    assert set(nan.payload()[0]) == set(TRAINED)
    assert "no state of this network" in other.header.reason
    assert set(other.payload()[0]) == {"other"}
    assert "no array" in word.header.reason
    assert "not seen" in unseen.header.reason


def test_a_record_that_cannot_be_opened_ends_the_job_before_it_starts(nets: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    filter = RecordFilter(str(tmp_path), **nets.WHAT)
    said: list[str] = []
    filter.system_panic = lambda reason, ctx: said.append(reason)
    filter.handle_event(EventType.START_RUN, context("server"))
    assert "holds something already" in said[0]
    passed(filter, shareable(DataKind.WEIGHT_DIFF, difference(nets), 0), context("server", "site-1"))


def test_recording_never_breaks_a_round(nets: Any, tmp_path: Path) -> None:
    filter = recording(nets, tmp_path / "record")
    filter._taken_down = None
    got = passed(filter, shareable(DataKind.WEIGHT_DIFF, difference(nets), 0), context("server", "site-1"))
    assert set(got) == set(difference(nets))
    assert not ended(filter, tmp_path / "record").updates


# ---- the package


def test_a_wrong_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability.metadata, "version", lambda name: "2.5.0")
    with pytest.raises(BadInput, match=r"nvflare 2\.5\.0 .*frostglass\[nvflare\]"):
        availability.require_nvflare()

    monkeypatch.setattr(availability.metadata, "version", lambda name: f"{availability.WORKS_WITH}.0")
    monkeypatch.setitem(sys.modules, "nvflare.apis.filter", None)
    with pytest.raises(BadInput, match=r"NVFlare does not import .*frostglass\[nvflare\]"):
        availability.require_nvflare()

    def absent(name: str) -> str:
        raise availability.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(availability.metadata, "version", absent)
    with pytest.raises(BadInput, match=r"not installed; run pip install 'frostglass\[nvflare\]'"):
        availability.require_nvflare()
