"""`frostglass.audit` from Python: the user's own network and tensors, in five lines, none of them changed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import frostglass
from frostglass.auditing.plan import load_plan, parse_plan
from scenes import same_outcome, small


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 3))


X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = [0, 1, 2, 0]


class InPlace(nn.Module):
    """Normalises as some do."""

    def __init__(self) -> None:
        super().__init__()
        self.rest = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.rest(x.sub_(0.5))
        return logits


QUICK = {"name": "thaw", "steps": 4, "every": 2}


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_five_lines() -> None:
    report = frostglass.audit(model=net(), images=X, labels=Y, attacks=["spear"])
    (cell,) = report.cells
    assert cell.summary is not None
    assert cell.summary.proved == 4
    assert "4 of 4 images recovered exactly" in str(report)
    assert report.html.exists()
    assert "1 cells" in repr(report)


def test_the_users_objects_are_as_they_were() -> None:
    model = net().eval()
    model[1].train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images, labels = X.clone().requires_grad_(True), torch.tensor(Y)
    frostglass.audit(model=model, images=images, labels=labels, attacks=QUICK, mode="train")
    assert [m.training for m in model.modules()] == [False, False, True, False, False]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(images.detach(), X)
    assert images.grad is None


def test_the_plan_that_is_kept_says_what_was_really_run(tmp_path: Path) -> None:
    report = frostglass.audit(model=net(), images=X, labels=Y, attacks=QUICK, out=tmp_path / "run")
    assert report.cells[0].model == "python:Sequential"
    assert report.cells[0].settings["data"]["source"] == "python"
    plan = load_plan(tmp_path / "run" / "plan.toml")
    assert plan.scenario[0].data.source == "python"
    with pytest.raises(frostglass.BadInput, match="given from Python"):
        frostglass.audit(plan, out=tmp_path / "other")


def test_a_plan_as_table_as_path_and_as_text(tmp_path: Path) -> None:
    table = small(QUICK)
    path = tmp_path / "plan.toml"
    path.write_text(parse_plan(table).to_toml())
    for name, plan in (("a", table), ("b", path), ("c", str(path)), ("d", parse_plan(table))):
        frostglass.audit(plan, out=tmp_path / name, device="cpu")
    for name in "bcd":
        same_outcome(tmp_path / "a", tmp_path / name)


def test_own_objects_replace_what_a_plan_names(tmp_path: Path) -> None:
    report = frostglass.audit(small(QUICK), model=net(), images=X, labels=Y, out=tmp_path / "run")
    cell = report.cells[0]
    assert cell.model == "python:Sequential"
    assert {i.id for i in cell.images} == {f"image {i}" for i in range(4)}
    only_images = frostglass.audit(small(QUICK), images=X, labels=Y)
    assert only_images.cells[0].model == "mlp"
    only_model = frostglass.audit(
        small(QUICK, model={"classes": 3}), model=nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    )
    assert only_model.cells[0].settings["data"]["source"] == "photos"


def test_device_and_emit_of_none_are_the_defaults() -> None:
    report = frostglass.audit(model=net(), images=X, labels=Y, attacks=QUICK, device=None, emit=None)
    assert not report.scorecard.failed
    report = frostglass.audit(model=net(), images=X, labels=Y, attacks=QUICK, device=torch.device("cpu"))
    assert not report.scorecard.failed


def test_names_may_stand_alone() -> None:
    report = frostglass.audit(
        model=net(), images=X, labels=Y, attacks="spear", defenses="none", grants="examples", metrics=("psnr", "ssim")
    )
    assert report.cells[0].grants.count("examples") == 1


@pytest.mark.parametrize("metrics", [["psnr"], [], ["fft2d"]])
def test_a_threshold_on_what_is_always_computed_needs_no_naming(metrics: list[str]) -> None:
    """SSIM decides the default event, and is computed whatever is asked for beside it."""
    report = frostglass.audit(model=net(), images=X, labels=Y, attacks=["spear"], metrics=metrics)
    (cell,) = report.cells
    assert cell.summary is not None
    assert (cell.summary.over_threshold.metric, cell.summary.over_threshold.count) == ("ssim", 4)
    assert all(set(row.extra) == set(metrics) - {"psnr"} for row in cell.images)


def test_a_threshold_without_a_value_for_such_images_is_refused() -> None:
    """Rows of one pixel have no SSIM: recovered exactly, they would have been counted as not recognisable."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3))
    plan = small([{"name": "spear"}])
    with pytest.raises(frostglass.BadInput, match="'ssim' has no value for images of 1 pixels a side"):
        frostglass.audit(plan, model=model, images=X.reshape(12, 1, 1, 64), labels=Y * 3)
    plan["report"] = {"threshold": {"metric": "psnr", "value": 30.0}}
    report = frostglass.audit(plan, model=model, images=X.reshape(12, 1, 1, 64), labels=Y * 3)
    assert report.cells[0].summary is not None


