"""Copies of networks that keep something of their last pass, which `copy.deepcopy` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint

import frostglass
from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.defenses.dp_sgd import dp_sgd
from frostglass.numerics import called
from frostglass.numerics.called import activations_kept, called_with, copied
from frostglass.numerics.client_step import defended_step
from frostglass.numerics.local_update import a_row_each, local_update
from frostglass.numerics.per_sample import agrees, streamable


class Keeping(nn.Module):
    """Keeps its activations, as networks do whose inside is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 8), nn.Linear(8, 3)
        self.activations: dict[str, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3] logits."""
        hidden = torch.sigmoid(self.inner(x.flatten(1)))
        self.activations["hidden"] = [hidden]
        return torch.Tensor(self.head(hidden))


def weight_normalised() -> nn.Module:
    inner = torch.nn.utils.weight_norm(nn.Linear(64, 8))
    return nn.Sequential(nn.Flatten(), inner, nn.Sigmoid(), torch.nn.utils.spectral_norm(nn.Linear(8, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("make", [Keeping, weight_normalised])
def test_what_a_network_keeps_of_its_last_pass_is_copied_without_its_graph(make: type[nn.Module]) -> None:
    model, images = make().eval(), torch.rand(2, 1, 8, 8)
    answer = model(images)
    twin = copied(model)
    torch.testing.assert_close(twin(images), answer)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    torch.testing.assert_close(called_with(twin, doubled, images), called_with(model, doubled, images))
    assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("make", [Keeping, weight_normalised])
def test_a_network_that_keeps_something_of_its_last_pass_is_audited(make: type[nn.Module]) -> None:
    model, images = make(), torch.rand(4, 1, 8, 8)
    model(images).sum().backward()
    attacks = [{"name": "thaw", "steps": 2}, {"name": "dlg", "steps": 2}]
    known = ["examples", "labels"]
    found = frostglass.audit(model=model, images=images, labels=[0, 1, 2, 0], attacks=attacks, grants=known, batch=2)
    assert [(cell.status, cell.error) for cell in found.scorecard.cells] == [("done", None)] * 2


class Saving(nn.Module):
    """A small network that may compute the activations of its first half anew in the backward pass."""

    def __init__(self, form: str, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.form = form
        self.inner, self.norm, self.head = nn.Conv2d(3, 4, 3), norm(4), nn.Linear(144, 3)

    def half(self, x: Tensor) -> Tensor:
        """[b, 4, 6, 6] activations."""
        return torch.relu(self.norm(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3] logits."""
        if self.form == "plain":
            hidden = self.half(x)
        else:
            x = x + 0 * self.head.bias.sum()  # the older form looks at its inputs alone
            hidden = checkpoint.checkpoint(self.half, x, use_reentrant=self.form == "older")
        return torch.Tensor(self.head(hidden.flatten(1)))


def both(form: str, norm: type[nn.Module] = nn.Identity) -> tuple[Saving, Saving]:
    plain, saving = Saving("plain", norm), Saving(form, norm)
    saving.load_state_dict(plain.state_dict())
    return plain, saving


SEEN = Batch(torch.rand(4, 3, 8, 8), one_hot([0, 1, 2, 0], 3), Domain(), ("a", "b", "c", "d"))


@pytest.mark.parametrize("form", ["newer", "older"])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_checkpointed_activations_are_of_the_weights_of_their_step(form: str, norm: type[nn.Module]) -> None:
    before = vars(checkpoint).copy()
    plan = LocalPlan("delta", local_steps=3, lr=0.5)
    plain, saving = both(form, norm)
    whole, made = (local_update(m, SEEN.images, SEEN.targets, plan) for m in (plain, saving))
    torch.testing.assert_close(dict(made.gradients), dict(whole.gradients))
    torch.testing.assert_close(dict(made.buffers), dict(whole.buffers))
    torch.testing.assert_close(saving.state_dict(), plain.state_dict())
    x = SEEN.images.clone().requires_grad_()
    further: list[Any] = []
    for model in (plain, saving):
        trace = local_update(model, x, SEEN.targets, plan, differentiable=True)
        further += torch.autograd.grad(sum(g.square().sum() for g in trace.gradients.values()), x)  # type: ignore[arg-type]
    torch.testing.assert_close(further[1], further[0])
    assert vars(checkpoint) == before, "checkpointing is as it was"


@pytest.mark.parametrize("form", ["newer", "older"])
def test_checkpointing_is_back_where_a_pass_breaks_and_blocks_may_lie_in_each_other(form: str) -> None:
    before = vars(checkpoint).copy()
    with pytest.raises(ZeroDivisionError), activations_kept(), activations_kept():
        raise ZeroDivisionError
    assert vars(checkpoint) == before
    _, saving = both(form)
    with activations_kept():
        kept = saving(SEEN.images)
    torch.testing.assert_close(saving(SEEN.images), kept)


class Interrupting:
    """A lock; the first time that it is left an interrupt comes."""

    def __init__(self) -> None:
        self.left = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if not self.left:
            self.left = True
            raise KeyboardInterrupt


def test_checkpointing_is_back_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    before = vars(checkpoint).copy()
    monkeypatch.setattr(called, "_KEEPING", Interrupting())
    with pytest.raises(KeyboardInterrupt), activations_kept():
        pass
    assert vars(checkpoint) == before, "while it was exchanged"
    for name, anew in called._ANEW.items():
        setattr(checkpoint, name, anew)
    with activations_kept():
        pass
    assert vars(checkpoint) == before, "while it was put back, by the next pass"


@pytest.mark.parametrize("form", ["newer", "older"])
def test_single_gradients_and_private_steps_of_checkpointed_networks(form: str) -> None:
    plain, saving = both(form)
    assert streamable(saving, "train", alone=True)
    assert agrees(saving, SEEN.images, SEEN.targets, "train", alone=True)
    defense = dp_sgd(noise_multiplier=1.0)
    sent = [defended_step(m, SEEN, LocalPlan(), defense, Rng.from_seed(0))[1].gradients for m in (plain, saving)]
    torch.testing.assert_close(dict(sent[1]), dict(sent[0]))


class Squeezing(Saving):
    def forward(self, x: Tensor) -> Tensor:
        """[b, 3] logits, but [3] of a batch of one."""
        return super().forward(x).squeeze()


def test_a_network_that_drops_the_axis_of_a_batch_of_one_is_told_so() -> None:
    local_update(Squeezing("plain"), SEEN.images, SEEN.targets, LocalPlan())
    one = SEEN.take([0])
    sentence = r"model: answers a batch of 1 with a tensor of shape \(3,\); it must be \[1, classes\]"
    with pytest.raises(BadInput, match=sentence):
        local_update(Squeezing("plain"), one.images, one.targets, LocalPlan())
    with pytest.raises(BadInput, match=sentence):
        defended_step(Squeezing("plain"), one, LocalPlan(), dp_sgd(), Rng.from_seed(0))


def test_an_answer_that_is_no_tensor_is_told_so() -> None:
    sentence = r"model: answers a batch of 4 with tuple; it must be a tensor of logits \[4, classes\]"
    with pytest.raises(BadInput, match=sentence):
        a_row_each((torch.zeros(4, 3), None), 4)
