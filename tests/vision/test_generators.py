"""Generators: fitted, saved, loaded without options, untrained, and brought by a user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.vision import datasets
from frostglass.vision.generator_fitting import FitSettings, divergence, fit
from frostglass.vision.generators import Decoder, Untrained, from_factory, load_generator, save_generator

TINY = FitSettings(latent=8, width=4, steps=60, batch=8, lr=5e-3)


def photos(size: int = 16) -> torch.Tensor:
    return datasets.load("photos", size=size).images


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (16, 3), (28, 1), (30, 3), (32, 3), (50, 3), (64, 3)])
def test_a_decoder_draws_images_of_any_size(size: int, channels: int) -> None:
    drawn = Decoder(latent=5, channels=channels, size=size, width=4)(torch.randn(2, 5)).detach()
    assert drawn.shape == (2, channels, size, size)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 1


def test_fitting_learns_and_repeats_itself() -> None:
    seen: list[float] = []
    found = fit(photos(), TINY, Rng.from_seed(0), progress=lambda step, psnr: seen.append(psnr))
    assert len(seen) == 60
    assert sum(seen[-5:]) > sum(seen[:5]) + 5 * 2
    assert found.psnr > seen[0] + 2
    assert found.rate > 0
    assert not any(p.requires_grad for p in found.decoder.parameters())
    again = fit(photos(), TINY, Rng.from_seed(0))
    other = fit(photos(), TINY, Rng.from_seed(1))
    z = torch.zeros(1, 8)
    assert torch.equal(found.decoder(z), again.decoder(z))
    assert not torch.equal(found.decoder(z), other.decoder(z))


def test_odd_sizes_and_grey_images_can_be_fitted() -> None:
    grey = photos(30).mean(1, keepdim=True)
    found = fit(grey, FitSettings(latent=4, width=4, steps=2, batch=4), Rng.from_seed(0))
    assert found.decoder(torch.zeros(1, 4)).shape == (1, 1, 30, 30)


def test_the_divergence_is_that_of_normal_distributions() -> None:
    mean, spread = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.5]])
    p = torch.distributions.Normal(mean, (0.5 * spread).exp())
    expected = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(divergence(mean, spread), expected)


def test_a_file_says_what_is_in_it(tmp_path: Path) -> None:
    decoder = Decoder(latent=6, channels=1, size=20, width=4).eval()
    path = save_generator(decoder, tmp_path / "deep" / "g.safetensors", fitted_on="nothing")
    loaded = load_generator(path)
    z = torch.randn(2, 6)
    assert torch.equal(loaded(z), decoder(z))
    assert loaded.latent_shape == (6,)
    assert not loaded.training
    assert [p.name for p in path.parent.iterdir()] == ["g.safetensors"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is no file"),
        (b"rubbish", "damaged"),
        ("weights", "fit-generator"),
        ("nan", "not finite"),
        ("cut", "damaged"),
    ],
)
def test_other_files_are_refused(content: str | bytes | None, words: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "g.safetensors"
    decoder = Decoder(latent=6, channels=1, size=20, width=4)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "weights":
        save_file({"a": torch.zeros(2)}, path)
    elif content == "nan":
        with torch.no_grad():
            decoder.first.bias.fill_(float("nan"))
        save_generator(decoder, path)
    elif content == "cut":
        save_generator(decoder, path)
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match=words):
        load_generator(path)
    with pytest.raises(BadInput, match="must end in"):
        save_generator(decoder, tmp_path / "g.pt")


def test_wrong_settings_are_refused_together() -> None:
    with pytest.raises(BadInput) as refused:
        FitSettings(latent=0, steps=0, lr=0)
    assert len(refused.value.problems) == 3
    with pytest.raises(BadInput, match="too small"):
        Decoder(latent=4, channels=3, size=4, width=4)
    with pytest.raises(BadInput, match="square"):
        fit(torch.zeros(3, 3, 8, 10), TINY, Rng.from_seed(0))
    with pytest.raises(BadInput, match="width"):
        Untrained(channels=3, size=(8, 8), width=1)


def test_the_untrained_network_draws_one_image_for_each_noise() -> None:
    net = Untrained(channels=3, size=(10, 14), width=8)
    drawn = net(torch.randn(2, *net.latent_shape))
    assert drawn.shape == (2, 3, 10, 14)
    assert not torch.equal(drawn[0], drawn[1])


FACTORIES = """
import torch
from torch import nn

class G(nn.Module):
    latent_shape = (3,)
    def forward(self, z):
        return torch.sigmoid(z)[:, :, None, None].expand(-1, -1, 8, 8)

class Drawn(G):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

class Signed(G):
    def forward(self, z):
        return super().forward(z) * 2 - 1 - 0.5

class Flat(G):
    def forward(self, z):
        return z

def broken():
    raise OSError("no weights here")

def other():
    return nn.Linear(2, 2)

number = 3
"""


def test_a_factory_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_generators.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made = from_factory("my_generators:G")
    assert isinstance(made, nn.Module)
    assert from_factory("my_generators:G") is made  # large weights are read once
    before = torch.get_rng_state()
    drawn = [from_factory.__wrapped__("my_generators:Drawn").w for _ in range(2)]
    assert torch.equal(*drawn)  # the same plan, the same result
    assert torch.equal(before, torch.get_rng_state())
    for name, words in {
        "my_generators:Signed": r"\[0, 1\]",
        "my_generators:Flat": "images",
        "my_generators:broken": "no weights here",
        "my_generators:other": "latent_shape",
        "my_generators:number": "name a function",
        "my_generators:Nothing": "has no 'Nothing'",
        "no_such_module:G": "does not import",
    }.items():
        with pytest.raises(BadInput, match=words):
            from_factory(name)


def test_the_command_writes_a_generator_that_loads(tmp_path: Path) -> None:
    from frostglass.app.commands.fit_generator import command

    settings = ["--size", "16", "--steps", "12", "--latent", "8", "--width", "4", "--batch", "8"]
    files = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        done = CliRunner().invoke(command, ["photos", "--out", str(path), *settings], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "fewer than 20 images none was held out" in done.output
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert load_generator(tmp_path / "a.safetensors").image_shape == (3, 16, 16)
    with pytest.raises(BadInput, match="must end in"):
        CliRunner().invoke(command, ["photos", "--out", str(tmp_path / "a.pt")], catch_exceptions=False)
    (tmp_path / "folder.safetensors").mkdir()
    for out, words in (("folder.safetensors", "is a folder"), ("a.safetensors/b.safetensors", "cannot be written")):
        with pytest.raises(BadInput, match=words):  # before the fit, not after it
            CliRunner().invoke(
                command, ["photos", "--out", str(tmp_path / out), "--steps", "9999999"], catch_exceptions=False
            )


def test_a_fit_says_whether_it_judges_images_that_it_did_not_see() -> None:
    few = fit(photos(), TINY, Rng.from_seed(0))
    many = fit(photos().repeat(3, 1, 1, 1)[:20], TINY, Rng.from_seed(0))
    assert (few.held_out, many.held_out) == (0, 2)
