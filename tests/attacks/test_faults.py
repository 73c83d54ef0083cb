"""Faults of published implementations (gradient inversion frameworks read in 2025), one test each that catches it.

Those of the group term are in test_consensus.py, of terms in tests/contracts/test_term_contract.py, of rules in
test_rules.py; of metrics in tests/auditing.
"""

from __future__ import annotations

import ast
import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frostglass.attacks
from frostglass.attacks.inversion import choice, elimination, engine, seeds, spaces, terms
from frostglass.attacks.inversion.lbfgs import lbfgs
from frostglass.attacks.inversion.machine import Inversion
from frostglass.attacks.inversion.rules import Rule, adam, chain, scale
from frostglass.attacks.inversion.target import lay_out
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import drive
from frostglass.core.errors import AttackFailed, BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.core.threat import Knows, Observation
from frostglass.core.update import LocalPlan
from victims import frozen_copy, observe

RUN = Runtime(Rng.from_seed(0, "faults"))
RECIPES = ["dlg", "idlg", "inverting_gradients", "deep_inversion", "grad_inversion"]


def plain(**changes: Any) -> Inversion:
    made = Inversion(
        "plain",
        terms=lambda seen: (terms.match_cosine(),),
        update=chain(adam(), scale(0.1)),
        steps=10,
        every=5,
    )
    return replace(made, **changes)


def recipe(name: str, **settings: Any) -> Inversion:
    made = ATTACKS[name].make(steps=6, every=3, **settings)
    assert isinstance(made, Inversion)
    return made


def settings(name: str) -> dict[str, Any]:
    few = {"inner": 3, "restart_every": 1}
    return {"grad_inversion": {"consensus": "lazy", "seeds": 2, "consensus_start": 0}, "dlg": few, "idlg": few}.get(
        name, {}
    )


# --- noise and schedule -------------------------------------------------------------------------------------------


def test_grad_inversion_moves_pixels_by_lr_times_noise_where_the_gradient_is_zero() -> None:
    """breaching and LeakPro put the noise on the gradient, where Adam normalises it away."""
    seen, _ = observe("mlp", hidden=(4,), size=32)
    attack = replace(
        recipe("grad_inversion", box=False, consensus="none", seeds=2),
        terms=lambda seen: (terms.Term("nothing", 1.0, lambda c: 0 * c.z.sum()),),
        steps=1000,
    )
    state = attack.init(seen, RUN)
    after, _ = attack.step(seen, state, RUN, 0)
    moved = after.z - state.z
    assert float(moved.std()) == pytest.approx(0.1 / 51 * 0.2, rel=0.03)  # first of 50 steps of warm-up
    assert not torch.equal(moved[0], moved[1])


