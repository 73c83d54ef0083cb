"""Mods: updates protected on their way out, recorded at the client, and stopped at the gate."""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("flwr")

from federations import federate, plan, weights
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Insecure
from frostglass.defenses.accounting import epsilon_of
from frostglass.defenses.clip_and_noise import clip_and_noise
from frostglass.defenses.dp_sgd import dp_sgd
from frostglass.defenses.noise import noise
from frostglass.defenses.pruning import pruning
from frostglass.defenses.registry import DEFENSES
from frostglass.federated.exchange import misfits, protected
from frostglass.federated.federation import federation_of
from frostglass.federated.flower import audit_mod, client_app, gate_mod, plan_client_app, protect_mod
from frostglass.federated.gate import Decision, Finding, Gate, Outgoing
from frostglass.federated.local_client import mean_state
from frostglass.federated.recorded import read_record
from frostglass.federated.recording import Recorder

ONE = plan(rounds="1")
PRUNED = ONE + '[[defense]]\nname = "pruning"\nfraction = 0.9\n'


def entries(update) -> torch.Tensor:
    return torch.cat([g.flatten() for g in update.payload()[0].values()])


def test_the_plans_defence_acts_on_what_is_sent(tmp_path) -> None:
    federate(PRUNED, tmp_path)
    made = federation_of(PRUNED)
    start, plain = made.model.state_dict(), federation_of(ONE)
    states, sizes = [], []
    for i, update in enumerate(read_record(tmp_path / "recorded").updates):
        assert float((entries(update) == 0).float().mean()) == pytest.approx(0.9, abs=0.02)
        assert update.header.defence == "pruning"
        done = plain.client(i).train(start, 1)
        want, _ = protected(
            made.model, start, done.state, pruning(fraction=0.9), Insecure(0), examples=done.examples,
            plan=made.plan.client.local_plan(),
        )  # fmt: skip
        states.append(want)
        sizes.append(done.examples)
    for name, value in mean_state(states, sizes).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, rtol=1e-5, atol=1e-6)


def test_a_users_app_with_protect_mod_is_the_same(tmp_path) -> None:
    made = federation_of(ONE)
    mod = protect_mod(pruning(fraction=0.9), made.model, made.plan.client.local_plan())
    app = client_app(lambda context: made.client(context.node_config["partition-id"]), mods=[mod])
    federate(ONE, tmp_path / "user", client=app)
    federate(PRUNED, tmp_path / "plan")
    left, right = weights(tmp_path / "user"), weights(tmp_path / "plan")
    assert all(torch.equal(left[n], right[n]) for n in left)


def test_a_mod_never_sees_the_images() -> None:
    made = federation_of(ONE)
    with pytest.raises(BadInput, match="works on images, which a mod never sees"):
        protect_mod(dp_sgd(), made.model, made.plan.client.local_plan())


def test_noise_on_updates_is_secret_unless_the_plan_is_insecure(tmp_path) -> None:
    noisy = ONE + '[[defense]]\nname = "noise"\nstd = 0.01\n'
    histories = [federate(noisy, tmp_path / name) for name in "ab"]
    left, right = (weights(tmp_path / name) for name in "ab")
    assert not torch.equal(left["head.weight"], right["head.weight"]), "noise came from the plan's seed"
    assert not histories[0]["insecure"]
    seeded = [federate("insecure_seed = 3\n" + noisy, tmp_path / name) for name in "cd"]
    left, right = (weights(tmp_path / name) for name in "cd")
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert seeded[0]["insecure"]


def test_epsilon_of_noised_updates_composes_over_rounds(tmp_path) -> None:
    text = 'buffers = "keep"\n' + plan(
        '[[defense]]\nname = "clip_and_noise"\nclipping_norm = 1.0\nnoise_multiplier = 2.0\ndelta = 1e-3\n'
    )
    history = federate(text, tmp_path)
    for r in (1, 2):
        for client in history["rounds"][r]["clients"]:
            assert client["epsilon"] == pytest.approx(epsilon_of(1.0, 1e-3, r))
            assert (client["unit"], client["delta"]) == ("update", 1e-3)
            assert client.get("loss") is None, "a loss that nobody noised was sent"


