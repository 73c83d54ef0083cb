"""What an inversion can be told to do, on a device; and that its loop never waits for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import frostglass
import pretend_device
from frostglass.attacks.inversion import captured
from frostglass.attacks.inversion.captured import Replay
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.together import Evaluations
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.update import LocalPlan
from victims import observe


@pytest.fixture(autouse=True)
def _no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the CPU takes convolutions by tiles; their rounding decides signs, which some of these attacks follow."""
    monkeypatch.setattr("frostglass.numerics.second_order.tiling", lambda *_: None)


SOON = {"steps": 9, "every": 50}
SETTINGS: dict[str, dict[str, Any]] = {
    "thaw": {"name": "thaw"},
    "seeds": {"name": "thaw", "seeds": 3},
    "eliminated": {"name": "thaw", "seeds": 4, "eliminate": True},
    "frozen": {"name": "thaw", "engine": "frozen_fd"},
    "cosine": {"name": "inverting_gradients"},
    "lazy": {"name": "grad_inversion", "seeds": 2, "consensus": "lazy", "consensus_start": 2, "consensus_every": 3},
    "registered": {"name": "grad_inversion", "seeds": 2, "consensus_start": 2, "consensus_every": 3},
    "norms": {"name": "grad_inversion", "seeds": 1, "bn_relative": True, "restore": "sum"},
    "priors": {"name": "deep_inversion"},
    "lbfgs": {"name": "dlg", "steps": 3, "inner": 4},
    "label first": {"name": "idlg", "steps": 3, "inner": 4},
    "untrained": {"name": "latent_projection"},
}
QUIET = sorted(SETTINGS.keys() - {"registered", "lbfgs", "label first"})
"""Those that never wait: registration works on the CPU, and L-BFGS looks at its line search."""


def made(wanted: dict[str, Any]) -> Inversion:
    entry = ATTACKS[wanted["name"]]
    options = {k: v for k, v in SOON.items() if k in entry.parameters} | wanted
    attack = entry.make(**{k: v for k, v in options.items() if k != "name"})
    assert isinstance(attack, Inversion)
    return attack


def on(device: str, seen: Any, attack: Any) -> Reconstruction:
    place = pretend_device.DEVICE if device == "auto" else torch.device("cpu")
    return drive(attack, seen, Runtime(Rng.from_seed(0, "device"), place))


def agree(there: Reconstruction, here: Reconstruction) -> None:
    torch.testing.assert_close(there.images, here.images, atol=1e-3, rtol=1e-3)
    assert there.info.keys() == here.info.keys()


@pytest.mark.parametrize("setting", SETTINGS)
def test_it_ends_where_the_cpu_ends(setting: str) -> None:
    seen, _ = observe("small_bn_cnn", width=8, batch=1 if setting == "label first" else 2)
    agree(on("auto", seen, made(SETTINGS[setting])), on("cpu", seen, made(SETTINGS[setting])))


@pytest.mark.parametrize(
    "plan",
    [
        LocalPlan(kind="delta", local_steps=2, lr=0.05, momentum=0.5, weight_decay=1e-3),
        LocalPlan(kind="delta", epochs=2, minibatch=1, lr=0.05),
        LocalPlan(kind="delta", epochs=2, lr=1e-3, optimizer="adam"),
    ],
    ids=["momentum", "unknown order", "adam"],
)
def test_weight_differences(plan: LocalPlan) -> None:
    seen, _ = observe("small_bn_cnn", width=4, plan=plan)
    agree(on("auto", seen, made({"name": "thaw"})), on("cpu", seen, made({"name": "thaw"})))


@pytest.mark.parametrize("victim", ["lenet", "mlp", "resnet20"])
def test_seeds_share_a_pass_there(victim: str) -> None:
    seen, _ = observe(victim, batch=1)
    attack = replace(made({"name": "thaw", "seeds": 2, "mean": False, "steps": 3}), at_once=2)
    agree(on("auto", seen, attack), on("cpu", seen, attack))
    assert [held.at_once for held in attack._laid_out.values()] == [2]


@pytest.mark.parametrize("victim", ["small_bn_cnn", "resnet20", "lenet", "mlp"])
@pytest.mark.parametrize("setting", ["thaw", "cosine", "lazy"])
def test_a_recording_is_made_of_device_tensors(setting: str, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(function: Any) -> Replay:
        """What a CUDA graph refuses while it is recorded: to wait for the device, and values from the CPU."""
        pretend_device.waits.clear(), pretend_device.arrivals.clear()
        held = function()
        assert (pretend_device.waits, pretend_device.arrivals) == ([], [])

        def replay() -> Evaluations:
            found = function()
            for place, value in zip(tensors_of(held), tensors_of(found), strict=True):
                place.copy_(value)
            return held

        return replay

    def tensors_of(found: Evaluations) -> list[torch.Tensor]:
        tensors = [found.own, found.total, found.gradient, *found.values.values()]
        assert all(t.device.type == "pretend" for t in tensors)
        return tensors

    seen, _ = observe(victim, **({"width": 8} if victim == "small_bn_cnn" else {}))
    told = {**SETTINGS[setting], "graph": True, "steps": 4}
    with monkeypatch.context() as patched:
        patched.setattr(captured, "recorder_for", lambda device: record if device.type == "pretend" else None)
        there = on("auto", seen, replace(made(told), at_once=2))  # seeds of the consensus in one pass
    here = on("cpu", seen, made(told))
    assert (there.info.pop("cuda_graph"), here.info.pop("cuda_graph")) == (True, False)
    agree(there, here)


@pytest.mark.parametrize("setting", QUIET)
@pytest.mark.parametrize("victim", ["small_bn_cnn", "lenet"])
def test_no_iteration_waits_for_the_device(setting: str, victim: str) -> None:
    options = {"width": 8} if victim == "small_bn_cnn" else {}
    seen, _ = observe(victim, batch=2, **options)
    attack, run = made(SETTINGS[setting]), Runtime(Rng.from_seed(0, "device"), pretend_device.DEVICE)
    if attack.check(seen):
        pytest.skip(f"{setting} does not apply to {victim}")
    state = attack.init(seen, run)
    state, _ = attack.step(seen, state, run, 0)
    for t in range(1, attack.steps - 1):  # the last step chooses a seed
        pretend_device.waits.clear()
        state, _ = attack.step(seen, state, run, t)
        refreshed = attack.consensus is not None and attack.consensus.due(t)
        dropped = attack.eliminate is not None and attack.eliminate.due(t, attack.steps)
        assert refreshed or dropped or pretend_device.waits == [], f"step {t}"


def test_the_pretend_device_refuses_what_cuda_refuses() -> None:
    there = torch.ones(3, device=pretend_device.DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    with pytest.raises(RuntimeError, match="not supported"):
        there.numpy()
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.embedding(torch.tensor([1]), there.view(3, 1))
    pretend_device.waits.clear()
    assert float(there.sum() + torch.tensor(1.0)) == 4
    assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
    assert len(pretend_device.waits) == 2


def test_auto_is_that_device() -> None:
    pretend_device.waits.clear()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    report = frostglass.audit(model=model, images=torch.rand(2, 3, 4, 4), attacks=[{"name": "thaw", "steps": 3}])
    assert report.cells[0].error is None
    assert pretend_device.waits
