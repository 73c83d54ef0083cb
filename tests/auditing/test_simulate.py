"""The client side: what is drawn, trained on and sent, and that an attack can reach none of the keys."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from frostglass.auditing.plan import Plan, parse_plan
from frostglass.auditing.plan_checks import make_defense
from frostglass.auditing.prepare import Inputs, Prepared, prepare
from frostglass.auditing.simulate import Round, Truth, play
from frostglass.core.batch import Batch
from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure, Randomness, Rng
from frostglass.core.threat import Knows, Observation
from frostglass.core.update import LocalPlan, Update
from frostglass.numerics.local_update import local_update

CPU = torch.device("cpu")
NONE = Defense("none", claim="none")


def plan_of(client: dict[str, Any] | None = None, grants: list[str] | None = None, **parts: Any) -> Plan:
    scenario = {
        "data": {"size": 8},
        "model": {"name": "mlp", "options": {"hidden": [16]}},
        "client": {"batch": 2} | (client or {}),
        "attack": [{"name": "thaw"}],
    }
    held = {"grants": ["examples"] if grants is None else grants}
    return parse_plan({"scenario": [scenario | parts.pop("scenario", {})], "threat": held, **parts})


def ready(plan: Plan, inputs: Inputs | None = None) -> Prepared:
    return prepare(plan, 0, CPU, inputs)


def truth_of(played: Round) -> Truth:
    """Tests open the seal by its private name: outside scoring nothing else may."""
    return played.truth._Sealed__value  # type: ignore[attr-defined, no-any-return]


def equal(a: Observation, b: Observation) -> bool:
    return all(torch.equal(g, b.gradients[n]) for n, g in a.gradients.items())


def test_the_same_plan_plays_the_same_round_and_each_repetition_another() -> None:
    prepared = ready(plan_of({"batches": 4}))
    rounds = [play(prepared, NONE, unit) for unit in range(4)]
    assert equal(rounds[2].seen, play(ready(plan_of({"batches": 4})), NONE, 2).seen)
    drawn = [i for r in rounds for i in truth_of(r).private.ids]
    assert len(set(drawn)) == 8, "eight photographs make four batches without a common image"
    assert not prepared.repeats_images
    assert ready(plan_of({"batches": 5})).repeats_images


def test_another_seed_draws_other_images_and_weights() -> None:
    one, other = (ready(plan_of(seed=s)) for s in (0, 1))
    assert truth_of(play(one, NONE, 0)).private.ids != truth_of(play(other, NONE, 0)).private.ids
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


def test_scenarios_draw_their_own() -> None:
    base = plan_of().model_dump()["scenario"][0] | {"name": ""}
    plan = parse_plan({"scenario": [base, base]})
    first, second = (prepare(plan, i, CPU) for i in range(2))
    assert first.rng.key != second.rng.key


def test_an_observation_is_free_of_graphs_hooks_and_gradients() -> None:
    missing = (Knows.AUXILIARY, Knows.GALLERY)  # eight photographs make no gallery
    prepared = ready(plan_of(grants=[k.value for k in Knows if k not in missing]))
    before = {n: v.clone() for n, v in prepared.model.state_dict().items()}
    seen = play(prepared, NONE, 0).seen
    for g in seen.gradients.values():
        assert g.grad_fn is None
        assert not g.requires_grad
    for module in seen.model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert all(p.grad is None for p in seen.model.parameters())
    assert all(torch.equal(v, seen.model.state_dict()[n]) for n, v in before.items()), (
        "a client trained the global model"
    )


def test_only_what_is_granted_is_seen() -> None:
    seen = play(ready(plan_of(grants=[], scenario={"attack": [{"name": "spear"}]})), NONE, 0).seen
    for k in (Knows.EXAMPLES, Knows.LABELS, Knows.LOCAL_PLAN, Knows.BN_BATCH, Knows.AUXILIARY, Knows.DEFENCE):
        assert getattr(seen, k.value) is None
    threat = {"grants": ["examples", "auxiliary"], "auxiliary": "digits"}
    plan = plan_of(scenario={"threat": threat})
    assert play(ready(plan), NONE, 0).seen.auxiliary.shape[1:] == (3, 8, 8)  # type: ignore[union-attr]


def test_granted_labels_are_shuffled_by_a_key_that_holds_the_images() -> None:
    orders = set()
    for seed in range(6):
        played = play(ready(plan_of({"batch": 8}, ["examples", "labels"], seed=seed)), NONE, 0)
        private, told = truth_of(played).private.targets, played.seen.labels
        assert told is not None
        assert torch.equal(told.sum(0), private.sum(0))
        orders.add(torch.equal(told, private))
    assert orders == {False}


class Listening:
    """A defence that keeps the keys it was given, and noise drawn from them."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []

    def defense(self) -> Defense:
        def encode(batch: Batch, randomness: Randomness) -> Batch:
            self.keys.append(randomness.rng().key)
            return batch

        return Defense("listening", encode=encode)


