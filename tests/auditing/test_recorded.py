"""Audits of updates that clients really sent: what is recovered, what is read, and what is passed over and named."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import frostglass
from frostglass.auditing import recorded_truth, recorded_view
from frostglass.auditing.plan import DefensePlan, parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.recorded_api import UpdatesRequest, audit_updates, parse_request
from frostglass.auditing.recorded_choice import PLACEHOLDER, scenario_of, seen_of
from frostglass.auditing.recorded_claim import Claimed
from frostglass.auditing.recorded_head import noise_level
from frostglass.auditing.recorded_plan import UpdatesPlan
from frostglass.auditing.recorded_pool import _row, headline_of
from frostglass.auditing.recorded_selection import chosen
from frostglass.auditing.recorded_table import cell_words, updates_text
from frostglass.auditing.recorded_truth import content, read_images
from frostglass.auditing.recorded_view import Recording, load_recording
from frostglass.auditing.report import write_report
from frostglass.auditing.wording import outcome
from frostglass.core.batch import one_hot
from frostglass.core.errors import BadInput
from frostglass.core.threat import Observation
from frostglass.core.update import LocalPlan
from frostglass.federated.feeds import takes_encodings
from frostglass.federated.recording import Received, Recorder
from frostglass.numerics.local_update import local_update
from frostglass.vision import networks
from recorded_scenes import ONE_STEP, Federation, Tiny
from scenes import small

MLP = {"network": "mlp", "options": {"hidden": [200]}}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    made = Federation(tmp_path_factory.mktemp("mlp"), clients=2, **MLP)
    made.run(2)
    made.truth()
    return made


def observed(plan: UpdatesPlan, model: torch.nn.Module | None = None) -> Observation:
    """Of the only update."""
    recording = load_recording(plan, model)
    return seen_of(recording, scenario_of(recording, recording.source.updates[0], [PLACEHOLDER]), 0, CPU)


def rows(report: Any) -> list[dict[str, Any]]:
    return [r for r in report.scorecard.recorded["updates"] if r["status"] != "passed over"]


def passed_over(report: Any) -> dict[str, str]:
    found = [r for r in report.scorecard.recorded["updates"] if r["status"] == "passed over"]
    return {f"{r['round']} {r['client']}": r["reason"] for r in found}


def test_one_step_of_a_small_cnn_is_peeled(tmp_path: Path) -> None:
    made = Federation(tmp_path)
    report = audit_updates(made.run(), truth=made.truth())
    (cell,) = report.cells
    assert cell.attack == "peel"
    assert cell.summary is not None
    assert cell.summary.over_threshold.count == 4
    assert cell.summary.psnr_median is not None
    assert cell.summary.psnr_median > 40
    assert "bn_batch" in cell.grants  # told by the buffers that were sent
    assert not cell.upper_bound
    (row,) = rows(report)
    assert row["read_as"] == "the gradient of one SGD step (lr 0.1)"
    assert row["labels"]["count_accuracy"] == 1.0
    assert row["exact"]["peel"] == ""
    assert row["exact"]["spear"] != ""


def test_batch_statistics_are_granted_only_where_buffers_tell_them(tmp_path: Path) -> None:
    told = observed(UpdatesPlan(record=str(Federation(tmp_path / "a").run())))
    kept = observed(UpdatesPlan(record=str(Federation(tmp_path / "b", buffers=False).run())))
    steps = LocalPlan(kind="delta", lr=0.1, local_steps=2)
    more = observed(UpdatesPlan(record=str(Federation(tmp_path / "c", plan=steps).run())))
    assert told.bn_batch
    assert kept.bn_batch is None
    assert more.bn_batch is None
    made = Federation(tmp_path / "d")
    trace = local_update(
        made.model, made.data.images[:4], one_hot(made.data.labels[:4], 10), LocalPlan(mode="train")
    )  # fmt: skip
    for name, true in trace.bn.items():
        assert torch.allclose(told.bn_batch[name].mean, true.mean, atol=1e-4)
        assert torch.allclose(told.bn_batch[name].var, true.var, atol=1e-3, rtol=1e-3)


def test_an_mlp_client_is_proved_whole(mlp: Federation) -> None:
    report = audit_updates(mlp.record, truth=mlp.folder / "TRUTH", known={"rounds": [1]})
    assert [c.attack for c in report.cells] == ["spear", "spear"]
    for cell in report.cells:
        assert cell.summary is not None
        assert cell.summary.proved == 4
        assert cell.summary.psnr_worst is not None
        assert cell.summary.psnr_worst > 45
    assert report.scorecard.verdict is not None
    assert report.scorecard.verdict.verdict == "VIOLATED"
    assert "2 of 4 recorded updates examined" in report.headline
    text = updates_text(report.scorecard)
    assert "round 1, client c1" in text
    assert "another round was chosen" in text
    page = report.html.read_text(encoding="utf-8")
    assert "The updates that were sent" in page
    assert "round 1, client c0" in page
    assert "<script" not in page


def test_an_attack_that_returns_nothing_has_failed_and_truth_was_given_all_the_same(mlp: Federation) -> None:
    report = audit_updates(mlp.record, truth=mlp.folder / "TRUTH", known={"rounds": [1]})
    one, other = report.cells
    empty = one.model_copy(update={"summary": None, "images": [], "pool": 9, "objective": 1.0})
    unknown = empty.model_copy(update={"pool": None})
    assert "returned no image to compare" in cell_words(empty)
    assert "no truth to score it with" in cell_words(unknown)
    assert "returned no image" in outcome(empty).sentence
    plan = parse_plan(small())
    held = _row(plan, (1, "spear", "none"), [empty, other], 1)
    assert (held["trials"], held["successes"]) == (2, 1)
    assert "No truth was given" not in held["text"]
    card = report.scorecard.model_copy(update={"cells": [empty]})
    assert "the attacks returned none to compare" in headline_of(card, rows(report))
    assert "no truth was given" in headline_of(card.model_copy(update={"cells": [unknown]}), rows(report))


def test_without_truth_proofs_and_labels_are_told_and_nothing_is_scored(mlp: Federation) -> None:
    report = audit_updates(mlp.record, known={"rounds": [1], "clients": ["c0"]}, show_images=True)
    (cell,) = report.cells
    assert cell.summary is not None
    assert cell.summary.proved == 4
    assert cell.summary.matched == 0
    assert {i.target for i in cell.images} == {"recovered"}
    assert cell.verdict is not None
    assert cell.verdict.verdict == "VIOLATED"  # a proof needs no truth
    (row,) = rows(report)
    assert row["labels"]["count_accuracy"] is None
    true = Counter(mlp.data.labels[:4].tolist())
    assert row["labels"]["counts"] == [float(true.get(k, 0)) for k in range(10)]
    page = report.html.read_text(encoding="utf-8")
    assert "there is no truth to put beside it" in page
    assert "0 of 4 private images" not in page
    (report.folder / "pictures.safetensors").write_bytes(b"junk")
    with pytest.raises(BadInput, match=r"pictures\.safetensors: cannot be read"):
        write_report(report.folder)


def test_an_attack_sees_the_same_whether_truth_is_given_or_not(mlp: Federation, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"attacks": [{"name": "thaw", "steps": 20}], "known": {"rounds": [2], "clients": ["c1"]}}
    audit_updates(mlp.record, truth=mlp.folder / "TRUTH", out=tmp_path / "with", **settings)
    audit_updates(mlp.record, out=tmp_path / "without", **settings)
    one, other = (load_file(tmp_path / n / "reconstruction.safetensors") for n in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    truthful = load_recording(UpdatesPlan(record=str(mlp.record), truth=str(mlp.folder / "TRUTH")))
    sent = truthful.source.updates[0]
    seen = seen_of(truthful, scenario_of(truthful, sent, [PLACEHOLDER]), 0, CPU)
    assert (seen.labels, seen.gallery, seen.auxiliary, seen.labels_distinct, seen.augmentation) == (None,) * 5


def test_several_local_steps_are_simulated(tmp_path: Path) -> None:
    plan = LocalPlan(kind="delta", lr=0.05, local_steps=4)
    made = Federation(tmp_path, each=3, plan=plan, **MLP)
    report = audit_updates(made.run(), truth=made.truth(), others="digits")
    by_attack = {c.attack: c for c in report.cells}
    assert set(by_attack) == {"thaw", "gallery"}
    summary = by_attack["thaw"].summary
    assert summary is not None
    assert summary.psnr_median is not None
    assert summary.psnr_median > 15
    assert by_attack["gallery"].summary is not None
    assert by_attack["gallery"].summary.identified == 1
    assert "gallery" not in by_attack["thaw"].grants  # the game's attacker alone is told the candidates
    (row,) = rows(report)
    assert row["read_as"] == "a difference of 4 SGD steps (lr 0.05)"
    assert row["labels"]["count_accuracy"] == 1.0
    assert all(row["exact"].values())


def test_where_clients_train_on_encodings_a_proof_is_of_no_private_image(tmp_path: Path) -> None:
    made = Federation(tmp_path, **MLP)
    takes_encodings(made.model)
    made.data = replace(made.data, images=2 * made.data.images - 1)  # what an encoder hands over: in [-1, 1]
    made.run()
    about = made.record / "record.json"
    values = json.loads(about.read_text())
    values["model"] |= {"takes": "encodings", "sees": "pixels"}
    about.write_text(json.dumps(values))
    report = audit_updates(made.record, truth=((made.data.images[:4] + 1) / 2, made.data.labels[:4]))
    (cell,) = report.cells
    assert cell.summary is not None
    assert cell.summary.proved == 0
    assert cell.summary.psnr_worst is not None
    assert cell.summary.psnr_worst > 40  # here nothing was mixed, so the rows are the images: seen, and not proved
    alone = audit_updates(made.record)
    assert alone.cells[0].images == []
    assert alone.scorecard.verdict is not None
    assert alone.scorecard.verdict.verdict == "INCONCLUSIVE"


def test_other_images_can_be_given_to_the_attacker_and_never_private_ones(
    mlp: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"rounds": [1], "clients": ["c0"], "grants": ["auxiliary"]}
    with pytest.raises(BadInput, match="grants: 'auxiliary' gives away nothing"):
        audit_updates(mlp.record, truth=mlp.folder / "TRUTH", known=asked)
    given: list[int] = []
    chosen = recorded_view._auxiliary

    def watched(recording: Any) -> Any:
        images = chosen(recording)
        held = {content(x) for pool in recording.truth.pools.values() for x in pool.images}
        assert held
        assert not held & {content(x) for x in images}
        given.append(len(images))
        return images

    monkeypatch.setattr(recorded_view, "_auxiliary", watched)
    report = audit_updates(mlp.record, truth=mlp.folder / "TRUTH", others="digits", known=asked)
    assert report.cells[0].error is None
    assert "auxiliary" in report.cells[0].grants
    assert all(n < 1797 for n in given)
    assert given


def test_clients_of_a_round_count_together(mlp: Federation) -> None:
    report = audit_updates(mlp.record, truth=mlp.folder / "TRUTH", others="digits", known={"rounds": [2]})
    trials = {t["attack"]: t for t in report.scorecard.recorded["trials"]}
    assert set(trials) == {"spear", "gallery"}
    assert (trials["spear"]["successes"], trials["spear"]["trials"]) == (2, 2)
    assert (trials["gallery"]["successes"], trials["gallery"]["kappa"]) == (2, 1 / 20)
    assert trials["gallery"]["event"] == "identified"
    assert [c.verdict.tests for c in report.cells if c.verdict] == [len(report.cells) + 2] * 4, "all share the error"
    single = audit_updates(mlp.record, truth=mlp.folder / "TRUTH", known={"rounds": [2], "clients": ["c0"]})
    assert single.scorecard.recorded["trials"] == []
    assert [c.verdict.tests for c in single.cells if c.verdict] == [len(single.cells)] * len(single.cells)


def test_a_sum_of_a_cohort_is_one_larger_message(tmp_path: Path) -> None:
    made = Federation(tmp_path, clients=3, each=2, cohort=True)
    truth = {"all": (made.data.images, made.data.labels)}
    report = audit_updates(made.run(), truth=truth, attacks={"name": "thaw", "steps": 30})
    (cell,) = report.cells
    assert cell.batch == 6
    assert "cohort" in cell.grants
    assert "bn_batch" not in cell.grants
    (row,) = rows(report)
    assert row["clients"] == 3
    assert row["labels"]["count_accuracy"] == 1.0
    assert any(f["about"] == "cohort" for f in row["findings"])
    assert not any(f["about"] == "scale" for f in row["findings"])


def test_a_dp_client_is_told_by_its_noise_and_its_declared_defence_is_held_against_its_proof(tmp_path: Path) -> None:
    dp = {"name": "dp_sgd", "clipping_norm": 1.0, "noise_multiplier": 1.0}
    made = Federation(tmp_path, declared="dp_sgd", defense=make_defense(DefensePlan(**dp)), **MLP)
    made.run()
    seen = observed(UpdatesPlan(record=str(made.record)))
    assert noise_level(seen.gradients["head.weight"]) == pytest.approx(1.0 / 4, rel=0.2)  # multiplier x norm / images
    report = audit_updates(made.record, truth=made.truth(), known={"defense": dp})
    (cell,) = report.cells
    assert cell.attack == "thaw"  # no exact attack is tried on noise
    assert cell.summary is not None
    assert cell.summary.proved == 0
    assert cell.verdict is not None
    assert cell.verdict.gamma is not None
    assert cell.verdict.verdict in ("INCONCLUSIVE", "BOUNDED")
    assert "safe" not in report.headline
    plain = audit_updates(made.record, known={"budget": "small"})
    (row,) = rows(plain)
    assert row["labels"]["confidence"] != "high"
    assert any(f["about"] == "noise" for f in row["findings"])
    assert plain.cells[0].defense == "dp_sgd (declared)"
    assert plain.cells[0].verdict is not None
    assert plain.cells[0].verdict.gamma is None  # a name alone proves nothing


def not_a_number(gradients: Any) -> Any:
    first = next(iter(gradients))
    return dict(gradients) | {first: torch.full_like(gradients[first], float("nan"))}


def test_a_nan_update_is_named_and_the_others_are_audited(tmp_path: Path) -> None:
    made = Federation(tmp_path, clients=2, **MLP)
    report = audit_updates(made.run(2, spoil={(1, 0): not_a_number}))
    assert {c.scenario for c in report.cells} == {"round 1, client c1", "round 2, client c0", "round 2, client c1"}
    assert "not finite" in passed_over(report)["1 c0"]
    assert not report.scorecard.failed


def cut(record: Path, number: int, how: str) -> None:
    path = record / "updates" / f"{number:06d}.safetensors"
    raw = path.read_bytes()
    if how == "short":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "lying":  # the header promises more bytes than there are
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        header["update.lie"] = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    elif how == "length":
        path.write_bytes(struct.pack("<Q", 2**62) + raw[8:])
    else:
        path.write_bytes(b"PK\x03\x04 no safetensors")


def test_the_readable_part_of_a_damaged_record_is_audited_and_the_rest_named(tmp_path: Path) -> None:
    made = Federation(tmp_path, clients=6, **MLP)
    made.run()
    for number, how in ((1, "short"), (2, "lying"), (3, "length"), (4, "other")):
        cut(made.record, number, how)
    lines = (made.record / "updates.jsonl").read_bytes()
    (made.record / "updates.jsonl").write_bytes(lines[:-40])  # the last header is cut short
    report = audit_updates(made.record)
    assert [c.scenario for c in report.cells] == ["round 1, client c4"]
    assert report.cells[0].summary is not None
    assert report.cells[0].summary.proved == 4
    assert set(passed_over(report)) == {"1 c0", "1 c1", "1 c2", "1 c3"}
    assert all("cannot be read" in why for why in passed_over(report).values())
    (problem,) = report.scorecard.recorded["problems"]
    assert "line 6" in problem
    assert "line 6" in updates_text(report.scorecard)


def test_a_record_that_has_grown_is_not_gone_on_with_and_an_empty_one_has_no_update_yet(tmp_path: Path) -> None:
    made, out = Federation(tmp_path, clients=2, **MLP), tmp_path / "out"
    made.run()
    headers = made.record / "updates.jsonl"
    whole = headers.read_bytes()
    headers.write_bytes(whole.splitlines(keepends=True)[0])
    audit_updates(made.record, out=out)
    headers.write_bytes(whole)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(BadInput, match=r"are not those that .* began with \(has it grown"):
        audit_updates(made.record, out=out, resume=True)
    with pytest.raises(BadInput, match="belongs to another plan"):
        audit_updates(made.record, out=out, resume=True, seed=1)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    headers.write_bytes(b"")
    with pytest.raises(BadInput, match="it holds no update yet; audit it when a round has ended"):
        audit_updates(made.record)


def test_a_record_of_which_nothing_is_left_is_refused_with_its_reasons(tmp_path: Path) -> None:
    made = Federation(tmp_path, **MLP)
    made.run()
    cut(made.record, 1, "short")
    with pytest.raises(BadInput, match="no update can be audited") as refused:
        audit_updates(made.record, out=tmp_path / "out")
    assert any("round 1, client c0" in p for p in refused.value.problems)
    assert not (tmp_path / "out").exists()


def test_another_network_than_the_recorded_one_is_refused_in_words(mlp: Federation) -> None:
    with pytest.raises(BadInput, match=r"lacks \d+ parameters of small_bn_cnn"):
        audit_updates(mlp.record, model="small_bn_cnn")
    with pytest.raises(BadInput, match="was sent with shape"):
        audit_updates(mlp.record, model="mlp", known={"options": {"hidden": [100]}})


def described(record: Path, **model: Any) -> Path:
    """The record with another description of its network."""
    info = json.loads((record / "record.json").read_text())
    info["model"] |= model
    (record / "record.json").write_text(json.dumps(info))
    return record


def test_what_a_record_names_is_not_called_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Federation(tmp_path / "a", **MLP)
    (tmp_path / "theirs.py").write_text(
        "from pathlib import Path\nfrom frostglass.core.randomness import Rng\n"
        "from frostglass.vision.networks import build\n"
        "def make(classes, channels, size, hidden):\n"
        f"    Path({str(tmp_path / 'called')!r}).touch()\n"
        "    return build('mlp', classes=classes, channels=channels, size=size, options={'hidden': hidden},\n"
        "                 rng=Rng.from_seed(0))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    record = described(made.run(), name="theirs:make")
    with pytest.raises(BadInput, match="give --model theirs:make"):
        load_recording(UpdatesPlan(record=str(record)))
    assert not (tmp_path / "called").exists()
    assert load_recording(UpdatesPlan(record=str(record), model="theirs:make")).network.options == {"hidden": [200]}
    assert (tmp_path / "called").exists()
    (tmp_path / "called").unlink()
    with pytest.raises(BadInput, match="give --model theirs:make"):
        frostglass.unmix(record, out=tmp_path / "out")
    with pytest.raises(BadInput, match="usable updates"):
        frostglass.unmix(record, model="theirs:make", out=tmp_path / "out")
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": 7}, "does not name its network"),
        ({"classes": "ten"}, ""),
        ({"classes": [10]}, ""),
        ({"options": "wide"}, ""),
        ({"options": [1]}, ""),
        ({"channels": "x", "size": {}}, ""),
    ],
)
def test_a_record_whose_description_makes_no_sense(tmp_path: Path, model: Any, words: str) -> None:
    record = described(Federation(tmp_path).run(), **model)
    if words:
        with pytest.raises(BadInput, match=words):
            load_recording(UpdatesPlan(record=str(record)))
    else:  # the image shape, what was sent and defaults say the same
        assert load_recording(UpdatesPlan(record=str(record))).network.classes == 10


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"classes": 10**9}, "updates.classes: 1000000000 are more than the 200 rows .* give --classes"),
        ({"options": {"hidden": [10**9]}}, "updates.model: 'mlp' as described has .* parameters"),
        ({"options": {"hidden": [10**15, 10**15]}}, "updates.model: 'mlp' cannot be built as described"),
    ],
)
def test_a_record_that_claims_a_huge_network_is_refused_before_it_is_built(
    tmp_path: Path, model: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = described(Federation(tmp_path, **MLP).run(), **model)
    build = networks.build

    def without_memory(*given: Any, **named: Any) -> torch.nn.Module:
        assert torch.empty(0).device.type == "meta"
        return build(*given, **named)

    monkeypatch.setattr(networks, "build", without_memory)
    with pytest.raises(BadInput, match=words):
        load_recording(UpdatesPlan(record=str(record)))


def test_images_larger_than_any_are_refused(tmp_path: Path) -> None:
    record = Federation(tmp_path, network="resnet20").run()
    with pytest.raises(BadInput, match=r"updates.size: images of 1 x 1000000 x 1000000 .* give --channels and --size"):
        load_recording(UpdatesPlan(record=str(record), size=10**6))


@pytest.mark.parametrize("name", [*networks.MODELS.names(), "torchvision:resnet18", "torchvision:vit_b_16"])
def test_every_network_can_be_weighed_without_memory(name: str) -> None:
    with torch.device("meta"):
        made = Claimed(name, 10, 3, 32, {}).build()
    assert {p.device.type for p in made.parameters()} == {"meta"}


def test_a_state_that_was_kept_as_it_came_is_no_difference(tmp_path: Path) -> None:
    made = Federation(tmp_path / "a", clients=2, **MLP)
    state = made.model.state_dict()
    returned, update = made.message(1, state, 1)
    with Recorder(
        tmp_path / "r", engine="flower", model={"name": "mlp", "options": made.options, "classes": 10},
        image_shape=made.shape,
    ) as recorder:  # fmt: skip
        recorder.sent(1, state)
        whole = dict(list(returned.items())[1:])
        recorder.received(
            Received(1, "c0", whole, examples=4, plan=ONE_STEP, reason="kept as it came, since it is no state")
        )
        recorder.received(made.received(1, "c1", returned, update, update.gradients))
    report = audit_updates(tmp_path / "r", attacks="spear")
    assert "kept as it came" in passed_over(report)["1 c0"]
    assert [r["client"] for r in rows(report)] == ["c1"]


def states(made: Federation, client: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    state = made.model.state_dict()
    returned, _ = made.message(client, state, 1)
    return state, returned


def test_two_states_are_read_as_the_record_of_the_same_client(tmp_path: Path) -> None:
    made = Federation(tmp_path)
    made.run()
    before, after = states(made)
    save_file(before, tmp_path / "before.safetensors")
    torch.save(after, tmp_path / "after.pt")
    pair = UpdatesPlan(
        before=str(tmp_path / "before.safetensors"), after=str(tmp_path / "after.pt"), model="small_bn_cnn", classes=10,
        channels=1, size=8, examples=4, local={"lr": 0.1, "mode": "train"},
    )  # fmt: skip
    one, other = observed(pair), observed(UpdatesPlan(record=str(made.record)))
    assert one.gradients.keys() == other.gradients.keys()
    assert all(torch.equal(one.gradients[n], other.gradients[n]) for n in one.gradients)
    assert one.bn_batch is not None
    assert other.bn_batch is not None
    assert all(torch.equal(one.bn_batch[n].mean, other.bn_batch[n].mean) for n in other.bn_batch)
    assert (one.examples, one.mode, one.messages[0].kind) == (other.examples, other.mode, other.messages[0].kind)


def test_outputs_are_told_by_the_classifier_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    made = Federation(tmp_path, network="mlp", options={"hidden": [12, 16]})
    made.run()
    before, after = states(made)
    backwards = {n: before[n] for n in sorted(before, reverse=True)}
    assert [len(t) for t in backwards.values() if t.ndim == 2] == [10, 16, 12]
    torch.save(backwards, tmp_path / "before.pt")
    torch.save(after, tmp_path / "after.pt")
    plan = UpdatesPlan(
        before=str(tmp_path / "before.pt"), after=str(tmp_path / "after.pt"), model="mlp", options=made.options,
        channels=1, size=8, examples=4, local={"lr": 0.1, "mode": "train"},
    )  # fmt: skip
    assert observed(plan).gradients.keys() == dict(made.model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("dtype", "examples"), [(torch.float32, None), (torch.float32, 4), (torch.float16, 4), (torch.bfloat16, 4)]
)
def test_spear_is_chosen_for_rounded_values_and_without_the_number_of_images(
    tmp_path: Path, dtype: torch.dtype, examples: int | None
) -> None:
    made = Federation(tmp_path, **MLP)
    trace = local_update(made.model, made.data.images[:4], one_hot(made.data.labels[:4], 10), LocalPlan(mode="train"))
    save_file({n: g.to(dtype) for n, g in trace.gradients.items()}, tmp_path / "g.safetensors")
    save_file(made.model.state_dict(), tmp_path / "w.safetensors")
    known = {"channels": 1, "size": 8} | ({} if examples is None else {"examples": examples})
    report = audit_updates(
        gradients=tmp_path / "g.safetensors", weights=tmp_path / "w.safetensors", model=made.model, known=known
    )
    proved = {c.attack: None if c.summary is None else c.summary.proved for c in report.cells}
    assert proved["spear"] == 4
    assert ("thaw" in proved) == (dtype != torch.float32)  # where rounding may end the proof a search stands beside it


def test_a_loss_summed_over_the_images_is_divided_out(tmp_path: Path) -> None:
    made = Federation(tmp_path, **MLP)
    trace = local_update(made.model, made.data.images[:4], one_hot(made.data.labels[:4], 10), LocalPlan(mode="train"))
    save_file({n: 4 * g for n, g in trace.gradients.items()}, tmp_path / "g.safetensors")
    save_file(made.model.state_dict(), tmp_path / "w.safetensors")
    held = UpdatesPlan(
        gradients=str(tmp_path / "g.safetensors"), weights=str(tmp_path / "w.safetensors"), model="mlp",
        options=made.options, channels=1, size=8, examples=4, loss_scale=4.0,
    )  # fmt: skip
    seen = observed(held)
    assert all(torch.equal(seen.gradients[n], g) for n, g in trace.gradients.items())
    states = held.model_copy(update={"gradients": None, "weights": None, "before": "a", "after": "b"})
    assert any("multiply lr by it" in text for text in states.problems())


def test_a_loss_scale_is_divided_out_of_half_precision_without_losing_small_entries(tmp_path: Path) -> None:
    """Scaled so that half precision holds them, they would be rounded away there without the scale."""
    made = Federation(tmp_path, **MLP)
    names = dict(made.model.named_parameters())
    rng = torch.Generator().manual_seed(0)
    true = {n: 1e-8 * torch.randn(p.shape, generator=rng) for n, p in names.items()}
    save_file({n: (65536 * g).half() for n, g in true.items()}, tmp_path / "g.safetensors")
    save_file(made.model.state_dict(), tmp_path / "w.safetensors")
    seen = observed(
        UpdatesPlan(
            gradients=str(tmp_path / "g.safetensors"), weights=str(tmp_path / "w.safetensors"), model="mlp",
            options=made.options, channels=1, size=8, examples=4, loss_scale=65536.0,
        )
    )  # fmt: skip
    for name, g in true.items():
        torch.testing.assert_close(seen.gradients[name].float(), g, rtol=1e-3, atol=1e-12)


def test_raw_gradients_give_what_audit_gives_on_the_same_batch(tmp_path: Path) -> None:
    made = Federation(tmp_path, **MLP)
    x, y = made.data.images[:4], made.data.labels[:4]
    trace = local_update(made.model, x, one_hot(y, 10), LocalPlan(mode="train"))
    save_file(dict(trace.gradients), tmp_path / "g.safetensors")
    save_file(made.model.state_dict(), tmp_path / "w.safetensors")
    sent = audit_updates(
        gradients=tmp_path / "g.safetensors", weights=tmp_path / "w.safetensors", model=made.model, truth=(x, y),
        known={"examples": 4, "channels": 1, "size": 8}, attacks="spear", out=tmp_path / "sent",
    )  # fmt: skip
    simulated = frostglass.audit(model=made.model, images=x, labels=y, attacks="spear", out=tmp_path / "simulated")
    found, wanted = (
        next(iter(load_file(tmp_path / n / "reconstruction.safetensors").values())) for n in ("sent", "simulated")
    )
    order = torch.cdist(found.flatten(1), wanted.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert torch.allclose(found, wanted[order], atol=1e-4)
    a, b = sent.cells[0].summary, simulated.cells[0].summary
    assert a is not None
    assert b is not None
    assert a.proved == b.proved == 4
    assert {i.sha256 for i in sent.cells[0].images} == {i.sha256 for i in simulated.cells[0].images}


def test_the_nearest_of_a_large_pool_is_no_success_by_itself(tmp_path: Path) -> None:
    made = Federation(tmp_path)
    made.run()
    report = audit_updates(made.record, truth="digits", attacks={"name": "thaw", "steps": 1})
    (cell,) = report.cells
    assert cell.pool == 1797
    assert len(cell.images) == 4  # each row beside the nearest image of the pool
    assert cell.verdict is not None
    assert cell.verdict.successes == 0
    assert cell.labels.count_accuracy is None  # nobody said which images the message holds
    good = audit_updates(made.record, truth="digits")
    assert good.cells[0].summary is not None
    assert good.cells[0].summary.psnr_worst is not None
    assert good.cells[0].summary.psnr_worst > 40
    true = {i.sha256 for i in audit_updates(made.record, truth=(made.data.images[:4], None)).cells[0].images}
    assert {i.sha256 for i in good.cells[0].images} == true


def test_a_truth_of_more_images_than_are_compared_is_refused(monkeypatch) -> None:
    """Those left out might be the private ones; other candidates may well be a part of what there is."""
    monkeypatch.setattr(recorded_truth, "MOST_IMAGES", 100)
    with pytest.raises(BadInput, match="--truth: 1797 images in digits are more than the 100"):
        read_images("digits", (1, 8, 8), whole=True)
    assert len(read_images("digits", (1, 8, 8), whole=False)) == 100


def test_a_pool_of_several_clients_is_nobodys_own_whatever_its_size(mlp: Federation) -> None:
    """Both sent four images; four were given, which are the first client's."""
    given = mlp.data.images[:4], mlp.data.labels[:4]
    report = audit_updates(mlp.record, truth=given, known={"rounds": [1]}, attacks={"name": "thaw", "steps": 1})
    assert [row["client"] for row in rows(report)] == ["c0", "c1"]
    assert [cell.pool for cell in report.cells] == [4, 4]
    assert all(cell.labels.count_accuracy is None for cell in report.cells)
    by_name = {"c0": given, "c1": (mlp.data.images[4:8], mlp.data.labels[4:8])}
    own = audit_updates(mlp.record, truth=by_name, known={"rounds": [1]}, attacks={"name": "thaw", "steps": 1})
    assert all(cell.labels.count_accuracy is not None for cell in own.cells)


