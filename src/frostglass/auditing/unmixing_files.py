"""What a run of `frostglass unmix` leaves in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from frostglass.auditing.score import Scored
from frostglass.auditing.store import save_tensors
from frostglass.auditing.unmixing_card import UnmixScorecard
from frostglass.auditing.unmixing_challenge import DECRYPTION
from frostglass.auditing.unmixing_inputs import EncodedSet
from frostglass.auditing.unmixing_plan import UnmixPlan
from frostglass.auditing.unmixing_report import write_unmix_report
from frostglass.core.files import write_json, written_beside
from frostglass.numerics.unmixing_similarity import similarity

SHOWN = 32
"""Images of an attack that go into the report."""
MOST_FILES = 1000
"""Images written as PNG for one attack; the tensor file holds all."""


def pictures_of(key: str, images: Tensor, scored: Scored | None) -> dict[str, Tensor]:
    """What the report shows of one attack: recovered images, in the order of the private ones where those are given."""
    if scored is None:
        return {f"{key}/reconstruction": images[:SHOWN].float().clone()} if len(images) else {}
    assert scored.truth is not None
    private = scored.truth.private.images[:SHOWN]
    rows = torch.full((len(private), *private.shape[1:]), float("nan"))
    for i, j in enumerate(scored.order[: len(private)].tolist()):
        if 0 <= j < len(images):
            rows[i] = images[j]
    return {f"{key}/private": private.float().clone(), f"{key}/reconstruction": rows}


def write_all(
    plan: UnmixPlan,
    out: Path,
    encoded: EncodedSet,
    card: UnmixScorecard,
    found: Mapping[str, Tensor],
    shown: dict[str, Tensor],
) -> None:
    """Tensors, pictures, a challenge's submission, scorecard and report; each file whole or absent."""
    save_tensors(out / "reconstruction.safetensors", dict(found))
    if plan.report.show_images:
        save_tensors(out / "pictures.safetensors", shown)
        for key, images in found.items():
            _write_pngs(out / "recovered" / key, images[:MOST_FILES])
    for key, images in found.items():
        with written_beside(out / "recovered" / f"{key}.npy") as beside, beside.open("wb") as held:
            np.save(held, images.permute(0, 2, 3, 1).contiguous().numpy(), allow_pickle=False)
    best = _submitted(card, found)
    if best is not None and len(encoded.images) and not card.encoded["manifest"]:
        rows = decryption(encoded.images, best)
        with written_beside(out / DECRYPTION) as beside, beside.open("wb") as held:
            np.save(held, rows.permute(0, 2, 3, 1).contiguous().numpy(), allow_pickle=False)
    write_json(out / "scorecard.json", card.model_dump(mode="json"))
    write_unmix_report(out)


def _submitted(card: UnmixScorecard, found: Mapping[str, Tensor]) -> Tensor | None:
    """Images of the attack that a submission would rest on: with the keys, else the unmixing; chosen without truth."""
    for name in ("prng_attack", "unmix_learned", "unmix_statistical"):
        for cell in card.cells:
            if cell.attack == name and len(found.get(cell.id, ())):
                return found[cell.id]
    return None


def decryption(encodings: Tensor, images: Tensor) -> Tensor:
    """[E, c, h, w] in [0, 1]: for each encoding the recovered image that it looks most like, as a challenge asks."""
    parts = encodings.tensor_split(-(-len(encodings) // 2048))  # even ones: each is centred at its own mean
    rows = [similarity(part, images).argmax(1) for part in parts]
    return images[torch.cat(rows)]


def _write_pngs(folder: Path, images: Tensor) -> None:
    for i, image in enumerate(images):
        pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
        array = pixels[0].numpy() if len(pixels) == 1 else pixels[:3].permute(1, 2, 0).contiguous().numpy()
        with written_beside(folder / f"{i:04d}.png") as beside:
            Image.fromarray(array).save(beside, "PNG")