def test_everything_is_random_from_the_seed(tmp_path: Path) -> None:
    for name in "ab":
        torch.manual_seed(ord(name))
        frostglass.audit(
            model=net(), images=X, labels=Y, attacks=QUICK, batch=2, batches=2, seed=5, out=tmp_path / name
        )
    same_outcome(tmp_path / "a", tmp_path / "b")


def test_a_run_with_other_objects_is_another_run(tmp_path: Path) -> None:
    def go(images: torch.Tensor, **more: Any) -> None:
        frostglass.audit(model=net(), images=images, labels=Y, attacks=QUICK, out=tmp_path / "run", **more)

    go(X)
    go(X, resume=True)
    with pytest.raises(frostglass.BadInput, match="already holds this run"):
        go(X)
    with pytest.raises(frostglass.BadInput, match="not those that"):
        go(X * 0.5, resume=True)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({}, "give a plan, or a model and images"),
        ({"model": net()}, "give a plan, or a model and images"),
        ({"model": net(), "images": X, "batch": 0}, "client.batch: 0 is not valid"),
        ({"model": net(), "images": X, "batch": 5}, "is more than the 4 images of the tensors given"),
        ({"model": net(), "images": X, "mode": "test"}, "model.mode"),
        ({"model": net(), "images": X, "attacks": ["speer"]}, "did you mean 'spear'"),
        ({"model": net(), "images": X, "attacks": []}, "attack: empty"),
        ({"model": net(), "images": X, "grants": ["lable"]}, "did you mean 'labels'"),
        ({"model": net(), "images": X, "device": "tpu"}, "device: 'tpu'"),
        ({"model": net(), "images": X * 3}, r"in \[0, 1\]"),
        ({"model": InPlace(), "images": X}, "changes its input in place"),
        ({"plan": "none.toml"}, "none.toml does not exist"),
        ({"plan": 5}, "plan: int is not taken"),
        ({"model": net(), "images": X, "attacks": None}, "attacks: None must be"),
        ({"model": net(), "images": X, "defenses": [("none", 1)]}, r"defenses: \('none', 1\) must be"),
        ({"model": net(), "images": X, "grants": 5}, "grants: 5 must be"),
        ({"model": net(), "images": X, "metrics": None}, "metrics: None must be"),
        ({"model": net(), "images": X, "out": 5}, "out: int is not taken"),
        ({"model": net(), "images": 5}, "images: int is not taken"),
        ({"model": net(), "images": []}, r"images: shape \(0,\) must be"),
        ({"model": net(), "images": X, "device": 5}, "device: 5 is not a device"),
        ({"model": net(), "images": X, "device": ["cpu"]}, r"device: \['cpu'\] is not a device"),
        ({"model": net(), "images": X, "emit": "print"}, "emit: str is not taken"),
        ({"model": net(), "images": X, "resume": True}, "resume: a run goes on in its own folder"),
        ({"plan": small(QUICK), "labels": Y}, "labels: they belong to images"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    tmp_path: Path, keywords: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(frostglass.BadInput, match=sentence):
        frostglass.audit(**keywords)
    assert list(tmp_path.iterdir()) == []
    assert float(X.min()) >= 0


def test_a_network_in_train_mode_with_dropout_is_audited() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    report = frostglass.audit(model=model, images=X, labels=Y, attacks=QUICK)
    assert not report.scorecard.failed


def test_a_public_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'auditt'"):
        _ = frostglass.auditt


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"encoded": 5}, "encoded: int is not taken"),
        ({"encoded": X, "attacks": [5]}, "attacks: 5 must be"),
        ({"encoded": X, "known": 5}, "known: 5 must be"),
        ({"encoded": X, "groups": X}, "groups: Tensor is not taken"),
        ({"encoded": X, "device": 5}, "device: 5 is not a device"),
        ({"encoded": X, "emit": 5}, "emit: int is not taken"),
        ({"encoded": X, "resume": True}, "resume: a run goes on in its own folder"),
    ],
)
def test_unmix_names_an_argument_of_another_type(keywords: dict[str, Any], sentence: str) -> None:
    with pytest.raises(frostglass.BadInput, match=sentence):
        frostglass.unmix(**keywords)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"recorded": 5}, "recorded: int is not taken"),
        ({"before": X}, "before: Tensor is not taken"),
        ({"model": 5}, "model: int is not taken"),
        ({"truth": X}, "truth: give a folder"),
        ({"truth": [X]}, "truth: give a folder"),
        ({"truth": {"0": X}}, "truth: give a folder"),
        ({"truth": {}}, "truth: it is empty"),
        ({"emit": 5}, "emit: int is not taken"),
        ({"resume": True}, "resume: a run goes on in its own folder"),
        ({"attacks": None}, "attacks: None must be"),
        ({"local": 5}, "local: 5 must be"),
        ({"metrics": None}, "metrics: None must be"),
    ],
)
def test_audit_updates_passes_no_argument_over(keywords: dict[str, Any], sentence: str) -> None:
    """Truth as a bare tensor was dropped without a word, and nothing scored."""
    with pytest.raises(frostglass.BadInput, match=sentence):
        frostglass.audit_updates(**{"recorded": "none", **keywords})
