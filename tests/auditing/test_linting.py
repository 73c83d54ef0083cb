"""The linter: every rule fires on what it is about and on nothing else, in every kind of file that it reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from documented import misfits
from frostglass.auditing.linting.check import check_facts, check_file
from frostglass.auditing.linting.facts import Facts
from frostglass.auditing.linting.flower_mechanisms import flower_object_facts
from frostglass.auditing.linting.output import Checked, as_json, as_sarif, as_text
from frostglass.auditing.linting.recompute import recompute
from frostglass.auditing.linting.rules import RULES, findings
from frostglass.core.errors import BadInput
from frostglass.guarantees.conversions import gdp_epsilon

GOOD: dict[str, Any] = {
    "framework": "numbers", "name": "Gaussian", "clip": 1.0, "sensitivity": 1.0, "noise_std": 2.0, "delta": 1e-5,
    "steps": 10, "accounted": True, "clip_unit": "image", "claim_unit": "image", "secure_generator": True,
    "epsilon": 9.0, "epsilon_is": "total",
}  # fmt: skip


def fired(**changes: Any) -> dict[str, str]:
    """Rule -> severity."""
    return {f.rule: f.severity for f in findings(Facts(**(GOOD | changes)))}


def test_a_correct_setting_breaks_no_rule() -> None:
    assert fired() == {}
    assert fired(adjacency="replace_one", sensitivity=2.0) == {}
    assert fired(rate=0.01, sampling="poisson") == {}


@pytest.mark.parametrize(
    ("changes", "rule", "severity"),
    [
        ({"sensitivity": 0.5}, "sensitivity", "error"),
        ({"sensitivity": 1.0, "adjacency": "replace_one"}, "sensitivity", "error"),
        ({"sensitivity": 3.0}, "sensitivity", "warning"),
        ({"classical": True, "epsilon": 1.0}, "formula", "warning"),
        ({"epsilon_is": "release", "accounted": None}, "accounting", "error"),
        ({"accounted": False}, "accounting", "warning"),
        ({"steps": None}, "accounting", "warning"),
        ({"rate": 0.01, "sampling": "shuffle"}, "sampling", "error"),
        ({"rate": 0.01, "sampling": "fixed"}, "sampling", "error"),
        ({"clip_unit": "image", "claim_unit": "client"}, "unit", "error"),
        ({"clip_unit": "client", "claim_unit": "image"}, "unit", "warning"),
        ({"order": "noise_clip"}, "order", "error"),
        ({"order": "noise_inside_clip"}, "order", "error"),
        ({"unnoised": ("BatchNorm buffers",)}, "order", "error"),
        ({"calibrated": False, "noise_std": None}, "naming", "error"),
        ({"clients": 10, "installed": 9}, "opt-in", "error"),
        ({"seed": 0}, "randomness", "error"),
        ({"secure_generator": False}, "randomness", "warning"),
        ({"batchnorm": True}, "layers", "error"),
        ({"frozen_noised": True}, "layers", "warning"),
        ({"uncovered": ("labels",)}, "coverage", "warning"),
        ({"mixing": True}, "mixing", "error"),
        ({"claimed_multiplier": 2.5}, "claim", "error"),
        ({"noise_std": 0.0}, "numbers", "error"),
        ({"steps": 0}, "numbers", "error"),
        ({"rate": 1.5}, "numbers", "error"),
        ({"delta": 1.0}, "numbers", "error"),
        ({"noise_std": None, "epsilon": None}, "numbers", "error"),
    ],
)
def test_each_rule_fires_alone(changes: dict[str, Any], rule: str, severity: str) -> None:
    assert fired(**changes) == {rule: severity}


def test_every_rule_is_tested_and_says_what_it_means_and_the_way_out() -> None:
    everything = Facts(
        **(GOOD | {
            "sensitivity": 0.5, "classical": True, "accounted": False, "rate": 0.1, "sampling": "shuffle",
            "claim_unit": "client", "order": "noise_clip", "clients": 2, "installed": 1, "seed": 1, "batchnorm": True,
            "mixing": True, "uncovered": ("labels",), "claimed_multiplier": 9.0, "steps": 0,
        })
    )  # fmt: skip
    found = [*findings(everything), *findings(Facts("NVFlare", "PercentilePrivacy", calibrated=False))]
    assert {f.rule for f in found} == {r.id for r in RULES}
    for f in found:
        assert all(text.endswith(".") and text[0].isupper() for text in (f.found, f.meaning, f.fix)), f


# ---------------------------------------------------------------- the worked case


FLIP = Facts(
    "Flower", "LocalDpMod", clip=1.0, sensitivity=1e-4, epsilon=10.0, delta=1e-5, epsilon_is="release", classical=True,
    clip_unit="client",
)  # fmt: skip


def test_the_worked_case() -> None:
    """londonaicentre/FLIP #833, public numbers: clip 1, sensitivity 1e-4, epsilon 10, delta 1e-5."""
    found = {f.rule: f for f in findings(FLIP)}
    assert found["sensitivity"].severity == "error"
    assert "10,000 times too small" in found["sensitivity"].meaning
    assert {"formula", "accounting"} <= set(found)
    n = recompute(FLIP)
    assert n is not None
    assert n.noise_std == pytest.approx(4.845e-05, abs=5e-9)
    assert n.rho == pytest.approx(2.13e8, rel=1e-3)
    assert n.epsilon["zCDP"] == pytest.approx(2.13e8, rel=1e-3)
    assert n.psnr == pytest.approx(40.5, abs=0.05)
    assert [b.gamma for b in n.gamma] == [1.0, 1.0, 1.0]
    text = as_text(check_facts([FLIP], "numbers", "numbers"))
    assert "40.5 dB" in text
    assert "gamma 1.0000" in text
    assert "without any prior" in text, "ceiling and gamma are said together"


