"""InstaHide inside federated training, end to end: recorded updates -> encodings -> private images."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import frostglass
from frostglass.app.cli import cli
from frostglass.auditing.unmixing import run_unmix
from frostglass.auditing.unmixing_plan import parse_unmix_plan
from frostglass.auditing.unmixing_record import view_of_record
from frostglass.core.errors import BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.update import LocalPlan
from frostglass.defenses.honesty import PrivacyCaution
from frostglass.defenses.instahide import InstaHide
from frostglass.federated.feeds import takes_encodings
from frostglass.federated.local_client import LocalClient
from frostglass.federated.recording import Received, Recorder
from frostglass.vision import datasets, networks

HIDDEN = (128, 32)
LABELS = torch.tensor([0, 1, 2, 0])


def photos() -> Tensor:
    return datasets.load("photos", size=16, rows=range(4)).images


def recorded(folder: Path, *, rounds: int = 24, clients: int = 1, plan: LocalPlan | None = None) -> Path:
    """Clients that train on fresh encodings, one step a round, each round from the weights of the last."""
    model = networks.build("mlp", classes=3, channels=3, size=16, options={"hidden": HIDDEN}, rng=Rng.from_seed(1))
    plan = plan or LocalPlan("delta", lr=0.05, mode="eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyCaution)
        made = [
            LocalClient(f"hospital {c}", takes_encodings(model), photos(), LABELS, 3, plan,
                        encoder=InstaHide(k=2, insecure_seed=5 + c))
            for c in range(clients)
        ]  # fmt: skip
    state = {n: t.clone() for n, t in model.state_dict().items()}
    about = {"name": "mlp", "options": {"hidden": list(HIDDEN)}, "classes": 3, "channels": 3, "size": 16}
    with Recorder(folder, engine="test", model=about, image_shape=(3, 16, 16), in_flight=rounds * clients) as record:
        for r in range(1, rounds + 1):
            record.sent(r, state)
            done = [c.train(state, r) for c in made]
            for c, d in zip(made, done, strict=True):
                record.received(Received(r, c.name, d.update.gradients, examples=d.examples, plan=plan))
            state = done[0].state
    return folder


def as_folder(folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(photos()):
        array = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_updates_give_the_private_images(tmp_path: Path) -> None:
    record, truth = recorded(tmp_path / "recorded"), as_folder(tmp_path / "truth")
    arguments = [
        "unmix",
        str(record),
        "--out",
        str(tmp_path / "run"),
        "--truth",
        str(truth),
        "--json",
        "--known",
        "k=2",
    ]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout)
    (cell,) = card["cells"]
    assert cell["attack"] == "gradient_then_unmix"
    assert cell["info"]["encodings_recovered"] == cell["info"]["encodings_proved"] >= 80
    assert cell["summary"]["ssim_median"] > 0.7
    assert card["headline"].startswith("Broken")
    assert card["encoded"]["encodings"] == 96
    report = (tmp_path / "run" / "report.html").read_text()
    assert "24 of client hospital 0" in report


class Killed(BaseException):
    """As sudden as a signal: no handler for errors may catch it."""


@pytest.mark.parametrize("step", [3, 7])  # six messages come first
def test_a_run_killed_between_two_messages_or_rounds_goes_on_behind_them(tmp_path: Path, step: int) -> None:
    plan = parse_unmix_plan({"encoded": str(recorded(tmp_path / "rec", rounds=6)), "known": {"k": 2}})
    begun: list[int] = []

    def listen(event: Event, last: int = -1) -> None:
        if event.kind == "attack_started":
            begun.append(event.step)
        if event.kind == "checkpoint" and event.step == last:
            raise Killed

    go = partial(run_unmix, plan, device=torch.device("cpu"))
    whole = go(tmp_path / "whole", emit=listen)
    with pytest.raises(Killed):
        go(tmp_path / "run", emit=partial(listen, last=step))
    again = go(tmp_path / "run", emit=listen, resume=True)
    assert begun == [0, 0, step]
    for key, images in whole.images.items():
        assert torch.equal(again.images[key], images)


def test_what_is_taken_for_granted_is_told(tmp_path: Path) -> None:
    record = str(recorded(tmp_path / "recorded", rounds=2))
    assumed = view_of_record(parse_unmix_plan({"encoded": record, "known": {"k": 2}}))[1]
    assert assumed.images == 4
    assert assumed.notes == (
        "known.images is not given: 4 private images are assumed, as many as one gradient holds.",
        "known.private is not given: 2 private images in one encoding are assumed.",
    )
    told = view_of_record(parse_unmix_plan({"encoded": record, "known": {"k": 2, "private": 2, "images": 8}}))[1]
    assert (told.images, told.notes) == (8, ())


def test_a_client_must_be_named_among_several(tmp_path: Path) -> None:
    record = recorded(tmp_path / "recorded", rounds=2, clients=2)
    with pytest.raises(BadInput, match="name one with --client"):
        frostglass.unmix(record)
    with pytest.raises(BadInput, match="'nobody' sent nothing here; known: hospital 0, hospital 1"):
        frostglass.unmix(record, client="nobody")


def test_updates_of_several_steps_are_refused_with_the_reason(tmp_path: Path) -> None:
    several = LocalPlan("delta", lr=0.05, mode="eval", epochs=2, minibatch=2)
    with pytest.raises(BadInput, match="several local steps"):
        frostglass.unmix(recorded(tmp_path / "recorded", rounds=3, plan=several))


def test_what_does_not_go_together(tmp_path: Path) -> None:
    record = recorded(tmp_path / "recorded", rounds=2)
    with pytest.raises(BadInput, match="reads encodings, not updates"):
        frostglass.unmix(record, attacks="unmix_statistical")
    with pytest.raises(BadInput, match="an encoded set names no clients"):
        frostglass.unmix(torch.zeros(4, 1, 8, 8), client="a")
