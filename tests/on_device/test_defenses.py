"""Every defence in an audit on a device, and the InstaHide encoder with images, labels and pool there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import frostglass
import pretend_device
from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.randomness import Insecure, Rng
from frostglass.defenses.encoded_dataset import EncodedDataset, EncodingCollate, soft_collate
from frostglass.defenses.instahide import InstaHide, average_predictions
from frostglass.defenses.registry import DEFENSES
from frostglass.defenses.sources import PublicPool

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

THERE = pretend_device.DEVICE
CHOSEN: dict[str, list[dict[str, Any]]] = {
    "dp_instahide": [{"k": 2}, {"k": 2, "law": "laplace", "weights": "random"}],
    "dp_sgd": [{}, {"expected_batch": 3, "noise_multiplier": 0.0}],
    "instahide": [
        {"k": 2, "mask": mask, "labels": labels}
        for mask, labels in itertools.product(("sign", "abs", "none"), ("exact", "quantised", "renormalised"))
    ],
    "mixup": [{"k": 3}],
    "noise": [{}, {"law": "laplace"}],
    "pruning": [{"fraction": 0.5}, {"keep": 9, "scope": "layer"}],
    "quantisation": [{}, {"rounding": "stochastic"}],
}
ALONE = [[{"name": e.name, **s}] for e in DEFENSES for s in CHOSEN.get(e.name, [{}])]
STACKS = [
    [{"name": "instahide", "k": 2}, {"name": "noise"}],
    [{"name": "soteria", "fraction": 0.2}, {"name": "clip_and_noise"}],
    [{"name": "pruning", "fraction": 0.5}, {"name": "quantisation"}],
]


def plan(defense: Any, attack: dict[str, Any], **client: Any) -> dict[str, Any]:
    return {
        "seed": 0,
        "threat": {"grants": ["examples", "labels", "local_plan", "bn_batch", "defence"]},
        "report": {"metrics": ["psnr", "ssim"]},
        "scenario": [
            {
                "name": "s",
                "data": {"source": "digits"},
                "model": {"name": "small_bn_cnn", "mode": "train", "options": {"width": 4, "norm": "group"}},
                "client": {"batch": 4, **client},
                "attack": [attack],
                "defense": [defense],
            }
        ],
    }


def agree(asked: dict[str, Any], within: float = 0.05) -> Any:
    """The cell of the plan's audit on the device, which is that of the CPU."""
    here, there = (frostglass.audit(asked, device=device).cells[0] for device in ("cpu", "auto"))
    assert (here.error, there.error) == (None, None)
    assert there.summary.images == here.summary.images
    assert there.summary.psnr_median == pytest.approx(here.summary.psnr_median, abs=within)
    return there


def title(defense: Any) -> str:
    return " + ".join("-".join(map(str, part.values())) for part in defense)


@pytest.mark.parametrize("defense", [*ALONE, *STACKS], ids=title)
def test_a_defence_does_there_what_it_does_here(defense: list[dict[str, Any]]) -> None:
    pretend_device.waits.clear()
    noisy = any(part["name"] == "dp_sgd" for part in defense)  # Opacus draws on the device
    asked = plan(defense[0] if len(defense) == 1 else {"stack": defense}, {"name": "thaw", "steps": 2})
    agree(asked, 1.0 if noisy else 0.05)
    assert pretend_device.waits, "nothing was on the device"


@pytest.mark.parametrize("defense", ["dp_sgd", "pruning", "soteria", "instahide", "noise"])
def test_local_training_under_a_defence(defense: str) -> None:
    asked = {"name": defense, **({"k": 2} if defense == "instahide" else {})}
    steps = {"update": "delta", "minibatch": 2, "epochs": 2, "lr": 0.1}
    agree(plan(asked, {"name": "thaw", "steps": 2}, **steps), 1.0 if defense == "dp_sgd" else 0.05)


def test_an_inverter_that_rehearses_the_defence() -> None:
    asked = plan({"name": "instahide", "k": 2}, {"name": "learned_inverter", "rehearsals": 20, "training": 4})
    asked["threat"] = {"grants": [*asked["threat"]["grants"], "auxiliary"], "auxiliary": "digits"}
    agree(asked, 0.5)