def test_nothing_is_recomputed_from_an_impossible_clip() -> None:
    for clip in (0.0, -1.0):
        assert recompute(Facts(**(GOOD | {"clip": clip, "noise_std": None, "noise_multiplier": 1.0}))) is None
        assert recompute(Facts(**(GOOD | {"clip": clip, "noise_std": -1.0}))) is None


def test_recomputed_numbers_are_those_of_the_guarantees() -> None:
    n = recompute(Facts(**(GOOD | {"adjacency": "replace_one", "steps": 4})))
    assert n is not None
    assert n.sigma == 2.0
    assert n.epsilon["GDP, exact"] == pytest.approx(gdp_epsilon(2.0, 1e-5))
    assert n.epsilon_release == pytest.approx(gdp_epsilon(1.0, 1e-5))
    assert n.rho == pytest.approx(0.5)
    sampled = recompute(Facts(**(GOOD | {"rate": 0.05, "sampling": "poisson"})))
    assert sampled is not None
    assert sampled.gamma[0].standard_error > 0
    assert sampled.gamma[0].gamma < n.gamma[0].gamma
    assert recompute(Facts("NVFlare", "PercentilePrivacy", calibrated=False)) is None
    assert recompute(Facts(**(GOOD | {"noise_std": 0.0}))) is None
    client = recompute(Facts(**(GOOD | {"clip_unit": "client"})))
    assert client is not None
    assert client.psnr is None, "one image is a part of a client's update"


# ---------------------------------------------------------------- files