# --- gradients reach the image ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [LocalPlan(), LocalPlan(kind="delta", local_steps=2, lr=0.1, momentum=0.5)])
def test_the_objectives_gradient_is_right_through_the_whole_machine(plan: LocalPlan) -> None:
    """NVIDIA's sample takes updated weights from a detached state_dict, so that nothing reaches the image."""
    seen, private = observe("lenet", size=8, batch=2, dtype=torch.float64, plan=plan)
    run = replace(RUN, dtype=torch.float64)
    z = spaces.pixels().start(lay_out(seen, run), 2, Rng.from_seed(3), torch.zeros((), dtype=torch.float64))
    found = (terms.match_layer_norms(), terms.match_cosine(), terms.variation_norm(0.1), terms.l2_norm(0.1))
    problem = engine.Objective(
        lay_out(seen, run), found, spaces.pixels(), "double_backward", 0, 1, private.targets, 0.3 * z, 0.5
    )
    got = engine.evaluate(z, problem).gradient
    assert got is not None
    way = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = [float(engine.evaluate(z + s * 1e-6 * way, problem, gradient=False).total) for s in (1, -1)]
    assert float((got * way).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_soft_labels_of_dlg_get_a_gradient_too() -> None:
    seen, _ = observe("lenet", size=8, batch=2, dtype=torch.float64)
    run, space = replace(RUN, dtype=torch.float64), spaces.with_labels(spaces.pixels(box=False))
    target = lay_out(seen, run)
    z = space.start(target, 2, Rng.from_seed(3), torch.zeros((), dtype=torch.float64))
    assert z.shape == (2, 3 * 8 * 8 + 10)
    problem = engine.Objective(target, (terms.match_squared(),), space, "double_backward", 0, 1, torch.zeros(2, 10))
    got = engine.evaluate(z, problem).gradient
    assert got is not None
    for column in (5, -3):
        step = torch.zeros_like(z)
        step[1, column] = 1e-6
        ends = [float(engine.evaluate(z + s * step, problem, gradient=False).total) for s in (1, -1)]
        assert float(got[1, column]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


# --- the network is left as it was --------------------------------------------------------------------------------


class Tripwire(nn.Module):
    """Raises at the given call."""

    def __init__(self, model: nn.Module, at: int) -> None:
        super().__init__()
        self.model, self.at, self.calls = model, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError("the user's own error")
        return self.model(x)


def rewired(seen: Observation, at: int) -> tuple[Observation, Tripwire]:
    model = Tripwire(seen.model, at)
    messages = tuple(
        replace(m, gradients={f"model.{n}": g for n, g in m.gradients.items()})  # type: ignore[union-attr, call-arg]
        for m in seen.messages
    )
    return replace(seen, model=model, messages=messages, bn_batch=None), model


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", engine.Engine.__args__)
def test_errors_come_through_and_no_hook_outlives_them(kind: Any) -> None:
    """LeakPro turns every error into "attack stopped"; breaching never removes its hooks."""
    seen, _ = rewired(observe("small_bn_cnn", width=4)[0], at=3)
    attack, state = plain(engine=kind), None
    with pytest.raises(ZeroDivisionError, match="own error"):
        drive(attack, seen, RUN)
    del state
    assert hooks(attack._prepared(seen, RUN)[0].model) == 0
    assert hooks(seen.model) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_weights_and_buffers_are_those_that_were_sent(name: str) -> None:
    """NVFlare's sample does not restore the global weights between iterations."""
    seen, _ = observe("small_bn_cnn", width=4, mode="train", batch=1)
    attack, before = recipe(name, **settings(name)), frozen_copy(seen)
    state = attack.init(seen, RUN)
    for t in range(2):
        state, _ = attack.step(seen, state, RUN, t)
    assert all(torch.equal(before[k], v) for k, v in frozen_copy(seen).items())
    inner = attack._prepared(seen, RUN)[0].model.state_dict()
    assert all(torch.equal(inner[k], v) for k, v in seen.model.state_dict().items())


def test_matching_and_priors_share_one_forward_pass() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    wired, _ = rewired(seen, at=0)
    wired = replace(wired, bn_batch={f"model.{n}": s for n, s in (seen.bn_batch or {}).items()})
    attack = recipe("grad_inversion", seeds=2)
    state = attack.init(wired, RUN)
    inner = attack._prepared(wired, RUN)[0].model
    assert isinstance(inner, Tripwire)
    before = inner.calls
    attack.step(wired, state, RUN, 0)
    assert inner.calls - before == 1  # one for both seeds


# --- nothing waits for the device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["as published", "frozen_fd"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_never_waits_for_the_device(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers fetch a loss and check it for NaN two or more times an iteration."""
    seen, _ = observe("small_bn_cnn", width=4, batch=1)
    attack = recipe(name, **settings(name))
    if kind == "frozen_fd":
        attack = replace(attack, engine="frozen_fd")
    state, _ = attack.step(seen, attack.init(seen, RUN), RUN, 0)  # holds the one refresh of the consensus, which waits

    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError("host synchronisation")

    waits = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "numpy", "cpu", "nonzero")
    for what in waits:
        monkeypatch.setattr(Tensor, what, refuse)
    for t in range(1, 4):
        state, _ = attack.step(seen, state, RUN, t)


# --- seeds --------------------------------------------------------------------------------------------------------


def spoilt(number: int) -> spaces.Space:
    """Pixels, with a NaN in the start of one seed."""
    whole = spaces.pixels()
    calls = iter(range(100))

    def start(*args: Any) -> Tensor:
        z = whole.start(*args)
        return torch.full_like(z, float("nan")) if next(calls) == number else z

    return replace(whole, start=start)


def test_a_seed_that_breaks_is_dropped_and_said_and_the_others_go_on() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    events: list[Event] = []
    whole = drive(plain(seeds=3), seen, RUN)
    found = drive(plain(seeds=3, space=spoilt(1)), seen, RUN, emit=events.append)
    assert found.info["seeds_dropped"] == 1
    assert "seeds_dropped" not in whole.info
    assert found.info["seed"] in (0, 2)
    assert events[-2].values["seeds_dropped"] == 1
    if whole.info["seed"] != 1:
        assert torch.equal(found.images, whole.images)


def test_a_run_whose_seeds_all_break_has_no_result() -> None:
    seen, _ = observe("small_bn_cnn", width=4)
    with pytest.raises(AttackFailed, match="non-finite"):
        drive(plain(space=spoilt(0)), seen, RUN)


def test_a_diverged_seed_starts_anew_with_a_fresh_rule() -> None:
    seen, _ = observe("lenet", size=8)
    attack = plain(space=spoilt(1), seeds=2, restart=seeds.Restart(3, 1.0), update=lbfgs(iterations=2), steps=8)
    found = drive(attack, seen, RUN)
    assert int(found.info["restarts"]) >= 1
    assert "seeds_dropped" not in found.info
    hopeless = plain(restart=seeds.Restart(2, 0.0), steps=8)
    assert drive(hopeless, seen, RUN).info["restarts"] == 3  # before steps 2, 4 and 6; none in the last fifth


def test_the_best_objective_goes_with_its_own_images() -> None:
    """AIJack pairs the best loss with the image after the step."""
    seen, _ = observe("small_bn_cnn", width=4)
    attack = plain(seeds=2, update=chain(adam(), scale(2.0)))
    state = attack.init(seen, RUN)
    for t in range(6):
        state, _ = attack.step(seen, state, RUN, t)
        for z, stated in zip(state.best, state.best_loss, strict=True):
            images = seen.domain.denormalise(z)
            assert attack.objective_of(seen, images, state.targets, RUN) == pytest.approx(float(stated), rel=1e-4)


def test_the_choice_among_seeds_is_the_objectives_alone() -> None:
    """LeakPro and another framework keep the reconstruction that is most like the private images."""
    seen, private = observe("small_bn_cnn", width=4)
    attack = plain(seeds=2)
    state = attack.init(seen, RUN)
    truth = seen.domain.normalise(private.images)
    near = replace(state, best=torch.stack([truth, torch.zeros_like(truth)]), best_loss=torch.tensor([2.0, 1.0]))
    assert attack.read(seen, near).info["seed"] == 1
    for chooses in (attack.read, choice.choose, choice.combined, elimination.eliminated, seeds.keep_best, drive):
        assert not {"truth", "private", "images"} & set(inspect.signature(chooses).parameters)


def test_no_attack_can_name_the_sealed_truth() -> None:
    home = Path(frostglass.attacks.__file__).parent
    for path in home.rglob("*.py"):
        names = {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(ast.parse(path.read_text("utf-8")))}
        assert not {"Sealed", "open_for_scoring"} & names, path.name


def test_seeds_differ_from_each_other_and_from_run_to_run() -> None:
    """AIJack resets its seed to one value at every iteration."""
    seen, _ = observe("small_bn_cnn", width=4)
    attack = plain(seeds=3)
    first = attack.init(seen, RUN).z
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, attack.init(seen, RUN).z)
    assert not torch.equal(first, attack.init(seen, RUN.at("another")).z)


