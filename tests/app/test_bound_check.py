"""`frostglass bound`, `frostglass check` and `frostglass audit --gate`, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm

from documented import misfits
from frostglass.app.cli import main

PLAN = """\
[[scenario]]
[scenario.data]
source = "digits"
[scenario.model]
name = "mlp"
options = {{ hidden = [8] }}
[scenario.client]
batch = 1
batches = 2
{defense}
[[scenario.attack]]
name = "linear_exact"
[verdict]
tolerance = {tolerance}
[report]
null = false
"""
DP = '[[scenario.defense]]\nname = "dp_sgd"\nnoise_multiplier = 8.0'


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_bound_prints_table_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bound", "--sigma", "2", "--steps", "10", "--gallery", "1000", "--image", "3x32x32") == 0
    text = capsys.readouterr().out
    for part in (
        "0.6178",
        "0.2281",
        "0.0656",
        "<- top-1 of 1000",
        "GDP, exact",
        "RDP, Opacus",
        "PSNR ceiling",
        "holds if",
    ):
        assert part in text, part


def test_a_small_bound_is_never_printed_as_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bound", "--sigma", "5", "--kappa", "1e-6", "--kappa", "0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    half, rare = (line.split() for line in lines if line.startswith(("  0.5", "  1e-06")))
    assert half[1] == "0.5793"
    assert rare[1] == f"{norm.cdf(norm.ppf(1e-6) + 1 / 5):.3g}"


def test_bound_as_json_and_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "b.svg"
    arguments = ["--sigma", "1", "--steps", "5", "--rate", "0.1", "--samples", "20000", "--format", "json"]
    assert run("bound", *arguments, "--plot", str(picture)) == 0
    first = capsys.readouterr().out
    held = json.loads(first)
    assert misfits("bound --format json", held) == []
    assert [b["kappa"] for b in held["bounds"]] == [0.1, 0.01, 0.001]
    assert all(b["standard_error"] > 0 and b["gamma"] > b["kappa"] for b in held["bounds"])
    assert len(held["assumptions"]) == 5
    assert picture.read_text().startswith("<?xml")
    assert run("bound", *arguments) == 0
    assert capsys.readouterr().out == first, "the simulation follows from its seed"


def test_a_clients_update_has_no_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bound", "--sigma", "1", "--unit", "client", "--image", "3x32x32") == 0
    assert "PSNR ceiling: none" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--sigma", "1", "--steps", "100000"], ["--sigma", "1e300", "--rate", "0.5"]])
def test_bound_leaves_out_an_accountant_that_overflows(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """PRV asked for 84 GiB at 100,000 steps, and Opacus squares the noise."""
    assert run("bound", *arguments, *(["--samples", "1000"] if "--rate" in arguments else [])) == 0
    out = capsys.readouterr().out
    assert "PRV" not in out
    assert "epsilon at delta" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sigma", "0"], "noise multiplier: 0 must be above 0"),
        (["--sigma", "1", "--steps", "0"], "steps: 0 must be at least 1"),
        (["--sigma", "1", "--rate", "2"], "sampling rate: 2 must be above 0 and at most 1"),
        (["--sigma", "1", "--kappa", "1"], "kappa: 1 must be strictly between 0 and 1"),
        (["--sigma", "1", "--kappa", "0", "--rate", "0.5"], "kappa: 0 must be strictly between 0 and 1"),
        (["--sigma", "1", "--gallery", "1"], "--gallery: 1 must be at least 2"),
        (["--sigma", "1", "--image", "32"], "--image: '32' must read"),
        (["--sigma", "1", "--plot", "x.txt"], "--plot: 'x.txt' must end in"),
        (["--sigma", "1", "--plot", f"{__file__}/x.png"], "x.png cannot be written (Not a directory); change --plot."),
        (["--sigma", "1", "--rate", "0.5", "--samples", "3"], "--samples: 3 is too few"),
        (["--sigma", "nan"], "noise multiplier: nan"),
        (["--sigma", "1e-300"], "--sigma: 1e-300 is too little noise"),
        (["--sigma", "1", "--steps", "1" + "0" * 23], "--steps: 1" + "0" * 23 + " must be at most 1000000000000"),
        (["--sigma", "1", "--steps", "10000000", "--rate", "0.01"], "must be at most 1000000 where --rate"),
    ],
)
def test_bound_refuses_in_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bound", *arguments) == 2
    out = capsys.readouterr()
    assert sentence in out.err
    assert len(out.err.strip().splitlines()) == 1
    assert not out.out


def test_check_says_how_far_a_simulated_gamma_may_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("check", "--clip", "1", "--sigma", "1", "--delta", "1e-5", "--steps", "900")
    assert run(*numbers) == 0
    assert "±" not in capsys.readouterr().out
    assert run(*numbers, "--rate", "0.01", "--sampling", "poisson") == 0
    gammas = [line for line in capsys.readouterr().out.splitlines() if "gamma 0." in line]
    assert len(gammas) == 3
    assert all(line.endswith("(one standard error)") and " ± 0." in line for line in gammas)


def test_check_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    flip = [
        "--clip",
        "1",
        "--sensitivity",
        "1e-4",
        "--epsilon",
        "10",
        "--delta",
        "1e-5",
        "--classical",
        "--per-release",
    ]
    assert run("check", *flip) == 1
    text = capsys.readouterr().out
    assert "4.845e-05" in text
    assert "40.5 dB" in text
    assert "10,000 times too small" in text
    assert run("check", "--clip", "1", "--sigma", "2", "--delta", "1e-5", "--steps", "10") == 0
    assert "0 errors" in capsys.readouterr().out


@pytest.mark.parametrize(("sigma", "code"), [("1e300", 0), ("1e-300", 1)])
def test_check_of_a_noise_beyond_floating_point(sigma: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--sigma", sigma) == code
    assert (f"The noise is {sigma} clipping norms" in capsys.readouterr().out) is (code == 1)


def test_check_of_a_plan_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(defense=DP, tolerance=0.2))
    assert run("check", str(path)) == 0
    assert "noise multiplier s / C = 8" in capsys.readouterr().out
    assert run("check", str(path), "--format", "json") == 0
    held = json.loads(capsys.readouterr().out)
    assert held["mechanisms"] == 1
    assert misfits("check --format json", held) == []
    assert run("check", str(path), "--format", "sarif") == 0
    assert json.loads(capsys.readouterr().out)["version"] == "2.1.0"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either a CONFIG file or numbers"),
        (["plan.toml", "--clip", "1"], "give either a CONFIG file or numbers"),
        (["nothing.toml"], "nothing.toml does not exist"),
        (["--noise", "1", "--sigma", "1"], "--noise and --sigma say the same"),
        (["--model", "x", "--clip", "1"], "--model stands alone"),
    ],
)
def test_check_refuses_in_one_sentence(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("check", *arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("defense", "tolerance", "code", "word"),
    [("", 0.1, 10, "VIOLATED"), (DP, 0.2, 0, "BOUNDED"), (DP, 0.06, 11, "INCONCLUSIVE")],
)
def test_a_gate_exits_by_verdict(
    defense: str, tolerance: float, code: int, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format(defense=defense, tolerance=tolerance))
    assert run("audit", str(path), "--out", str(tmp_path / "gated"), "--gate") == code
    assert f"Verdict: {word}" in capsys.readouterr().out
    if code:
        assert run("audit", str(path), "--out", str(tmp_path / "free")) == 0


def test_check_of_a_received_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--model", "mlp", "--image", "1x8x8") == 0
    assert "no proof" in capsys.readouterr().out
    layer = torch.nn.Linear(64, 32)
    with torch.no_grad():  # one direction in every row, thresholds in order: the trap of Robbing the Fed
        layer.weight.copy_(torch.full((32, 64), 1 / 64))
        layer.bias.copy_(-torch.linspace(0, 1, 32))
    save_file({f"0.{k}": v.clone() for k, v in layer.state_dict().items()}, tmp_path / "trap.safetensors")
    assert run("check", "--model", str(tmp_path / "trap.safetensors"), "--format", "json") == 1
    assert json.loads(capsys.readouterr().out)
    assert run("check", "--model", "mlp", "--format", "sarif") == 2
    assert run("check", "--model", "mlp", "--image", "1x8x9") == 2


@pytest.mark.parametrize("declared", ["0", "-1"])
def test_a_sensitivity_of_nothing_is_an_error_of_the_configuration(
    declared: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "--sensitivity", declared, "--epsilon", "1", "--delta", "1e-5", "--clip", "1") == 1
    assert "Noise that follows from it is no noise." in capsys.readouterr().out