FLOWER = """\
[project]
name = "app"

[tool.flwr.app.components]
serverapp = "app.server:app"
clientapp = "app.client:app"

[tool.flwr.app.config]
num-server-rounds = 20
clipping-norm = 1.0
sensitivity = 0.0001
epsilon = 10.0
delta = 1e-5
"""
CLIENT = """\
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod

SENSITIVITY = 1e-4

app = ClientApp(
    mods=[
        LocalDpMod(1.0, SENSITIVITY, epsilon=10.0, delta=1e-5),
    ]
)
"""
SERVER = """\
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

def main(grid, context):
    strategy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(), noise_multiplier=0.1, clipping_norm=context.run_config["clipping-norm"], num_sampled_clients=10,
    )
"""
OPACUS = """\
import torch
from opacus import PrivacyEngine
from torchvision.models import resnet18

torch.manual_seed(7)
EPOCHS = 3
model = resnet18()
engine = PrivacyEngine()
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader,
    noise_multiplier=1.1,
    max_grad_norm=1.0,
    poisson_sampling=False,
)
print(engine.get_epsilon(delta=1e-5))
"""
OPACUS_GOOD = """\
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator

batch_size = 100
dataset_size = 10_000
model = ModuleValidator.fix(resnet18())
engine = PrivacyEngine(secure_mode=True)
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.1, max_grad_norm=1.0, epochs=2,
)
print(engine.get_epsilon(delta=1e-5))
"""
NVFLARE = """\
{
  "format_version": 2,
  "executors": [{"tasks": ["train", "submit_model"], "executor": {"path": "trainer.Trainer", "args": {}}}],
  "task_result_filters": [
    {
      "tasks": ["train"],
      "filters": [
        {"path": "nvflare.app_common.filters.exclude_vars.ExcludeVars", "args": {"exclude_vars": ["head"]}},
        {"path": "nvflare.app_common.filters.svt_privacy.SVTPrivacy", "args": {"fraction": 0.1, "epsilon": 0.1}},
        {
          "path": "nvflare.app_common.filters.percentile_privacy.PercentilePrivacy",
          "args": {"percentile": 10, "gamma": 0.0}
        }
      ]
    }
  ]
}
"""
PLAN = """\
name = "a plan"
[[scenario]]
name = "digits"
[scenario.data]
source = "digits"
[[scenario.defense]]
name = "none"
[[scenario.defense]]
name = "dp_sgd"
clipping_norm = 1.0
noise_multiplier = 0.5
[[scenario.attack]]
name = "linear_exact"
[verdict.claim]
unit = "client"
adjacency = "add_remove"
noise_multiplier = 1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


Write = Callable[[str, str], Path]


def at(checked: Checked, rule: str) -> list[int | None]:
    return [f.line for f in checked.findings if f.rule == rule]


def test_a_flower_project_is_read_with_its_sources(file: Write) -> None:
    project = file("pyproject.toml", FLOWER)
    file("app/client.py", CLIENT)
    file("app/server.py", SERVER)
    found = check_file(project)
    assert found.kind.startswith("Flower project")
    assert found.mechanisms == 2
    assert at(found, "sensitivity") == [8]
    local = next(f for f in found.findings if f.rule == "sensitivity")
    assert local.where == "LocalDpMod (client.py)"
    client = (project.parent / "app/client.py").as_posix()
    assert f"{client}:8: error [sensitivity]" in as_text(found), "the line is one of the source, not of the project"
    assert client in {f["file"] for f in as_json(found)["findings"]}
    results = as_sarif([found])["runs"][0]["results"]
    places = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in results}
    assert places == {client, (project.parent / "app/server.py").as_posix()}
    assert {f.where for f in found.findings if f.rule == "accounting"} == {
        "LocalDpMod (client.py)", "DifferentialPrivacyServerSideFixedClipping (server.py)",
    }  # fmt: skip
    central = next(n for n in found.numbers if n.where.startswith("Differential"))
    assert (central.sigma, central.steps) == (0.1, 20), "the clip came from the run configuration"


def test_a_flower_project_without_sources_is_read_by_the_names_in_its_configuration(file: Write) -> None:
    found = check_file(file("pyproject.toml", FLOWER))
    assert found.mechanisms == 1
    assert at(found, "sensitivity") == [FLOWER.splitlines().index("sensitivity = 0.0001") + 1]
    assert "After 20 releases it is not 10" in next(f.meaning for f in found.findings if f.rule == "accounting")
    empty = check_file(file("other/pyproject.toml", "[tool.flwr.app.config]\nlr = 0.1\n"))
    assert (empty.mechanisms, empty.findings) == (0, ())
    assert "nothing is proved either" in as_text(empty)


def test_live_flower_objects() -> None:
    class LocalDpMod:
        def __init__(self) -> None:
            self.clipping_norm, self.sensitivity, self.epsilon, self.delta = 1.0, 1e-4, 10.0, 1e-5

    class Mine(LocalDpMod):
        pass

    facts = flower_object_facts(Mine(), rounds=5)
    assert facts is not None
    assert (facts.clip, facts.sensitivity, facts.steps) == (1.0, 1e-4, 5)
    assert "sensitivity" in {f.rule for f in findings(facts)}
    assert flower_object_facts(object()) is None


def test_opacus_source(file: Write) -> None:
    found = check_file(file("train.py", OPACUS))
    assert found.mechanisms == 1
    assert at(found, "sampling") == [13]
    assert at(found, "layers") == [9]
    assert at(found, "randomness") == [5, 9]
    assert {f.rule for f in found.findings if f.severity == "error"} == {"sampling", "layers", "randomness"}
    good = check_file(file("good.py", OPACUS_GOOD))
    assert good.errors == 0, as_text(good)
    assert good.numbers[0].steps == 200
    mixed = check_file(
        file("mixed.py", OPACUS_GOOD.replace("import PrivacyEngine", "import PrivacyEngine\nfrom a import mixup"))
    )
    assert [f.rule for f in mixed.findings if f.severity == "error"] == ["mixing"]


def test_opacus_constants_are_found_where_they_are_usually_written(file: Write) -> None:
    """Annotated, as a power, and the delta of `get_epsilon` by position, as Opacus's own tutorials write it."""
    source = OPACUS_GOOD.replace("noise_multiplier=1.1", "noise_multiplier=NOISE")
    source += "NOISE: float = 1.1\nDELTA = 10**-3\nepsilon = engine.get_epsilon(DELTA)\n"
    found = check_file(file("train.py", re.sub(r".*get_epsilon\(delta.*\n", "", source)))
    assert found.errors == 0
    assert found.numbers[0].sigma == 1.1
    assert found.numbers[0].delta == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("target_epsilon=-1, target_delta=1e-5", "Epsilon is -1."),
        ("target_epsilon=1, target_delta=1.5", "Delta is 1.5."),
        ("noise_multiplier=0", "The noise multiplier is 0."),
    ],
)
def test_impossible_opacus_targets_are_findings(file: Write, target: str, error: str) -> None:
    found = check_file(file("train.py", OPACUS_GOOD.replace("noise_multiplier=1.1", target)))
    assert [f.found for f in found.findings if f.severity == "error"] == [error]


