"""What became of a federation, round by round: history.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frostglass.core.files import write_json
from frostglass.core.printable import plain
from frostglass.defenses.dp_instahide import PIXELS
from frostglass.federated.federation import Federation
from frostglass.federated.global_accuracy import Accuracy

HISTORY = "history.json"

UNITS = {"image": "per image", "update": "per update", PIXELS: "for the pixels of an image"}
"""What an epsilon is about, and how that is said behind it."""


class History:
    """Grows by a row a round; the file is whole after each.

    Args:
        folder: where it lies.
        made: the federation.
        engine: what it ran on.
        before: what an interrupted run had in it, to go on with.
    """

    def __init__(self, folder: Path, made: Federation, engine: str, before: dict[str, Any] | None = None) -> None:
        self.path = folder / HISTORY
        plan = made.plan
        self.value: dict[str, Any] = before or {
            "name": plan.name, "engine": engine, "defence": plan.called, "seed": plan.seed,
            "insecure": made.insecure(), "clients": len(made.rows),
            "examples": [len(rows) for rows in made.rows], "test_images": len(made.test), "buffers": plan.buffers,
            "rounds": [], "notes": [],
        }  # fmt: skip

    def add(self, round: int, accuracy: Accuracy, clients: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
        """A round, 0 for the network before the first; returns its row."""
        used = [c for c in clients if not c.get("reason")]
        losses = [(c["loss"], c["examples"]) for c in used if c.get("loss") is not None]
        total = sum(n for _, n in losses)
        row = {
            "round": round, "accuracy": accuracy.plain, "accuracy_encoded": accuracy.encoded,
            "loss": sum(x * (n / total) for x, n in losses) if total else None,
            "seconds": round_to(seconds), "clients": used, "left_out": [c for c in clients if c.get("reason")],
        }  # fmt: skip
        if round and not used:
            self.value["notes"].append(f"Round {round}: no update could be used; the weights stayed as they were.")
        self.value["rounds"].append(row)
        self.save()
        return row

    def note(self, text: str) -> None:
        """A sentence for whoever reads it."""
        self.value["notes"].append(text)

    def save(self) -> None:
        """To the file."""
        write_json(self.path, self.value)


def round_to(seconds: float) -> float:
    """Two places."""
    return float(f"{seconds:.2f}")


def line(row: dict[str, Any], rounds: int) -> str:
    """A round for the terminal."""
    n = row["round"]
    encoded = row["accuracy_encoded"]
    words = [f"accuracy {row['accuracy']:.4f}" + ("" if encoded is None else f" plain, {encoded:.4f} encoded")]
    if not n:
        return f"start: {words[0]}"
    if row["loss"] is not None:
        words.append(f"loss {row['loss']:.4f}")
    spent = [c for c in row["clients"] if c.get("epsilon") is not None]
    if spent:
        worst = max(spent, key=lambda c: float(c["epsilon"]))
        words.append(f"epsilon up to {worst['epsilon']:.2f} {UNITS[worst['unit']]}")
    exposures = [c["exposure-max"] for c in row["clients"] if c.get("exposure-max") is not None]
    if exposures:
        words.append(f"images in up to {max(exposures)} encodings")
    words.append(f"{len(row['clients'])} clients")
    # clients give the reasons, and are not trusted
    lost = "".join(f"\n  left out: client {plain(c['client'])}: {plain(c['reason'])}" for c in row["left_out"])
    if not row["clients"]:
        lost += "\n  no update could be used: the weights stay as they are"
    return f"round {n}/{rounds}: {', '.join(words)}{lost}"
