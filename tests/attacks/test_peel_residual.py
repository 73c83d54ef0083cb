"""One image out of a residual network: exact activations, recognisable pixels, a fallback that says so, refusals."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.attacks.analytic.residual_graph import find_graph
from frostglass.attacks.registry import ATTACKS
from frostglass.core.batch import Batch
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Facts, GradientMessage, Knows, Observation, ThreatModel
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.conv_subspace import shape_of_input
from frostglass.numerics.local_update import local_update
from frostglass.vision import networks, weights
from victims import observe, photo_batch

RUN = Runtime(Rng.from_seed(0, "peel residual"))


def plain_layer(weight: Tensor, padding: int = 1) -> ConvLayer:
    one, zero = torch.ones(len(weight)).double(), torch.zeros(len(weight)).double()
    return ConvLayer(weight, None, (1, 1), (padding, padding), (1, 1), "none", one, zero, zero, one, 1, 0.0)


@pytest.mark.parametrize("centred", [False, True])
def test_a_weight_gradient_alone_gives_the_input_up_to_a_factor(centred: bool) -> None:
    rng = Rng.from_seed(1)
    a = rng.at("a").normal((1, 6, 4, 4)).double().relu()
    layer = plain_layer(rng.at("w").normal((20, 6, 3, 3)).double())
    dz = rng.at("dz").normal((1, 20, 4, 4)).double()
    dz = dz - dz.mean((2, 3), keepdim=True) if centred else dz
    start = rng.at("start").normal((6 * 16,)).double()
    found = shape_of_input(layer, layer.gradient_of_weight(a, dz), (4, 4), centred=centred, start=start)
    assert found is not None
    assert found.unique
    assert torch.allclose(found.inputs, a / a.norm(), atol=1e-7)


def test_fewer_channels_than_places_are_no_answer() -> None:
    rng = Rng.from_seed(1)
    a, dz = rng.at("a").normal((1, 6, 4, 4)).double().relu(), rng.at("dz").normal((1, 12, 4, 4)).double()
    layer = plain_layer(rng.at("w").normal((12, 6, 3, 3)).double())
    start = rng.at("start").normal((6 * 16,)).double()
    assert shape_of_input(layer, layer.gradient_of_weight(a, dz), (4, 4), centred=False, start=start) is None


def trained() -> nn.Module:
    """The public ResNet-20 for CIFAR-10."""
    data = os.environ.get("FROSTGLASS_DATA", "")
    file = Path(data).parent / "models" / "cifar10" / "resnet20.safetensors"
    if not data or not file.exists():
        pytest.skip("needs a trained ResNet-20: set FROSTGLASS_DATA to a data folder with models/ beside it")
    net = networks.build("resnet20", classes=10, channels=3, size=32, rng=Rng.from_seed(2))
    weights.load_weights(net, file)
    return net


def seen_by_server(model: nn.Module, size: int, mode: str) -> tuple[Observation, Batch]:
    private = photo_batch(size, 7)
    private = replace(
        private,
        images=private.images[6:],
        targets=private.targets[6:],
        ids=private.ids[6:],
        domain=networks.domain_of(model),
    )
    plan = LocalPlan(mode="train" if mode == "train" else "eval")
    trace = local_update(model, private.images, private.targets, plan)
    facts = Facts(private.domain, mode, private.image_shape, 10, private.targets, plan)
    knows = frozenset({Knows.EXAMPLES, Knows.BN_BATCH}) if mode == "train" else frozenset({Knows.EXAMPLES})
    return ThreatModel("test", knows).observe(model, [Update(trace.gradients, trace.bn, 1, plan)], facts), private


def psnr(found: Reconstruction, private: Batch) -> float:
    return float(-10 * (found.images - private.images).square().mean().log10())


def peeled(seen: Observation, **options: Any) -> Reconstruction:
    attack = ATTACKS["peel_residual"].make(**options)
    assert attack.check(seen) == []
    return drive(attack, seen, RUN)


@pytest.mark.slow
def test_a_trained_network_in_eval_mode_gives_its_image_away() -> None:
    seen, private = seen_by_server(trained(), 32, "eval")
    found = peeled(seen)
    assert found.info["certificate"] is True
    assert found.info["features_error"] < 1e-5
    assert psnr(found, private) > 20
    assert found.targets is not None
    assert torch.equal(found.targets, private.targets.float())  # restored, not granted


@pytest.mark.slow
def test_activations_are_exact_in_train_mode_too() -> None:
    seen, _ = observe("resnet20", size=32, batch=1)
    found = peeled(seen, steps=2)
    assert found.info["certificate"] is True
    assert found.info["features_error"] < 1e-5
    assert found.info["convolutions_solved"] >= 5


def test_noise_ends_in_gradient_matching_and_says_so() -> None:
    seen, _ = observe("resnet20", size=16, batch=1)
    rng = Rng.from_seed(5)
    touched = {
        n: g + 0.05 * g.std() * rng.at(n).normal(tuple(g.shape)) if g.numel() > 1 else g
        for n, g in seen.gradients.items()
    }
    found = peeled(replace(seen, messages=(GradientMessage(touched, "gradient"),)), steps=2)
    assert "gradient matching" in str(found.info["warning"])
    assert not found.proved.any()


def test_what_cannot_be_read_is_refused_in_a_sentence() -> None:
    attack = ATTACKS["peel_residual"].make()
    two, _ = observe("resnet20", size=16, batch=2)
    assert "gradient of one" in attack.check(two)[0]
    plain, _ = observe("small_bn_cnn", size=16, batch=1)
    assert "average over places" in attack.check(plain)[0]
    unknown, _ = observe("resnet20", size=16, batch=1, knows=frozenset({Knows.EXAMPLES}))
    assert "bn_batch" in attack.check(unknown)[0]
    large, _ = observe("resnet20", size=64, batch=1)
    assert "at most as many places as channels" in attack.check(large)[0]


def test_the_graph_of_a_residual_network_is_recognised() -> None:
    seen, _ = observe("resnet20", size=16, batch=1)
    graph, problem = find_graph(seen)
    assert graph is not None, problem
    kinds = [n.shortcut.kind if n.shortcut else None for n in graph.nodes]
    assert kinds.count("identity") == 7
    assert kinds.count("pad") == 2
    assert graph.nodes[0].unit is None  # the image
    assert len(graph.units) == 19