def keys_of(prepared: Prepared, units: int = 1) -> list[bytes]:
    heard = Listening()
    for unit in range(units):
        play(prepared, heard.defense(), unit)
    return heard.keys


def test_a_defences_key_depends_on_the_private_pixels() -> None:
    """The plan's seed is no secret. Whoever knows all but the images cannot build the key."""
    images = torch.rand(2, 3, 8, 8)
    changed = images.clone()
    changed[1, 2, 7, 7] += 1e-4 if float(changed[1, 2, 7, 7]) < 0.5 else -1e-4
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    plan = plan_of(scenario={"name": "own"})
    keys = [keys_of(ready(plan, Inputs(net, x, [0, 1])))[0] for x in (images, changed, images)]
    assert keys[0] == keys[2] != keys[1]


def test_keys_differ_by_repetition_member_and_purpose() -> None:
    keys = keys_of(ready(plan_of({"batches": 2, "clients": 2, "cohort": 2})), units=2)
    assert len(set(keys)) == len(keys) == 4


def test_a_defences_key_is_not_below_what_an_attack_can_reach() -> None:
    """Neither the attack's runtime nor the client root, which follows from the seed, lead to it without the images."""
    prepared = ready(plan_of())
    (secret,) = keys_of(prepared)
    roots = [Rng.from_seed(0, "attack", "thaw"), Rng.from_seed(0, "client side", "0"), Rng.from_seed(0), prepared.rng]
    words: list[tuple[str | int, ...]] = [
        (), ("encode",), ("keys",), ("keys", 0, 0, "listening"), ("keys", 0, 0, "listening", "encode"), ("01-x", 0),
    ]  # fmt: skip
    reachable = {root.at(*path).key for root in roots for path in words} | {r.key for r in roots}
    reachable |= {root.at(*path).at("encode").key for root in roots for path in words}
    assert secret not in reachable


@pytest.mark.slow
def test_noise_cannot_be_subtracted_by_whoever_knows_the_seed() -> None:
    """What is left of a DP-SGD update after removing noise from every guessable key is still noise."""
    defense = make_defense(plan_of(scenario={"defense": [{"name": "dp_sgd"}]}).scenario[0].defense[0])
    prepared = ready(plan_of())
    sent = play(prepared, defense, 0).seen.gradients
    private = truth_of(play(prepared, defense, 0)).private
    assert defense.gradient is not None
    for guess in (prepared.rng, prepared.rng.at("keys", 0, 0, "dp_sgd").at("gradient"), Rng.from_seed(0)):
        again = defense.gradient(prepared.model, private, LocalPlan(), Insecure(guess)).gradients
        assert not any(torch.allclose(again[n], sent[n]) for n in sent)


def test_a_cohort_sends_one_sum_that_is_the_gradient_of_all_its_images() -> None:
    prepared = ready(plan_of({"clients": 4, "cohort": 2, "batches": 1}, ["examples", "cohort", "labels", "bn_batch"]))
    assert (prepared.units, prepared.per_message) == (2, 4)
    played = play(prepared, NONE, 1)
    truth = truth_of(played)
    assert len(played.seen.messages) == 1
    assert (played.seen.examples, played.seen.cohort, len(truth.private)) == (4, 2, 4)
    joint = local_update(prepared.model, truth.private.images, truth.private.targets, LocalPlan())
    for name, g in joint.gradients.items():
        torch.testing.assert_close(played.seen.gradients[name], g)
    assert not played.seen.bn_batch, "statistics of single clients are hidden in a sum"


