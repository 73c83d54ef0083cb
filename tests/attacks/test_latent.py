"""Latent projection: spaces that a network draws from, in plans and from Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import frostglass
from frostglass.attacks.inversion.generated import initial_weights, latent, unflattened, untrained
from frostglass.attacks.inversion.target import lay_out
from frostglass.attacks.recipes.latent_projection import latent_projection
from frostglass.attacks.registry import ATTACKS
from frostglass.core.drive import drive
from frostglass.core.errors import BadInput
from frostglass.core.events import Event
from frostglass.core.randomness import Rng
from frostglass.core.runtime import Runtime
from frostglass.vision.generators import Decoder, Untrained, save_generator
from victims import observe

RUN = Runtime(Rng.from_seed(0, "latent"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    decoder = Decoder(latent=6, channels=3, size=16, width=4)
    return str(save_generator(decoder, tmp_path_factory.mktemp("g") / "g.safetensors"))


def test_defaults_need_no_file() -> None:
    defaults = {k: p.default for k, p in ATTACKS["latent_projection"].parameters.items()}
    assert defaults["generator"] == "untrained"
    assert defaults["matching"] == "cosine"


@pytest.mark.parametrize("which", ["untrained", "file"])
@pytest.mark.parametrize("matching", ["cosine", "l2"])
def test_the_objective_falls(which: str, matching: str, file: str) -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    events: list[Event] = []
    generator = file if which == "file" else which
    attack = latent_projection(generator=generator, matching=matching, steps=40, every=10, width=8)  # type: ignore[arg-type]
    found = drive(attack, seen, RUN, emit=events.append)
    progress = [e.values["objective"] for e in events if e.kind == "progress"]
    assert progress[-1] < progress[0]
    assert found.objective <= progress[-1] + 1e-6
    assert found.targets is not None
    assert attack.objective_of(seen, found.images, found.targets, RUN) == pytest.approx(found.objective, rel=1e-3)
    assert bool(((found.images >= 0) & (found.images <= 1)).all())


@pytest.mark.parametrize("which", ["untrained", "file"])
def test_building_a_generator_leaves_the_users_random_numbers_alone(which: str, file: str) -> None:
    before = torch.get_rng_state()
    seen, _ = observe("small_bn_cnn", width=8)
    assert torch.equal(before, torch.get_rng_state())
    drive(latent_projection(generator=file if which == "file" else which, steps=1, width=8), seen, RUN)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_a_projection_finds_what_its_generator_drew(tmp_path: Path) -> None:
    """The private image is one that the generator draws, so the projection can be exact where pixels are not."""
    from dataclasses import replace

    from frostglass.core.threat import GradientMessage
    from frostglass.numerics.local_update import local_update
    from victims import photo_batch

    torch.manual_seed(1)
    decoder = Decoder(latent=3, channels=3, size=16, width=8).eval()
    path = save_generator(decoder, tmp_path / "g.safetensors")
    seen, _ = observe("small_bn_cnn", width=8, batch=1)
    images, targets = decoder(0.8 * torch.randn(1, 3)).detach(), photo_batch(16, 1).targets
    assert seen.local_plan is not None
    trace = local_update(seen.model, images, targets, seen.local_plan)
    drawn = replace(seen, messages=(GradientMessage(trace.gradients, "gradient"),), bn_batch=None)
    found = drive(latent_projection(generator=str(path), steps=250, seeds=2), drawn, RUN)
    assert float((found.images - images).square().mean()) < 1e-4


def test_seeds_differ_in_their_weights_and_share_their_noise() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    target, space, like = lay_out(seen, RUN), untrained(width=8), torch.zeros(())
    one, two = (space.start(target, 2, Rng.from_seed(s), like) for s in (0, 1))
    assert one.shape == two.shape
    assert one.ndim == 1
    assert not torch.equal(one, two)
    drawn = space.images(one, target)
    assert drawn.shape == (2, 3, 16, 16)
    assert torch.equal(drawn, space.images(one.clone(), target))
    inside = target.denormalise(drawn)
    assert 0 <= float(inside.min()) < float(inside.max()) <= 1


def test_weights_as_a_vector_are_the_networks_own() -> None:
    net = Untrained(channels=3, size=(8, 8), width=8)
    z = initial_weights(net, Rng.from_seed(0), torch.zeros((), dtype=torch.float64))
    assert z.dtype == torch.float64
    parts = unflattened(net, z)
    assert {n: p.shape for n, p in parts.items()} == {n: p.shape for n, p in net.named_parameters()}
    assert torch.equal(torch.cat([p.flatten() for p in parts.values()]), z)
    norms = [p for n, p in parts.items() if n.endswith("1.weight")]
    assert all(bool((p == 1).all()) for p in norms)


class Small(nn.Module):
    """Draws grey squares of 4 pixels a side."""

    latent_shape = (2,)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z.sum(1))[:, None, None, None].expand(-1, 1, 4, 4)


def test_other_sizes_and_channels_are_brought_to_the_victims() -> None:
    seen, _ = observe("small_bn_cnn", width=8)
    target, space = lay_out(seen, RUN), latent(Small())
    z = space.start(target, 2, Rng.from_seed(0), torch.zeros(())).requires_grad_(True)
    drawn = space.images(z, target)
    assert drawn.shape == (2, 3, 16, 16)
    expected = torch.sigmoid(z.sum(1))[:, None, None, None].expand(2, 3, 16, 16)
    torch.testing.assert_close(target.denormalise(drawn), expected)
    assert torch.autograd.grad(drawn.sum(), z)[0].abs().min() > 0
    assert float(space.box(torch.full((2, 2), 9.0), target).max()) == 3


class Normed(nn.Module):
    """Keeps its weight of the last pass, on its graph, as `torch.nn.utils.spectral_norm` does."""

    latent_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.utils.spectral_norm(nn.Linear(2, 48))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.inner(z)).view(-1, 3, 4, 4)


def test_a_generator_that_was_used_before_is_copied_without_the_graph_of_its_last_pass() -> None:
    generator = Normed()
    generator(torch.zeros(1, 2))
    seen, _ = observe("small_bn_cnn", width=8)
    target, space = lay_out(seen, RUN), latent(generator)
    assert space.images(torch.zeros(2, 2), target).shape == (2, 3, 16, 16)


def test_a_users_generator_runs_and_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import torch\nfrom frostglass.vision.generators import Decoder\n"
    source += "def make():\n    torch.manual_seed(0)\n    return Decoder(latent=4, channels=3, size=16, width=4)\n"
    (tmp_path / "brought.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    seen, _ = observe("small_bn_cnn", width=8)
    found = drive(latent_projection(generator="brought:make", steps=3, every=1), seen, RUN)
    assert found.images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("generator", ["", "nothing", "a:", ":b"])
def test_other_words_are_refused(generator: str) -> None:
    with pytest.raises(BadInput, match=r"attack\.generator"):
        latent_projection(generator=generator)


def test_a_plan_names_its_generator_from_its_own_folder(tmp_path: Path, file: str) -> None:
    from frostglass.auditing.plan import load_plan

    (tmp_path / "g.safetensors").write_bytes(Path(file).read_bytes())
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[[scenario]]\ndata = { size = 16 }\nmodel = { name = "small_bn_cnn", options = { width = 4 } }\n'
        'client = { batch = 1 }\n[[scenario.attack]]\nname = "latent_projection"\ngenerator = "g.safetensors"\n'
        'steps = 5\nevery = 5\n[[scenario.attack]]\nname = "latent_projection"\nsteps = 5\nevery = 5\nwidth = 8\n'
        '[threat]\ngrants = ["examples"]\n'
    )
    report = frostglass.audit(load_plan(plan), out=tmp_path / "run", device="cpu")
    assert [cell.status for cell in report.cells] == ["done", "done"]
    with pytest.raises(BadInput, match="fit-generator"):
        load_plan(plan, ["scenario.attack.generator=none.safetensors"])
