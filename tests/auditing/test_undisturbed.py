"""Audits from Python: the same results inside of whatever the caller is inside of, which is left as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frostglass
from frostglass.core.events import Event
from frostglass.defenses.instahide import InstaHide

ANYWHERE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "another device": lambda: torch.device("meta"),
}


def victim() -> tuple[nn.Module, Tensor]:
    make = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=make))
    return net, torch.rand(2, 3, 4, 4, generator=make)


def found(net: nn.Module, images: Tensor, emit: Callable[[Event], None] | None = None) -> list[Any]:
    report = frostglass.audit(
        model=net, images=images, labels=[0, 1], attacks=[{"name": "thaw", "steps": 2}, "linear_exact"],
        defenses=["soteria"], grants=["examples", "labels"], device="cpu", emit=emit,
    )  # fmt: skip
    return [(c.status, c.error, c.objective, [i.psnr for i in c.images]) for c in report.scorecard.cells]


def settings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.is_anomaly_enabled(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.default_generator.get_state().numpy().tobytes(),
    )  # fmt: skip


@pytest.mark.parametrize("where", ANYWHERE)
def test_what_the_caller_is_inside_of_changes_nothing_and_is_left_as_it_was(where: str) -> None:
    net, images = victim()
    alone = found(net, images)
    assert [status for status, *_ in alone] == ["done", "done"]
    with ANYWHERE[where]():
        before = settings()
        assert found(net, images) == alone
        assert settings() == before


def test_networks_and_images_made_in_inference_mode_are_audited() -> None:
    alone = found(*victim())
    with torch.inference_mode():
        made = victim()
        assert found(*made) == alone
    assert found(*made) == alone


def test_another_default_type_changes_nothing_in_what_is_unmixed() -> None:
    make = torch.Generator().manual_seed(0)
    private = (torch.rand(6, 1, 8, 8, generator=make), torch.arange(6) % 3)
    encoder = InstaHide(k=2, insecure_seed=3)
    rounds = [r for _ in range(12) for r in encoder.epoch(private, batch_size=6, num_classes=3)]
    encoded, targets = torch.cat([r.images for r in rounds]), torch.cat([r.targets for r in rounds])

    def unmixed() -> list[Any]:
        known = {"k": 2, "private": 2, "images": 6}
        report = frostglass.unmix(
            encoded, targets=targets, truth=private[0], known=known, attacks=["unmix_statistical"], device="cpu"
        )
        return [(c.status, c.error, c.objective, [i.psnr for i in c.images]) for c in report.scorecard.cells]

    alone = unmixed()
    torch.set_default_dtype(torch.float64)
    try:
        assert unmixed() == alone
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_threads_audit_one_after_the_other_and_leave_the_settings_of_the_process() -> None:
    net, images = victim()
    alone, before = found(net, images), settings()
    order: list[int] = []
    results: list[Any] = []

    def audit(number: int) -> None:
        results.append(found(net, images, emit=lambda _: order.append(number)))

    threads = [threading.Thread(target=audit, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone, alone]
    assert order in (sorted(order), sorted(order, reverse=True))  # no event of one among those of the other
    assert settings() == before
