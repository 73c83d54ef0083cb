"""The wall: a grant, its plan string and its field are one thing, and what is not granted is not there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from frostglass.core.batch import Batch, Domain, one_hot
from frostglass.core.defense import Defense, stack
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, OsKey, Randomness
from frostglass.core.threat import (
    ALWAYS,
    MEANING,
    Facts,
    Gallery,
    GradientMessage,
    Knows,
    Observation,
    ThreatModel,
    parse_grants,
)
from frostglass.core.update import BNStatistics, LocalPlan, Update

FROM_THE_MODEL = {"image_shape", "classes"}
"""Fields that say what the model's inputs and outputs are, which whoever holds the model knows."""

MODEL = nn.Linear(4, 3)
STATISTICS = {"bn": BNStatistics(torch.zeros(2), torch.ones(2), 8)}
UPDATE = Update({"weight": torch.ones(3, 4)}, STATISTICS, 2, LocalPlan(), clients=1)
FACTS = Facts(
    domain=Domain(),
    mode="train",
    image_shape=(1, 2, 2),
    classes=3,
    labels=one_hot([0, 2], 3),
    bn_running=STATISTICS,
    augmentation="flip",
    auxiliary=torch.rand(1, 1, 2, 2),
    defence=Defense("none"),
    gallery=Gallery(torch.rand(2, 1, 2, 2), one_hot([1, 1], 3), torch.rand(1, 1, 2, 2), one_hot([0], 3)),
)


def see(*grants: Knows) -> Observation:
    return ThreatModel("test", frozenset(grants)).observe(MODEL, [UPDATE], FACTS)


def test_each_grant_is_one_field_one_string_and_one_meaning() -> None:
    names = [f.name for f in fields(Observation) if f.name not in FROM_THE_MODEL]
    assert sorted(names) == sorted(k.value for k in Knows)
    assert set(MEANING) == set(Knows)
    assert len(set(MEANING.values())) == len(Knows)
    assert all(parse_grants([k.value]) == {k} for k in Knows)
    assert all(k.value == k.name.lower() for k in Knows)


@given(st.sets(st.sampled_from(sorted(Knows))))
def test_what_is_not_granted_is_none_and_what_is_granted_is_there(grants: set[Knows]) -> None:
    seen = see(*grants)
    for k in Knows:
        assert (getattr(seen, k.value) is not None) == (k in grants | ALWAYS), k


def test_optional_fields_are_none_by_default() -> None:
    for f in fields(Observation):
        required = f.name in FROM_THE_MODEL or f.name in ALWAYS
        assert required or f.default is None, f.name


def test_grants_carry_the_facts() -> None:
    seen = see(*Knows)
    assert (seen.examples, seen.cohort, seen.augmentation, seen.mode) == (2, 1, "flip", "train")
    assert seen.labels_distinct is True
    assert seen.bn_batch == STATISTICS
    assert seen.model is MODEL
    assert seen.gradients.keys() == {"weight"}
    assert seen.messages[0].kind == "gradient"  # type: ignore[union-attr]


def test_an_observation_holds_no_more_than_its_fields() -> None:
    seen = see()
    assert set(vars(seen)) == {f.name for f in fields(Observation)}
    held = vars(seen.messages[0])
    assert {name for name, value in held.items() if value is not None} == {"gradients", "kind"}


def test_repeated_labels_are_not_called_distinct() -> None:
    facts = Facts(Domain(), "train", (1, 2, 2), 3, labels=one_hot([1, 1], 3))
    seen = ThreatModel("t", frozenset({Knows.LABELS_DISTINCT})).observe(MODEL, [UPDATE], facts)
    assert seen.labels_distinct is False
    assert seen.labels is None


def test_unknown_grants_are_all_named_with_the_close_match() -> None:
    with pytest.raises(BadInput) as wrong:
        parse_grants(["lables", "labels", "bn_bach"])
    assert [("labels" in p, "bn_batch" in p) for p in wrong.value.problems] == [(True, False), (False, True)]


def test_missing_grants_and_the_listing() -> None:
    threat = ThreatModel("t", frozenset({Knows.LABELS}))
    assert threat.missing([Knows.MODEL, Knows.LABELS, Knows.EXAMPLES]) == (Knows.EXAMPLES,)
    assert threat.grants == tuple(sorted(k.value for k in ALWAYS | {Knows.LABELS}))


def test_one_update_is_read_or_none() -> None:
    both = (GradientMessage({}, "gradient"),) * 2
    for messages in ((), both):
        seen = Observation(MODEL, messages, Domain(), "train", (1, 2, 2), 3)
        with pytest.raises(BadInput, match=f"{len(messages)} were sent"):
            _ = seen.gradients


def noisy(name: str) -> Defense:
    def encode(batch: Batch, randomness: Randomness) -> Batch:
        return Batch(batch.images + randomness.rng().normal(batch.images.shape), batch.targets, batch.domain, batch.ids)

    def protect(update: Update, randomness: Randomness) -> Update:
        sent = {n: g + randomness.rng().normal(g.shape) for n, g in update.gradients.items()}
        return Update(sent, update.bn, update.examples, update.plan)

    return Defense(name, encode=encode, protect=protect)


def played(defense: Defense, randomness: Any = None) -> list[torch.Tensor]:
    key = randomness or Insecure(5)
    batch = Batch(torch.zeros(2, 1, 3, 3), one_hot([0, 1], 2), Domain(), ("a", "b"))
    return [defense.encode(batch, key).images, defense.protect(UPDATE, key).gradients["weight"]]


def test_stacks_are_associative_in_everything() -> None:
    a, b, c = noisy("a"), noisy("b"), noisy("c")
    stacks = [stack(a, b, c), stack(stack(a, b), c), stack(a, stack(b, c)), stack(stack(stack(a), b), stack(c))]
    first = stacks[0]
    for other in stacks[1:]:
        assert (other.name, other.claim, other.settings, other.encodes) == ("a+b+c", "heuristic", first.settings, False)
        for x, y in zip(played(first), played(other), strict=True):
            assert torch.equal(x, y)
    assert stack(a) is a
    assert stack().name == "none"
    assert stack().claim == "none"


def test_two_of_a_kind_do_not_repeat_each_others_noise() -> None:
    """The same noise twice would be one noise of double size, and could be subtracted."""
    doubled = played(stack(noisy("n"), noisy("n")))[0]
    alone = played(noisy("n"))[0]
    assert not torch.allclose(doubled, 2 * alone)
    ratio = doubled / played(stack(noisy("n"), Defense("none")))[0]
    assert float(ratio.std()) > 0.1


def test_a_stack_under_keys_of_the_system_never_repeats() -> None:
    made = stack(noisy("a"), noisy("b"))
    assert not torch.equal(played(made, OsKey())[0], played(made, OsKey())[0])


def test_stacks_that_would_lie_are_refused_however_they_are_nested() -> None:
    def step(*_: Any) -> Update:
        return UPDATE

    clip, mix = Defense("clip", gradient=step, claim="proof"), Defense("mix", encodes=True)
    for make in (lambda: stack(clip, clip), lambda: stack(stack(clip, noisy("a")), clip)):
        with pytest.raises(BadInput, match="both replace the client step"):
            make()
    for make in (lambda: stack(mix, clip), lambda: stack(stack(mix, noisy("a")), clip)):
        with pytest.raises(BadInput, match="'mix' mixes images, so the per-example sensitivity of 'clip'"):
            make()
    both = stack(clip, noisy("a"))
    assert both.claim == "proof"
    assert both.gradient is step