def test_a_seeded_split_is_no_seeded_noise(file: Write) -> None:
    plain = OPACUS_GOOD.replace("secure_mode=True", "")
    split = "import torch\nparts = random_split(data, [8, 2], generator=torch.Generator().manual_seed(42))\n"
    named = "import torch\ng = torch.Generator()\ng.manual_seed(42)\n"
    for source in (split, named):
        assert check_file(file("train.py", source + plain)).errors == 0
    noised = named + plain.replace("noise_multiplier=1.1", "noise_multiplier=1.1, noise_generator=g")
    assert at(check_file(file("train.py", noised)), "randomness")[0] == 3
    assert at(check_file(file("train.py", "import torch\ntorch.manual_seed(0)\n" + plain)), "randomness")[0] == 2


def test_a_network_with_a_norm_of_its_own_has_no_batchnorm(file: Write) -> None:
    own = "from torchvision.models import resnet18\nnet = resnet18(norm_layer=group_norm)\n"
    unfixed = OPACUS_GOOD.replace("ModuleValidator.fix(resnet18())", "net")
    assert check_file(file("train.py", own + unfixed)).errors == 0
    for other in ("net = resnet18()\n", "group_norm = nn.BatchNorm2d\n"):
        assert len(at(check_file(file("train.py", own + other + unfixed)), "layers")) == 1


