"""Registration on real photographs, and its promises about failures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frostglass.core.errors import BadInput
from frostglass.numerics import image, registration
from victims import photo_batch

MOVING = [n for n in registration.METHODS if n != "none"]


def turned(x: Tensor, degrees: float, shift: float) -> Tensor:
    """Rotated about the centre and moved right, by bilinear interpolation."""
    a = math.radians(degrees)
    matrix = torch.tensor([[math.cos(a), -math.sin(a), shift], [math.sin(a), math.cos(a), 0.0]]).repeat(len(x), 1, 1)
    grid = torch.nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def inner_error(a: Tensor, b: Tensor) -> float:
    return float((a - b)[..., 8:-8, 8:-8].abs().mean())


@pytest.mark.parametrize("name", MOVING)
def test_shifted_photographs_come_back(name: str) -> None:
    fixed = photo_batch(48, 3).images
    moving = turned(fixed, 0, 0.08)
    warped = registration.METHODS[name](moving, fixed)
    assert inner_error(warped, fixed) < 0.5 * inner_error(moving, fixed)
    assert float(registration.unmoved(moving, warped, fixed)) == 0


@pytest.mark.parametrize("name", ["ecc_euclidean", "ecc_affine", "dis"])
def test_turned_photographs_come_back(name: str) -> None:
    fixed = photo_batch(48, 3).images
    moving = turned(fixed, 5, 0.03)
    assert inner_error(registration.METHODS[name](moving, fixed), fixed) < 0.5 * inner_error(moving, fixed)


@pytest.mark.parametrize("name", registration.METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_agrees_already_stays_bit_by_bit(name: str, dtype: torch.dtype) -> None:
    fixed = photo_batch(24, 2).images.to(dtype)
    warped = registration.METHODS[name](fixed.clone(), fixed)
    assert torch.equal(warped, fixed)
    assert warped.dtype == dtype
    assert float(registration.unmoved(fixed, warped, fixed)) == 0


def test_ecc_that_does_not_converge_gives_the_image_back_and_is_counted() -> None:
    fixed = photo_batch(32, 2).images
    flat = torch.full_like(fixed, 0.5)
    warped = registration.ecc_euclidean(flat, fixed)
    assert torch.equal(warped, flat)
    assert float(registration.unmoved(flat, warped, fixed)) == 2


@pytest.mark.parametrize("name", MOVING)
def test_one_channel_small_images_and_broken_values_are_survived(name: str) -> None:
    fixed = photo_batch(8, 2).images[:, :1]
    moving = fixed.roll(1, -1)
    moving[1] = float("nan")
    warped = registration.METHODS[name](moving, fixed)
    assert warped.shape == fixed.shape
    assert bool(warped[0].isfinite().all())
    assert bool(warped[1].isnan().all())


def test_methods_by_name_or_by_path() -> None:
    assert registration.method("dis") is registration.dis
    assert registration.method("frostglass.numerics.registration:phase") is registration.phase
    for wrong in ("ecc", "no.such.module:f", "frostglass.numerics.registration:nothing", "math:pi"):
        with pytest.raises(BadInput, match="registration"):
            registration.method(wrong)


def test_priors_on_hand_computed_images() -> None:
    ramp = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]).view(1, 1, 2, 3)
    assert float(image.total_variation(ramp)) == pytest.approx(1.0)
    assert float(image.variation_norm(ramp)) == pytest.approx(2.0)  # four differences of 1 to the right, none down
    assert float(image.variation_norm(torch.cat([ramp, 0 * ramp]))) == pytest.approx(1.0)  # mean over the batch
    assert float(image.mean_norm(ramp)) == pytest.approx(10**0.5)  # not squared: breaching takes a mean of squares
    assert float(image.anchor_distance(ramp, torch.zeros_like(ramp))) == pytest.approx(10**0.5)


def test_blocks_and_shifts() -> None:
    x = torch.arange(30.0).view(1, 1, 5, 6)
    coarse = image.blocks(x, 2)
    assert float(coarse[0, 0, 0, 0]) == pytest.approx((0 + 1 + 6 + 7) / 4)
    assert float(coarse[0, 0, 4, 5]) == pytest.approx((28 + 29) / 2)
    torch.testing.assert_close(image.blocks(coarse, 2), coarse)
    moved = image.shifted(x, 1, -2, flip=True)
    assert float(moved[0, 0, 1, 5]) == float(x[0, 0, 0, 2])
