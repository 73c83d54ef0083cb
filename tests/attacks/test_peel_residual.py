"""Images out of residual networks: exact activations, recognisable pixels, a fallback that says so, refusals."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.attacks.analytic.activation_fit import mismatch
from frostglass.attacks.analytic.residual_graph import find_graph
from frostglass.attacks.analytic.residual_peel import peel_down
from frostglass.attacks.analytic.residual_problem import prepare
from frostglass.attacks.registry import ATTACKS
from frostglass.core.batch import Batch
from frostglass.core.drive import drive
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Facts, GradientMessage, Knows, Observation, ThreatModel
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.conv_layer import ConvLayer
from frostglass.numerics.conv_subspace import shapes_of_inputs
from frostglass.numerics.local_update import local_update
from frostglass.numerics.nonnegative_rays import rays
from frostglass.vision import networks, weights
from victims import observe, photo_batch

RUN = Runtime(Rng.from_seed(0, "peel residual"))


def plain_layer(weight: Tensor, padding: int = 1) -> ConvLayer:
    one, zero = torch.ones(len(weight)).double(), torch.zeros(len(weight)).double()
    return ConvLayer(weight, None, (1, 1), (padding, padding), (1, 1), "none", one, zero, zero, one, 1, 0.0)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("examples", [1, 3])
def test_a_weight_gradient_alone_gives_the_inputs_up_to_a_factor(centred: bool, examples: int) -> None:
    rng = Rng.from_seed(1)
    a = rng.at("a").normal((examples, 12, 4, 4)).double().relu()
    layer = plain_layer(rng.at("w").normal((60, 12, 3, 3)).double())
    dz = rng.at("dz").normal((examples, 60, 4, 4)).double()
    dz = dz - dz.mean((0, 2, 3), keepdim=True) if centred else dz
    gradient = layer.gradient_of_weight(a, dz)
    found = shapes_of_inputs(layer, gradient, (4, 4), examples, centred=centred, rng=rng)
    assert found is not None
    assert found.least < 1e-9 < found.next_least
    unit = a / a.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    order = torch.cdist(unit.flatten(1), found.inputs.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == list(range(examples))
    assert torch.allclose(found.inputs[order], unit, atol=1e-6)


@pytest.mark.parametrize("examples", [1, 2])
def test_fewer_channels_than_places_or_a_wrong_number_of_images_are_no_answer(examples: int) -> None:
    rng = Rng.from_seed(1)
    a, dz = rng.at("a").normal((1, 6, 4, 4)).double().relu(), rng.at("dz").normal((1, 12, 4, 4)).double()
    layer = plain_layer(rng.at("w").normal((12, 6, 3, 3)).double())
    gradient = layer.gradient_of_weight(a, dz)
    assert shapes_of_inputs(layer, gradient, (4, 4), examples, centred=False, rng=rng) is None


@pytest.mark.parametrize("count", [1, 2, 7])
def test_sparse_non_negative_vectors_are_told_apart(count: int) -> None:
    rng = Rng.from_seed(count)
    truth = rng.at("truth").normal((400, count)).double().relu()
    mixed = truth @ rng.at("mixing").normal((count, count)).double()
    found = rays(mixed, rng.at("starts").generator())
    assert found is not None
    unit = truth / truth.norm(dim=0)
    order = (unit.T @ found).argmax(1)
    assert sorted(order.tolist()) == list(range(count))
    assert torch.allclose(found[:, order], unit, atol=1e-9)


def test_vectors_without_zeros_are_not_told_apart() -> None:
    rng = Rng.from_seed(3)
    assert rays(rng.uniform((400, 3)).double() + 0.5, rng.at("starts").generator()) is None


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


def seen_with_statistics(batch: int, mode: str) -> tuple[Observation, Batch]:
    """A batch's gradient of a narrow ResNet-18, random but for running statistics that fit photographs."""
    model = networks.build(
        "resnet18", classes=10, channels=3, size=16, options={"width": 32}, rng=Rng.from_seed(1)
    ).train()
    with torch.no_grad():
        for step in range(20):
            model(photo_batch(16, 8).images.roll((step, 2 * step), (2, 3)))
    held = photo_batch(16, batch)
    private = replace(held, domain=networks.domain_of(model))
    plan = LocalPlan(mode="train" if mode == "train" else "eval")
    trace = local_update(model, private.images, private.targets, plan)
    facts = Facts(private.domain, mode, private.image_shape, 10, private.targets, plan)
    knows = frozenset({Knows.EXAMPLES, Knows.BN_BATCH}) if mode == "train" else frozenset({Knows.EXAMPLES})
    return ThreatModel("test", knows).observe(model, [Update(trace.gradients, trace.bn, batch, plan)], facts), private


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_whole_batch_is_peeled_down_to_its_pixels_and_its_labels_are_read(mode: str) -> None:
    seen, private = seen_with_statistics(3, mode)
    found = peeled(seen, steps=500)
    assert found.info["certificate"] is True
    assert found.info["features_error"] < 1e-5
    assert found.info["convolutions_solved"] >= 9
    assert found.targets is not None
    errors = torch.stack([(found.images - image).square().mean((1, 2, 3)) for image in private.images])
    assert sorted(errors.argmin(1).tolist()) == [0, 1, 2]
    assert float(-10 * errors.amin(1).max().log10()) > 40
    assert found.proved.all()
    assert torch.equal(found.targets[errors.argmin(1)], private.targets.float())


