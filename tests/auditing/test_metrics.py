"""Metrics against reference values."""

from __future__ import annotations

import hashlib
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from frostglass.auditing.metrics import lpips as lpips_file
from frostglass.auditing.metrics.fft2d import fft2d_values
from frostglass.auditing.metrics.identification import pool_words
from frostglass.auditing.metrics.iip_features import iip_features_values, penultimate
from frostglass.auditing.metrics.iip_pixels import iip_pixels_values
from frostglass.auditing.metrics.ms_ssim import LEAST, ms_ssim_values
from frostglass.auditing.metrics.ms_ssim import _similarity as similarity
from frostglass.auditing.metrics.psnr import psnr_values
from frostglass.auditing.metrics.registered_psnr import registered_psnr_values
from frostglass.auditing.metrics.registry import METRICS, Metric, MetricContext, NotAvailable
from frostglass.auditing.metrics.ssim import ssim_values
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.vision import datasets, networks
from frostglass.vision.borrowed import import_torchvision


def photos(size: int, n: int = 4) -> Tensor:
    return datasets.load("photos", size=size, rows=range(n)).images


def noisy(images: Tensor, amount: float = 0.1, key: int = 0) -> Tensor:
    return (images + amount * Rng.from_seed(key).normal(images.shape)).clamp(0, 1)


# --------------------------------------------------------------------------------------------------- reference values


def test_psnr_by_hand() -> None:
    truth = torch.full((2, 1, 4, 4), 0.5)
    found = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr_values(found, truth), torch.tensor([20.0, 40.0]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (3, 1, 8, 8), (2, 3, 5, 9), (2, 3, 6, 6), (2, 1, 3, 3)])
def test_ssim_is_that_of_scikit_image(shape: tuple[int, ...]) -> None:
    from skimage.metrics import structural_similarity

    a, b = (Rng.from_seed(k).uniform(shape) for k in (0, 1))
    b = 0.7 * a + 0.3 * b
    side = min(shape[2:])
    window = min(7, side if side % 2 else side - 1)
    held = [
        structural_similarity(x, y, channel_axis=0, data_range=1.0, win_size=window)
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim_values(a, b).numpy(), held, atol=1e-10)


def test_ms_ssim_agrees_with_scikit_image_and_torchmetrics() -> None:
    """torchmetrics 1.9 counts windows beyond the border at the last scale, whole ones elsewhere: hence the margin."""
    from skimage.metrics import structural_similarity

    truth = photos(LEAST, 3)
    found = torch.stack([noisy(truth[0], 0.05), noisy(truth[1], 0.3), 0.5 * truth[2]])
    assert ms_ssim_values(found, truth).tolist() == pytest.approx([0.941374, 0.572770, 0.809417], abs=1e-3)
    x, y = found[:, :, :40, :50].double(), truth[:, :, :40, :50].double()
    held, _ = similarity(x, y)
    for a, b, value in zip(x.numpy(), y.numpy(), held.tolist(), strict=True):
        named = structural_similarity(
            a, b, channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert value == pytest.approx(named, abs=1e-9)


def test_contrast_and_structure_do_not_see_brightness() -> None:
    """Contrast and structure of two images that differ by a constant are perfect, their luminance is not."""
    x = 0.5 * photos(40, 2).double()
    whole, contrast = similarity(x + 0.3, x)
    assert contrast.tolist() == pytest.approx([1.0, 1.0], abs=1e-9)
    assert bool((whole < 0.98).all())


def test_ms_ssim_of_flat_pictures_by_hand() -> None:
    """Without contrast only the luminance of the coarsest scale is left: (2ab + c1) / (a^2 + b^2 + c1)."""
    a, b = (torch.full((1, 1, LEAST, LEAST), v) for v in (0.2, 0.8))
    luminance = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert float(ms_ssim_values(a, b)) == pytest.approx(luminance**0.1333, abs=1e-6)


def test_fft2d_by_hand() -> None:
    flat, striped = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 1, 4, 4), 0.5)
    striped[..., ::2] += 0.25
    striped[..., 1::2] -= 0.25
    # orthonormal: the mean gives 0.5 * 16 / 4 = 2, the stripes 0.25 * 16 / 4 = 1 at one further frequency
    apart, together = math.log1p(255), 2 * math.log1p(255 * 2) + math.log1p(255)
    assert float(fft2d_values(striped, flat)) == pytest.approx(apart / together, abs=1e-6)
    assert float(fft2d_values(flat, striped)) == pytest.approx(apart / together, abs=1e-6)