def test_a_delta_is_what_sgd_moves() -> None:
    client = {"update": "delta", "local_steps": 2, "epochs": 2, "lr": 0.05, "momentum": 0.5, "weight_decay": 0.01}
    prepared = ready(plan_of(client, ["examples", "local_plan"]))
    played = play(prepared, NONE, 0)
    assert played.seen.local_plan == played.plan
    assert played.seen.messages[0].kind == "delta"  # type: ignore[union-attr]
    model, private = copy.deepcopy(prepared.model), truth_of(played).private
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)
    for _ in range(4):
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(private.images), private.targets).backward()
        sgd.step()
    for (name, start), end in zip(prepared.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(played.seen.gradients[name], (start - end).detach(), atol=1e-6, rtol=1e-4)


def test_flips_are_half_of_the_images_and_are_the_truth() -> None:
    plan = plan_of({"batch": 8, "augmentation": "flip"}, ["augmentation", "examples"])
    flipped = 0
    for seed in range(8):
        prepared = ready(replaced(plan, seed))
        played = play(prepared, NONE, 0)
        plain = truth_of(play(replace(prepared, scenario=plan_of({"batch": 8}).scenario[0]), NONE, 0)).private
        private = truth_of(played).private
        assert private.ids == plain.ids
        for a, b in zip(private.images, plain.images, strict=True):
            mirrored = torch.equal(a, b.flip(-1))
            assert mirrored or torch.equal(a, b)
            flipped += mirrored
        assert played.seen.augmentation == "flip"
    assert 16 < flipped < 48


def replaced(plan: Plan, seed: int) -> Plan:
    return plan.model_copy(update={"seed": seed})


NET = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
X = torch.rand(4, 3, 8, 8)


class Answer(nn.Module):
    def __init__(self, out: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.out = out

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(x)


DIVERGED = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
DIVERGED[1].bias.data[0] = float("nan")
COMPLEX = Answer(lambda x: x.flatten(1)[:, :3])
COMPLEX.register_parameter("w", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
PACKED = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), {nn.Linear})
QUANTISED = nn.Sequential(*PACKED, nn.Linear(8, 3))
SCRIPTED = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (Inputs(NET, X * 2), r"finite and in \[0, 1\]"),
        (Inputs(NET, X.mul(255).byte()), "divide bytes by 255"),
        (Inputs(NET, X * float("nan")), "finite"),
        (Inputs(NET, X[0]), r"must be \[n, c, h, w\]"),
        (Inputs(NET, X[:0]), "none of them 0"),
        (Inputs(NET, X, [0, 1]), "must be 4 class indices"),
        (Inputs(NET, X, torch.rand(4)), "class indices"),
        (Inputs(NET, X, torch.eye(4)), "class indices"),
        (Inputs(NET, X, [0, 1, 2, 3]), "labels from 0 to 3 do not fit the model's 3 outputs"),
        (Inputs(NET, X, [0, 1, 2, -1]), "labels from -1 to 2"),
        (Inputs(NET, X, ["a", "b", "c", "d"]), "give tensors"),
        (Inputs(NET, "photo.png"), "give tensors"),
        (Inputs(NET, X[:1]), "client.batch = 2 x cohort = 1 is more than the 1 images"),
        (Inputs(NET, X[..., :4]), "does not take images of shape"),
        (Inputs(lambda x: x, X), "no torch.nn.Module"),
        (Inputs(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double(), X), r"convert it with \.float\(\)"),
        (Inputs(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), X), "'1.weight' of 'Sequential' has no values yet"),
        (Inputs(nn.Sequential(nn.Flatten(), nn.Linear(192, 3, device="meta")), X), "has no values yet"),
        (Inputs(SCRIPTED, X), "'RecursiveScriptModule' is a ScriptModule, whose layers cannot be seen"),
        (Inputs(DIVERGED, X), "'1.bias' of the model has values that are not finite"),
        (
            Inputs(nn.Sequential(nn.BatchNorm2d(3, affine=False, device="meta"), nn.Flatten(), nn.Linear(192, 3)), X),
            "'0.running_mean' of 'Sequential' has no values yet",
        ),
        (Inputs(nn.Flatten(), X), "no parameter of the model requires a gradient"),
        (Inputs(COMPLEX, X), "torch.complex64 parameters; keep whole numbers in buffers, and complex ones by"),
        (Inputs(QUANTISED, X), "layer '1' of the model is quantised, and no gradient passes it"),
        (Inputs(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), X), r"with \(2, 1\); .* two classes at the least"),
        (Inputs(Answer(lambda x: x.mean(1)), X), "must return logits"),
        (Inputs(Answer(lambda x: [x]), X), "must return logits"),
        (Inputs(Answer(lambda x: torch.zeros(1, 3)), X), "must return logits"),
        (Inputs(Answer(lambda x: 1 / 0), X), "ZeroDivisionError"),
    ],
)
def test_objects_that_cannot_be_used_are_refused_in_a_sentence(inputs: Inputs, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as wrong:
        ready(plan_of(), inputs)
    assert all("\n" not in p for p in wrong.value.problems)


def test_the_digest_of_a_network_bears_extra_state_and_sparse_buffers() -> None:
    class Own(nn.Sequential):
        def get_extra_state(self) -> Any:
            return {"version": 2}

        def set_extra_state(self, state: Any) -> None:
            pass

    net = Own(nn.Flatten(), nn.Linear(192, 3))
    net.register_buffer("mask", torch.eye(3).to_sparse())
    first = ready(plan_of(), Inputs(net, X)).digest()
    assert ready(plan_of(), Inputs(net, X)).digest() == first
    net.mask = 2 * torch.eye(3).to_sparse()
    assert ready(plan_of(), Inputs(net, X)).digest() != first


def test_own_objects_are_copied_and_missing_labels_are_said_to_be_arbitrary() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3)).eval()
    prepared = ready(plan_of(), Inputs(net, X))
    assert prepared.model is not net
    assert prepared.model.training
    assert not any(m.training for m in net.modules())
    assert prepared.data.labels.tolist() == [0, 1, 2, 0]
    assert any("arbitrary" in note for note in prepared.data.notes)