def test_grants_beyond_what_a_server_knows_are_an_upper_bound(mlp: Federation) -> None:
    known = {"rounds": [1], "clients": ["c0"], "grants": ["labels"]}
    attack = {"name": "thaw", "steps": 5}
    report = audit_updates(mlp.record, truth=mlp.folder / "TRUTH", known=known, attacks=attack)
    assert report.cells[0].upper_bound
    assert rows(report)[0]["beyond"] == ["labels"]
    with pytest.raises(BadInput, match="need --truth"):
        audit_updates(mlp.record, known=known, attacks=attack)


def test_a_finished_run_resumes_to_the_same_and_belongs_to_its_record(mlp: Federation, tmp_path: Path) -> None:
    from scenes import same_outcome

    settings: dict[str, Any] = {"truth": mlp.folder / "TRUTH", "known": {"rounds": [2]}}
    audit_updates(mlp.record, out=tmp_path / "a", **settings)
    audit_updates(mlp.record, out=tmp_path / "b", **settings)
    same_outcome(tmp_path / "a", tmp_path / "b")
    done = sorted((tmp_path / "b" / "checkpoints").glob("*.done.safetensors"))
    done[-1].unlink()
    (tmp_path / "b" / "scorecard.json").unlink()
    audit_updates(mlp.record, out=tmp_path / "b", resume=True, **settings)
    same_outcome(tmp_path / "a", tmp_path / "b")
    again = audit_updates(tmp_path / "a" / "plan.toml", out=tmp_path / "c")  # a run's own plan plays it again
    assert len(again.cells) == 2
    with pytest.raises(BadInput, match="another plan"):
        audit_updates(mlp.record, out=tmp_path / "a", resume=True, known={"rounds": [1]})


