"""What clients remember from round to round, though every message may find them in a new process."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Context, RecordDict

from federations import federate, plan, weights
from frostglass.defenses.accounting import epsilon_of
from frostglass.defenses.dp_instahide import PIXELS
from frostglass.federated.federation import federation_of
from frostglass.federated.flower import LocalGrid, plan_client_app
from frostglass.federated.flower.memory import keep, restore
from frostglass.federated.recorded import read_record

pytestmark = pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")

ENCODED = plan('[[defense]]\nname = "instahide"\nk = 2\npartners = "permutation"\n')


class Remembering(LocalGrid):
    made: ClassVar[list[LocalGrid]] = []

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.made.append(self)


def test_exposures_are_counted_over_rounds_and_stay_at_the_client(tmp_path) -> None:
    history = federate(ENCODED.replace("rounds = 2", "rounds = 3"), tmp_path, grid=Remembering)
    for r in (1, 2, 3):
        for client in history["rounds"][r]["clients"]:
            assert client["exposure-mean"] == client["exposure-max"] == 2 * r, "one as first image, one as partner"
    state = Remembering.made[-1].contexts[1].state
    assert int(state.array_records["frostglass.ledger"].to_torch_state_dict()["first"].sum()) == 3 * 67
    held = {name for record in state.values() for name in record}
    assert held == {"first", "partner", "epochs"}, "something else is kept: no key may be"
    for update in read_record(tmp_path / "recorded").updates:
        assert not [n for n in update.header.metrics if "first" in n or "partner" in n]


def test_max_exposure_holds_across_rounds(tmp_path) -> None:
    history = federate(ENCODED.replace("rounds = 2", "rounds = 3") + "max_exposure = 4\n", tmp_path)
    assert [len(row["clients"]) for row in history["rounds"]] == [0, 3, 3, 0]
    assert all("max_exposure" in lost["reason"] for lost in history["rounds"][3]["left_out"])


def test_keys_come_from_the_operating_system(tmp_path) -> None:
    for name in "ab":
        history = federate(ENCODED, tmp_path / name)
        assert not history["insecure"]
        assert not any(c.get("insecure") for row in history["rounds"] for c in row["clients"])
    left, right = (weights(tmp_path / name) for name in "ab")
    assert not torch.equal(left["head.weight"], right["head.weight"]), "the plan's seed made the keys"


def test_insecure_keys_repeat_but_not_from_round_to_round_or_client_to_client(tmp_path) -> None:
    text = ENCODED + "insecure_seed = 7\n"
    for name in "ab":
        history = federate(text, tmp_path / name)
        assert history["insecure"]
    left, right = (weights(tmp_path / name) for name in "ab")
    assert all(torch.equal(left[n], right[n]) for n in left)
    made, context = federation_of(text), node(0)
    seen = []
    for _ in range(2):
        client = made.client(0)
        restore(client, context)
        seen.append(next(client.encoder.epoch((client.images, client.labels), 67, 10)).images)
        keep(client, context)
    other = made.client(1)
    seen.append(next(other.encoder.epoch((made.client(0).images, made.client(0).labels), 67, 10)).images)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def node(partition: int) -> Context:
    return Context(run_id=1, node_id=1, node_config={"partition-id": partition}, state=RecordDict(), run_config={})


def test_encodings_are_used_again_in_a_new_process(tmp_path) -> None:
    text = ENCODED + "rounds = 1\nreuse = true\n"
    history = federate(text.replace("[server]\nrounds = 2", "[server]\nrounds = 3"), tmp_path, grid=Remembering)
    assert [row["clients"][0]["exposure-max"] for row in history["rounds"][1:]] == [2, 2, 2]
    made, context = federation_of(text), Remembering.made[-1].contexts[1]
    client = made.client(0)
    restore(client, context)
    (kept,) = client.encoder._kept
    batch = next(client.encoder.epoch((client.images, client.labels), 67, 10))
    rows = {tuple(x.flatten().tolist()) for x in kept.images}
    assert {tuple(x.flatten().tolist()) for x in batch.images} == rows


def test_the_epsilon_of_dp_sgd_grows_as_the_accountant_says(tmp_path) -> None:
    text = plan('[[defense]]\nname = "dp_sgd"\ndelta = 1e-3\n').replace("[model]", '[model]\nfix = "opacus"')
    history = federate(text, tmp_path)
    for r in (1, 2):
        for client in history["rounds"][r]["clients"]:
            rate, steps = 16 / client["examples"], -(-client["examples"] // 16)
            assert client["epsilon"] == pytest.approx(epsilon_of(1.0, 1e-3, r * steps, "rdp", rate))
            assert (client["unit"], client["delta"]) == ("image", 1e-3)
            assert client.get("loss") is None
    assert not history["insecure"]
    again = federate(text, tmp_path / "again")
    assert again["rounds"][1]["clients"] == history["rounds"][1]["clients"]
    left, right = weights(tmp_path), weights(tmp_path / "again")
    assert not torch.equal(left["head.weight"], right["head.weight"]), "its noise came from the plan's seed"


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_the_epsilon_of_noisy_encodings_grows_by_a_release_a_round(tmp_path, law) -> None:
    """One encoding of all images a round, whatever the steps: k means hold an image, each moved by 1 / k at most."""
    text = plan(f'[[defense]]\nname = "dp_instahide"\nk = 2\nstd = 0.5\nlaw = "{law}"\ndelta = 1e-3\n')
    history = federate(text, tmp_path, grid=Remembering)
    gauss = 0.5 / (math.sqrt(2) * math.sqrt(64) / 2)
    for r in (1, 2):
        due = epsilon_of(gauss, 1e-3, r) if law == "gaussian" else r * 64 / (0.5 / math.sqrt(2))
        for client in history["rounds"][r]["clients"]:
            assert client["epsilon"] == pytest.approx(due)
            assert client["delta"] == (1e-3 if law == "gaussian" else 0)
            assert client["unit"] == PIXELS


def test_a_client_that_lives_on_is_not_counted_twice(tmp_path) -> None:
    made = federation_of(ENCODED)
    living = {i: made.client(i) for i in range(3)}
    from frostglass.federated.flower import client_app

    app = client_app(lambda context: living[context.node_config["partition-id"]])
    history = federate(ENCODED, tmp_path, client=app)
    assert [row["clients"][0]["exposure-max"] for row in history["rounds"][1:]] == [2, 4]


def test_a_node_without_a_partition_says_so() -> None:
    from flwr.app import Message, MessageType

    from frostglass.federated.flower.local_grid import _identity

    with _identity():
        message = Message(RecordDict(), 1, MessageType.TRAIN)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        reply = plan_client_app(ENCODED)(message, context)
    assert 'start the SuperNode with --node-config "partition-id=0"' in reply.error.reason
    with _identity():
        reply = plan_client_app(ENCODED)(Message(RecordDict(), 1, MessageType.TRAIN), node(99))
    assert "99 is not one of the plan's 3 clients" in reply.error.reason