# ---- the encoder


def photos(n: int, kind: torch.dtype, side: int = 6) -> Tensor:
    made = (Rng.from_seed(n).uniform((n, 3, side, side)) * 255).to(torch.uint8)
    return made if kind == torch.uint8 else made.float() / 255


LABELS = torch.arange(24) % 5
ROWS = list(range(24))


def same(there: Tensor, here: Tensor) -> None:
    assert there.device == THERE
    assert here.device.type == "cpu"
    assert there.dtype == here.dtype
    within = 1e-2 if here.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(there.cpu().float(), here.float(), atol=within, rtol=within)


def alike(images: Tensor, public: Any = None, public_here: Any = None, **settings: Any) -> None:
    """The same encodings of images that lie there and of the same images here, over two epochs."""
    public_here = public if public_here is None else public_here
    away, near = (
        InstaHide(insecure_seed=1, public=public, **settings),
        InstaHide(insecure_seed=1, public=public_here, **settings),
    )
    far, far_labels = images.to(THERE), LABELS.to(THERE)
    for epoch in range(2):
        torch.manual_seed(epoch)  # of augmentations
        got = away.encode_rows(far, far_labels, torch.tensor(ROWS).to(THERE), epoch, 5)
        torch.manual_seed(epoch)
        want = near.encode_rows(images, LABELS, ROWS, epoch, 5)
        same(got.images, want.images)
        same(got.targets, want.targets)
    assert away.ledger is not None
    assert near.ledger is not None
    assert torch.equal(away.ledger.total, near.ledger.total)
    assert away.report() == near.report()


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("k", [2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_that_lie_there_are_encoded_there(kind: torch.dtype, k: int, dtype: torch.dtype) -> None:
    alike(photos(24, kind), k=k, dtype=dtype)


@pytest.mark.parametrize(("mask", "labels"), [("sign", "quantised"), ("abs", "exact"), ("none", "renormalised")])
def test_masks_and_labels(mask: Any, labels: Any) -> None:
    alike(photos(24, torch.uint8), k=3, mask=mask, labels=labels)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("when", ["per_epoch", "per_use"])
def test_augmented_there(kind: torch.dtype, when: Any) -> None:
    def turned(images: Tensor) -> Tensor:
        which = (torch.rand(len(images)) < 0.5).to(images.device)
        return torch.where(which[:, None, None, None], images.flip(-1), images)

    alike(photos(24, kind), k=2, augment=when, augmentation=turned)


def on_disk(images: Tensor, folder: Path) -> Any:
    held: Any = np.memmap(folder / "pool", images.numpy().dtype, "w+", shape=tuple(images.shape))
    held[:] = images.numpy()
    return held


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("lies", ["there", "here", "array", "disk"])
def test_a_public_pool_wherever_it_lies(kind: torch.dtype, crop: bool, lies: str, tmp_path: Path) -> None:
    public = photos(10, kind, 9 if crop else 6)
    places: dict[str, Callable[[], Any]] = {
        "there": lambda: public.to(THERE),
        "here": lambda: public,
        "array": lambda: public.numpy(),
        "disk": lambda: on_disk(public, tmp_path),
    }
    placed = PublicPool(places[lies](), crop)
    alike(photos(24, kind), placed, PublicPool(public, crop), k=4, private=2)
    encoder = InstaHide(k=4, private=2, public=placed, insecure_seed=2)
    found = encoder.encode_for_inference(photos(6, kind).to(THERE), 3)
    near = InstaHide(k=4, private=2, public=PublicPool(public, crop), insecure_seed=2)
    same(found.images, near.encode_for_inference(photos(6, kind), 3).images)


def test_images_here_mix_with_a_pool_that_lies_there() -> None:
    private, public = photos(24, torch.uint8), photos(10, torch.uint8)
    encoders = [InstaHide(k=4, private=2, public=PublicPool(p), insecure_seed=2) for p in (public, public.to(THERE))]
    near, away = (e.encode_rows(private, torch.arange(24) % 3, range(24), num_classes=3).images for e in encoders)
    assert away.device.type == "cpu"
    torch.testing.assert_close(away, near, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", ["sign", "abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_there(mask: Any, dtype: torch.dtype) -> None:
    x, partners = photos(5, torch.uint8), photos(24, torch.uint8)
    away, near = (InstaHide(k=3, mask=mask, dtype=dtype, insecure_seed=3) for _ in range(2))
    same(away.plain_for_inference(x.to(THERE)), near.plain_for_inference(x))
    got = away.encode_for_inference(x.to(THERE), 4, partners=partners.to(THERE))
    want = near.encode_for_inference(x, 4, partners=partners)
    same(got.images, want.images)
    same(average_predictions(got.images.float().flatten(1), 4), average_predictions(want.images.float().flatten(1), 4))
    mixed = InstaHide(k=3, mask=mask, dtype=dtype, insecure_seed=3).encode_for_inference(x.to(THERE), 4, 0.5, partners)
    same(mixed.images, want.images)


def test_memory_that_lies_there_is_written_to() -> None:
    images = photos(24, torch.uint8)
    out = torch.empty(24, 3, 6, 6).to(THERE)
    made = InstaHide(k=2, insecure_seed=1).encode_rows(images.to(THERE), LABELS.to(THERE), ROWS, 0, 5, out)
    assert made.images is out
    same(out, InstaHide(k=2, insecure_seed=1).encode_rows(images, LABELS, ROWS, 0, 5).images)


@pytest.mark.parametrize("reuse", [False, True])
def test_loops_and_loaders_with_a_set_that_lies_there(reuse: bool) -> None:
    images = photos(24, torch.float32)
    pairs = (images.to(THERE), LABELS.to(THERE)), (images, LABELS)
    encoders = [InstaHide(k=2, insecure_seed=1, reuse=reuse) for _ in pairs]
    for _ in range(2):
        for got, want in zip(*(e.epoch(s, 10, 5) for e, s in zip(encoders, pairs, strict=True)), strict=True):
            same(got.images, want.images)
            same(got.targets, want.targets)
    for of in (
        lambda e, s: DataLoader(range(24), 10, collate_fn=EncodingCollate(e, s, 5, 0)),
        lambda e, s: DataLoader(EncodedDataset(s, e, 5, 0), 10, collate_fn=soft_collate),
        lambda e, s: DataLoader(EncodedDataset(s, e, 5, 0), 10, sampler=range(24)),
        lambda e, s: DataLoader(EncodedDataset(TensorDataset(*s), e, 5, 0), 10),
    ):
        fresh = [InstaHide(k=2, insecure_seed=1, reuse=reuse) for _ in pairs]
        for got, want in zip(*(of(e, s) for e, s in zip(fresh, pairs, strict=True)), strict=True):
            same(got[0], want[0])
            same(got[1], want[1])


def test_a_map_style_set_whose_items_lie_there() -> None:
    images = photos(24, torch.float32)
    items = [(x, y) for x, y in zip(images.to(THERE), LABELS.to(THERE), strict=True)]
    got = next(InstaHide(k=2, insecure_seed=1).epoch(items, 24, 5))
    same(got.images, next(InstaHide(k=2, insecure_seed=1).epoch((images, LABELS), 24, 5)).images)


def test_one_hot_targets_there() -> None:
    images, hot = photos(24, torch.float32), one_hot(LABELS, 5)
    got = InstaHide(k=2, insecure_seed=1).encode_rows(images.to(THERE), hot.to(THERE), ROWS)
    same(got.targets, InstaHide(k=2, insecure_seed=1).encode_rows(images, hot, ROWS).targets)


def test_the_registered_encoding_takes_pool_and_public_images_of_elsewhere() -> None:
    images = photos(6, torch.float32)
    here = Batch(images, one_hot(LABELS[:6], 5), Domain(), tuple(map(str, range(6))))
    there = Batch(images.to(THERE), here.targets.to(THERE), here.domain, here.ids)
    for more in ({"k": 3, "pool": here}, {"k": 3, "private": 2, "public": photos(7, torch.float32)}):
        made = DEFENSES["instahide"].make(**more)
        got, want = (made.encode(batch, Insecure(1)) for batch in (there, here))
        same(got.images, want.images)
        same(got.targets, want.targets)
