"""The siamese network: it learns, repeats itself, and a file of another kind is refused."""

from __future__ import annotations

import math

import pytest
import torch

from encoded_scenes import crops
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.key_rows import MixLaw
from frostglass.numerics.similarity_network import Shape, SimilarityNetwork, embed, load_network, misfit, save_network
from frostglass.numerics.similarity_network_fit import FitSettings, coefficient_rows, fit, pairs, pairs_and_rows

CPU = torch.device("cpu")
TINY = FitSettings(steps=3, batch=8, width=4, features=8)


def test_coefficients_keep_the_law() -> None:
    for law in (MixLaw(6, 2), MixLaw(4, 4, law="dirichlet")):
        rows = coefficient_rows(law, 500, Rng.from_seed(1))
        assert rows.shape == (500, law.k)
        assert bool(law.accepts(rows.numpy()).all())
        assert torch.allclose(rows.sum(1), torch.ones(500), atol=1e-5)


def test_pairs_share_an_image() -> None:
    """With k = 1 both encodings are the image itself."""
    a, b = pairs(crops(8) * 2 - 1, MixLaw(1, 1, c1=1.0), 16, Rng.from_seed(2))
    assert torch.equal(a, b)
    assert bool((a >= 0).all())


def test_pairs_that_share_a_partner_are_no_pairs_of_different_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten images two encodings of four often share one; the AUC of a perfect judge is 1 all the same."""
    from frostglass.numerics import similarity_network_fit as fitted

    images, law, rng = crops(8, 10) * 2 - 1, MixLaw(4, 2), Rng.from_seed(4)
    _, _, left, right = pairs_and_rows(images, law, 40, rng)
    both = torch.cat([left, right])
    held = torch.nn.functional.one_hot(both, 10).amax(1).float()  # inner products count the images in common
    monkeypatch.setattr(fitted, "embed", lambda network, y: held[:40] if torch.equal(y, a) else held[40:])
    a = pairs(images, law, 40, rng)[0]
    assert fitted.held_out_auc(SimilarityNetwork(Shape(3, 8, 4, features=8)), images, law, rng) == 1.0
    two = crops(8, 2) * 2 - 1
    monkeypatch.undo()
    network = SimilarityNetwork(Shape(3, 8, 4, features=8))
    assert math.isnan(fitted.held_out_auc(network, two, MixLaw(6, 2), rng)), "all share something"


def test_the_mask_makes_no_difference() -> None:
    network = SimilarityNetwork(Shape(3, 8, 4, features=8)).eval()
    y = crops(8, 6) * 2 - 1
    flips = torch.where(torch.rand(y.shape) < 0.5, -1.0, 1.0)
    assert torch.allclose(embed(network, y), embed(network, y * flips), atol=1e-6)
    assert torch.allclose(embed(network, y).norm(dim=1), torch.ones(6), atol=1e-5)


def test_the_same_seed_gives_the_same_network() -> None:
    made = [fit(crops(8) * 2 - 1, MixLaw(2, 2), TINY, Rng.from_seed(5), device=CPU) for _ in range(2)]
    for a, b in zip(made[0].network.state_dict().values(), made[1].network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_it_learns_to_tell_encodings_of_one_image() -> None:
    """From 65 images and 150 small steps not well (0.5 is chance), but on images that it has never seen."""
    images = crops(16) * 2 - 1
    settings = FitSettings(steps=150, batch=32, width=8, features=32)
    losses: list[float] = []
    found = fit(
        images, MixLaw(2, 2), settings, Rng.from_seed(1), device=CPU, progress=lambda _, loss: losses.append(loss)
    )
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert found.auc > 0.57


def test_a_saved_network_comes_back(tmp_path) -> None:
    network = SimilarityNetwork(Shape(3, 8, 4, features=8)).eval()
    save_network(network, tmp_path / "n.safetensors", k="2")
    y, before = crops(8, 5), torch.get_rng_state()
    assert torch.equal(embed(network, y), embed(load_network(tmp_path / "n.safetensors"), y))
    assert torch.equal(before, torch.get_rng_state())


def test_a_network_is_written_to_the_same_bytes(tmp_path) -> None:
    """Each of several entries of metadata would stand in an arbitrary place."""
    network = SimilarityNetwork(Shape(3, 8, 4, features=8))
    for i in range(6):
        save_network(network, tmp_path / f"{i}.safetensors", k="2", private="2", steps="5", seed="0", auc="0.5")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_bad_files_and_shapes_are_refused(tmp_path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        load_network(tmp_path / "none.safetensors")
    (tmp_path / "n.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot be read"):
        load_network(tmp_path / "n.safetensors")
    with pytest.raises(BadInput, match="fitted to 3 x 8 x 8"):
        embed(SimilarityNetwork(Shape(3, 8, 4, features=8)), crops(16, 2))
    with pytest.raises(BadInput, match="at least 64"):
        fit(crops(8, 10), MixLaw(2, 2), TINY, Rng.from_seed(0), device=CPU)
    with pytest.raises(BadInput, match="batch 1"):
        FitSettings(batch=1)


def test_encodings_that_are_not_square_are_told_apart_from_those_of_another_size() -> None:
    assert misfit(Shape(3, 8), (3, 8, 8)) == ""
    assert "fit one with --size" in misfit(Shape(3, 8), (3, 16, 16))
    assert misfit(Shape(3, 8), (3, 8, 6)) == "network: it reads square encodings alone, and these are 3 x 8 x 6."
