"""Whose turn it is in a client's minibatches, and images that were found once an epoch."""

from __future__ import annotations

import pytest
import torch

from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.numerics.fedavg import drawn_order, epoch_order, merge_epochs, order_free, own_order
from frostglass.numerics.local_update import local_update
from frostglass.vision import networks
from victims import photo_batch

PLAN = LocalPlan("delta", epochs=3, lr=0.05, minibatch=2)


def test_every_epoch_sees_every_image_once() -> None:
    order = drawn_order(PLAN, 5, Rng.from_seed(0))
    assert order is not None
    assert len(order) == PLAN.steps_for(5) == 9
    assert [len(rows) for rows in order] == [2, 2, 1] * 3
    epochs = [torch.cat(order[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = drawn_order(PLAN, 5, Rng.from_seed(0))
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(order, again, strict=True))


def test_whole_batches_have_no_order() -> None:
    assert drawn_order(LocalPlan("delta", local_steps=3), 5, Rng.from_seed(0)) is None
    assert drawn_order(LocalPlan("delta", minibatch=5), 5, Rng.from_seed(0)) is None
    assert [rows.tolist() for rows in own_order(LocalPlan("delta", local_steps=2), 2)] == [[0, 1], [0, 1]]
    assert order_free(LocalPlan("delta", minibatch=9), 5) == LocalPlan("delta", minibatch=9)


def test_images_held_once_an_epoch_are_gone_through_block_by_block() -> None:
    assert [rows.tolist() for rows in own_order(PLAN, 3)] == [[0, 1], [2]] * 3
    blocks = [[0, 1], [2], [3, 4], [5], [6, 7], [8]]
    assert [rows.tolist() for rows in epoch_order(PLAN, 3)] == blocks


def test_equal_blocks_give_the_update_of_one() -> None:
    model = networks.build("mlp", classes=10, channels=3, size=8, options={"hidden": (8,)}, rng=Rng.from_seed(0))
    batch = photo_batch(8, 3)
    one = local_update(model, batch.images, batch.targets, PLAN)
    x, y = batch.images.repeat(3, 1, 1, 1), batch.targets.repeat(3, 1)
    blocks = local_update(model, x, y, PLAN, order=epoch_order(PLAN, 3))
    for name, g in one.gradients.items():
        torch.testing.assert_close(g, blocks.gradients[name])


def test_the_order_free_plan_agrees_to_first_order() -> None:
    errors = [order_free_error(lr) for lr in (1e-5, 1e-4)]
    assert errors[0] < 1e-3
    assert errors[1] == pytest.approx(10 * errors[0], rel=0.2)


def order_free_error(lr: float) -> float:
    model = networks.build(
        "mlp", classes=10, channels=3, size=8, options={"hidden": (8,)}, rng=Rng.from_seed(0)
    ).double()
    batch = photo_batch(8, 4)
    images, targets = batch.images.double(), batch.targets.double()
    plan = LocalPlan("delta", epochs=2, lr=lr, minibatch=2, momentum=0.0)
    free = order_free(plan, 4)
    assert (free.minibatch, free.local_steps, free.epochs) == (None, 2, 2)
    order = drawn_order(plan, 4, Rng.from_seed(1))
    real = local_update(model, images, targets, plan, order=order).gradients
    near = local_update(model, images, targets, free).gradients
    error = sum(float((real[n] - near[n]).square().sum()) for n in real) ** 0.5
    size = sum(float(g.square().sum()) for g in real.values()) ** 0.5
    return error / size


def test_epochs_are_merged_one_to_one_and_only_among_equal_labels() -> None:
    made = torch.Generator().manual_seed(0)
    truth = torch.rand(4, 3, 6, 6, generator=made)
    shuffled = [truth, truth[[2, 0, 3, 1]], truth[[3, 2, 1, 0]]]
    noisy = torch.cat([t + 0.05 * torch.randn(t.shape, generator=made) for t in shuffled])
    merged = merge_epochs(noisy, 3)
    assert float((merged - truth).abs().mean()) < 0.8 * float((noisy[:4] - truth).abs().mean())
    labels = [0, 0, 1, 1]
    kept = merge_epochs(torch.cat([truth, truth[[1, 0, 3, 2]]]), 2, labels)
    torch.testing.assert_close(kept, truth)
    swapped = merge_epochs(torch.cat([truth, truth[[2, 3, 0, 1]]]), 2, labels)  # never across labels
    assert not torch.allclose(swapped, truth, atol=0.05)