# --- engines ------------------------------------------------------------------------------------------------------


def test_plain_finite_differences_are_not_offered() -> None:
    assert set(engine.Engine.__args__) == {"double_backward", "frozen_fd"}


class Mixed(nn.Module):
    """Every kind of kink that is frozen, and smooth parts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv1d(8, 6, 3), nn.Linear(6 * 7, 10)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.a(x), 0.1)
        x = nn.functional.max_pool2d(nn.ReLU(inplace=True)(self.norm(self.b(x))), 2, stride=2)
        x = nn.functional.hardtanh(nn.functional.relu6(self.c(x.flatten(2)[..., :16])), -0.5, 0.4)
        return self.d(torch.nn.functional.gelu(nn.functional.max_pool1d(x, 2).flatten(1)))


MATCHES: dict[str, Callable[[], terms.Term]] = {"cosine": terms.match_cosine, "l2": terms.match_layer_norms}


@pytest.mark.parametrize("match", MATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["small_bn_cnn", "resnet20", "mixed"])
def test_frozen_differences_agree_with_double_backward(name: str, dtype: torch.dtype, match: str) -> None:
    seen, private = observe("small_bn_cnn" if name == "mixed" else name, size=8, dtype=dtype)
    if name == "mixed":
        torch.manual_seed(0)
        model = Mixed().to(dtype)
        sent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
        seen = replace(seen, model=model, messages=(replace(seen.messages[0], gradients=sent),), bn_batch=None)  # type: ignore[call-arg]
    run = replace(RUN, dtype=dtype)
    found = [MATCHES[match](), terms.variation_norm(0.01)]
    if seen.bn_batch:
        found.append(terms.bn_statistics(0.01, Knows.BN_BATCH))
    z = seen.domain.normalise(private.images) + 0.3 * Rng.from_seed(5).normal(private.images.shape).to(dtype)
    problem = engine.Objective(
        lay_out(seen, run), tuple(found), spaces.pixels(), "double_backward", 0, 1, private.targets, 0.5 * z, 0.01
    )
    exact = engine.evaluate(z, problem)
    close = engine.evaluate(z, replace(problem, engine="frozen_fd"))
    assert exact.gradient is not None
    assert close.gradient is not None
    error = (exact.gradient - close.gradient).norm() / exact.gradient.norm()
    alike = torch.cosine_similarity(exact.gradient.flatten(), close.gradient.flatten(), 0)
    assert float(alike) > 0.999
    assert float(error) < (1e-5 if dtype == torch.float64 else 2e-2)
    # BatchNorm statistics are read at the moved weights
    torch.testing.assert_close(exact.total, close.total, rtol=1e-7 if dtype == torch.float64 else 1e-4, atol=0)
    assert set(exact.values) == set(close.values)


@pytest.mark.parametrize("withheld", [False, True])
def test_frozen_differences_need_a_gradient_not_a_weight_difference(withheld: bool) -> None:
    seen, _ = observe("small_bn_cnn", width=4, plan=LocalPlan(kind="delta", local_steps=2))
    if withheld:  # the message itself says what it is
        seen = replace(seen, local_plan=None)
    assert any("frozen_fd" in p for p in plain(engine="frozen_fd").check(seen))
    assert not plain().check(seen)


class Own(nn.Module):
    """A deep network with one activation of the caller's."""

    def __init__(self, activation: Callable[[Tensor], Tensor], depth: int = 9) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.BatchNorm2d(16)) for i in range(depth)
        )
        self.head, self.activation = nn.Linear(16, 10), activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(x.mean((2, 3)))