def test_activations_in_train_mode_are_exact_below_a_stride_and_a_shortcut() -> None:
    seen, private = seen_with_statistics(3, "train")
    prepared = prepare(seen, RUN)
    found = peel_down(prepared.sent)
    assert found.residuals["stages.3.0.conv1"] < 1e-5  # its stride leaves a constant that the gradient does not hold
    assert found.residuals["stages.1.1.conv2"] < 1e-5  # behind a shortcut, and with more places than channels
    lowest = min(i for i in found.values if prepared.graph.nodes[i].unit is not None)
    reads: list[Tensor] = []
    conv = prepared.model.get_submodule(prepared.graph.readers[lowest].name)
    conv.register_forward_pre_hook(lambda _, args: reads.append(args[0].detach().double()))
    prepared.model(private.images)
    distance = torch.cdist(reads[0].flatten(1), found.values[lowest].clamp_min(0).flatten(1))
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2]
    assert bool((distance.amin(1) < 1e-5 * reads[0].flatten(1).norm(dim=1)).all())


def test_gradients_of_norms_that_were_kept_back_are_done_without() -> None:
    seen, _ = seen_with_statistics(3, "train")
    kept = {n: g for n, g in seen.gradients.items() if "bn" not in n}
    sent = prepare(replace(seen, messages=(GradientMessage(kept, "gradient"),)), RUN).sent
    found = peel_down(sent)
    assert found.features_error < 1e-4


def seen_by_torchvision(size: int) -> tuple[Observation, Batch]:
    """One photograph's gradient of torchvision's ResNet-18 in eval mode, with running statistics of photographs."""
    model = networks.build("torchvision:resnet18", classes=10, channels=3, size=size, rng=Rng.from_seed(1))
    with torch.no_grad():
        model.train()(photo_batch(size, 8).images)
    model.eval()
    private = photo_batch(size, 1)
    plan = LocalPlan(mode="eval")
    trace = local_update(model, private.images, private.targets, plan)
    facts = Facts(networks.domain_of(model), "eval", private.image_shape, 10, private.targets, plan)
    update = Update(trace.gradients, trace.bn, 1, plan)
    seen = ThreatModel("test", frozenset({Knows.EXAMPLES})).observe(model, [update], facts)
    return seen, private


def test_activations_too_coarse_for_the_pixels_give_a_smoothed_picture_and_say_so() -> None:
    seen, private = seen_by_torchvision(96)
    found = peeled(seen, steps=120)
    assert found.info["certificate"] is True
    assert found.info["coarse"] is True
    assert "smoothed" in str(found.info["warning"])
    assert psnr(found, private) > 15


def test_a_network_that_works_in_place_is_fitted_as_well() -> None:
    seen, private = seen_by_torchvision(64)
    prepared = prepare(seen, RUN)
    nodes = sorted(i for i in prepared.graph.readers if prepared.graph.nodes[i].unit is not None)[:3]
    values = {}
    for i in nodes:
        unit = prepared.graph.readers[i]
        handle = prepared.model.get_submodule(unit.name).register_forward_pre_hook(
            lambda _, args, i=i: values.__setitem__(i, args[0].detach().clone())
        )
        prepared.model(private.images)
        handle.remove()
    assert float(mismatch(prepared.graph, prepared.model, values, private.images).max()) < 1e-9


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
    five, _ = observe("resnet20", size=16, batch=5)
    assert "5 images write 80 places in the 64 channels" in attack.check(five)[0]
    assert "here 4 images" in attack.check(five)[0]
    uncounted, _ = observe("resnet20", size=16, batch=1, knows=frozenset({Knows.BN_BATCH}))
    assert "grant 'examples'" in attack.check(uncounted)[0]
    plain, _ = observe("small_bn_cnn", size=16, batch=1)
    assert "average over places" in attack.check(plain)[0]
    unknown, _ = observe("resnet20", size=16, batch=1, knows=frozenset({Knows.EXAMPLES}))
    assert "bn_batch" in attack.check(unknown)[0]
    large, _ = observe("resnet20", size=64, batch=1)
    assert "which one image exceeds" in attack.check(large)[0]


def test_the_graph_of_a_residual_network_is_recognised() -> None:
    seen, _ = observe("resnet20", size=16, batch=1)
    graph, problem = find_graph(seen)
    assert graph is not None, problem
    kinds = [n.shortcut.kind if n.shortcut else None for n in graph.nodes]
    assert kinds.count("identity") == 7
    assert kinds.count("pad") == 2
    assert graph.nodes[0].unit is None  # the image
    assert len(graph.units) == 19