def test_fft2d_is_zero_for_equal_spectra_and_one_for_disjoint_ones() -> None:
    images = photos(32)
    assert fft2d_values(images, images).tolist() == [0.0] * 4
    assert fft2d_values(images.roll((5, 3), (2, 3)), images).tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    black = torch.zeros(1, 3, 8, 8)
    assert float(fft2d_values(black, black)) == 0
    assert float(fft2d_values(black, torch.full_like(black, 0.5))) == pytest.approx(1, abs=1e-6)
    random = fft2d_values(Rng.from_seed(0).uniform(images.shape), images)
    assert bool(((random > 0.1) & (random < 1)).all())


def shifted(images: Tensor, right: int, down: int) -> Tensor:
    """With the border repeated."""
    rows = (torch.arange(images.shape[-2]) - down).clamp(0, images.shape[-2] - 1)
    columns = (torch.arange(images.shape[-1]) - right).clamp(0, images.shape[-1] - 1)
    return images[..., rows, :][..., columns]


def test_registration_finds_a_shifted_image_again() -> None:
    truth = torch.nn.functional.interpolate(photos(48), scale_factor=1)
    window = torch.zeros(48).index_fill(0, torch.arange(8, 40), 1.0)
    truth = truth * window[:, None] * window  # a black rim: nothing leaves the picture
    found = shifted(truth, 3, -2)
    plain, registered = psnr_values(found, truth), registered_psnr_values(found, truth)
    assert bool((registered > plain + 8).all())
    assert bool((registered > 28).all())


def test_registered_psnr_is_never_below_the_plain_one() -> None:
    truth = photos(32)
    for found in (
        truth, noisy(truth), noisy(truth, 3.0), Rng.from_seed(1).uniform(truth.shape), torch.zeros_like(truth),
        shifted(truth, 2, 0), truth.flip(0), truth.flip(3),
    ):  # fmt: skip
        assert bool((registered_psnr_values(found, truth) >= psnr_values(found, truth)).all())
    for side in (1, 2, 5):
        tiny = torch.rand(2, 3, side, side)
        assert bool((registered_psnr_values(tiny, tiny.flip(0)) >= psnr_values(tiny, tiny.flip(0))).all())


# ------------------------------------------------------------------------------------------------------ identification


def a_context(pool: Tensor, k: int, model: nn.Module | None = None) -> MetricContext:
    return MetricContext(pool, torch.arange(k), model or nn.Linear(1, 1))


def cnn(size: int, channels: int = 3) -> nn.Module:
    return networks.build("small_bn_cnn", classes=10, channels=channels, size=size, rng=Rng.from_seed(3))


@pytest.mark.parametrize("values", [iip_pixels_values, iip_features_values])
def test_noisy_copies_are_identified_and_those_of_others_are_not(values: Any) -> None:
    pool = photos(32, 8)
    context = a_context(pool, 4, cnn(32))
    assert values(noisy(pool[:4], 0.02), pool[:4], context).tolist() == [1.0] * 4
    assert values(noisy(pool[4:], 0.02), pool[:4], context).tolist() == [0.0] * 4
    swapped = noisy(pool[[1, 0, 2, 3]], 0.02)
    assert values(swapped, pool[:4], context).tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("values", [iip_pixels_values, iip_features_values])
def test_random_pictures_are_identified_at_chance(values: Any) -> None:
    """Pool and guesses from one distribution, independent: 1 in n; 800 guesses among 20 are 40 +- 6."""
    pool = Rng.from_seed(0).uniform((20, 1, 8, 8))
    guesses = Rng.from_seed(1).uniform((800, 1, 8, 8))
    context = MetricContext(pool, torch.arange(800) % 20, cnn(8, 1))
    hits = float(values(guesses, pool[context.index], context).sum())
    assert 20 <= hits <= 60
    assert pool_words(context) == "nearest by cosine among a pool of 20 originals; chance level 5 %"


def test_a_picture_without_content_identifies_nobody() -> None:
    pool = photos(8, 4)
    assert iip_pixels_values(torch.zeros_like(pool), pool, a_context(pool, 4)).tolist() == [0.0] * 4


def test_copies_of_an_original_are_no_rivals() -> None:
    pool = photos(8, 4)
    twice = torch.cat([pool, pool[:2]])
    assert iip_pixels_values(pool, pool, a_context(twice, 4)).tolist() == [1.0] * 4