def test_frozen_differences_let_gradients_go_before_the_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, private = observe("small_bn_cnn", size=8)
    z = seen.domain.normalise(private.images) + 0.1
    problem = engine.Objective(
        lay_out(seen, RUN), (terms.match_cosine(),), spaces.pixels(), "frozen_fd", 0, 1, private.targets, None, 0.0
    )
    first: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    valued, forward = engine.valued, engine._forward

    def watched(problem: Any, candidate: Any, *, only: bool | None = None) -> Any:
        if only:
            first.extend(weakref.ref(g) for g in candidate.trace.gradients.values())
        return valued(problem, candidate, only=only)

    def counted(*args: Any, **kw: Any) -> Any:
        alive.append(sum(ref() is not None for ref in first))
        return forward(*args, **kw)

    monkeypatch.setattr(engine, "valued", watched)
    monkeypatch.setattr(engine, "_forward", counted)
    engine.evaluate(z, problem)
    assert len(first) == len(seen.gradients)
    assert alive == [0, 0]  # as much memory as the weights


def seen_with(model: nn.Module) -> Observation:
    seen, private = observe("small_bn_cnn", width=4, batch=4, size=32)
    model.train(seen.mode == "train")
    loss = nn.functional.cross_entropy(model(private.images), private.targets)
    sent = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    message = replace(seen.messages[0], gradients=sent)  # type: ignore[call-arg]
    return replace(seen, model=model, messages=(message,), bn_batch=None, bn_running=None)


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0, x, 0 * x),
    "product": lambda x: x * (x > 0),
    "selu": nn.functional.selu,
}