def test_rounds_and_clients_are_chosen_in_turn(tmp_path: Path) -> None:
    made = Federation(tmp_path, clients=3, each=1, **MLP)
    made.run(4)
    recording = load_recording(UpdatesPlan(record=str(made.record), most=4))
    picked, left = chosen(recording)
    assert sorted({p.header.round for p in picked}) == [1, 3, 4]  # first, middle, last
    assert len(picked) == 4
    assert sum("another round" in why for why in left.values()) == 3
    assert sum("more than 4 updates" in why for why in left.values()) == 5
    with pytest.raises(BadInput, match="9 is not kept in the record"):
        chosen(load_recording(UpdatesPlan(record=str(made.record), rounds=[9])))


def test_a_client_of_many_images_has_its_labels_read_and_says_why_no_pixels(tmp_path: Path) -> None:
    plan = LocalPlan(kind="delta", lr=0.05, minibatch=15)
    made = Federation(tmp_path, each=30, plan=plan, **MLP)
    report = audit_updates(made.run())
    assert report.cells == []
    (row,) = rows(report)
    assert row["status"] == "checked"
    assert "30 images in one message" in row["reason"]
    assert row["labels"]["confidence"] in ("low", "high", "none")
    assert report.html.exists()
    assert "No attack fits" in report.headline


