"""What every registered attack on encodings must hold to; a new file below frostglass/attacks is tested by existing."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from encoded_scenes import crops, observed, scene
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.store import CheckpointStore
from frostglass.auditing.unmixing_rounds import simulate_rounds
from frostglass.core.drive import Attack, drive
from frostglass.core.errors import AttackFailed
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import EncodingMessage, GradientMessage, Observation
from frostglass.defenses.instahide import InstaHide
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.similarity_network import save_network
from frostglass.numerics.similarity_network_fit import FitSettings, fit
from frostglass.vision import networks
from victims import observe

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

RUN = Runtime(Rng.from_seed(3, "contract"))
NAMES = [e.name for e in ATTACKS if e.about.get("reads", "an update") != "an update"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "similarity.safetensors"
    made = fit(crops(8) * 2 - 1, MixLaw(2, 2), FitSettings(steps=2, batch=8, width=4, features=8), Rng.from_seed(0),
               device=torch.device("cpu"))  # fmt: skip
    save_network(made.network, path)
    return str(path)


def made(name: str, network: str) -> Attack[Any]:
    """The attack with few steps, where it has any to set."""
    entry = ATTACKS[name]
    wanted = {"rounds": 4, "starts": 2, "last": 1 << 9, "network": network, "batch": 2, "messages": 6}
    return entry.make(**{k: v for k, v in wanted.items() if k in entry.parameters})


def watched(name: str) -> Observation:
    """A set that this attack takes, as its grants say."""
    if ATTACKS[name].about["reads"] == "rounds":
        model = networks.build("mlp", classes=3, channels=3, size=8, options={"hidden": (96, 32)}, rng=Rng.from_seed(1))
        encoder = InstaHide(k=2, labels="exact", insecure_seed=2)
        x, y = crops(8, 4), torch.tensor([0, 1, 2, 0])
        played = simulate_rounds(encoder, model, x, y, classes=3, rounds=3, batch=2, rng=Rng.from_seed(4))
        return played.seen
    if name == "mixup_attack":
        return scene(k=3, private=2, mask="none", rounds=4, grant_pool=True).seen
    if name == "averaging":
        held = scene(k=3, private=1, rounds=5).seen
        message = held.messages[0]
        assert isinstance(message, EncodingMessage)
        groups = [torch.arange(i, 30, 6) for i in range(6)]
        return observed(message.images, message.targets, 6, None, None, groups, crops()[20:])
    return scene(images=4, rounds=12, side=8).seen


def tensors_of(seen: Observation) -> list[torch.Tensor]:
    kept = [seen.labels.clone()] if seen.labels is not None else []
    for m in seen.messages:
        if isinstance(m, EncodingMessage):
            kept += [m.images.clone(), *([] if m.targets is None else [m.targets.clone()])]
        else:
            kept += [g.clone() for g in m.gradients.values()]
    return kept + [v.clone() for v in seen.model.state_dict().values()]


def test_it_has_a_summary_and_a_source(name: str) -> None:
    entry = ATTACKS[name]
    assert len(entry.summary) > 20
    assert entry.paper
    assert entry.about["reads"] in ("encodings", "rounds")
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in entry.parameters.values())


def test_result_has_the_shape_and_range_of_encodings_and_nothing_is_changed(name: str, network: str) -> None:
    seen, attack = watched(name), made(name, network)
    before = tensors_of(seen)
    assert attack.check(seen) == []
    found = drive(attack, seen, RUN)
    assert found.images.shape[1:] == seen.image_shape
    assert found.images.dtype == torch.float32
    assert found.proved.shape == (len(found.images),)
    assert bool((found.images.abs() <= 1).all())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(seen), strict=True))


def test_the_same_run_twice_gives_the_same_result(name: str, network: str) -> None:
    results = [drive(made(name, network), watched(name), RUN) for _ in range(2)]
    assert torch.equal(results[0].images, results[1].images)


def test_resumed_equals_uninterrupted(name: str, network: str, tmp_path: Any) -> None:
    whole = drive(made(name, network), watched(name), RUN)
    store = CheckpointStore(tmp_path / "c.safetensors", torch.device("cpu"))

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if event.kind == "checkpoint":
            raise Killed

    killed = 0
    for _ in range(200):
        try:
            resumed = drive(made(name, network), watched(name), RUN, emit=kill, store=store, save_every=1)
            break
        except Killed:
            killed += 1
    else:
        pytest.fail(f"{name} does not come to its end")
    assert torch.equal(whole.images, resumed.images)
    assert killed >= 1 or made(name, network).steps == 1 or ATTACKS[name].name in ("averaging", "prng_attack")


def test_values_that_are_not_finite_end_as_a_failed_run(name: str, network: str) -> None:
    seen = watched(name)
    broken = []
    for m in seen.messages:
        if isinstance(m, EncodingMessage):
            images = m.images.clone()
            images.view(-1)[0] = float("nan")
            broken.append(EncodingMessage(images, m.targets))
        else:
            gradients = {n: g.clone() for n, g in m.gradients.items()}
            for g in gradients.values():
                g.view(-1)[0] = float("nan")
            broken.append(GradientMessage(gradients, m.kind))
    with pytest.raises(AttackFailed):
        drive(made(name, network), replace(seen, messages=tuple(broken)), RUN)


def test_one_update_is_refused_in_a_sentence(name: str, network: str) -> None:
    seen, _ = observe("mlp", hidden=(16,))
    problems = made(name, network).check(seen)
    assert problems
    assert all(p.endswith(".") for p in problems)


def test_missing_grants_are_told_and_never_raise(name: str, network: str) -> None:
    """With the encodings alone an attack either works, or says what it lacks."""
    seen = replace(watched(name), examples=None, labels=None, defence=None, auxiliary=None)
    attack = made(name, network)
    if any(isinstance(m, EncodingMessage) for m in seen.messages):
        bare = tuple(EncodingMessage(m.images, None) for m in seen.messages if isinstance(m, EncodingMessage))
        seen = replace(seen, messages=bare)
    if not attack.check(seen):
        drive(attack, seen, RUN)