@pytest.mark.parametrize("name", KINKS)
def test_frozen_differences_refuse_kinks_that_no_list_names(name: str) -> None:
    torch.manual_seed(0)
    seen = seen_with(Own(KINKS[name]))
    with pytest.raises(AttackFailed, match="use double_backward"):
        drive(plain(engine="frozen_fd", steps=1), seen, RUN)
    assert drive(plain(steps=1), seen, RUN).images.isfinite().all()


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_frozen_differences_take_kinks_that_are_held_and_smooth_functions(name: str) -> None:
    torch.manual_seed(0)
    assert drive(plain(engine="frozen_fd", steps=1), seen_with(Own(getattr(nn.functional, name))), RUN)


class Attending(nn.Module):
    """A tiny vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


def test_attention_is_differentiated_twice() -> None:
    """PyTorch's fast kernels of attention have no second derivative."""
    torch.manual_seed(0)
    seen = seen_with(Attending())
    target, private = lay_out(seen, RUN), observe("small_bn_cnn", width=4, batch=4, size=32)[1]
    z = seen.domain.normalise(private.images) + 0.3
    problem = engine.Objective(
        target, (terms.match_cosine(),), spaces.pixels(), "double_backward", 0, 1, private.targets
    )
    exact, close = (engine.evaluate(z, replace(problem, engine=e)).gradient for e in ("double_backward", "frozen_fd"))
    assert exact is not None
    assert close is not None
    assert float(torch.cosine_similarity(exact.flatten(), close.flatten(), 0)) > 0.99


@pytest.mark.parametrize("kind", ["double_backward", "frozen_fd"])
def test_dropout_in_train_mode_repeats_and_leaves_pytorchs_generator_alone(kind: Any) -> None:
    torch.manual_seed(0)
    seen = seen_with(Own(lambda x: nn.functional.dropout(torch.relu(x), 0.3, training=True)))
    before = torch.get_rng_state()
    first = drive(plain(engine=kind, steps=3), seen, RUN).images
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(first, drive(plain(engine=kind, steps=3), seen, RUN).images)


def test_a_network_that_changes_its_activations_is_not_replayed() -> None:
    from frostglass.attacks.inversion.frozen import Choices

    choices, x = Choices(), torch.randn(3, 5)
    with choices.recorded():
        torch.relu(x)

    def replay(calls: int) -> None:
        with choices.replayed():
            for _ in range(calls):
                torch.relu(x)

    for calls in (0, 2):
        with pytest.raises(RuntimeError, match="recorded pass"):
            replay(calls)
    with choices.replayed():
        assert torch.equal(torch.relu(-x), -x * (x > 0))


@pytest.mark.parametrize("kink", [torch.abs, nn.PReLU(), nn.AdaptiveMaxPool2d(4), lambda x: x.clamp(min=0)])
def test_a_network_with_a_kink_that_is_not_frozen_is_refused(kink: Callable[[Tensor], Tensor]) -> None:
    from frostglass.attacks.inversion.frozen import Choices

    with pytest.raises(AttackFailed, match="use double_backward"), Choices().recorded():
        kink(torch.randn(1, 2, 8, 8))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"steps": 0}, {"every": 0}])
def test_counts_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="from 1"):
        plain(**wrong)


def test_rules_that_need_the_gradient_function_are_served() -> None:
    seen, _ = observe("lenet", size=8)
    rule: Rule = lbfgs(iterations=3)
    events: list[Event] = []
    drive(plain(update=rule, steps=6, every=1), seen, RUN, emit=events.append)
    values = [e.values["objective"] for e in events if e.kind == "progress"]
    assert values[-1] < values[0]