def test_nvflare_filters(file: Write) -> None:
    found = check_file(file("config_fed_client.json", NVFLARE))
    assert found.mechanisms == 3
    assert sorted(f.line or 0 for f in found.findings if f.rule == "naming") == [8, 9, 11]
    order = " ".join(f.found for f in found.findings if f.rule == "order")
    assert "submit_model" in order
    assert "passes everything" in order
    scopes = {"scopes": [{"name": "public", "task_result_filters": [{"path": "a.b.SVTPrivacy", "args": {}}]}]}
    site = check_file(file("privacy.json", json.dumps(scopes, indent=1)))
    assert "in scope public" in site.findings[0].where


def _chains(*chains: tuple[Any, Any], taken: Any = ("train", "submit_model")) -> str:
    filters = [{"tasks": tasks, "filters": [{"path": "own.GaussianNoise", "args": args}]} for tasks, args in chains]
    return json.dumps({"executors": [{"tasks": list(taken)}], "task_result_filters": filters}, indent=1)


def test_nvflare_chains_cover_each_others_tasks(file: Write) -> None:
    """NVFlare refuses two chains for one task, so their tasks are disjoint."""
    both = check_file(file("both.json", _chains((["train"], {"sigma": 1.0}), (["submit_model"], {"sigma": 2.0}))))
    assert (both.mechanisms, at(both, "order")) == (2, [])
    assert len(set(at(both, "accounting"))) == 2, "each chain has a line of its own"
    one = check_file(file("one.json", _chains((["train"], {"sigma": 1.0}))))
    assert ["submit_model" in f.found for f in one.findings if f.rule == "order"] == [True]


@pytest.mark.parametrize(
    ("taken", "filtered", "bare"),
    [
        (["*"], ["train"], ["'submit_model' (which an executor of '*' takes)"]),
        (["*"], ["train", "submit_model"], []),
        (["tr*"], ["train"], []),
        (["train_*"], ["validate"], ["'train_*'"]),
        (["train_*"], ["train_a"], []),
        (["t?ain", "validate"], ["validate"], []),
        (["train"], ["*"], ["'train'", "'*'"]),
        (["train"], ["train", "train_*"], ["'train_*'"]),
    ],
)
def test_nvflare_executors_take_patterns_and_filters_do_not(
    file: Write, taken: list[str], filtered: list[str], bare: list[str]
) -> None:
    """A task is routed by fnmatch where a name has "*"; a filter is found by the task's exact name alone."""
    found = check_file(file("config.json", _chains((filtered, {"sigma": 1.0}), taken=taken)))
    order = [f.found for f in found.findings if f.rule == "order"]
    assert len(order) == len(bare)
    assert all(any(task in sentence for sentence in order) for task in bare)


def test_nvflare_itself_matches_tasks_so() -> None:
    """What the rules about patterns rest on."""
    task_utils = pytest.importorskip("nvflare.apis.utils.task_utils")
    from nvflare.apis.fl_context import FLContext
    from nvflare.private.fed.client.client_runner import TaskRouter

    router = TaskRouter()
    router.add_executor(["train_*"], "executor")
    router.add_executor(["t?ain"], "other")
    assert [router.route(t) for t in ("train_a", "train")] == ["executor", None]
    for name, found in (("*", []), ("tr*", []), ("train", ["filter"])):
        table = {f"{name}/out": ["filter"]}
        assert task_utils.get_filters("task_result_filters", FLContext(), table, "train", "out") == found


@pytest.mark.parametrize("tasks", [None, 5, ["train"]])
@pytest.mark.parametrize("args", [None, [1], {"sigma": 10**400}])
def test_nvflare_values_of_other_types_are_passed_over(file: Write, tasks: Any, args: Any) -> None:
    text = _chains((tasks, args)).replace('"submit_model"', "null")
    assert check_file(file("config.json", text)).mechanisms == 1
    assert check_file(file("config.json", text.replace('"executors": [', '"executors": [5, '))).mechanisms == 1


