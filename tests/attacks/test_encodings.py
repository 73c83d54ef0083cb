"""What each attack on encodings recovers where the answer is known, and what it says where it does not apply."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from encoded_scenes import Scene, crops, observed, scene, similarity_of_best
from frostglass.attacks.registry import ATTACKS
from frostglass.auditing.unmixing_rounds import score_rounds, simulate_rounds
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.reconstruction import Reconstruction
from frostglass.core.runtime import Runtime
from frostglass.core.threat import EncodingMessage
from frostglass.defenses.instahide import InstaHide
from frostglass.vision import networks

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

RUN = Runtime(Rng.from_seed(3, "test"))


def run(name: str, held: Scene, **settings: Any) -> Reconstruction:
    attack = ATTACKS[name].make(**settings)
    assert attack.check(held.seen) == []
    return drive(attack, held.seen, RUN)


def test_unmixing_recovers_encodings_inside_one_set() -> None:
    held = scene(images=6, rounds=20)
    found = run("unmix_statistical", held)
    assert similarity_of_best(found.images, held.images, either_sign=True) > 0.95
    assert found.targets is not None
    assert torch.equal(found.targets.sum(0), torch.tensor([2.0, 2.0, 2.0]))


def test_unmixing_takes_a_sample_where_there_are_too_many() -> None:
    """The table of all pairs is then 60 x 60, not 120 x 120."""
    held = scene(images=4, rounds=30)
    found = run("unmix_statistical", held, limit=60, rounds=2)
    assert (found.info["encodings_used"], found.info["of"]) == (60, 120)


def test_unmixing_bounds_coefficients_by_the_encoder_s_c1() -> None:
    held = scene(images=4, rounds=4, c1=0.9)
    attack = ATTACKS["unmix_statistical"].make()
    given = attack._problem(held.seen, torch.arange(16), torch.device("cpu"))  # type: ignore[attr-defined]
    assert given.most == 0.9


def test_labels_of_zeros_leave_out_their_encodings_alone() -> None:
    held = scene(images=6, rounds=20)
    message = held.seen.messages[0]
    assert isinstance(message, EncodingMessage)
    assert message.targets is not None
    targets = message.targets.clone()
    targets[[3, 50]] = 0
    seen = replace(held.seen, messages=(EncodingMessage(message.images, targets),))
    found = run("unmix_statistical", replace(held, seen=seen), rounds=6)
    assert found.info["encodings_used"] == 118
    assert similarity_of_best(found.images, held.images, either_sign=True) > 0.9
    assert "2 encodings have a label of zeros" in ATTACKS["unmix_statistical"].make().warnings(seen)[0]


def test_encodings_of_zeros_are_refused_in_words() -> None:
    seen = scene(images=6, rounds=3).seen
    message = seen.messages[0]
    assert isinstance(message, EncodingMessage)
    blank = replace(seen, messages=(EncodingMessage(message.images * 0, message.targets),))
    assert "every value is 0" in ATTACKS["unmix_statistical"].make().check(blank)[0]


def test_more_starts_are_never_less_likely() -> None:
    held = scene(images=6, rounds=8)
    one, three = (run("unmix_statistical", held, starts=n, rounds=3) for n in (1, 3))
    assert three.info["log_likelihood"] >= one.info["log_likelihood"]


def test_unmixing_asks_for_what_it_lacks() -> None:
    held = scene()
    attack = ATTACKS["unmix_statistical"].make()
    assert "number of private images" in attack.check(replace(held.seen, examples=None))[0]
    message = held.seen.messages[0]
    assert isinstance(message, EncodingMessage)
    bare = replace(held.seen, messages=(EncodingMessage(message.images, None),), defence=None, labels=None)
    assert "--known k=6,private=2" in attack.check(bare)[0]
    assert attack.check(replace(held.seen, defence=None)) == [], "the labels say how many slots are private"
    few = replace(held.seen, messages=(EncodingMessage(message.images[:3], None),), labels=None)
    assert "fewer" in attack.check(few)[0]
    with pytest.raises(BadInput, match="starts 0"):
        ATTACKS["unmix_statistical"].make(starts=0)


def test_a_small_seed_opens_a_set_of_our_own_encoder() -> None:
    held = scene(k=2, rounds=20, insecure_seed=900)
    found = run("prng_attack", held, last=1 << 10)
    assert found.info["seed"] == 900
    assert similarity_of_best(found.images, held.images, either_sign=False) > 0.99


def test_public_partners_are_noise_without_the_pool_and_nothing_with_it() -> None:
    close = []
    for grant in (False, True):
        held = scene(k=4, private=2, rounds=30, insecure_seed=70, grant_pool=grant)
        found = run("prng_attack", held, last=1 << 8)
        close.append(similarity_of_best(found.images, held.images, either_sign=False))
    assert 0.6 < close[0] < close[1]
    assert close[1] > 0.99


def test_a_key_of_the_system_ends_as_not_found_with_what_was_searched() -> None:
    found = run("prng_attack", scene(insecure_seed=None), last=1 << 11)
    assert len(found.images) == 0
    assert found.info["found"] == "nothing"
    assert found.info["searched_own"] == found.info["searched_released"] == "seeds 0 to 2047"


def test_the_seed_search_says_when_labels_cannot_tell_seeds_apart() -> None:
    held = scene()
    message = held.seen.messages[0]
    assert isinstance(message, EncodingMessage)
    assert message.targets is not None
    attack = ATTACKS["prng_attack"].make()
    hard = torch.nn.functional.one_hot(message.targets.argmax(1), 3).float()
    assert "one-hot" in attack.check(replace(held.seen, messages=(EncodingMessage(message.images, hard),)))[0]
    few = replace(held.seen, messages=(EncodingMessage(message.images[:2], message.targets[:2]),))
    assert "too few" in attack.check(few)[0]
    with pytest.raises(BadInput, match="no range"):
        ATTACKS["prng_attack"].make(first=5, last=5)


def test_mixup_gives_its_public_images_away_and_the_rest_is_private() -> None:
    held = scene(k=3, private=1, rounds=4, mask="none", grant_pool=True)
    found = run("mixup_attack", held)
    assert int(found.info["found"]) > 0.6 * int(found.info["public_partners"])
    assert similarity_of_best(found.images, held.images, either_sign=False) > 0.9


def test_a_mask_hides_no_partner_from_blocks_but_nothing_is_subtracted() -> None:
    held = scene(k=3, private=1, rounds=4, side=32, grant_pool=True)
    found = run("mixup_attack", held)
    assert int(found.info["found"]) > 4
    assert len(found.images) == 0
    assert "cannot be subtracted" in ATTACKS["mixup_attack"].make().warnings(held.seen)[0]


def test_mixup_attack_needs_the_pool() -> None:
    attack = ATTACKS["mixup_attack"].make()
    assert "--public POOL" in attack.check(scene(k=3, private=1, rounds=2).seen)[0]
    assert "--public POOL" in attack.check(scene(k=2, rounds=2).seen)[0]


@pytest.mark.parametrize("mask", ["none", "sign"])
def test_a_pool_of_any_size_gives_no_partner_that_is_not_there(mask: str, monkeypatch) -> None:
    """The parts in which a pool is compared are even: of a last one of a single image nobody can tell chance."""
    from frostglass.attacks.encodings import mixup_attack

    monkeypatch.setattr(mixup_attack, "BLOCK", 64)
    held = scene(k=3, private=1, rounds=4, mask=mask)
    noise = torch.randn(65, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    others = torch.nn.functional.interpolate(noise, size=16, mode="bilinear").tanh()  # none is in the encodings
    defence = held.seen.defence
    assert defence is not None
    told = replace(defence, settings={**defence.settings, "public": others})
    found = run("mixup_attack", replace(held, seen=replace(held.seen, defence=told)))
    assert int(found.info["found"]) <= 1


def test_a_pool_too_small_to_tell_chance_is_refused() -> None:
    held = scene(k=3, private=1, rounds=2, pool=5, grant_pool=True)
    assert "too small to tell" in ATTACKS["mixup_attack"].make().check(held.seen)[0]
    many = scene(k=5, private=1, rounds=2, grant_pool=True)
    assert "more than slots = 3" in ATTACKS["mixup_attack"].make(slots=3).check(many.seen)[0]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("demask", {"views": 0}),
        ("demask", {"views": -4}),
        ("averaging", {"first": 5.0}),
        ("averaging", {"groups": 0}),
        ("mixup_attack", {"shown": 0}),
        ("mixup_attack", {"slots": 0}),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=name):
        ATTACKS[name].make(**settings)


def grouped(n: int, auxiliary: bool) -> Scene:
    """n encodings of each of 6 images, and which belong together."""
    held = scene(k=4, private=1, rounds=n)
    message = held.seen.messages[0]
    assert isinstance(message, EncodingMessage)
    groups = [torch.arange(i, 6 * n, 6) for i in range(6)]
    others = crops()[40:] if auxiliary else None
    return replace(held, seen=observed(message.images, message.targets, 6, None, None, groups, others))


def test_averaging_sees_more_the_more_encodings_there_are() -> None:
    few, many = (
        similarity_of_best(run("averaging", h, groups=20).images, h.images, either_sign=True)
        for h in (grouped(2, True), grouped(60, True))
    )
    assert many > few + 0.05
    assert many > 0.4


def test_one_other_image_is_too_few_to_average_with() -> None:
    held = grouped(20, False)
    alone = replace(held, seen=replace(held.seen, auxiliary=crops()[:1]))
    assert torch.equal(run("averaging", alone, groups=20).images, run("averaging", held, groups=20).images)


def test_averaging_asks_which_encodings_belong_together() -> None:
    assert "--groups" in ATTACKS["averaging"].make().check(scene().seen)[0]
    assert "nothing to average" in ATTACKS["averaging"].make().check(grouped(1, False).seen)[0]


def test_a_view_is_the_absolute_value_whatever_the_mask() -> None:
    views = [run("demask", scene(rounds=3, mask=mask)).images for mask in ("sign", "abs")]
    assert torch.allclose(views[0], views[1], atol=1e-5)
    assert len(run("demask", scene(rounds=3), views=5).images) == 5


def test_a_view_of_more_pixels_than_a_quantile_takes() -> None:
    large = torch.linspace(-1, 1, 4100 * 4100).view(1, 1, 4100, 4100)
    seen = observed(large, None, 1, None, None)
    found = drive(ATTACKS["demask"].make(), seen, RUN)
    assert torch.allclose(found.images[0, 0, 0, 0], torch.tensor(1.0))
    assert float(found.images[0, 0, 2050].max()) < -0.99, "the middle of the ramp is black"


@pytest.mark.parametrize("server_lr", [0.0, 0.05])
def test_gradients_give_encodings_and_encodings_give_images(server_lr: float) -> None:
    """End to end: InstaHide inside FedSGD, the model updated between the messages or not."""
    x, y = crops(16, 4), torch.tensor([0, 1, 2, 0])
    # wide: every encoding of a pair needs some units of its own, whatever the keys are
    model = networks.build("mlp", classes=3, channels=3, size=16, options={"hidden": (256, 32)}, rng=Rng.from_seed(1))
    encoder = InstaHide(k=2, labels="exact", insecure_seed=2)
    played = simulate_rounds(
        encoder, model, x, y, classes=3, rounds=14, batch=2, server_lr=server_lr, rng=Rng.from_seed(4)
    )
    attack = ATTACKS["gradient_then_unmix"].make(batch=2, server_lr=server_lr)
    assert attack.check(played.seen) == []
    found = drive(attack, played.seen, RUN)
    assert found.info["encodings_proved"] == found.info["encodings_recovered"] == 56
    _, summary = score_rounds(found, played)
    assert summary is not None
    assert summary.ssim_median is not None
    assert summary.ssim_median > 0.7


def test_gradients_of_the_wrong_model_prove_nothing() -> None:
    """The server's step is not told: from the second message on, nothing agrees."""
    x, y = crops(8, 4), torch.tensor([0, 1, 2, 0])
    model = networks.build("mlp", classes=3, channels=3, size=8, options={"hidden": (96, 32)}, rng=Rng.from_seed(1))
    played = simulate_rounds(InstaHide(k=2, insecure_seed=2), model, x, y, classes=3, rounds=2, batch=2,
                             server_lr=1.0, rng=Rng.from_seed(4))  # fmt: skip
    attack = ATTACKS["gradient_then_unmix"].make(batch=2)
    state = attack.init(played.seen, RUN)
    for t in range(4):
        state, told = attack.step(played.seen, state, RUN, t)
    assert told["proved"] < 8


def test_more_images_than_memory_holds_are_refused_in_words() -> None:
    seen = scene(rounds=1).seen
    assert ATTACKS["unmix_statistical"].make().check(seen) == []
    (wrong,) = ATTACKS["unmix_statistical"].make().check(replace(seen, examples=100_000))
    assert "100000 private images are too many at once" in wrong
