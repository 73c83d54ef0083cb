"""What tells the images of a run from others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from frostglass.core.randomness import Rng
from frostglass.defenses.public_pool import PoolSettings, make_pool
from frostglass.federated.federation import federation_of
from frostglass.federated.held_out import digest_of_both
from frostglass.vision.byte_images import load_bytes

HELD = load_bytes("digits", size=8)


def pool(folder: Path, seed: int) -> str:
    make_pool("photos", folder, PoolSettings(size=8, crops=3, key_points=-1, channels=1), Rng.from_seed(seed))
    return str(folder)


def test_images_labels_and_public_images_all_tell(tmp_path) -> None:
    one, same, other = (pool(tmp_path / name, seed) for name, seed in (("one", 0), ("same", 0), ("other", 1)))
    turned = replace(HELD, images=HELD.images.flip(0))
    renamed = replace(HELD, labels=HELD.labels.flip(0))
    runs = [(HELD, HELD), (turned, HELD), (HELD, turned), (renamed, HELD)]
    found = [digest_of_both(*sets) for sets in runs] + [digest_of_both(HELD, HELD, [p]) for p in (one, other)]
    assert len(set(found)) == len(found)
    assert digest_of_both(HELD, HELD, [None, one]) == digest_of_both(HELD, HELD, [same])


PLAN = """
name = "pooled"
[data]
source = "digits"
[[defense]]
name = "instahide"
k = 4
private = 2
public = "{pool}"
reuse = true
"""


@pytest.mark.filterwarnings("ignore::frostglass.defenses.honesty.PrivacyCaution")
def test_a_federation_knows_its_public_pool(tmp_path) -> None:
    found = [federation_of(PLAN.format(pool=pool(tmp_path / str(s), s))).digest() for s in (0, 1)]
    assert found[0] != found[1]