def test_features_are_those_before_the_classifier_and_leave_the_network_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.rand(100, 3, 2, 2)
    held = penultimate(model, images)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(held, model.eval()[:4](images).detach())


def test_a_network_without_a_final_linear_layer_has_no_features() -> None:
    images = torch.rand(2, 3, 4, 4)
    for model in (
        nn.Sequential(nn.Conv2d(3, 2, 4), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 2, 1), nn.Flatten()),
    ):
        with pytest.raises(NotAvailable, match="does not end in a Linear layer"):
            iip_features_values(images, images, a_context(images, 2, model))
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_features_that_depend_on_the_other_images_are_not_compared() -> None:
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), norm, nn.ReLU(), nn.Linear(5, 3))
    images = torch.rand(4, 3, 2, 2)
    with pytest.raises(NotAvailable, match="keeps no running statistics"):
        iip_features_values(images[:1], images[:1], a_context(images, 1, model))


# --------------------------------------------------------------------------------------------------------------- LPIPS


def test_lpips_without_its_package_or_weights_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = photos(32, 2)
    monkeypatch.setattr(lpips_file, "find_spec", lambda name: None)
    with pytest.raises(NotAvailable, match=r"package lpips is not installed; run pip install 'frostglass\[metrics\]'"):
        lpips_file.lpips_values(images, images)
    monkeypatch.setattr(lpips_file, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(NotAvailable, match=r"alexnet-owt-7be5be79.pth are not in .*checkpoints, and nothing is down"):
        lpips_file.lpips_values(images, images)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / lpips_file.BACKBONE).write_bytes(b"something else")
    with pytest.raises(NotAvailable, match="is not the file that its name says"):
        lpips_file.lpips_values(images, images)


def test_lpips_never_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the real package, and a backbone of random weights in place of the 244 MB that are not here."""
    if find_spec("lpips") is None or find_spec("torchvision") is None:
        pytest.skip("the extra 'metrics' is not installed")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("went online"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    path.parent.mkdir()
    state = import_torchvision().models.alexnet(weights=None).state_dict()
    torch.save(state, path)
    name = f"alexnet-owt-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    path.rename(path.with_name(name))
    monkeypatch.setattr(lpips_file, "BACKBONE", name)
    truth = photos(64, 3)
    held = lpips_file.lpips_values(noisy(truth), truth)
    assert bool((held > 0).all())
    assert lpips_file.lpips_values(truth, truth).tolist() == [0.0] * 3
    network = lpips_file._network()
    for name, weight in network.net.named_parameters():
        assert torch.equal(weight, state[f"features.{name.partition('.')[2]}"])
    tiny = photos(lpips_file.LEAST, 1)
    assert lpips_file.lpips_values(tiny, tiny).isfinite().all()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (torch.zeros(1), r"'own': returned torch.float32 of shape \(1,\) for 4 pairs; return real numbers \[4\]"),
        (torch.tensor(0.5), r"of shape \(\)"),
        (torch.zeros(4, dtype=torch.complex64), "torch.complex64"),
        ([0.0] * 4, "returned list"),
        (None, "returned NoneType"),
        (torch.tensor([1.0, 2.0, 3.0, math.inf]), "'own': gave an infinite score; limit it, or give NaN"),
    ],
)
def test_what_a_metric_returns_is_one_real_number_a_pair(values: Any, sentence: str) -> None:
    """One value for all would be written beside each image, and JSON has no infinity: the whole scorecard was lost."""
    with pytest.raises(BadInput, match=sentence):
        Metric("own", lambda found, truth: values).values(photos(8), photos(8))


def test_a_metric_may_have_no_value_for_a_pair_and_comes_without_a_graph() -> None:
    own = torch.tensor([1.0, math.nan], requires_grad=True)
    found = Metric("own", lambda found, truth: own).values(photos(8, 2), photos(8, 2))
    assert not found.requires_grad
    assert found.isnan().tolist() == [False, True]


def test_a_metric_says_when_it_lacks_its_context() -> None:
    with pytest.raises(NotAvailable, match="compares with a pool"):
        METRICS["iip_pixels"].make().values(torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.5))
    assert Metric("far", lambda a, b: (a - b).flatten(1).sum(1)).values(
        torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.5)
    ).tolist() == [0.0]
