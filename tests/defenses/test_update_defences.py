"""What each defence does to numbers, and what it says it spends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.defense import stack
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.defenses.accounting import epsilon_of
from frostglass.defenses.noise import drawn
from frostglass.defenses.registry import DEFENSES
from frostglass.numerics.client_step import defended_step
from frostglass.numerics.compress import kept, quantised, total_norm
from frostglass.numerics.local_update import local_update
from frostglass.vision import networks

KEY = Insecure(3)


def update_of(size: int = 400) -> Update:
    rng = Rng.from_seed(1)
    gradients = {"a": rng.at("a").normal((size // 2, 2)), "b": 0.01 * rng.at("b").normal((size,))}
    return Update(gradients, {}, 4, LocalPlan())


def make(name: str, **settings: Any) -> Any:
    return DEFENSES[name].make(**settings)


def scene(n: int = 3, mode: str = "train", norm: str = "group") -> tuple[nn.Module, Batch, LocalPlan]:
    model = networks.build(
        "small_bn_cnn", classes=4, channels=1, size=8, options={"width": 4, "norm": norm}, rng=Rng.from_seed(0)
    )
    images = Rng.from_seed(2).uniform((n, 1, 8, 8))
    batch = Batch(images, one_hot(torch.arange(n) % 4, 4), Domain(), tuple(map(str, range(n))))
    return model, batch, LocalPlan(mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("noise", {"std": 0.0}),
        ("pruning", {"fraction": 0.0}),
        ("pruning", {"keep": 10**9}),
        ("quantisation", {"bits": 32}),
        ("clip_and_noise", {"clipping_norm": 1e9, "noise_multiplier": 0.0}),
    ],
)
def test_at_zero_strength_the_update_is_what_it_was(name: str, settings: dict[str, Any]) -> None:
    before = update_of()
    after = make(name, **settings).protect(before, KEY)
    assert all(torch.equal(after.gradients[n], g) for n, g in before.gradients.items())


@pytest.mark.parametrize("norm", [0.1, 5.0, 1e6])
def test_clipping_shortens_to_the_norm_and_no_further(norm: float) -> None:
    before = update_of()
    after = make("clip_and_noise", clipping_norm=norm, noise_multiplier=0.0).protect(before, KEY)
    length = float(total_norm(before.gradients))
    assert float(total_norm(after.gradients)) == pytest.approx(min(norm, length), rel=1e-5)
    assert after.spent is None


def test_noise_has_the_size_that_is_accounted() -> None:
    before = update_of(20_000)
    after = make("clip_and_noise", clipping_norm=2.0, noise_multiplier=1.5).protect(before, KEY)
    short = make("clip_and_noise", clipping_norm=2.0, noise_multiplier=0.0).protect(before, KEY)
    noise = torch.cat([(after.gradients[n] - short.gradients[n]).flatten() for n in before.gradients])
    assert float(noise.std()) == pytest.approx(3.0, rel=0.02)
    assert abs(float(noise.mean())) < 0.1
    other = make("clip_and_noise", clipping_norm=2.0, noise_multiplier=1.5).protect(before, Insecure(4))
    assert not torch.allclose(other.gradients["a"], after.gradients["a"])


def test_epsilon_is_that_of_the_sensitivity() -> None:
    """mu = 1 is 4.377 at delta 1e-5, mu = 2 is 9.997, exactly; RDP is an upper bound, PRV is close."""
    spent = {
        (a, m): make("clip_and_noise", adjacency=a, accountant=m).protect(update_of(), KEY).spent
        for a in ("replace", "add_remove")
        for m in ("rdp", "prv")
    }
    for (adjacency, accountant), s in spent.items():
        exact = 9.997 if adjacency == "replace" else 4.377
        assert exact * 0.99 <= s.epsilon <= exact * (1.2 if accountant == "rdp" else 1.02), (adjacency, accountant)
        assert s.unit == "update"
        assert accountant.upper() in s.accountant


def test_batch_statistics_are_not_sent_beside_a_noised_update() -> None:
    model, batch, plan = scene(norm="batch")
    _, plain = defended_step(model, batch, plan, make("none"), Rng.from_seed(0))
    _, sent = defended_step(model, batch, plan, make("clip_and_noise"), Rng.from_seed(0))
    assert plain.bn
    assert not sent.bn


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruning_keeps_the_largest_and_exactly_so_many(scope: Any) -> None:
    before = update_of()
    after = make("pruning", fraction=0.9, scope=scope).protect(before, KEY).gradients
    counts = {n: int((g != 0).sum()) for n, g in after.items()}
    assert sum(counts.values()) == 80
    if scope == "layer":
        assert counts == {"a": 40, "b": 40}
    for n, g in after.items():
        held = g != 0
        assert torch.equal(g[held], before.gradients[n][held])
        if scope == "layer":
            assert float(before.gradients[n][held].abs().min()) >= float(before.gradients[n][~held].abs().max())


def test_pruning_has_no_limit_of_size_and_copes_with_ties() -> None:
    """torch.quantile refuses more than 2^24 entries."""
    g = {"w": torch.ones(2**24 + 8)}
    assert int((kept(g, 0.999, "global")["w"] != 0).sum()) == 2**24 + 8 - round(0.999 * (2**24 + 8))


def test_top_k_by_number() -> None:
    after = make("pruning", keep=7).protect(update_of(), KEY).gradients
    assert sum(int((g != 0).sum()) for g in after.values()) == 7


def test_levels_are_even_and_few_and_random_rounding_keeps_the_mean() -> None:
    g = Rng.from_seed(5).normal((500,))
    for bits in (2, 3, 8):
        q = quantised(g, bits)
        step = float(g.abs().max()) / (2 ** (bits - 1) - 1)
        assert len(q.unique()) <= 2**bits - 1
        assert float((q - g).abs().max()) <= step / 2 * (1 + 1e-5)
    mean = torch.stack([quantised(g, 2, "stochastic", Rng.from_seed(i)) for i in range(400)]).mean(0)
    assert float((mean - g).abs().mean()) < 0.06
    assert torch.equal(quantised(torch.zeros(3), 2), torch.zeros(3))


def test_signs_carry_one_magnitude_a_tensor() -> None:
    before = update_of()
    after = make("sign").protect(before, KEY).gradients
    for n, g in after.items():
        assert g.abs().unique().numel() == 1
        assert float(g.abs().mean()) == pytest.approx(float(before.gradients[n].abs().mean()), rel=1e-5)
        assert torch.equal(g.sign(), before.gradients[n].sign())


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_drawn_noise_has_unit_variance(law: Any) -> None:
    x = drawn(Rng.from_seed(0), law, torch.zeros(200_000))
    assert float(x.std()) == pytest.approx(1, rel=0.01)
    assert float(x.double().pow(4).mean()) == pytest.approx(3 if law == "gaussian" else 6, rel=0.1)


def test_soteria_empties_columns_of_the_classifier_alone() -> None:
    model, batch, plan = scene()
    plain = local_update(model, batch.images, batch.targets, plan).gradients
    _, sent = defended_step(model, batch, plan, make("soteria", fraction=0.75), Rng.from_seed(0))
    for n, g in plain.items():
        if n != "head.weight":
            assert torch.equal(sent.gradients[n], g)
    columns = (sent.gradients["head.weight"] != 0).any(0)
    assert int(columns.sum()) <= round(0.25 * len(columns))
    assert torch.equal(sent.gradients["head.weight"][:, columns], plain["head.weight"][:, columns])


# ---- DP-SGD


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.identity(m, "weight")])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dp_sgd_refuses_weights_that_are_made_anew_in_each_pass(norm: Any) -> None:
    _, batch, plan = scene()
    model = nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 4)))
    with pytest.raises(BadInput, match=r"'weight' of layer '1' is made anew in each pass .*; remove that from model"):
        defended_step(model, batch, plan, make("dp_sgd"), Rng.from_seed(0))


def test_dp_sgd_follows_parametrised_weights() -> None:
    _, batch, plan = scene()
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 4)))
    plain = defended_step(model, batch, plan, make("none"), Rng.from_seed(0))[1].gradients
    private = make("dp_sgd", clipping_norm=1e6, noise_multiplier=0.0)
    for name, sent in defended_step(model, batch, plan, private, Rng.from_seed(0))[1].gradients.items():
        assert torch.allclose(sent, plain[name], atol=1e-6), name


def test_dp_sgd_works_in_eval_mode_and_clips_each_image() -> None:
    model, batch, _ = scene(mode="eval")
    plan = LocalPlan(mode="eval")
    single = [local_update(model, batch.images[i : i + 1], batch.targets[i : i + 1], plan).gradients for i in range(3)]
    clip = 0.5 * min(float(total_norm(g)) for g in single)
    defense = make("dp_sgd", clipping_norm=clip, noise_multiplier=0.0)
    _, sent = defended_step(model, batch, plan, defense, Rng.from_seed(0))
    for n, g in sent.gradients.items():
        mean = torch.stack([x[n] * clip / float(total_norm(x)) for x in single]).mean(0)
        torch.testing.assert_close(g, mean, rtol=1e-3, atol=1e-6)
    assert sent.spent is None
    assert defense.claim == "heuristic"


def test_an_empty_poisson_batch_sends_noise_of_the_expected_size() -> None:
    model, batch, plan = scene()
    empty = batch.take([])
    defense = make("dp_sgd", clipping_norm=2.0, noise_multiplier=3.0, expected_batch=4)
    _, sent = defended_step(model, empty, plan, defense, Rng.from_seed(0))
    flat = torch.cat([g.flatten() for g in sent.gradients.values()])
    assert float(flat.std()) == pytest.approx(2.0 * 3.0 / 4, rel=0.05)
    with pytest.raises(BadInput, match="set it to sampling rate x images"):
        defended_step(model, empty, plan, make("dp_sgd"), Rng.from_seed(0))


def test_the_expected_batch_divides_the_sum() -> None:
    model, batch, plan = scene()
    one, other = (
        defended_step(model, batch, plan, make("dp_sgd", noise_multiplier=0.0, expected_batch=e), Rng.from_seed(0))[1]
        for e in (3, 6)
    )
    for n, g in one.gradients.items():
        torch.testing.assert_close(g, 2 * other.gradients[n])


def test_batchnorm_is_named_with_the_fix() -> None:
    model, batch, plan = scene(norm="batch")
    with pytest.raises(BadInput, match=r"'body.1' is BatchNorm.*model.fix = \"opacus\"") as wrong:
        defended_step(model, batch, plan, make("dp_sgd"), Rng.from_seed(0))
    assert len(wrong.value.problems) == 1
    fixed = networks.fix_for_opacus(model)
    assert defended_step(fixed, batch, plan, make("dp_sgd"), Rng.from_seed(0))[1].spent is not None


def test_images_that_mix_are_refused_under_per_image_clipping_and_not_elsewhere() -> None:
    for mixer in ("instahide", "mixup", "dp_instahide"):
        with pytest.raises(BadInput, match="mixes images, so the per-example sensitivity of 'dp_sgd'"):
            stack(make(mixer), make("dp_sgd"))
        assert stack(make(mixer), make("soteria")).encodes
        assert stack(make(mixer), make("clip_and_noise")).claim == "proof"


@pytest.mark.parametrize("steps", [1, 50])
def test_the_two_accountants_agree(steps: int) -> None:
    rdp, prv = (epsilon_of(4.0, 1e-5, steps, a) for a in ("rdp", "prv"))  # type: ignore[arg-type]
    assert prv < rdp < 1.35 * prv


# ---- DP-InstaHide


def encodings(images: Tensor, **settings: Any) -> Tensor:
    n = len(images)
    batch = Batch(images, one_hot(torch.arange(n) % 4, 4), Domain(), tuple(map(str, range(n))))
    return make("dp_instahide", std=0.0, **settings).encode(batch, KEY).images


@pytest.mark.parametrize("settings", [{"k": 4}, {"k": 3, "weights": "random", "c1": 0.6}])
def test_the_sensitivity_is_never_exceeded_and_equal_weights_attain_it(settings: dict[str, Any]) -> None:
    images = Rng.from_seed(6).uniform((9, 1, 8, 8))
    c_max = settings.get("c1", 1 / settings["k"])
    bound = c_max * math.sqrt(64 * settings["k"])
    for place in range(9):
        dark, bright = images.clone(), images.clone()
        dark[place], bright[place] = 0, 1
        moved = (encodings(dark, **settings) - encodings(bright, **settings)) / 2  # encodings span [-1, 1]
        touched = int((moved.flatten(1).norm(dim=1) > 0).sum())
        assert touched == settings["k"]
        assert float(moved.norm()) <= bound * (1 + 1e-5)
        if "c1" not in settings:
            assert float(moved.norm()) == pytest.approx(bound, rel=1e-5)


def test_its_constants_are_the_published_ones_and_labels_are_not_covered() -> None:
    """[0, 1], CIFAR, k = 4 equal, s = .1: mu = 138.6 a release, and each image is in four."""
    batch = Batch(torch.zeros(4, 3, 32, 32), one_hot([0, 1, 2, 3], 4), Domain(), ("a", "b", "c", "d"))
    defense = make("dp_instahide", k=4, std=0.1)
    assert defense.account is not None
    spent = defense.account(batch)
    assert 1 / spent.noise_multiplier == pytest.approx(2 * 138.564, rel=1e-4)
    assert spent.epsilon > 1000
    assert "labels are not private" in spent.unit
    laplace = make("dp_instahide", k=4, std=0.1, law="laplace").account(batch)
    assert (laplace.delta, laplace.epsilon) == (0.0, pytest.approx(3072 / (0.1 / math.sqrt(2)), rel=1e-6))


def test_a_batch_below_k_is_refused() -> None:
    with pytest.raises(BadInput, match=r"k = 4 is above the 2 images"):
        encodings(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip_and_noise", {"clipping_norm": 0.0}),
        ("clip_and_noise", {"noise_multiplier": -1.0}),
        ("clip_and_noise", {"delta": 1.0}),
        ("noise", {"std": -0.1}),
        ("pruning", {"fraction": 1.0}),
        ("pruning", {"keep": 0}),
        ("quantisation", {"bits": 1}),
        ("soteria", {"fraction": 1.0}),
        ("dp_instahide", {"std": -1.0}),
        ("dp_sgd", {"expected_batch": 0}),
    ],
)
def test_strengths_that_make_no_sense_are_refused_in_a_sentence(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as wrong:
        make(name, **settings)
    (sentence,) = wrong.value.problems
    (key,) = settings
    assert f"{key} = {settings[key]}" in sentence


@pytest.mark.parametrize("name", DEFENSES.names())
def test_the_docs_say_what_it_claims_and_what_it_must_face(name: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "defences.md").read_text(encoding="utf-8")
    (line,) = [row for row in text.splitlines() if row.startswith(f"| `{name}` |")]
    defense = make(name)
    assert line.split("|")[2].strip().startswith(defense.claim)
    assert all(f"`{attack}`" in line for attack in defense.adaptive)
