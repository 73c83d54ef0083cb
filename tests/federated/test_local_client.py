"""Local training for every engine: plain, with an encoder in the loader, and with DP-SGD through Opacus."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from frostglass.core.defense import Defense
from frostglass.core.errors import BadInput
from frostglass.core.randomness import OsKey, Rng
from frostglass.core.update import LocalPlan
from frostglass.defenses.accounting import epsilon_of
from frostglass.defenses.dp_sgd import dp_sgd
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide, instahide
from frostglass.defenses.soteria import soteria
from frostglass.federated.feeds import takes_encodings
from frostglass.federated.local_client import LocalClient, dirichlet_split, mean_state
from frostglass.vision import datasets, networks

HELD = datasets.load("digits", size=8)
PLAN = LocalPlan("delta", epochs=2, minibatch=16, lr=0.1, momentum=0.9)


def network(name: str = "mlp") -> nn.Module:
    return networks.build(name, classes=10, channels=1, size=8, rng=Rng.from_seed(0))


def client(
    n: int = 40, name: str = "mlp", plan: LocalPlan = PLAN, model: nn.Module | None = None, **more: object
) -> LocalClient:
    made = network(name) if model is None else model
    return LocalClient("a", made, HELD.images[:n], HELD.labels[:n], 10, plan, **more)  # type: ignore[arg-type]


def encoder(**settings: object) -> InstaHide:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyCaution)
        return InstaHide(**settings)  # type: ignore[arg-type]


def test_one_full_step_is_torch_sgd() -> None:
    made = client(plan=LocalPlan("delta", lr=0.5), seed=0)
    twin = network()
    nn.functional.cross_entropy(twin(HELD.images[:40]), HELD.labels[:40]).backward()
    after = made.train(made.model.state_dict(), 1).state
    for name, p in twin.named_parameters():
        torch.testing.assert_close(after[name], p.detach() - 0.5 * p.grad)


def test_running_statistics_are_those_of_torch() -> None:
    made = client(name="small_bn_cnn", plan=LocalPlan("delta", lr=0.1), seed=0)
    twin = network("small_bn_cnn").train()
    twin(HELD.images[:40])
    after = made.train(made.model.state_dict(), 1).state
    for name, b in twin.named_buffers():
        if name in after:
            torch.testing.assert_close(after[name], b)


def test_seeded_rounds_repeat_and_differ() -> None:
    made, again = client(seed=3), client(seed=3)
    state = made.model.state_dict()
    one, two = made.train(state, 1).state, made.train(state, 2).state
    assert any(not torch.equal(one[n], two[n]) for n in one)
    same = again.train(state, 1).state
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert made.train(state, 1).insecure


def test_soteria_leaves_the_running_statistics_of_an_ordinary_step() -> None:
    state = network("small_bn_cnn").state_dict()
    plan = LocalPlan("delta", lr=0.1)
    ways: tuple[dict[str, object], ...] = ({}, {"defense": soteria()})
    after = [client(20, "small_bn_cnn", plan, seed=0, **more).train(state, 1).state for more in ways]
    moved = [n for n in state if "running" in n or "tracked" in n]
    assert moved
    for name in moved:
        assert torch.equal(after[0][name], after[1][name]), name
        assert not torch.equal(after[0][name], state[name]), name


@pytest.mark.parametrize("defense", [soteria(fraction=0.5), dp_sgd()], ids=lambda d: d.name)
def test_dropout_under_a_defence_of_the_step_follows_from_the_key(defense: Defense) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
    after = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        held = torch.get_rng_state()
        after.append(client(model=net, seed=0, defense=defense).train(net.state_dict(), 1).state)
        assert torch.equal(torch.get_rng_state(), held), "torch's own generator was drawn from"
    assert all(torch.equal(after[0][n], after[1][n]) for n in net.state_dict())


def test_keys_come_from_the_operating_system() -> None:
    made = client()
    assert isinstance(made.randomness(1, "train"), OsKey)
    state = made.model.state_dict()
    first, second = made.train(state, 1), made.train(state, 1)
    assert not first.insecure
    assert any(not torch.equal(first.state[n], second.state[n]) for n in state)


def test_the_global_state_is_left_alone() -> None:
    made = client(seed=0)
    state = {n: t.clone() for n, t in made.model.state_dict().items()}
    before = copy.deepcopy(state)
    made.train(state, 1)
    assert all(torch.equal(state[n], before[n]) for n in state)


def test_the_encoder_encodes_anew_in_every_local_epoch_and_counts() -> None:
    made = client(model=takes_encodings(network()), encoder=encoder(k=2))
    for r in (1, 2):
        done = made.train(made.model.state_dict(), r)
    assert done.examples == 40
    assert not done.insecure
    ledger = made.encoder.ledger  # type: ignore[union-attr]
    assert ledger is not None
    assert ledger.first.tolist() == [4] * 40  # 2 rounds of 2 epochs
    assert int(ledger.partner.sum()) == 4 * 40


@pytest.mark.parametrize("mapped", [False, True])
def test_public_images_of_bytes_mix_with_a_client_of_floats(mapped: bool, tmp_path: Path) -> None:
    pool = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    if mapped:
        np.save(tmp_path / "pool.npy", pool)
        pool = np.load(tmp_path / "pool.npy", mmap_mode="r")
    made = client(model=takes_encodings(network()), encoder=encoder(k=4, private=2, public=pool))
    made.begin()
    assert made.train(made.model.state_dict(), 1).examples == 40
    assert made.encoder.ledger.first.tolist() == [2] * 40  # type: ignore[union-attr]


def test_an_encoder_whose_rounds_are_used_up_ends_the_training_in_words() -> None:
    made = client(model=takes_encodings(network()), encoder=encoder(k=2, rounds=2))
    made.train(made.model.state_dict(), 1)
    with pytest.raises(BadInput, match="rounds"):
        made.train(made.model.state_dict(), 2)


def test_epsilon_is_accounted_over_rounds_with_the_sampling_rate() -> None:
    made = client(
        defense=dp_sgd(noise_multiplier=1.0, delta=1e-5), seed=0, plan=LocalPlan("delta", epochs=2, minibatch=10)
    )
    state = made.model.state_dict()
    first, second = made.train(state, 1).epsilon, made.train(state, 2).epsilon
    assert first == pytest.approx(epsilon_of(1.0, 1e-5, 8, rate=0.25))
    assert second == pytest.approx(epsilon_of(1.0, 1e-5, 16, rate=0.25))


def test_noiseless_dp_sgd_with_a_large_clip_is_a_mean_over_poisson_draws() -> None:
    plan = LocalPlan("delta", epochs=20, minibatch=10, lr=1e-4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    free = dp_sgd(clipping_norm=1e6, noise_multiplier=0.0)
    made = client(model=model, defense=free, plan=plan, seed=5)
    done = made.train(made.model.state_dict(), 1)
    assert done.epsilon is None
    plain = client(model=model, plan=LocalPlan("delta", lr=1e-4), seed=5).train(made.model.state_dict(), 1)
    a, b = (d.update.gradients["1.weight"].flatten() for d in (done, plain))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.95  # 80 steps of 10 images each, on average
    assert float(a.norm() / (80 * b.norm())) == pytest.approx(1, abs=0.1)


def test_a_draw_of_nobody_sends_noise_alone() -> None:
    plan = LocalPlan("delta", epochs=1, minibatch=1, lr=1.0)
    made = client(n=2, defense=dp_sgd(clipping_norm=1.0, noise_multiplier=0.5), plan=plan)
    state = made.model.state_dict()
    for r in range(1, 9):  # each of 2 images by a coin of 1/2, two steps a round: an empty draw all but surely
        done = made.train(state, r)
        assert all(bool(g.isfinite().all()) for g in done.update.gradients.values())
        assert all(float(g.abs().max()) > 0 for g in done.update.gradients.values())


def test_mixing_and_per_example_clipping_are_refused_together() -> None:
    with pytest.raises(BadInput, match="sensitivity"):
        client(encoder=encoder(k=2), defense=dp_sgd())
    with pytest.raises(BadInput, match="not both"):
        client(encoder=encoder(k=2), defense=instahide(k=2))


def test_what_cannot_be_trained_is_said() -> None:
    with pytest.raises(BadInput, match="has no images"):
        client(n=0).train(network().state_dict(), 1)
    with pytest.raises(BadInput, match="does not fit the model"):
        client().train(network("small_bn_cnn").state_dict(), 1)
    with pytest.raises(BadInput, match="engines send weights"):
        client(plan=LocalPlan("gradient"))
    with pytest.raises(BadInput, match="is a ScriptModule"):
        client(model=torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))))
    with pytest.raises(BadInput, match="diverged"):
        client(plan=LocalPlan("delta", lr=1e30, epochs=4), seed=0).train(network().state_dict(), 1)


@given(clients=st.integers(1, 30), alpha=st.sampled_from([0.01, 0.5, 100.0]), seed=st.integers(0, 9))
def test_a_split_is_a_partition(clients: int, alpha: float, seed: int) -> None:
    parts = dirichlet_split(HELD.labels[:300], clients, alpha, Rng.from_seed(seed))
    assert len(parts) == clients
    assert sorted(i for p in parts for i in p.tolist()) == list(range(300))
    assert min(len(p) for p in parts) >= 2


def test_alpha_says_how_unequal_clients_are() -> None:
    def classes(alpha: float) -> float:
        parts = dirichlet_split(HELD.labels, 10, alpha, Rng.from_seed(1))
        return sum(len(HELD.labels[p].unique()) for p in parts) / 10

    assert classes(0.05) < 6
    assert classes(100.0) == 10


@pytest.mark.parametrize(("clients", "alpha"), [(0, 1.0), (900, 1.0), (4, 0.0), (4, float("nan"))])
def test_splits_that_cannot_be(clients: int, alpha: float) -> None:
    with pytest.raises(BadInput):
        dirichlet_split(HELD.labels, clients, alpha, Rng.from_seed(0))


def test_the_mean_of_states_is_weighted_by_images() -> None:
    states = [{"w": torch.tensor([1.0]), "n": torch.tensor(5)}, {"w": torch.tensor([4.0]), "n": torch.tensor(9)}]
    out = mean_state(states, [2, 1])
    torch.testing.assert_close(out["w"], torch.tensor([2.0]))
    assert int(out["n"]) == 5


def test_a_client_that_sends_half_precision_does_not_round_the_others() -> None:
    states = [{"w": torch.ones(1).half()}, {"w": torch.tensor([1.0001])}]
    out = mean_state(states, [1, 1])
    assert out["w"].dtype == torch.float32
    torch.testing.assert_close(out["w"], torch.tensor([1.00005]))
    kept = mean_state([{"w": torch.ones(1).half()}] * 3, [1, 1, 1])["w"]
    assert (kept.dtype, float(kept)) == (torch.half, 1.0)
