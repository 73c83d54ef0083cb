"""Facts about the networks, borrowed ones included."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from frostglass.core.batch import Domain
from frostglass.core.errors import BadInput
from frostglass.core.randomness import Rng
from frostglass.numerics.local_update import in_mode
from frostglass.vision.networks import (
    MODELS,
    Normalise,
    Normalised,
    build,
    domain_of,
    fix_for_opacus,
)
from frostglass.vision.normalise import IMAGENET_MEAN, IMAGENET_STD

RNG = Rng.from_seed(0)
SHAPE = {"classes": 10, "channels": 3, "size": 32}


def make(name: str, rng: Rng = RNG, options: dict | None = None, **shape) -> nn.Module:
    return build(name, **{**SHAPE, **shape}, options=options, rng=rng)


def refused(name: str, *words: str, options: dict | None = None, problems: int = 1, **shape) -> None:
    with pytest.raises(BadInput) as caught:
        make(name, options=options, **shape)
    assert len(caught.value.problems) == problems
    for word in words:
        assert word in str(caught.value), str(caught.value)


def layers(model: nn.Module) -> list[str]:
    return [repr(module) for module in model.modules() if not list(module.children())]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, whose modules are forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in path if p])
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


class TestEveryBuiltInNetwork:
    def test_the_list(self):
        assert MODELS.names() == [
            "imprinted", "lenet", "mlp", "resnet18", "resnet20", "resnet32", "resnet56", "small_bn_cnn"
        ]  # fmt: skip
        assert all(entry.summary for entry in MODELS)

    @pytest.mark.parametrize("name", MODELS.names())
    @pytest.mark.parametrize("shape", [(3, 32, 10), (1, 8, 2)])
    def test_gives_logits(self, name, shape):
        channels, size, classes = shape
        model = make(name, channels=channels, size=size, classes=classes)
        assert model(torch.rand(2, channels, size, size)).shape == (2, classes)
        assert model.training

    @pytest.mark.parametrize("name", [n for n in MODELS.names() if n != "imprinted"])  # its trap reads plain pixels
    def test_normalises_inside_by_its_first_submodule(self, name):
        model = make(name)
        assert isinstance(next(model.children()), Normalise)
        assert not any("normalise" in key for key in model.state_dict())
        domain = domain_of(model)
        assert (domain.low, domain.high) == (0, 1)
        assert domain.mean == ((0.0,) if name == "lenet" else IMAGENET_MEAN)

    @pytest.mark.parametrize("name", MODELS.names())
    def test_weights_follow_from_the_rng_alone(self, name):
        torch.manual_seed(1)
        first = make(name).state_dict()
        before = torch.get_rng_state()
        again = make(name).state_dict()
        assert torch.equal(torch.get_rng_state(), before), "torch's own generator must not move"
        assert all(torch.equal(first[key], again[key]) for key in first)
        other = make(name, RNG.at("other")).state_dict()
        assert any(not torch.equal(first[key], other[key]) for key in first)

    @pytest.mark.parametrize("name", MODELS.names())
    def test_can_be_differentiated_twice(self, name):
        model, x = make(name, size=8).double().eval(), torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        loss = nn.functional.cross_entropy(model(x), torch.tensor([3]))
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (twice,) = torch.autograd.grad(sum(g.square().sum() for g in gradients), x)
        assert bool(twice.isfinite().all())
        assert float(twice.abs().max()) > 0


class TestOptions:
    def test_mlp_layers(self):
        model = make("mlp", options={"hidden": [7, 5]})
        shapes = [tuple(p.shape) for p in model.parameters()]
        assert shapes == [(7, 3072), (7,), (5, 7), (5,), (10, 5), (10,)]
        linear = make("mlp", options={"hidden": []})
        assert [tuple(p.shape) for p in linear.parameters()] == [(10, 3072), (10,)]

    def test_lenet_is_the_one_of_dlg(self):
        model = make("lenet", classes=100)
        assert model.head.in_features == 768
        assert sum(isinstance(m, nn.Sigmoid) for m in model.modules()) == 3
        largest = max(float(p.detach().abs().max()) for p in model.parameters())
        assert 0.49 < largest <= 0.5
        gentle = make("lenet", options={"activation": "relu", "init_range": 0.1})
        assert max(float(p.detach().abs().max()) for p in gentle.parameters()) <= 0.1

    def test_lenet_of_any_size(self):
        assert make("lenet", size=29)(torch.rand(1, 3, 29, 29)).shape == (1, 10)

    @pytest.mark.parametrize(
        ("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("none", nn.Identity)]
    )
    def test_norms_of_the_small_network(self, norm, kind):
        model = make("small_bn_cnn", options={"norm": norm, "width": 8}, size=12)
        assert sum(isinstance(m, kind) for m in model.modules()) == (0 if norm == "none" else 4)
        assert model(torch.rand(2, 3, 12, 12)).shape == (2, 10)

    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            ("small_bn", {}, ["did you mean 'small_bn_cnn'", "package.module:factory"]),
            ("small_bn_cnn", {"widht": 3}, ["model.widht", "did you mean 'width'"]),
            ("small_bn_cnn", {"norm": "layer"}, ["'batch', 'group', 'none'"]),
            ("small_bn_cnn", {"width": 0}, ["model.width: 0"]),
            ("mlp", {"hidden": [0]}, ["model.hidden"]),
            ("mlp", {"hidden": ["a"]}, ["model.hidden"]),
            ("mlp", {"classes": 3}, ["model.classes", "leave it out"]),
            ("lenet", {"init_range": -1.0}, ["model.init_range"]),
        ],
    )
    def test_bad_options(self, name, options, words):
        refused(name, *words, options=options)

    @pytest.mark.parametrize(
        ("name", "shape", "word"),
        [
            ("small_bn_cnn", {"size": 30}, "multiple of 4"),
            ("resnet20", {"size": 2}, "at least 4"),
            ("resnet18", {"size": 4}, "at least 8"),
            ("mlp", {"classes": 1}, "model.classes"),
            ("mlp", {"channels": 0}, "model.channels"),
            ("mlp", {"size": 8.0}, "model.size"),
        ],
    )
    def test_bad_shapes(self, name, shape, word):
        refused(name, word, **shape)

    def test_resnet_has_the_published_number_of_parameters(self):
        published = {"resnet20": 269_722, "resnet32": 464_154, "resnet56": 853_018}  # 0.27, 0.46, 0.85 million
        published["resnet18"] = 11_173_962  # 11.69 million less ImageNet's classes and its wider first kernel
        assert {name: sum(p.numel() for p in make(name).parameters()) for name in published} == published


class TestNormalise:
    def test_agrees_with_its_domain_exactly_in_both_precisions(self):
        model = make("resnet20")
        for dtype in (torch.float32, torch.float64):
            x = torch.rand(2, 3, 4, 4, dtype=dtype)
            assert torch.equal(model.to(dtype).normalise(x), domain_of(model).normalise(x))

    def test_a_model_of_the_users_own(self):
        plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        assert domain_of(plain) == Domain(0.0, 1.0, (0.0,), (1.0,))
        wrapped = Normalised(plain, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
        assert domain_of(wrapped) == Domain(0.0, 1.0, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
        assert domain_of(nn.Sequential(copy.deepcopy(wrapped))) == domain_of(wrapped)
        x = torch.rand(1, 3, 2, 2)
        torch.testing.assert_close(wrapped(x), plain(domain_of(wrapped).normalise(x)))

    @pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.0,)), ((0.5, 0.5), (1.0,)), ((), ()), ((0.5,), (-1.0,))])
    def test_bad_constants(self, mean, std):
        with pytest.raises(BadInput, match="normalise: std"):
            Normalise(mean, std)


class TestOpacus:
    def test_its_fix_gives_the_group_norm_network(self):
        fixed = fix_for_opacus(make("small_bn_cnn"))
        assert layers(fixed) == layers(make("small_bn_cnn", options={"norm": "group"}))
        assert list(fixed.state_dict()) == list(make("small_bn_cnn", options={"norm": "group"}).state_dict())
        assert domain_of(fixed).mean == IMAGENET_MEAN

    def test_the_network_given_is_left_alone(self):
        model = make("resnet20").eval()
        fixed = fix_for_opacus(model)
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in fixed.modules())
        assert not fixed.training

    @pytest.mark.parametrize("affine", [False, True])
    def test_batch_norms_that_it_overlooks_are_named(self, affine):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine))
        model[1].requires_grad_(False)
        with pytest.raises(BadInput, match=r"leaves the batch norm '1' as it is; put nn\.GroupNorm"):
            fix_for_opacus(model)

    def test_layers_that_it_refuses_are_named(self, monkeypatch):
        from opacus.validators import ModuleValidator

        monkeypatch.setitem(ModuleValidator.VALIDATORS, nn.Linear, lambda module: [ValueError("no linear layers")])
        with pytest.raises(BadInput, match=r"Opacus refuses it \(no linear layers\)"):
            fix_for_opacus(nn.Sequential(nn.Linear(3, 2)))


class TestTorchvision:
    @pytest.fixture(autouse=True)
    def _installed(self):
        if importlib.util.find_spec("torchvision") is None:
            pytest.skip("needs the extra frostglass[models]")

    @pytest.mark.slow
    def test_imports_in_a_fresh_process_beside_another_build_of_torch(self):
        code = (
            "from frostglass.vision.borrowed import import_torchvision as go; tv = go(); assert go() is tv; "
            "from torchvision.models import resnet18; resnet18(num_classes=2)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def test_a_residual_network(self):
        model = make("torchvision:resnet18")
        assert isinstance(model, Normalised)
        assert model.training
        assert domain_of(model) == Domain(0.0, 1.0, IMAGENET_MEAN, IMAGENET_STD)
        assert int(model.model.bn1.num_batches_tracked) == 0
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert torch.equal(make("torchvision:resnet18").model.fc.weight, model.model.fc.weight)

    def test_a_transformer_takes_the_size_of_the_data(self):
        small = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
        refused("torchvision:vit_b_16", "num_layers", options=small)  # the constructor fixes these itself
        assert make("torchvision:vit_b_32").model.image_size == 32

    def test_networks_with_second_outputs_give_logits(self):
        model = make("torchvision:googlenet")
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)

    def test_unknown_and_impossible(self):
        refused("torchvision:resnet19", "did you mean", "resnet")
        refused("torchvision:resnet18", "model.weights", options={"weights": "DEFAULT"})
        refused("torchvision:resnet18", "3 channels, not 1", channels=1)
        refused("torchvision:resnet18", "raised TypeError", "widht", options={"widht": 3})
        refused("torchvision:inception_v3", "does not take images of 3 x 32 x 32")
        refused("torchvision:fasterrcnn_resnet50_fpn", "no classification network")


def test_torchvision_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    refused("torchvision:resnet18", "pip install 'frostglass[models]'")


class TestFactories:
    def write(self, here, body: str) -> None:
        (here / "mine.py").write_text("import torch\nfrom torch import nn\n" + body)

    def test_gets_what_it_names(self, here):
        self.write(
            here,
            "def net(classes, size, *, channels=3, width=2):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, width), nn.Linear(width, classes))\n"
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.head = nn.Linear(3 * 32 * 32, 10)\n"
            "    def forward(self, x):\n"
            "        return self.head(x.flatten(1))\n",
        )
        model = make("mine:net", options={"width": 5})
        assert model[1].out_features == 5
        assert torch.equal(model[1].weight, make("mine:net", options={"width": 5})[1].weight)
        assert make("mine:Net")(torch.rand(1, 3, 32, 32)).shape == (1, 10)
        assert domain_of(model) == Domain(0.0, 1.0, (0.0,), (1.0,))
        refused("mine:net", "model.widht", "did you mean 'width'", options={"widht": 1})
        refused("mine:nett", "did you mean 'net'")

    def test_the_trial_run_changes_nothing(self, here):
        self.write(
            here,
            "def net():\n    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10))\n"
            "    net[0].eval()\n    return net\n",
        )
        model = make("mine:net")
        assert int(model[0].num_batches_tracked) == 0
        assert (model.training, model[0].training, model[2].training) == (True, False, True)

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("def net(): return 3", ["returned int", "torch.nn.Module"]),
            ("def net(): raise RuntimeError('no luck')", ["raised RuntimeError: no luck"]),
            ("def net(depth): return nn.Identity()", ["model.depth: missing"]),
            ("def net(): return nn.Flatten()", ["(2, 3072)", "(2, 10)"]),
            ("def net(): return nn.LazyLinear(10)", ["'weight'", "has no values yet"]),
            (
                "def net(): return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))",
                ["'mine:net' is a ScriptModule", "as it was before torch.jit"],
            ),
            (
                "def net(): return nn.Sequential(nn.Flatten(), torch.jit.script(nn.Linear(3072, 10)))",
                ["layer '1' of 'mine:net' is a ScriptModule"],
            ),
            ("def net(): return nn.Linear(5, 10)", ["does not take images of 3 x 32 x 32"]),
            ("net = 3", ["is of type int"]),
            ("raise ValueError('at import')", ["does not import", "at import"]),
            ("import nowhere_at_all", ["does not import", "nowhere_at_all"]),
            ("def net(:", ["does not import", "SyntaxError"]),
        ],
    )
    def test_what_goes_wrong_is_one_sentence(self, here, body, words):
        self.write(here, body)
        refused("mine:net", *words)

    def test_another_number_of_outputs_names_the_key(self, here):
        self.write(here, "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))\n")
        refused("mine:net", "(2, 7)", "set classes = 7 under [scenario.model]", "--classes 7")

    def test_a_missing_module_and_half_a_name(self, here):
        refused("no_such_module_here:net", "does not import", str(here))
        refused("mine:", "package.module:factory")
        refused(":net", "package.module:factory")

    def test_a_file_here_does_not_hide_an_installed_package(self, here):
        (here / "json.py").write_text("raise RuntimeError('hidden')")
        sys.modules.pop("json.tool", None)
        refused("json.tool:nothing", "has no 'nothing'")


def test_modes_are_each_restored():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3))
    model[1].eval()
    with in_mode(model, "eval"):
        assert not any(module.training for module in model.modules())
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
