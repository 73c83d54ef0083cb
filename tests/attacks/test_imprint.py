"""The malicious ceiling, and the scan that finds its layer and leaves honest networks alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from frostglass.app.commands.check import command
from frostglass.attacks.analytic.imprint import imprint
from frostglass.attacks.analytic.imprint_scan import scan_model
from frostglass.auditing.cells import expand
from frostglass.auditing.plan import parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import prepare
from frostglass.auditing.score import score
from frostglass.auditing.simulate import play
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.vision import networks
from frostglass.vision.borrowed import import_torchvision
from frostglass.vision.weights import save_weights

OPTIONS = {"bins": 500, "mean": 0.31, "std": 0.05, "inner_options": {"width": 4}}


def plan_of(batch: int, grants: list[str], model: dict[str, Any]) -> Any:
    scenario = {
        "data": {"source": "digits"},
        "model": model,
        "client": {"batch": batch},
        "attack": [{"name": "imprint"}],
    }
    return parse_plan({"scenario": [scenario], "threat": {"grants": grants}})


def test_images_alone_in_their_bins_are_exact_whatever_stands_behind() -> None:
    plan = plan_of(12, ["examples", "modified_model"], {"name": "imprinted", "options": OPTIONS})
    prepared = prepare(plan, 0, torch.device("cpu"))
    played = play(prepared, make_defense(plan.scenario[0].defense[0]), 0)
    attack = imprint()
    assert not attack.check(played.seen)
    found = drive(attack, played.seen, Runtime(Rng.from_seed(0)))
    scored = score(found, played, ["psnr"], null=False)
    exact = sum(row.psnr is not None and row.psnr > 40 for row in scored.private)
    assert exact >= 8
    assert found.info["bins_filled"] <= 12


def test_its_cells_say_what_it_takes() -> None:
    (cell,) = expand(plan_of(2, ["modified_model"], {"name": "imprinted"}))
    assert "malicious ceiling" in cell.title


def test_an_honest_model_is_no_ground_for_it() -> None:
    plan = plan_of(2, ["modified_model"], {"name": "mlp"})
    played = play(prepare(plan, 0, torch.device("cpu")), make_defense(plan.scenario[0].defense[0]), 0)
    (problem,) = imprint().check(played.seen)
    assert "no layer of bins" in problem


def built(name: str, **options: Any) -> nn.Module:
    return networks.build(name, classes=10, channels=3, size=16, options=options, rng=Rng.from_seed(1))


@pytest.mark.parametrize("name", ["mlp", "lenet", "small_bn_cnn", "resnet20", "torchvision:resnet18"])
def test_honest_networks_pass_the_scan(name: str) -> None:
    if name.startswith("torchvision"):
        try:
            import_torchvision()
        except BadInput as why:
            pytest.skip(str(why))
    assert scan_model(built(name)) == []


def test_a_trained_network_passes_the_scan() -> None:
    model = built("mlp", hidden=[64, 32])
    x, y = Rng.from_seed(2).uniform((64, 3, 16, 16)), torch.arange(64) % 10
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    assert scan_model(model) == []
    assert scan_model({n: torch.zeros_like(w) for n, w in model.state_dict().items()}) == []


def test_bins_trap_weights_and_copies_are_found() -> None:
    found = {f.rule for f in scan_model(built("imprinted"))}
    assert found == {"imprint"}
    trapped = nn.Linear(768, 64)
    with torch.no_grad():
        for row in trapped.weight:  # Boenisch et al. 2023: half negative, the positive half scaled down
            order = torch.randperm(768)
            size = torch.randn(768).abs()
            row.copy_(size * 0.95)
            row[order[:384]] = -size[order[:384]]
    assert [f.rule for f in scan_model(nn.Sequential(nn.Flatten(), trapped))] == ["trap_weights"]
    copying = nn.Conv2d(3, 3, 3, padding=1)
    nn.init.dirac_(copying.weight)
    assert [f.rule for f in scan_model(copying)] == ["pass_through"]


def test_a_client_is_warned_on_the_command_line(tmp_path: Path) -> None:
    bad = save_weights(built("imprinted"), tmp_path / "bad.safetensors")
    good = save_weights(built("small_bn_cnn"), tmp_path / "good.safetensors")
    warned = CliRunner().invoke(command, ["--model", str(bad)])
    assert warned.exit_code == 1
    assert "do not train this model" in warned.output
    passed = CliRunner().invoke(command, ["--model", str(good)])
    assert passed.exit_code == 0
    assert "no proof" in passed.output