def test_a_plan_is_held_against_its_own_claim(file: Write) -> None:
    found = check_file(file("plan.toml", PLAN))
    errors = {f.rule: f.line for f in found.findings if f.severity == "error"}
    lines = PLAN.splitlines()
    assert errors == {
        "unit": lines.index('unit = "client"') + 1,
        "claim": len(lines),
        "layers": lines.index('name = "dp_sgd"') + 1,
    }
    fixed = PLAN.replace('source = "digits"', 'source = "digits"\n[scenario.model]\nname = "mlp"')
    fixed = fixed.replace('"client"', '"image"').replace("noise_multiplier = 1.0", "noise_multiplier = 0.5")
    assert check_file(file("fixed.toml", fixed)).errors == 0


def test_each_defence_of_a_plan_has_its_own_line(file: Write) -> None:
    more = '[[scenario.defense]]\nname = "dp_sgd"\nclipping_norm = 1.0\nnoise_multiplier = 2.0\n'
    text = PLAN.partition("[verdict.claim]")[0] + more
    first = text.splitlines().index('name = "dp_sgd"') + 1
    assert at(check_file(file("plan.toml", text)), "layers") == [first, len(text.splitlines()) - 2]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "[tool.ruff]\n", "none of the known kinds; tried: Frostglass plan; Flower project"),
        ("a.toml", "not toml", "not valid TOML"),
        ("a.toml", "tool = 1\n", "none of the known kinds"),
        ("a.toml", "[tool]\nflwr = 1\n", "none of the known kinds"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": 1}', "none of the known kinds"),
        ("a.json", "[[[[1]]]]", "none of the known kinds"),
        ("a.py", "print(1)\n", "none of the known kinds"),
        ("a.py", "def (:\n", "none of the known kinds"),
        ("a.yaml", "a: 1\n", "NVFlare filter configuration; Python source with Opacus or Flower; or give numbers"),
        ("plan.toml", "scenario = 3\n", "scenario"),
    ],
)
def test_other_files_say_what_was_tried(file: Write, name: str, text: str, sentence: str) -> None:
    with pytest.raises(BadInput) as wrong:
        check_file(file(name, text))
    assert sentence in "\n".join(wrong.value.problems)


@pytest.mark.parametrize(
    "text",
    [
        "[tool.flwr.app]\nconfig = 3\n", "[tool.flwr.app]\ncomponents = 'x'\n",
        FLOWER.replace("num-server-rounds = 20", "num-server-rounds = nan"),
        FLOWER.replace("num-server-rounds = 20", f"num-server-rounds = {'9' * 400}"),
    ],
)  # fmt: skip
def test_tables_and_rounds_of_other_types_are_no_internal_error(file: Write, text: str) -> None:
    assert check_file(file("pyproject.toml", text)).kind.startswith("Flower project")


def test_a_component_that_cannot_be_read_is_named_and_not_passed_over(file: Write) -> None:
    project = file("pyproject.toml", FLOWER)
    file("app/server.py", SERVER)
    client = file("app/client.py", "\ufeff" + CLIENT)
    assert check_file(project).mechanisms == 2, "an editor's byte order mark is no mistake"
    for content in (CLIENT.encode() + b"# caf\xe9\n", CLIENT.encode() + b"def (\n"):
        client.write_bytes(content)
        with pytest.raises(BadInput, match=r"the component client\.py cannot be read as Python"):
            check_file(project)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.py", f"x = {'+'.join(['1'] * 5000)}\nengine.make_private(noise_multiplier=1.0)\n"),
        ("train.py", f"engine.make_private(noise_multiplier={'-' * 5000}1)\n"),
    ],
)
def test_deep_nesting_is_bad_input(file: Write, name: str, text: str) -> None:
    with pytest.raises(BadInput, match="nested too deeply"):
        check_file(file(name, text))


def test_numbers_too_large_for_a_float_lie_where_no_theorem_holds(file: Write) -> None:
    source = f"import opacus\nx = {'9' * 400} / 3\nengine.make_private(noise_multiplier={'9' * 400}, max_grad_norm=1)\n"
    assert at(check_file(file("train.py", source)), "numbers") == [3]


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        check_file(tmp_path / "none.toml")
    (tmp_path / "x.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read as text"):
        check_file(tmp_path / "x.py")