def test_a_network_of_the_users_own_and_truth_as_tensors(tmp_path: Path) -> None:
    net = Tiny()
    x, y = torch.rand(1, 1, 8, 8), torch.tensor([3])
    trace = local_update(net, x, one_hot(y, 10), LocalPlan(mode="eval"))
    save_file(dict(trace.gradients), tmp_path / "g.safetensors")
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    report = audit_updates(
        gradients=tmp_path / "g.safetensors", weights=tmp_path / "w.safetensors", model=net, truth=(x, y),
        known={"examples": 1, "channels": 1, "size": 8}, attacks="linear_exact",
    )  # fmt: skip
    assert report.cells[0].summary is not None
    assert report.cells[0].summary.psnr_worst is not None
    assert report.cells[0].summary.psnr_worst > 60
    assert any(f["about"] == "normalisation" for f in rows(report)[0]["findings"])
    for unset in (Tiny().to("meta"), torch.nn.Sequential(torch.nn.LazyBatchNorm2d(affine=False), Tiny())):
        with pytest.raises(BadInput, match="has no values yet"):
            audit_updates(
                gradients=tmp_path / "g.safetensors", weights=tmp_path / "w.safetensors", model=unset,
                known={"channels": 1, "size": 8},
            )  # fmt: skip


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "none was given"),
        ({"record": "a", "gradients": "b", "weights": "c"}, "record and gradients were given"),
        ({"before": "a", "model": "mlp"}, "go together"),
        ({"gradients": "a", "model": "mlp"}, "weights: missing"),
        ({"before": "a", "after": "b"}, "updates.model: missing"),
        ({"record": "a", "local": {"lr": 0.1}}, "a record says what the clients did"),
        ({"record": "a", "sice": 3}, "unknown key; did you mean 'size'"),
        ({"record": "a", "attacks": [{"steps": 3}]}, "lacks a name"),
        ({"record": "a", "budget": "huge"}, "budget"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_in_words(table: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        parse_request({"updates": table}, tmp_path)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"truth": "nowhere"}, "nowhere"),
        ({"attacks": [{"name": "peel"}]}, "fits no update"),
        ({"attacks": [{"name": "pel"}]}, "not a known attack"),
        ({"clients": ["nobody"]}, "'nobody' is not in the record; there are c0, c1"),
        ({"model": "mpl"}, "mpl"),
    ],
)
def test_what_does_not_fit_the_record_is_refused_before_compute(
    mlp: Federation, known: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=words):
        audit_updates(mlp.record, known=known, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"examples":4', '"examples":1000000000000', "more than the 2048"),
        ('"lr":0.1', '"lr":-1.0', "local plan cannot be read (lr"),
        ('"minibatch":null', '"minibatch":0', "local plan cannot be read (minibatch"),
        ('"local_steps":1', '"local_steps":1000000000', "local steps are more than"),
    ],
)
def test_what_a_hostile_record_claims_breaks_nothing(tmp_path: Path, old: str, new: str, words: str) -> None:
    made = Federation(tmp_path, **MLP)
    made.run()
    header = made.record / "updates.jsonl"
    assert old in header.read_text()
    header.write_text(header.read_text().replace(old, new))
    assert words in " ".join(updates_text(audit_updates(made.record).scorecard).split())


