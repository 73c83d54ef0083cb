"""What a client must not forget between rounds: privacy spent, exposures, encodings that are used again.

Flower may run every message in a process of its own; what lasts is the node's `Context.state`, which stays at the
client and is never sent. Keys are not in it: an encoder draws new ones in every process.
"""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from frostglass.defenses.encoder import Encoded, encoded_domain
from frostglass.federated.local_client import LocalClient

SPENT, LEDGER, KEPT = "frostglass.spent", "frostglass.ledger", "frostglass.kept"
_FIELDS = ("sigma", "delta", "rate", "steps")


def restore(client: LocalClient, context: Context) -> None:
    """Puts a client where it stood after its last round on this node.

    Raises:
        BadInput: its encoder cannot take its images.
    """
    spent = context.state.config_records.get(SPENT)
    if spent is not None:
        columns: list[Any] = [spent[f] for f in _FIELDS]
        client.goes_on_from({(s, d, r): int(n) for s, d, r, n in zip(*columns, strict=True)})
    if client.encoder is None:
        return
    encoder = client.encoder
    if encoder.ledger is None:
        client.begin()
    held = context.state.array_records.get(LEDGER)
    if held is None or encoder.epochs:  # a client that lives on in this process knows it all
        return
    counts = held.to_torch_state_dict()
    encoder.epochs = int(counts["epochs"])
    every = torch.arange(len(client.images))
    assert encoder.ledger is not None
    partners = every.repeat_interleave(counts["partner"])[:, None]
    encoder.ledger.add(every.repeat_interleave(counts["first"]).numpy(), partners.numpy())
    kept = context.state.array_records.get(KEPT)
    if kept is not None:
        encoder._kept = _encodings(kept.to_torch_state_dict(), encoder.insecure)


def keep(client: LocalClient, context: Context) -> None:
    """Writes down where a client stands; also after a round that failed: what was encoded may have been seen."""
    steps = client.steps_spent
    if steps:
        rows = [[*map(float, setting), float(n)] for setting, n in steps.items()]
        context.state[SPENT] = ConfigRecord({f: list(c) for f, c in zip(_FIELDS, zip(*rows, strict=True), strict=True)})
    if client.encoder is None or client.encoder.ledger is None:
        return
    encoder, ledger = client.encoder, client.encoder.ledger
    context.state[LEDGER] = ArrayRecord({
        "first": ledger.first, "partner": ledger.partner, "epochs": torch.tensor(encoder.epochs),
    })  # fmt: skip
    if encoder.reuse:
        parts = enumerate(encoder._kept)
        context.state[KEPT] = ArrayRecord({
            f"{what}.{i}": value for i, p in parts for what, value in (("images", p.images), ("targets", p.targets))
        })  # fmt: skip


def _encodings(held: dict[str, Tensor], insecure: bool) -> list[Encoded]:
    count = len(held) // 2
    return [
        Encoded(held[f"images.{i}"], held[f"targets.{i}"], encoded_domain(held[f"images.{i}"].shape[1]), insecure)
        for i in range(count)
    ]
