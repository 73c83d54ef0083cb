"""Recorded updates on a device that is not the CPU: same results as there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import frostglass
import pretend_device
from frostglass.auditing.metrics.registry import METRICS
from frostglass.auditing.recorded_api import audit_updates
from frostglass.auditing.recorded_choice import PLACEHOLDER, scenario_of
from frostglass.auditing.recorded_plan import UpdatesPlan
from frostglass.auditing.recorded_view import load_recording, prepare_scenario
from frostglass.core.batch import one_hot
from frostglass.core.events import Event
from frostglass.core.update import LocalPlan
from frostglass.federated.recording import Received
from frostglass.numerics.local_update import local_update
from recorded_scenes import Federation

MLP = {"network": "mlp", "options": {"hidden": [200]}}
STEPS = LocalPlan(kind="delta", lr=0.05, local_steps=3)
LABELS = {"grants": ["labels"]}
"""Restoring them takes longer than all else here."""


def told(report: Any) -> list[Any]:
    """What must not depend on the device: cells without times, and what was read of every update."""
    cells = [
        (c.title, c.attack, c.grants, None if c.summary is None else (c.summary.images, c.summary.proved), c.error)
        for c in report.cells
    ]
    rows = [
        {k: r[k] for k in ("client", "round", "status", "reason", "read_as", "mode", "exact", "findings")}
        for r in report.scorecard.recorded["updates"]
    ]
    labels = [r["labels"] and {k: r["labels"].get(k) for k in ("problem", "rule", "counts", "confidence")}
              for r in report.scorecard.recorded["updates"]]  # fmt: skip
    return [cells, rows, labels]


def same_on_both(*sources: Any, **settings: Any) -> Any:
    """The report from there, after it agreed with the one from here."""
    here = audit_updates(*sources, device="cpu", **settings)
    pretend_device.waits.clear()
    there = audit_updates(*sources, **settings)
    assert pretend_device.waits, "nothing was on the device"
    assert not there.scorecard.failed, [c.error for c in there.cells]
    assert told(there) == told(here)
    for one, other in zip(here.cells, there.cells, strict=True):
        if one.summary is not None and one.summary.psnr_median is not None:
            assert other.summary.psnr_median == pytest.approx(one.summary.psnr_median, abs=0.5)
    return there


def test_every_metric_and_rank_of_a_proved_batch(tmp_path: Path) -> None:
    made = Federation(tmp_path, **MLP)
    report = same_on_both(
        made.run(), truth=made.truth(), others="digits", attacks="spear", show_images=True,
        metrics=[m.name for m in METRICS if m.make().least_side <= 8],
    )  # fmt: skip
    (cell,) = report.cells
    assert cell.summary.proved == 4
    assert cell.images[0].null is not None
    assert {"iip_features", "iip_pixels", "fft2d", "registered_psnr"} <= set(cell.summary.extra_means)
    assert cell.summary.extra_means["iip_features"] == 1


def test_a_difference_of_several_steps(tmp_path: Path) -> None:
    made = Federation(tmp_path, options={"width": 8}, each=2, plan=STEPS)
    same_on_both(made.run(), truth=made.truth(), attacks={"name": "thaw", "steps": 4})


def test_the_right_candidate_is_named(tmp_path: Path) -> None:
    made = Federation(tmp_path, each=2, plan=STEPS, network="mlp", options={"hidden": [32]})
    report = same_on_both(made.run(), truth=made.truth(), others="digits", attacks="gallery")
    assert report.cells[0].summary.identified == 1


def test_minibatches_with_momentum_and_adam(tmp_path: Path) -> None:
    for name, plan in (
        ("sgd", replace(STEPS, minibatch=2, epochs=2, local_steps=1, momentum=0.9, weight_decay=1e-3)),
        ("adam", replace(STEPS, optimizer="adam")),
    ):
        made = Federation(tmp_path / name, each=4, plan=plan, network="mlp", options={"hidden": [32]})
        same_on_both(made.run(), truth=made.truth(), attacks={"name": "thaw", "steps": 4}, known=LABELS)


def test_a_sum_of_several_clients(tmp_path: Path) -> None:
    made = Federation(tmp_path, clients=3, each=2, cohort=True)
    truth = {"all": (made.data.images, made.data.labels)}
    report = same_on_both(made.run(), truth=truth, attacks={"name": "thaw", "steps": 4}, known=LABELS)
    assert report.cells[0].batch == 6


def test_a_pair_of_checkpoints(tmp_path: Path) -> None:
    made = Federation(tmp_path)
    before = made.model.state_dict()
    after, _ = made.message(0, before, 1)
    save_file(before, tmp_path / "before.safetensors")
    torch.save(after, tmp_path / "after.pt")
    report = same_on_both(
        before=tmp_path / "before.safetensors", after=tmp_path / "after.pt", model="small_bn_cnn",
        known={"classes": 10, "channels": 1, "size": 8, "examples": 4}, local={"lr": 0.1, "mode": "train"},
        truth=(made.data.images[:4], made.data.labels[:4]), attacks={"name": "peel", "steps": 3},
    )  # fmt: skip
    assert "bn_batch" in report.cells[0].grants


def test_raw_gradients_of_a_network_given_from_python(tmp_path: Path) -> None:
    made = Federation(tmp_path, **MLP)
    x, y = made.data.images[:4], made.data.labels[:4]
    trace = local_update(made.model, x, one_hot(y, 10), LocalPlan(mode="train"))
    save_file(dict(trace.gradients), tmp_path / "g.safetensors")
    save_file(made.model.state_dict(), tmp_path / "w.safetensors")
    report = same_on_both(
        gradients=tmp_path / "g.safetensors", weights=tmp_path / "w.safetensors", model=made.model, truth=(x, y),
        known={"examples": 4, "channels": 1, "size": 8}, attacks="spear",
    )  # fmt: skip
    assert report.cells[0].summary.proved == 4
    assert {p.device.type for p in made.model.parameters()} == {"cpu"}, "the user's own network stays where it was"


def test_without_truth_what_was_found_is_named(tmp_path: Path) -> None:
    made = Federation(tmp_path, each=1, **MLP)
    report = same_on_both(made.run(), attacks="linear_exact")
    assert report.cells[0].images[0].sha256


class Crowd(Federation):
    """Client c0 says that it holds more images than any attack is tried on."""

    def received(self, number: int, client: str, *sent: Any) -> Received:
        made = super().received(number, client, *sent)
        return replace(made, examples=4000) if client == "c0" else made


def test_an_update_that_is_only_checked_leaves_those_of_its_round_where_they_are(tmp_path: Path) -> None:
    made = Crowd(tmp_path, clients=2, **MLP)
    report = same_on_both(made.run())
    assert {r["client"]: r["status"] for r in report.scorecard.recorded["updates"]} == {
        "c0": "checked",
        "c1": "attacked",
    }


def test_a_network_stays_on_its_device_when_it_is_wanted_on_another(tmp_path: Path) -> None:
    recording = load_recording(UpdatesPlan(record=str(Federation(tmp_path).run())))
    scenario = scenario_of(recording, recording.source.updates[0], [PLACEHOLDER])
    there, here = (prepare_scenario(recording, scenario, 0, d) for d in (pretend_device.DEVICE, torch.device("cpu")))
    for ready, kind in ((there, "pretend"), (here, "cpu")):
        assert {t.device.type for t in ready.model.state_dict().values()} == {kind}
        assert ready.arrived is not None
        assert {g.device.type for g in ready.arrived.round.seen.gradients.values()} == {kind}


def test_killed_twice_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    made = Federation(tmp_path, each=2, plan=STEPS, network="mlp", options={"hidden": [32]})
    record = made.run()
    settings: dict[str, Any] = {
        "attacks": {"name": "thaw", "steps": 6, "every": 2}, "truth": made.truth(), "known": LABELS,
    }  # fmt: skip
    audit_updates(record, out=tmp_path / "whole", **settings)

    def kill(event: Event) -> None:
        if event.kind == "checkpoint":
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            audit_updates(record, out=tmp_path / "killed", resume=resume, emit=kill, **settings)
    audit_updates(record, out=tmp_path / "killed", resume=True, **settings)
    whole, resumed = (load_file(tmp_path / n / "reconstruction.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("defense", ["instahide", "mixup", "dp_instahide"])
def test_encodings_before_an_attack_are_read_alike(defense: str) -> None:
    settings = {} if defense == "dp_instahide" else {"k": 2}
    plan = {
        "seed": 0,
        "threat": {"grants": ["examples", "labels"]},
        "report": {"null": False},
        "scenario": [
            {
                "name": "s",
                "data": {"source": "digits"},
                "model": {"name": "mlp", "options": {"hidden": [200]}},
                "client": {"batch": 4},
                "attack": [{"name": "spear"}],
                "defense": [{"name": defense, **settings}],
            }
        ],
    }
    found = []
    for device in ("cpu", "auto"):
        cell = frostglass.audit(plan, device=device).cells[0]
        assert cell.error is None, cell.error
        found.append((cell.encoding_summary.proved, cell.summary.psnr_median))
    assert found[1] == pytest.approx(found[0], abs=0.2)