def test_a_clients_name_leads_out_of_no_folder(tmp_path: Path) -> None:
    made = Federation(tmp_path, **MLP)
    made.run()
    made.truth()
    header = made.record / "updates.jsonl"
    header.write_text(header.read_text().replace('"client":"c0"', '"client":"../c0"'))
    truth = made.folder / "TRUTH" / "c0"
    recording: Recording = load_recording(UpdatesPlan(record=str(made.record), truth=str(truth)))
    assert recording.truth is not None
    assert set(recording.truth.pools) == {""}  # one pool: the name matched no subfolder
    report = audit_updates(UpdatesRequest(updates=recording.plan), out=tmp_path / "run")
    assert all((tmp_path / "run") in p.parents for p in (tmp_path / "run").rglob("*"))
    assert report.cells[0].scenario == "round 1, client ../c0"


@pytest.mark.slow
def test_cifar_images_of_a_small_cnn_client_are_recovered(tmp_path: Path, data_root: Path) -> None:
    source = f"parquet:{data_root / 'cifar10' / 'test-00000-of-00001.parquet'}"
    made = Federation(tmp_path, source=source, size=32)
    report = audit_updates(made.run(), truth=(made.data.images, made.data.labels))
    summary = report.cells[0].summary
    assert summary is not None
    assert summary.psnr_median is not None
    assert summary.psnr_median > 20
    assert summary.over_threshold.count == 4


def test_docs_explain_every_key_of_the_table() -> None:
    import re

    from frostglass.auditing.recorded_plan import LocalTable

    text = (Path(__file__).resolve().parents[2] / "docs" / "audit-updates.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `([\w.]+)` \| .+? \| (.+) \|$", text, re.M))
    wanted = {n: f.description for n, f in UpdatesPlan.model_fields.items() if n != "local"}
    wanted |= {f"local.{n}": f.description for n, f in LocalTable.model_fields.items()}
    assert documented == wanted


def test_truth_that_is_not_finite_is_refused(mlp: Federation) -> None:
    images = mlp.data.images[:4] * float("nan")
    with pytest.raises(BadInput, match=r"truth: shape"):
        audit_updates(mlp.record, truth={"0": (images, None)})