def test_a_compiled_or_parallel_network_is_attacked_as_what_it_wraps() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    for wrapped in (torch.compile(net), nn.DataParallel(net), nn.DataParallel(torch.compile(net))):
        model = ready(plan_of(), Inputs(wrapped, X)).model
        assert type(model) is nn.Sequential
        assert torch.equal(model[1].weight, net[1].weight)


def test_what_was_given_from_python_cannot_be_rerun_from_the_plan() -> None:
    for part in ({"data": {"source": "python"}}, {"model": {"name": "python:Net"}}):
        with pytest.raises(BadInput, match=r"given from Python; run frostglass\.audit"):
            ready(plan_of(scenario=part))


def test_the_digest_covers_images_labels_and_weights() -> None:
    base = ready(plan_of(), Inputs(NET, X, [0, 1, 2, 0])).digest()
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert base == ready(plan_of(), Inputs(NET, X, [0, 1, 2, 0])).digest()
    for inputs in (Inputs(NET, X * 0.9, [0, 1, 2, 0]), Inputs(NET, X, [0, 1, 2, 1]), Inputs(other, X, [0, 1, 2, 0])):
        assert ready(plan_of(), inputs).digest() != base


def test_a_step_of_somebody_elses_leaves_the_model_and_no_gradient_of_the_message_before() -> None:
    """Written as a plain training step is: it leaves .grad behind, moves running statistics, and sets the mode."""

    def gradient(model: nn.Module, batch: Batch, plan: LocalPlan, _: Randomness) -> Update:
        nn.functional.cross_entropy(model.train()(batch.images), batch.targets).backward()
        sent = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        return Update(sent, {}, len(batch), plan)

    theirs = Defense("theirs", gradient=gradient)
    model = {"model": {"name": "small_bn_cnn", "mode": "eval", "options": {"width": 4}}}
    prepared = ready(plan_of({"batches": 2}, scenario=model))
    before = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    play(prepared, theirs, 0)
    second = play(prepared, theirs, 1)
    assert all(torch.equal(value, before[name]) for name, value in prepared.model.state_dict().items())
    assert all(p.grad is None for p in prepared.model.parameters())
    assert not any(layer.training for layer in prepared.model.modules())
    assert equal(second.seen, play(ready(plan_of({"batches": 2}, scenario=model)), theirs, 1).seen)


def test_a_defence_that_encodes_in_place_does_not_change_what_is_scored() -> None:
    def encode(batch: Batch, _: Randomness) -> Batch:
        batch.images.zero_()
        batch.targets.zero_()
        return batch

    truth = truth_of(play(ready(plan_of()), Defense("black", encode=encode, encodes=True), 0))
    assert float(truth.trained.images.abs().max()) == 0
    plain = truth_of(play(ready(plan_of()), NONE, 0))
    assert torch.equal(truth.private.images, plain.private.images)
    assert torch.equal(truth.private.targets, plain.private.targets)


@pytest.mark.parametrize("recorded", [False, True])
def test_what_an_attack_does_to_its_model_ends_with_its_message(recorded: bool) -> None:
    prepared = ready(plan_of())
    if recorded:
        message: Any = SimpleNamespace(round=play(prepared, NONE, 0))
        prepared = replace(prepared, arrived=message)
    seen = play(prepared, NONE, 0).seen
    with torch.no_grad():
        next(seen.model.parameters()).zero_()
    seen.model.requires_grad_(False).eval()
    seen.model.register_forward_hook(lambda *_: None)
    again = play(prepared, NONE, 0).seen
    assert equal(seen, again)
    assert all(bool(p.any()) for p in again.model.parameters() if p.ndim > 1)
    assert all(p.requires_grad for p in again.model.parameters())
    assert all(layer.training for layer in again.model.modules())
    assert not again.model._forward_hooks