def test_stacks_act_in_order(tmp_path) -> None:
    text = ONE + '[[defense]]\nname = "clip_and_noise"\nnoise_multiplier = 0.0\nclipping_norm = 0.01\n'
    text += '[[defense]]\nname = "pruning"\nfraction = 0.5\n'
    federate(text, tmp_path)
    for update in read_record(tmp_path / "recorded").updates:
        assert float(entries(update).norm()) <= 0.0101
        assert float((entries(update) == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_states_of_another_network_are_refused_in_words(tmp_path) -> None:
    wrong = federation_of(ONE.replace("width = 8", "width = 4"))
    mod = protect_mod(noise(), wrong.model, wrong.plan.client.local_plan())
    with_mod = plan_client_app(ONE, mods=[mod])
    row = federate(ONE, tmp_path, client=with_mod)["rounds"][1]
    assert len(row["left_out"]) == 3
    assert "do not fit the network" in row["left_out"][0]["reason"]
    assert misfits(federation_of(ONE).model.state_dict(), wrong.model)


@pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")
@pytest.mark.parametrize("name", DEFENSES.names())
def test_every_defence_can_be_carried(name, tmp_path) -> None:
    text = 'buffers = "keep"\n' + ONE.replace("[model]", '[model]\nfix = "opacus"')
    history = federate(f'{text}[[defense]]\nname = "{name}"\n', tmp_path)
    row = history["rounds"][1]
    assert len(row["clients"]) == 3, row["left_out"]
    assert not torch.equal(weights(tmp_path)["head.weight"], federation_of(text).model.state_dict()["head.weight"])
    proved = "epsilon" in row["clients"][0]
    assert proved is (name in ("dp_sgd", "clip_and_noise", "dp_instahide"))


# ---- at the client


def test_the_client_records_what_leaves(tmp_path) -> None:
    made = federation_of(PRUNED)
    with Recorder(tmp_path / "client", engine="flower", note="seen by the clients") as recorder:
        tap = audit_mod(recorder, made.model, made.plan.client.local_plan(), defence="pruning")
        federate(PRUNED, tmp_path / "run", mods=[tap])
    own, seen = read_record(tmp_path / "client"), read_record(tmp_path / "run" / "recorded")
    assert len(own.updates) == len(seen.updates) == 3
    for left, right in zip(own.updates, seen.updates, strict=True):
        assert left.header.client == right.header.client
        assert left.header.sha256 == right.header.sha256
        assert left.header.sent_sha256 == right.header.sent_sha256


def test_a_broken_client_side_recorder_stops_nothing(tmp_path, caplog) -> None:
    def none(context):
        raise OSError("no disk")

    with caplog.at_level(logging.WARNING):
        history = federate(ONE, tmp_path, mods=[audit_mod(none, federation_of(ONE).model)])
    assert len(history["rounds"][1]["clients"]) == 3
    assert "no disk" in caplog.text


def test_what_the_gate_blocks_does_not_leave(tmp_path) -> None:
    made, asked = federation_of(PRUNED), []

    def decide(out: Outgoing) -> Decision:
        asked.append(out)
        leaks = out.client == "1"
        return Decision((Finding("labels", leaks, 1.0, 0.5, "All labels can be read off."),), 0.0)

    gate = Gate(decide)
    mod = gate_mod(
        gate, made.model, made.plan.client.local_plan(), lambda c: made.private(c.node_config["partition-id"]),
        defence=made.outside,
    )  # fmt: skip
    row = federate(PRUNED, tmp_path, mods=[mod])["rounds"][1]
    assert [c["client"] for c in row["clients"]] == ["0", "2"]
    assert row["left_out"] == [
        {"client": "1", "examples": None, "reason": "blocked by the client's gate: All labels can be read off."}
    ]
    assert [o.client for o in asked] == ["0", "1", "2"]
    out = asked[1]
    assert torch.equal(out.private.images, made.private(1).images)
    zeros = torch.cat([g.flatten() for g in out.update.gradients.values()]) == 0
    assert float(zeros.float().mean()) == pytest.approx(0.9, abs=0.02), "the gate saw it before the defence"
    assert (out.round, out.defence.name, out.update.bn) == (1, "pruning", {})
    assert [u.header.client for u in read_record(tmp_path / "recorded").updates if u.header.file] == ["0", "2"]


def test_the_gate_sees_the_statistics_of_a_single_step(tmp_path) -> None:
    text = ONE.replace("minibatch = 16", "whole_batch = true")
    made, seen = federation_of(text), []

    def decide(out: Outgoing) -> Decision:
        seen.append(out.update.bn)
        return Decision((), 0.0)

    mod = gate_mod(
        Gate(decide), made.model, made.plan.client.local_plan(), lambda c: made.private(c.node_config["partition-id"])
    )
    federate(text, tmp_path / "send", mods=[mod])
    assert {*seen[0]} == {"body.1", "body.4", "body.7", "body.10"}
    want = made.client(0).train(made.model.state_dict(), 1).update.bn
    torch.testing.assert_close(seen[0]["body.1"].mean, want["body.1"].mean, rtol=1e-4, atol=1e-5)
    seen.clear()
    federate('buffers = "keep"\n' + text, tmp_path / "keep", mods=[mod])
    assert seen[0] == {}


def test_clipping_is_a_mods_work() -> None:
    made = federation_of(ONE)
    assert protect_mod(clip_and_noise(), made.model, made.plan.client.local_plan())
