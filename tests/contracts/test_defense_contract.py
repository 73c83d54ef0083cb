"""What every registered defence must hold to; a new file below frostglass/defenses is tested by existing."""

from __future__ import annotations

import pytest
import torch

from frostglass.attacks.registry import ATTACKS
from frostglass.core.batch import Batch
from frostglass.core.defense import Defense, stack
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.local_update import local_update
from frostglass.vision import networks
from victims import photo_batch

SEED = Insecure(7)


@pytest.fixture(params=DEFENSES.names())
def defense(request: pytest.FixtureRequest) -> Defense:
    return DEFENSES[request.param].make()


@pytest.fixture
def batch() -> Batch:
    return photo_batch(16, 6)


def sent(defense: Defense, batch: Batch, randomness: Insecure) -> tuple[Batch, Update]:
    """What a client with this defence trains on and sends."""
    model = networks.build(
        "small_bn_cnn",
        classes=10,
        channels=3,
        size=16,
        options={"width": 8, "norm": "group"},
        rng=Rng.from_seed(0),
    )
    plan = LocalPlan()
    encoded = defense.encode(batch, randomness)
    if defense.gradient is not None:
        update = defense.gradient(model, encoded, plan, randomness)
    else:
        trace = local_update(model, encoded.images, encoded.targets, plan)
        update = Update(trace.gradients, trace.bn, len(encoded), plan)
    return encoded, defense.protect(update, randomness)


def test_it_says_what_it_claims(defense: Defense) -> None:
    entry = DEFENSES[defense.name]
    assert len(entry.summary) > 20
    assert defense.claim in ("none", "heuristic", "proof")


def test_same_randomness_same_result_and_the_input_is_untouched(defense: Defense, batch: Batch) -> None:
    images, targets = batch.images.clone(), batch.targets.clone()
    first, second = sent(defense, batch, SEED), sent(defense, batch, SEED)
    assert torch.equal(first[0].images, second[0].images)
    for name, g in first[1].gradients.items():
        assert torch.equal(g, second[1].gradients[name])
    assert torch.equal(batch.images, images)
    assert torch.equal(batch.targets, targets)


def test_other_randomness_gives_another_result_or_none_was_used(defense: Defense, batch: Batch) -> None:
    class Asked(Insecure):
        calls = 0

        def rng(self) -> Rng:
            Asked.calls += 1
            return super().rng()

    first, other = sent(defense, batch, SEED), sent(defense, batch, Asked(8))
    same = torch.equal(first[0].images, other[0].images) and all(
        torch.equal(g, other[1].gradients[n]) for n, g in first[1].gradients.items()
    )
    assert same or Asked.calls
    assert not same or defense.claim != "proof", "a proof without randomness"


def test_what_an_attacker_rehearses_is_differentiable_and_keeps_names_and_shapes(
    defense: Defense, batch: Batch
) -> None:
    _, update = sent(defense, batch, SEED)
    own = {n: (g + 0.1).requires_grad_(True) for n, g in update.gradients.items()}
    before = {n: g.detach().clone() for n, g in own.items()}
    observed = {n: g.clone() for n, g in update.gradients.items()}
    made = defense.simulate(own, update.gradients)
    assert {n: (g.shape, g.dtype) for n, g in made.items()} == {n: (g.shape, g.dtype) for n, g in own.items()}
    assert all(torch.equal(observed[n], g) for n, g in update.gradients.items())
    total = torch.stack([g.square().sum() for g in made.values()]).sum()
    slopes = torch.autograd.grad(total, list(own.values()))
    assert any(float(s.abs().max()) > 0 for s in slopes)
    assert all(torch.equal(before[n], g.detach()) for n, g in own.items())


def test_it_names_the_attacks_that_it_must_face(defense: Defense) -> None:
    assert all(name in ATTACKS for name in defense.adaptive)
    assert bool(defense.adaptive) == (defense.claim != "none")


def test_encodings_lie_in_their_domain_and_labels_keep_their_mass(defense: Defense, batch: Batch) -> None:
    encoded = defense.encode(batch, SEED)
    assert encoded.images.shape == batch.images.shape
    assert bool((encoded.images >= encoded.domain.low - 1e-6).all())
    assert bool((encoded.images <= encoded.domain.high + 1e-6).all())
    assert bool((encoded.targets >= 0).all())
    assert bool((encoded.targets.sum(1) <= 1 + 1e-5).all())
    assert defense.encodes == (not torch.equal(encoded.images, batch.images))


def test_gradients_keep_their_names_and_shapes(defense: Defense, batch: Batch) -> None:
    _, update = sent(defense, batch, SEED)
    _, plain = sent(DEFENSES["none"].make(), batch, SEED)
    assert {n: g.shape for n, g in update.gradients.items()} == {n: g.shape for n, g in plain.gradients.items()}
    assert update.examples == len(batch)


def test_stacking_is_associative(defense: Defense, batch: Batch) -> None:
    none = DEFENSES["none"].make()
    left = sent(stack(stack(none, defense), none), batch, SEED)
    right = sent(stack(none, stack(defense, none)), batch, SEED)
    assert torch.equal(left[0].images, right[0].images)
    assert all(torch.equal(g, right[1].gradients[n]) for n, g in left[1].gradients.items())


def test_mixing_images_under_per_example_clipping_is_refused() -> None:
    mixers = [e.make() for e in DEFENSES if e.make().encodes]
    clippers = [d for d in (e.make() for e in DEFENSES) if d.gradient is not None and d.per_example]
    assert clippers
    for mixer in mixers:
        for clipper in clippers:
            with pytest.raises(BadInput, match="sensitivity"):
                stack(mixer, clipper)


def test_noise_on_encodings_is_accounted_for_images_and_never_for_mixtures() -> None:
    """An image in several rows of Mixup moves more encodings than the k that its proof counts; noise first is fine."""
    noisy, mixup = DEFENSES["dp_instahide"].make(), DEFENSES["mixup"].make()
    with pytest.raises(BadInput, match="'mixup' mixes images before 'dp_instahide'"):
        stack(mixup, noisy)
    assert stack(noisy, mixup).account is noisy.account