# ---------------------------------------------------------------- output


def test_sarif_is_what_code_hosts_read(file: Write) -> None:
    checked = check_file(file("train.py", OPACUS))
    log = json.loads(json.dumps(as_sarif([checked])))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    rules = [r["id"] for r in run["tool"]["driver"]["rules"]]
    assert rules == [r.id for r in RULES]
    assert len(run["results"]) == len(checked.findings) > 3
    for result, finding in zip(run["results"], checked.findings, strict=True):
        assert rules[result["ruleIndex"]] == result["ruleId"] == finding.rule
        assert result["level"] in ("error", "warning")
        assert result["message"]["text"]
        (place,) = result["locations"]
        assert place["physicalLocation"]["artifactLocation"]["uri"].endswith("train.py")
        assert place["physicalLocation"]["region"]["startLine"] == finding.line
    bare = as_sarif([check_facts([FLIP], "numbers", "numbers")])
    assert "region" not in bare["runs"][0]["results"][0]["locations"][0]["physicalLocation"], "no line, no region"


def test_json_holds_no_nan(file: Write) -> None:
    for checked in (check_facts([FLIP], "numbers", "n"), check_file(file("train.py", OPACUS))):
        text = json.dumps(as_json(checked), allow_nan=False)
        assert json.loads(text)["errors"] == checked.errors
        assert misfits("check --format json", json.loads(text)) == []
    assert math.isfinite(as_json(check_facts([FLIP], "n", "n"))["recomputed"][0]["epsilon"]["zCDP"])


def test_docs_list_every_rule() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "linter.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.M) == [r.id for r in RULES]


def test_a_target_epsilon_becomes_the_noise_that_opacus_would_choose(file: Write) -> None:
    source = OPACUS_GOOD.replace("make_private(", "make_private_with_epsilon(")
    source = source.replace("noise_multiplier=1.1", "target_epsilon=3.0, target_delta=1e-5")
    found = check_file(file("target.py", source))
    assert found.errors == 0
    assert found.numbers[0].steps == 200
    assert found.numbers[0].epsilon["RDP, Opacus"] == pytest.approx(3.0, rel=0.01)


def test_minibatches_of_a_client_are_steps_at_a_rate(file: Write) -> None:
    """Eight Poisson draws at 1/8, whose epsilon at 1e-5 is 12.85 by composing privacy losses; not one release."""
    client = '[scenario.client]\nbatch = 64\nminibatch = 8\nupdate = "delta"\n'
    text = PLAN.split("[verdict.claim]")[0].replace("[[scenario.defense]]", client + "[[scenario.defense]]", 1)
    (numbers,) = check_file(file("minibatches.toml", text)).numbers
    assert numbers.steps == 8
    assert "GDP, exact" not in numbers.epsilon
    assert numbers.epsilon["PRV, Opacus"] == pytest.approx(12.86, abs=0.02)
    assert numbers.epsilon["RDP, Opacus"] == pytest.approx(14.99, abs=0.05)


def test_noisy_encodings_cover_pixels_alone(file: Write) -> None:
    plan = PLAN.split("[verdict.claim]")[0].replace(
        'name = "dp_sgd"\nclipping_norm = 1.0\nnoise_multiplier = 0.5', 'name = "dp_instahide"'
    )
    found = check_file(file("encoded.toml", plan))
    assert found.mechanisms == 1
    assert [(f.rule, f.severity) for f in found.findings] == [("coverage", "warning")]


def test_a_plans_own_factory_is_not_run_and_a_claim_is_about_its_defence(file: Write, tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('the linter ran the plan')")
    text = PLAN.replace('source = "digits"', 'source = "digits"\n[scenario.model]\nname = "trap:factory"')
    found = check_file(file("plan.toml", text + 'defense = "noise"\n'))
    assert found.errors == 0
