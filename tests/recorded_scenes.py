"""Records as real clients make them, in this process: a LocalClient trains, a Recorder writes it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from frostglass.core.defense import Defense
from frostglass.core.randomness import Insecure, Rng
from frostglass.core.update import LocalPlan, Update
from frostglass.defenses.channels import secure_sum
from frostglass.federated.exchange import names_of, protected
from frostglass.federated.local_client import NOTHING, LocalClient, mean_state
from frostglass.federated.recording import Received, Recorder
from frostglass.vision import datasets, networks

ONE_STEP = LocalPlan(kind="delta", mode="train", lr=0.1)


@dataclass
class Federation:
    """Clients of `each` digits that train a network for some rounds, and the record of what they sent.

    Args:
        folder: where RECORDED and TRUTH go.
        network: by name; `options` of its maker.
        plan: of every client.
        each: images of a client.
        clients: how many.
        defense: applied by every client.
        cohort: True: the server sees the clients' mean alone.
        buffers: whether clients return theirs.
    """

    folder: Path
    network: str = "small_bn_cnn"
    options: dict[str, Any] = field(default_factory=dict)
    plan: LocalPlan = ONE_STEP
    each: int = 4
    clients: int = 1
    defense: Defense = NOTHING
    cohort: bool = False
    buffers: bool = True
    source: str = "digits"
    size: int = 8
    declared: str | None = None

    def __post_init__(self) -> None:
        rows = list(range(self.each * self.clients))
        self.data = datasets.load(self.source, size=self.size, rows=rows)
        self.shape = tuple(self.data.images.shape[1:])
        self.model = networks.build(
            self.network, classes=10, channels=self.shape[0], size=self.size, options=self.options,
            rng=Rng.from_seed(1, "tests"),
        )  # fmt: skip
        self.record = self.folder / "RECORDED"

    def rows(self, client: int) -> slice:
        return slice(client * self.each, (client + 1) * self.each)

    def run(self, rounds: int = 1, spoil: dict[tuple[int, int], Any] | None = None) -> Path:
        """Trains and records; `spoil` changes the gradients of (round, client)."""
        state = self.model.state_dict()
        about = {"name": self.network, "options": self.options, "classes": 10, "channels": self.shape[0],
                 "size": self.size}  # fmt: skip
        with Recorder(self.record, engine="in process", model=about, image_shape=self.shape, in_flight=32) as recorder:
            for number in range(1, rounds + 1):
                recorder.sent(number, state)
                sent = [self.message(c, state, number) for c in range(self.clients)]
                for c, (returned, update) in enumerate(sent):
                    change = (spoil or {}).get((number, c), lambda g: g)
                    if not self.cohort:
                        recorder.received(self.received(number, f"c{c}", returned, update, change(update.gradients)))
                if self.cohort:
                    mean = secure_sum(len(sent))([u for _, u in sent])[0]
                    recorder.received(
                        Received(number, "all", mean.gradients, examples=mean.examples, clients=mean.clients,
                                 plan=self.plan)
                    )  # fmt: skip
                state = mean_state([s for s, _ in sent], [self.each] * len(sent))
        return self.record

    def message(self, client: int, state: dict[str, torch.Tensor], number: int) -> tuple[Any, Update]:
        rows = self.rows(client)
        one = LocalClient(
            f"c{client}", self.model, self.data.images[rows], self.data.labels[rows], 10, self.plan, self.defense,
            seed=client,
        )  # fmt: skip
        trained = one.train(state, number)
        return protected(
            self.model, state, trained.state, self.defense, Insecure(Rng.from_seed(client, "protect", str(number))),
            examples=self.each, plan=self.plan,
        )  # fmt: skip

    def received(self, number: int, client: str, returned: Any, update: Update, gradients: Any) -> Received:
        carried = {n: returned[n] for n in names_of(self.model).carried} if self.buffers else {}
        return Received(
            number, client, gradients, carried, examples=self.each, plan=self.plan, defence=self.declared,
        )  # fmt: skip

    def truth(self, clients: Sequence[int] | None = None) -> Path:
        """Image files by client and class."""
        for c in range(self.clients) if clients is None else clients:
            for i in range(*self.rows(c).indices(len(self.data))):
                place = self.folder / "TRUTH" / f"c{c}" / str(int(self.data.labels[i]))
                place.mkdir(parents=True, exist_ok=True)
                pixels = (self.data.images[i] * 255).round().byte()
                shown = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
                Image.fromarray(shown.numpy()).save(place / f"{i}.png")
        return self.folder / "TRUTH"


class Tiny(nn.Module):
    """A network of the user's own, without normalisation."""

    def __init__(self, classes: int = 10, hidden: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)
