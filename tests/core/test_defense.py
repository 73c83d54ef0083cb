"""What a defence of somebody else's gives back is looked at, and what does not fit is told by its name and its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.defense import Defense, stack
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.client_step import defended_step

BATCH = Batch(torch.rand(2, 1, 4, 4), one_hot([0, 1], 3), Domain(), ("a", "b"))
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
PLAN = LocalPlan()


def put(value: Any, **fields: Any) -> Any:
    """`value` with other fields, past the checks of types that only tests have."""
    made = replace(value)
    for name, held in fields.items():
        object.__setattr__(made, name, held)
    return made


def gradients(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda update, _: put(update, gradients={n: change(g) for n, g in update.gradients.items()})


def broken(*_: Any) -> Any:
    raise ValueError("no such key\nand more")


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"encode": lambda b, _: b.images}, "encode returned Tensor; it must return a Batch"),
    "arrays": ({"encode": lambda b, _: put(b, images=b.images.numpy())}, "encode returned images that are ndarray"),
    "bytes": ({"encode": lambda b, _: put(b, images=b.images.byte())}, "encode returned images that are torch.uint8"),
    "not finite": ({"encode": lambda b, _: replace(b, images=b.images / 0)}, "images that are not finite"),
    "fewer classes": ({"encode": lambda b, _: put(b, targets=b.targets[:, :2])}, "returned targets of 2 classes"),
    "a broken encoder": ({"encode": broken}, "encode raised ValueError: no such key; correct that defence"),
    "no update": ({"protect": lambda u, _: dict(u.gradients)}, "protect returned dict; it must return an Update"),
    "gradients as arrays": (
        {"protect": gradients(lambda g: g.numpy())},
        r"protect returned '1.weight' as ndarray; it must return a dense tensor of floats, \(3, 16\)",
    ),
    "gradients of another shape": ({"protect": gradients(torch.flatten)}, r"as torch.float32 of shape \(48,"),
    "gradients as whole numbers": ({"protect": gradients(lambda g: g.sign().char())}, "'1.weight' as torch.int8"),
    "sparse gradients": ({"protect": gradients(Tensor.to_sparse)}, "'1.weight' as sparse torch.float32"),
    "other names": (
        {"protect": lambda u, _: replace(u, gradients={f"x.{n}": g for n, g in u.gradients.items()})},
        "protect returned a tensor 'x.1.weight'; it must return those of the network's parameters",
    ),
    "a step's arrays": (
        {"gradient": lambda m, b, p, _: put(Update({}, {}, len(b), p), gradients={"1.bias": [0.0] * 3})},
        "gradient returned '1.bias' as list",
    ),
    "a number as an account": ({"account": lambda _: 3.0}, "account returned float; it must return PrivacySpent"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told_by_the_defence_and_its_step(case: str) -> None:
    parts, sentence = CASES[case]
    defense = Defense("theirs", **parts)
    with pytest.raises(BadInput, match=f"defense 'theirs': .*{sentence}") as told:
        defended_step(MODEL, BATCH, PLAN, defense, Rng.from_seed(0))
    (problem,) = told.value.problems
    assert "\n" not in problem
    if "gradient" not in parts:
        with pytest.raises(BadInput, match=r"defense '(fine.)?theirs': "):
            defended_step(MODEL, BATCH, PLAN, stack(Defense("fine"), defense), Rng.from_seed(0))


def test_a_defence_may_keep_tensors_back_and_change_the_number_of_rows() -> None:
    def kept(update: Update, _: object) -> Update:
        return replace(update, gradients={"1.bias": update.gradients["1.bias"]})

    defense = Defense("theirs", encode=lambda batch, _: batch.take([1]), protect=kept)
    encoded, sent = defended_step(MODEL, BATCH, PLAN, defense, Rng.from_seed(0))
    assert len(encoded) == sent.examples == 1
    assert set(sent.gradients) == {"1.bias"}


def test_memory_that_ran_out_is_no_fault_of_the_defence() -> None:
    def greedy(*_: Any) -> Any:
        raise MemoryError("too much")

    with pytest.raises(MemoryError):
        defended_step(MODEL, BATCH, PLAN, Defense("theirs", protect=greedy), Rng.from_seed(0))
